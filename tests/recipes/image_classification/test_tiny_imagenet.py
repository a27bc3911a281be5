"""``duoka train tiny-imagenet`` on the real subset: its options, its results, and weights that plain torch loads."""

import json
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from duoka.cli.main import main
from duoka.errors import ConfigError
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.recipes.image_classification.config import TinyImageNetConfig
from duoka.recipes.image_classification.label_metrics import LabelWeightedAccuracy
from duoka.recipes.image_classification.presets import TINY_IMAGENET
from duoka.recipes.image_classification.results import DatasetMetadata
from duoka.recipes.models import small_cnns
from support.paths import TINY_IMAGENET as TINY_IMAGENET_SUBSET
from support.paths import needs_file

needs_data = needs_file(TINY_IMAGENET_SUBSET)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with tarfile.open(TINY_IMAGENET_SUBSET) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Path:
    """A finished run of two epochs on two devices: 16x16 pixels, 16 images per class."""
    out = tmp_path_factory.mktemp("out")
    options = ["--image_size", "16", "--limit", "16", "--epochs", "2", "--device", "cpu:2", "--augmentation", "mixup"]
    words = ["train", "tiny-imagenet", "--model", "residual", "--root", str(root), *options, "--out", str(out)]
    assert main(words) == 0
    (folder,) = (out / "tiny-imagenet").iterdir()
    return folder


@needs_data
def test_three_lines_of_plain_torch_load_the_weights_without_duoka(run, tmp_path):
    lines = (run / "load.txt").read_text()
    assert len(lines.splitlines()) == 3
    before, after = (
        "import sys, torch; sys.modules['duoka'] = None",
        "torch.save(model.eval()(torch.ones(2, 3, 16, 16)), 'out')",
    )
    code = f"{before}\n{lines}\n{after}"
    subprocess.run([sys.executable, "-c", code], cwd=run, check=True)
    model, _ = TINY_IMAGENET.load_finished_run(RecipeRun.at(run), TinyImageNetConfig(model="residual"))
    assert torch.equal(torch.load(run / "out"), model.eval()(torch.ones(2, 3, 16, 16)))


@needs_data
def test_a_run_writes_its_results(run, capsys):
    results = json.loads((run / "results.json").read_text())
    assert results["parameters"] == sum(
        parameter.numel() for parameter in small_cnns.build("residual", 10).parameters()
    )
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < epoch["train_accuracy"] < 1 for epoch in history), "mixed labels count by their shares"
    assert results["test_accuracy"] == pytest.approx(history[-1]["val_accuracy"])
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["test_accuracy"] == results["test_accuracy"]
    following = capsys.readouterr().out.splitlines()[-1]
    assert main(shlex.split(following)[2:]) == 0


@needs_data
def test_evaluation_has_no_augmentation(root):
    config = TinyImageNetConfig(root=str(root), image_size=16, limit=4)
    images = TINY_IMAGENET.load(config)
    metadata = DatasetMetadata.of(images)
    test = TINY_IMAGENET.test_loader(config, images, metadata)
    assert sum(transform.num_random for transform in test.transforms) == 0
    assert test.mix is None
    assert not test.shuffle
    mean = torch.tensor(metadata.statistics.mean).view(3, 1, 1)
    std = torch.tensor(metadata.statistics.std).view(3, 1, 1)
    assert torch.allclose(next(iter(test))[0], (images.test.pixels / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("options", "chosen"), [
    ({}, {"scheduler": "none", "weight_decay": 0.0, "lr": 3e-4, "batch_size": 64, "image_size": 64}),
    ({"model": "best"}, {"weight_decay": 1e-6, "scheduler": "none", "optimizer": "adam"}),
    ({"optimizer": "adamw"}, {"scheduler": "cosine", "weight_decay": 0.01}),
    ({"optimizer": "rmsprop"}, {"scheduler": "cosine", "weight_decay": 0.0}),
    ({"dataset": "cifar10"}, {"image_size": 32, "name": "baseline-basic-adam"}),
])  # fmt: skip
def test_options_left_open_become_the_guides_values(options, chosen):
    resolved = TinyImageNetConfig(**options).resolved()
    assert {name: getattr(resolved, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    "options", [{"image_size": 60}, {"dataset": "cifar10", "image_size": 64}, {"lr": 0.0}, {"limit": 0}]
)
def test_values_that_are_not_valid_raise_an_error(options):
    with pytest.raises(ConfigError, match=next(reversed(options))):
        TinyImageNetConfig(**options)


@pytest.mark.parametrize(("augmentation", "optimizer", "num_workers"), [
    ("none", "adam", 0), ("basic", "adamw", 0), ("cutmix", "rmsprop", 0), ("mixup", "adam", 1),
])  # fmt: skip
def test_every_augmentation_and_optimizer_also_trains_on_cifar(
    augmentation, optimizer, num_workers, monkeypatch, tmp_path
):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.arange(16) % 2)
    monkeypatch.setattr(
        "duoka.recipes.datasets.cifar.load", lambda *_, **__: ImageSet("cifar10", ("a", "b"), images, images)
    )
    options = {"augmentation": augmentation, "optimizer": optimizer, "num_workers": num_workers, "out": str(tmp_path)}
    config = {"dataset": "cifar10", "model": "residual", "device": "cpu", "limit": 4, "epochs": 1, "batch_size": 8}
    outcome = TINY_IMAGENET.train(TinyImageNetConfig(**config, **options))
    assert outcome.results["test_loss"] > 0


@pytest.mark.parametrize("augmentation", ["none", "basic", "cutmix"])
def test_dataloader_workers_make_the_same_batches_as_the_device(augmentation):
    pixels = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    pixels[:, 0] += torch.arange(64, dtype=torch.uint8)[:, None, None]
    images = Images(pixels, torch.arange(64) % 4)
    images = ImageSet("some", ("a", "b", "c", "d"), images, images)
    kept, worked = (
        next(iter(TINY_IMAGENET.train_loader(config, images, DatasetMetadata.of(images))))
        for config in (TinyImageNetConfig(augmentation=augmentation, num_workers=workers) for workers in (0, 1))
    )
    assert [part.shape for part in kept] == [part.shape for part in worked]
    assert [part.dtype for part in kept] == [part.dtype for part in worked]
    assert torch.allclose(kept[0].mean(dim=(0, 2, 3)), worked[0].mean(dim=(0, 2, 3)), atol=0.25)
    assert torch.allclose(kept[1].float().mean(0), worked[1].float().mean(0))
    if augmentation == "none":
        first, second = (batch[0][batch[0][:, 0, 0, 0].argsort()] for batch in (kept, worked))
        assert torch.allclose(first, second, atol=1e-4), "the same images, in another order"


def test_a_mixed_label_counts_by_its_shares():
    measure = LabelWeightedAccuracy()
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    measure.update(logits, torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0]]))
    assert measure.compute() == pytest.approx(0.35)
    measure.update(logits, torch.tensor([0, 0]))
    assert measure.compute() == pytest.approx((0.7 + 1) / 4)
