"""The pictures are drawn for few and many classes, and touch nothing of the user's matplotlib."""

import matplotlib
import pytest
import torch
from PIL import Image

from duoka.errors import StorageError
from duoka.recipes.image_classification import plots


def counts_of(classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(classes)
    return torch.randint(0, 5, (classes, classes), generator=generator) + 50 * torch.eye(classes, dtype=torch.int64)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_pictures_are_drawn_for_few_and_many_classes(tmp_path, classes):
    names = [f"class_number_{number}" for number in range(classes)]
    plots.confusion_matrix(tmp_path / "a.png", counts_of(classes), names)
    plots.class_accuracy(tmp_path / "b.png", counts_of(classes), names)
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(("channels", "right"), [(1, True), (3, False)])
def test_examples_are_drawn_with_and_without_mistakes(tmp_path, channels, right):
    pixels = torch.randint(0, 256, (30, channels, 8, 8), dtype=torch.uint8)
    labels = torch.arange(30) % 3
    probabilities = torch.eye(3)[labels if right else (labels + 1) % 3]
    plots.examples(tmp_path / "a.png", pixels, labels, probabilities, ["one", "two", "three"])
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.height > 900) is not right


def test_names_in_chinese_or_with_dollars_and_empty_classes_do_no_harm(tmp_path):
    counts = counts_of(3)
    counts[2] = 0
    plots.confusion_matrix(tmp_path / "a.png", counts, ["猫", "$x_$", "empty"])
    plots.class_accuracy(tmp_path / "b.png", counts, ["猫", "$x_$", "empty"])


def test_the_users_matplotlib_stays_as_it_was(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 7.0}):
        before = dict(matplotlib.rcParams)
        plots.confusion_matrix(tmp_path / "a.png", counts_of(2), ["a", "b"])
        assert dict(matplotlib.rcParams) == before


def test_a_place_that_is_not_writable_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"cannot write the picture .*file/a\.png"):
        plots.confusion_matrix(tmp_path / "file" / "a.png", counts_of(2), ["a", "b"])
