"""``plots/curves.png``: loss, metrics and learning rate over epochs, from the records of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

__all__ = ["curves_png"]

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito's, which colour-blind people tell apart
PANEL_INCHES = (5.2, 3.4)
COLUMNS = 3
TRAINING, VALIDATION = "train_", "val_"


def curves_png(history: Sequence[dict[str, Any]]) -> bytes:
    """Return the picture as PNG. Matplotlib's global state (``pyplot``, the user's figures) is not touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = _panels(history)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (title, lines) in enumerate(panels):
        _draw(figure.add_subplot(rows, columns, index + 1), title, lines)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


Line = tuple[str, str, str, list[tuple[int, float]]]


def _panels(history: Sequence[dict[str, Any]]) -> list[tuple[str, list[Line]]]:
    """Return a title and lines ``(label, colour, marker, points)`` for each panel."""
    names = dict.fromkeys(
        name.removeprefix(part) for part in (VALIDATION, TRAINING) for record in history for name in record
        if name.startswith(part)
    )  # fmt: skip
    panels: list[tuple[str, list[Line]]] = [
        (
            name,
            [
                ("training", BLUE, "o", _points(history, TRAINING + name)),
                ("validation", ORANGE, "s", _points(history, VALIDATION + name)),
            ],
        )
        for name in ("loss", *(name for name in names if name != "loss"))
    ]
    panels.append(("learning rate", [("", GREEN, "", _points(history, "lr"))]))
    return [(title, drawn) for title, lines in panels if (drawn := [line for line in lines if line[3]])]


def _points(history: Sequence[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    values = [(record["epoch"], record.get(name)) for record in history]
    return [(epoch, float(value)) for epoch, value in values if isinstance(value, (int, float))]


def _draw(axes: Any, title: str, lines: list[Line]) -> None:
    for label, colour, marker, points in lines:
        epochs, values = zip(*points, strict=True)
        few = len(points) <= 40
        axes.plot(epochs, values, color=colour, marker=marker if few else "", markersize=4, linewidth=1.6, label=label)
    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.grid(visible=True, alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(frameon=False)
