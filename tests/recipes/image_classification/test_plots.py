"""Plots for few and many classes, which leave the user's matplotlib settings unchanged."""

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
def test_plots_show_few_and_many_classes(tmp_path, classes):
    names = [f"class_number_{number}" for number in range(classes)]
    plots.confusion_matrix(tmp_path / "a.png", counts_of(classes), names)
    plots.class_accuracy(tmp_path / "b.png", counts_of(classes), names)
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 250
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(("channels", "right"), [(1, True), (3, False)])
def test_examples_have_room_for_mistakes_if_there_are_any(tmp_path, channels, right):
    pixels = torch.randint(0, 256, (30, channels, 8, 8), dtype=torch.uint8)
    labels = torch.arange(30) % 3
    probabilities = torch.eye(3)[labels if right else (labels + 1) % 3]
    plots.examples(tmp_path / "a.png", pixels, labels, probabilities, ["one", "two", "three"])
    with Image.open(tmp_path / "a.png") as picture:
        assert (picture.height > 900) is not right


def test_chinese_names_dollar_signs_and_empty_classes_need_no_warning(tmp_path):
    # warnings are errors in tests, so drawing is the assertion
    counts = counts_of(3)
    counts[2] = 0
    plots.confusion_matrix(tmp_path / "a.png", counts, ["猫", "$x_$", "empty"])
    plots.class_accuracy(tmp_path / "b.png", counts, ["猫", "$x_$", "empty"])


def test_the_users_matplotlib_settings_stay_unchanged(tmp_path):
    with matplotlib.rc_context({"lines.linewidth": 7.0}):
        before = dict(matplotlib.rcParams)
        plots.confusion_matrix(tmp_path / "a.png", counts_of(2), ["a", "b"])
        assert dict(matplotlib.rcParams) == before


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/a\.png"):
        plots.confusion_matrix(tmp_path / "file" / "a.png", counts_of(2), ["a", "b"])
