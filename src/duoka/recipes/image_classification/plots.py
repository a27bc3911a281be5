"""Plots of a classifier's results: confusion matrix, accuracy of each class, and example images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from duoka.utils.figures import BLUE, GREY, ORANGE, figure_file, hide_frame


def confusion_matrix(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """Draw ``counts (classes, classes)``: the number of images by true class (row) and predicted class (column)."""
    number = len(classes)
    share = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    few = number <= 20
    side = 2.6 + 0.5 * number if few else min(24.0, 4.0 + 0.135 * number)
    with figure_file(path, side + 0.8, side) as figure:
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
        axes.set_title(f"Confusion matrix: {right:,} of {total:,} correct ({right / max(1, total):.2%})")
        bar = figure.colorbar(picture, fraction=0.04, pad=0.02, ticks=[0, 0.01, 0.05, 0.2, 0.5, 1])
        bar.ax.set_yticklabels(["0", "1%", "5%", "20%", "50%", "100%"])
        bar.set_label("share of the true class's images")
        for row, column in counts.nonzero().tolist() if few else ():
            color = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", fontsize=8, color=color)


def class_accuracy(path: Path, counts: Tensor, classes: Sequence[str]) -> None:
    """Draw the accuracy of each class from ``counts``, best first, with its 95% interval (Wilson, 1927)."""
    right, total = counts.diagonal().double(), counts.sum(dim=1).double()
    order = sorted(range(len(classes)), key=lambda index: -float(right[index] / total[index].clamp_min(1)))
    columns = 1 if len(order) <= 30 else 2 if len(order) <= 120 else math.ceil(len(order) / 60)
    rows = math.ceil(len(order) / columns)
    with figure_file(path, 1.0 + 5.0 * columns, 1.4 + 0.2 * rows) as figure:
        grid = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
        for column, axes in enumerate(grid):
            part = order[column * rows : (column + 1) * rows]
            _bars(axes, right[part], total[part], [_short(classes[index], 24) for index in part], rows)
        overall = float(right.sum() / total.sum().clamp_min(1))
        for axes in grid:
            axes.axvline(overall, color=GREY, linewidth=1, linestyle="--")
        figure.suptitle(f"Test accuracy of each class\ndashed: all classes, {overall:.2%}; thin: 95% interval")


def examples(path: Path, pixels: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> None:
    """Draw test images with the model's predictions: evenly spaced ones, and its most confident mistakes.

    ``pixels`` are uint8 ``(images, channels, height, width)``, ``labels (images,)`` the true classes, and
    ``probabilities (images, classes)`` the predictions.
    """
    confidence, predicted = probabilities.max(dim=1)
    some = torch.linspace(0, len(labels) - 1, min(16, len(labels))).long().tolist()
    mistakes = (predicted != labels).nonzero().flatten()
    worst = mistakes[confidence[mistakes].argsort(descending=True)][:16].tolist()
    parts = [("Test images, evenly spaced", some)] + ([("Most confident mistakes", worst)] if worst else [])
    heights = [math.ceil(len(indices) / 8) for _, indices in parts]
    with figure_file(path, 13.0, 0.5 + sum(1.95 * rows + 0.45 for rows in heights)) as figure:
        boxes = figure.subfigures(len(parts), 1, height_ratios=[1.95 * rows + 0.45 for rows in heights], squeeze=False)
        for box, (title, indices), rows in zip(boxes[:, 0], parts, heights, strict=True):
            box.suptitle(title, x=0.01, ha="left", fontweight="bold")
            for axes, index in zip(box.subplots(rows, 8, squeeze=False).flat, [*indices, *[None] * 8], strict=False):
                axes.set_axis_off()
                if index is not None:
                    truth, answer = classes[int(labels[index])], classes[int(predicted[index])]
                    _example(axes, pixels[index], truth, answer, float(confidence[index]))


def _example(axes: Any, image: Tensor, truth: str, answer: str, confidence: float) -> None:
    """Show one image; a cross, the true class and the color mark a mistake."""
    axes.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    right = truth == answer
    title = f"{'✓' if right else '✗'} {_short(answer)} ({confidence:.0%})" + ("" if right else f"\nis {_short(truth)}")
    axes.set_title(title, fontsize=9, color=BLUE if right else ORANGE)


def _bars(axes: Any, right: Tensor, total: Tensor, names: list[str], rows: int) -> None:
    accuracy = right / total.clamp_min(1)
    low, high = _wilson(right, total)
    indices = range(len(names))
    axes.barh(indices, accuracy.numpy(), color="#9CC9E5", height=0.7)
    axes.hlines(indices, low.numpy(), high.numpy(), color=BLUE, linewidth=1)
    axes.set_yticks(indices, names, fontsize=8)
    axes.set(xlim=(0, 1.14), ylim=(rows - 0.5, -0.5), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter("{x:.0%}")
    hide_frame(axes)
    for index in indices:
        axes.text(1.015, index, f"{float(accuracy[index]):.1%}", va="center", fontsize=7, color=GREY)


def _wilson(right: Tensor, total: Tensor, z: float = 1.96) -> tuple[Tensor, Tensor]:
    total = total.clamp_min(1)
    share = right / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)).sqrt()
    return (center - half).clamp(0, 1), (center + half).clamp(0, 1)


def _short(name: str, limit: int = 16) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "…"
