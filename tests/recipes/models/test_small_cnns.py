"""The five Tiny-ImageNet networks: parameters, inputs, and independence from duoka."""

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
def test_each_network_has_the_number_of_parameters_of_the_guide(name):
    assert sum(parameter.numel() for parameter in small_cnns.build(name, 200, 64).parameters()) == COUNTS[name]
    assert list(small_cnns.MODELS) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_each_network_takes_cifar_images_and_trains_all_parameters(name):
    model = small_cnns.build(name, 10, 32)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_squeeze_excite_scales_channels_by_factors_from_0_to_1():
    features = torch.rand(2, 32, 4, 4) + 0.1
    scales = small_cnns.SqueezeExcite(32)(features) / features
    assert ((scales > 0) & (scales < 1)).all()
    assert torch.allclose(scales, scales[:, :, :1, :1].expand_as(scales), atol=1e-5)


@pytest.mark.parametrize(("name", "size", "message"), [("resnet", 64, "baseline"), ("best", 60, "multiple of 8")])
def test_unknown_names_and_sizes_are_rejected(name, size, message):
    with pytest.raises(ValueError, match=message):
        small_cnns.build(name, 10, size)


def test_the_file_does_not_import_duoka(tmp_path):
    (tmp_path / "model.py").write_text(Path(small_cnns.__file__).read_text())
    code = "import sys, model; model.build('residual', 3); sys.exit('duoka' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0
