"""Pictures of what a classifier does: which classes it confuses, how well it knows each, and examples."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.errors import StorageError

__all__ = ["GREY", "RIGHT", "WRONG", "canvas", "class_accuracy", "confusion_matrix", "examples"]

RIGHT, WRONG, GREY = "#0072B2", "#D55E00", "#6B6B6B"
"""Blue and vermilion of the Okabe-Ito palette, which colour-blind readers tell apart."""
CHINESE = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei")
"""Fonts for class names in Chinese, where one of them is installed."""


def confusion_matrix(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """Draw ``counts (classes, classes)``: how many images of a class (row) were taken for which (column)."""
    number = len(classes)
    share = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    few = number <= 20
    side = 2.6 + 0.5 * number if few else min(24.0, 4.0 + 0.135 * number)
    with canvas(path, side + 0.8, side) as figure:
        from matplotlib.colors import PowerNorm

        axes = figure.add_subplot()
        picture = axes.imshow(share.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        size = 9 if few else max(3.5, min(7, 620 / number))
        every = 1 if number <= 200 else math.ceil(number / 200)
        names = [_short(name) for name in classes[::every]]
        axes.set_xticks(range(0, number, every), names, rotation=90 if max(map(len, names)) > 2 else 0, fontsize=size)
        axes.set_yticks(range(0, number, every), names, fontsize=size)
        axes.set(xlabel="predicted", ylabel="true")
        right, total = int(counts.diagonal().sum()), int(counts.sum())
        axes.set_title(f"Confusion matrix: {right:,} of {total:,} right ({right / max(1, total):.2%})")
        bar = figure.colorbar(picture, fraction=0.04, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"])
        bar.set_label("share of the true class's images")
        if few:
            _write_counts(axes, counts, share)


def class_accuracy(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """Draw each class's accuracy from the confusion ``counts``, best first, with its 95% interval (Wilson, 1927)."""
    right, total = counts.diagonal().double(), counts.sum(dim=1).double()
    order = sorted(range(len(classes)), key=lambda place: -float(right[place] / total[place].clamp_min(1)))
    columns = 1 if len(order) <= 30 else 2 if len(order) <= 120 else math.ceil(len(order) / 60)
    rows = math.ceil(len(order) / columns)
    with canvas(path, 1.0 + 5.0 * columns, 1.4 + 0.2 * rows) as figure:
        grid = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
        for column, axes in enumerate(grid):
            part = order[column * rows : (column + 1) * rows]
            _bars(axes, right[part], total[part], [_short(classes[place], 24) for place in part], rows)
        overall = float(right.sum() / total.sum().clamp_min(1))
        for axes in grid:
            axes.axvline(overall, color=GREY, linewidth=1, linestyle="--")
        figure.suptitle(f"Test accuracy of each class\ndashed: all together, {overall:.2%}; thin: 95% interval")


def examples(path: Path, pixels: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> None:
    """Draw test images with the model's answers: some as they come, and the mistakes it was surest of.

    Args:
        path: the picture's file.
        pixels: uint8 ``(images, channels, height, width)``.
        labels: the true classes, ``(images,)``.
        probabilities: the model's, ``(images, classes)``.
        classes: names.

    """
    sure, answers = probabilities.max(dim=1)
    some = torch.linspace(0, len(labels) - 1, min(16, len(labels))).long().tolist()
    mistakes = (answers != labels).nonzero().flatten()
    worst = mistakes[sure[mistakes].argsort(descending=True)][:16].tolist()
    parts = [("Test images, evenly spread", some)] + ([("Mistakes the model was surest of", worst)] if worst else [])
    heights = [math.ceil(len(places) / 8) for _, places in parts]
    with canvas(path, 13.0, 0.5 + sum(1.95 * rows + 0.45 for rows in heights)) as figure:
        boxes = figure.subfigures(len(parts), 1, height_ratios=[1.95 * rows + 0.45 for rows in heights], squeeze=False)
        for box, (title, places), rows in zip(boxes[:, 0], parts, heights, strict=True):
            box.suptitle(title, x=0.01, ha="left", fontweight="bold")
            for axes, place in zip(box.subplots(rows, 8, squeeze=False).flat, [*places, *[None] * 8], strict=False):
                axes.set_axis_off()
                if place is not None:
                    truth, answer = classes[int(labels[place])], classes[int(answers[place])]
                    _example(axes, pixels[place], truth, answer, float(sure[place]))


def _example(axes: Any, image: Tensor, truth: str, answer: str, sure: float) -> None:
    """Show one image; a mistake is marked by a cross, the true class, and colour."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    right = truth == answer
    text = f"✓ {_short(answer)} ({sure:.0%})" if right else f"✗ {_short(answer)} ({sure:.0%})\nis {_short(truth)}"
    axes.set_title(text, fontsize=9, color=RIGHT if right else WRONG)


def _bars(axes: Any, right: Tensor, total: Tensor, names: list[str], rows: int) -> None:
    """Draw one column of bars, with room for ``rows`` of them."""
    accuracy = right / total.clamp_min(1)
    low, high = _wilson(right, total)
    places = range(len(names))
    axes.barh(places, accuracy.numpy(), color="#9CC9E5", height=0.7)
    axes.hlines(places, low.numpy(), high.numpy(), color=RIGHT, linewidth=1)
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlim=(0, 1.14), ylim=(rows - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    for place in places:
        axes.text(1.015, place, f"{float(accuracy[place]):.1%}", va="center", fontsize=7, color=GREY)


def _wilson(right: Tensor, total: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor]:
    """Return the ends of the interval of a share ``right / total`` (Wilson, 1927)."""
    total = total.clamp_min(1)
    share = right / total
    centre = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)).sqrt()
    return (centre - half).clamp(0, 1), (centre + half).clamp(0, 1)


def _write_counts(axes: Any, counts: Tensor, share: Tensor) -> None:
    """Write each count that is not 0 into its cell."""
    for row, column in counts.nonzero().tolist():
        colour = "white" if share[row, column] > 0.4 else "black"
        axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", fontsize=8, color=colour)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"


@contextlib.contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """Lend a figure, ``width`` x ``height`` inches, and write it to ``path``; the user's own plots are left alone."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    settings = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings |= {"font.family": ["DejaVu Sans", *(font for font in CHINESE if font in installed)]}
    with matplotlib.rc_context({**settings, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
        except OSError as error:
            raise StorageError(f"cannot write the picture {path}: {error}") from error
