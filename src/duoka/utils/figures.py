"""Matplotlib figures written to PNG files, independent of ``pyplot`` and of the user's settings."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duoka.utils.files import atomic_write

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
"""Colors of the Okabe-Ito palette, which color-blind readers can distinguish, and a gray."""
CHINESE_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "Microsoft YaHei", "PingFang SC", "SimHei",
)  # fmt: skip
"""Fonts for Chinese names, used if they are installed."""


@contextlib.contextmanager
def figure_file(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure of ``width`` x ``height`` inches, and write it to ``path`` when the block ends.

    Raises:
        StorageError: the file cannot be written.
    """
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    settings = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings |= {"font.family": ["DejaVu Sans", *(font for font in CHINESE_FONTS if font in installed)]}
    with matplotlib.rc_context({**settings, "text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with atomic_write(path) as file:
            figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)


def hide_frame(axes: Any) -> None:
    """Hide the top and right edges of ``axes``."""
    axes.spines[["top", "right"]].set_visible(False)
