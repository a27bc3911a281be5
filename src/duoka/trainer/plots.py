"""Curves of a run in ``plots/curves.png``: loss, metrics and learning rate over epochs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duoka.utils.figures import BLUE, GREEN, ORANGE, figure_file, hide_frame

PANEL_INCHES = (5.2, 3.4)
COLUMNS = 3
TRAINING, VALIDATION = "train_", "val_"

Line = tuple[str, str, str, list[tuple[int, float]]]


def draw_curves(path: Path, history: Sequence[dict[str, Any]]) -> None:
    """Draw the records of a run."""
    panels = _panels(history)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with figure_file(path, PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows) as figure:
        for index, (title, lines) in enumerate(panels):
            _draw(figure.add_subplot(rows, columns, index + 1), title, lines)


def _panels(history: Sequence[dict[str, Any]]) -> list[tuple[str, list[Line]]]:
    """Return title and lines ``(label, color, marker, points)`` of each panel."""
    panels: dict[str, list[Line]] = {"loss": []}
    for prefix, label, color, marker in ((TRAINING, "training", BLUE, "o"), (VALIDATION, "validation", ORANGE, "s")):
        for name in dict.fromkeys(name for record in history for name in record if name.startswith(prefix)):
            line = (label, color, marker, _points(history, name))
            panels.setdefault(name.removeprefix(prefix), []).append(line)
    panels["learning rate"] = [("", GREEN, "", _points(history, "lr"))]
    return [(title, drawn) for title, lines in panels.items() if (drawn := [line for line in lines if line[3]])]


def _points(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    values = [(record["epoch"], record.get(name)) for record in history]
    return [(epoch, float(value)) for epoch, value in values if isinstance(value, (int, float))]


def _draw(axes: Any, title: str, lines: list[Line]) -> None:
    for label, color, marker, points in lines:
        epochs, values = zip(*points, strict=True)
        few = len(points) <= 40
        axes.plot(epochs, values, color=color, marker=marker if few else "", markersize=4, linewidth=1.6, label=label)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.grid(visible=True, alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    hide_frame(axes)
    if len(lines) > 1:
        axes.legend(frameon=False)
