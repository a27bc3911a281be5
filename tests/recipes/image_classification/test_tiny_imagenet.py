"""``duoka train tiny-imagenet`` on the real subset, small: its options, its results, and weights that torch alone loads."""

import json
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from duoka.cli.main import main
from duoka.errors import ConfigError
from duoka.recipes.common.label_metrics import LabelWeightedAccuracy
from duoka.recipes.common.recipe_run import RecipeRun
from duoka.recipes.datasets.images import Images, ImageSet
from duoka.recipes.image_classification import common, tiny_imagenet
from duoka.recipes.image_classification.config import TinyImageNetConfig
from duoka.recipes.models import small_cnns

REAL = Path(__file__).parents[4] / "shared" / "data" / "tiny-imagenet-10.tar"
needs_data = pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/tiny-imagenet-10.tar")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    with tarfile.open(REAL) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def run(root, tmp_path_factory) -> Path:
    """A finished run of two epochs on two devices: 16x16 pixels, 16 images a class."""
    out = tmp_path_factory.mktemp("out")
    options = ["--image_size", "16", "--limit", "16", "--epochs", "2", "--device", "cpu:2", "--augmentation", "mixup"]
    words = ["train", "tiny-imagenet", "--model", "residual", "--root", str(root), *options, "--out", str(out)]
    assert main(words) == 0
    (folder,) = (out / "tiny-imagenet").iterdir()
    return folder


@needs_data
def test_weights_load_into_a_plain_torch_model_in_three_lines_without_duoka(run, tmp_path):
    lines = (run / "load.txt").read_text()
    assert len(lines.splitlines()) == 3
    before, after = (
        "import sys, torch; sys.modules['duoka'] = None",
        "torch.save(model.eval()(torch.ones(2, 3, 16, 16)), 'out')",
    )
    code = f"{before}\n{lines}\n{after}"
    subprocess.run([sys.executable, "-c", code], cwd=run, check=True)
    model, _ = tiny_imagenet._finished(RecipeRun.at(run), TinyImageNetConfig(model="residual"))
    assert torch.equal(torch.load(run / "out"), model.eval()(torch.ones(2, 3, 16, 16)))


@needs_data
def test_the_run_says_what_it_came_to(run, capsys):
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
def test_evaluation_sees_no_random_change(root):
    images = tiny_imagenet.load(TinyImageNetConfig(root=str(root), image_size=16, limit=4))
    facts = common.facts_of(images)
    test = common.test_loader(images, facts, 64)
    assert sum(transform.num_random for transform in test.transforms) == 0
    assert test.mix is None
    assert not test.shuffle
    mean = torch.tensor(facts.statistics.mean).view(3, 1, 1)
    std = torch.tensor(facts.statistics.std).view(3, 1, 1)
    assert torch.allclose(next(iter(test))[0], (images.test.pixels / 255 - mean) / std, atol=1e-5)


@pytest.mark.parametrize(("options", "chosen"), [
    ({}, {"scheduler": "none", "weight_decay": 0.0, "lr": 3e-4, "batch_size": 64, "image_size": 64}),
    ({"model": "best"}, {"weight_decay": 1e-6, "scheduler": "none", "optimizer": "adam"}),
    ({"optimizer": "adamw"}, {"scheduler": "cosine", "weight_decay": 0.01}),
    ({"optimizer": "rmsprop"}, {"scheduler": "cosine", "weight_decay": 0.0}),
    ({"dataset": "cifar10"}, {"image_size": 32, "name": "baseline-basic-adam"}),
])  # fmt: skip
def test_open_options_become_the_guides(options, chosen):
    resolved = TinyImageNetConfig(**options).resolved()
    assert {name: getattr(resolved, name) for name in chosen} == chosen


@pytest.mark.parametrize(
    "options", [{"image_size": 60}, {"dataset": "cifar10", "image_size": 64}, {"lr": 0.0}, {"limit": 0}]
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match=next(reversed(options))):
        TinyImageNetConfig(**options)


@pytest.mark.parametrize(("augmentation", "optimizer", "workers"), [
    ("none", "adam", 0), ("basic", "adamw", 0), ("cutmix", "rmsprop", 0), ("mixup", "adam", 1),
])  # fmt: skip
def test_every_augmentation_and_optimiser_trains_on_cifar_too(augmentation, optimizer, workers, monkeypatch, tmp_path):
    pixels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    images = Images(pixels, torch.arange(16) % 2)
    monkeypatch.setattr(tiny_imagenet.cifar, "load", lambda *_, **__: ImageSet("cifar10", ("a", "b"), images, images))
    options = {
        "augmentation": augmentation,
        "optimizer": optimizer,
        "epochs": 1,
        "batch_size": 8,
        "num_workers": workers,
    }
    options["out"] = str(tmp_path)
    outcome = tiny_imagenet.train(
        TinyImageNetConfig(dataset="cifar10", model="residual", device="cpu", limit=4, **options)
    )
    assert outcome.results["test_loss"] > 0


@pytest.mark.parametrize("augmentation", ["none", "basic", "cutmix"])
def test_worker_processes_make_batches_like_those_on_the_device(augmentation):
    pixels = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    pixels[:, 0] += torch.arange(64, dtype=torch.uint8)[:, None, None]
    images = Images(pixels, torch.arange(64) % 4)
    images = ImageSet("some", ("a", "b", "c", "d"), images, images)
    facts = common.facts_of(images)
    kept, worked = (
        next(
            iter(
                tiny_imagenet._train_loader(
                    TinyImageNetConfig(augmentation=augmentation, num_workers=workers), images, facts
                )
            )
        )
        for workers in (0, 1)
    )
    assert [part.shape for part in kept] == [part.shape for part in worked]
    assert [part.dtype for part in kept] == [part.dtype for part in worked]
    assert torch.allclose(kept[0].mean(dim=(0, 2, 3)), worked[0].mean(dim=(0, 2, 3)), atol=0.25)
    assert torch.allclose(kept[1].float().mean(0), worked[1].float().mean(0))
    if augmentation == "none":
        first, second = (batch[0][batch[0][:, 0, 0, 0].argsort()] for batch in (kept, worked))
        assert torch.allclose(first, second, atol=1e-4), "the same images, in another order"


def test_mixed_labels_count_by_their_shares():
    measure = LabelWeightedAccuracy()
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    measure.update(logits, torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0]]))
    assert measure.compute() == pytest.approx(0.35)
    measure.update(logits, torch.tensor([0, 0]))
    assert measure.compute() == pytest.approx((0.7 + 1) / 4)
