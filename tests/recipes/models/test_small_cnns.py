"""The five networks of the Tiny-ImageNet suite: their sizes, what they take, and that torch alone builds them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duoka.recipes.models import small_cnns

COUNTS = {
    "baseline": 13_590_472,
    "residual": 9_910_600,
    "deeper_wider": 19_449_416,
    "se_attention": 13_677_768,
    "best": 20_137_928,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_network_has_the_parameters_of_the_guide(name):
    assert sum(parameter.numel() for parameter in small_cnns.build(name, 200, 64).parameters()) == COUNTS[name]
    assert list(small_cnns.MODELS) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_every_network_also_takes_the_images_of_cifar_and_passes_gradients_to_all_parameters(name):
    model = small_cnns.build(name, 10, 32)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_squeeze_and_excitation_weighs_whole_channels_between_none_and_all():
    features = torch.rand(2, 32, 4, 4) + 0.1
    weights = small_cnns.SqueezeExcite(32)(features) / features
    assert ((weights > 0) & (weights < 1)).all()
    assert torch.allclose(weights, weights[:, :, :1, :1].expand_as(weights), atol=1e-5)


@pytest.mark.parametrize(("name", "size", "message"), [("resnet", 64, "baseline"), ("best", 60, "multiple of 8")])
def test_a_network_that_is_not_there_is_refused_with_what_is(name, size, message):
    with pytest.raises(ValueError, match=message):
        small_cnns.build(name, 10, size)


def test_the_file_needs_torch_and_nothing_of_duoka(tmp_path):
    (tmp_path / "model.py").write_text(Path(small_cnns.__file__).read_text())
    code = "import sys, model; model.build('residual', 3); sys.exit('duoka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
