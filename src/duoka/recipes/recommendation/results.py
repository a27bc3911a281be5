"""What a run leaves: measures of the model and of its baselines side by side, as JSON, as text, as a picture."""

from __future__ import annotations

from pathlib import Path

from duoka.recipes.image_classification.plots import canvas
from duoka.recipes.recommendation.ranking_metrics import CUTOFFS, NAMES

__all__ = ["Table", "draw", "headline", "text"]

Table = dict[str, dict[str, float]]
"""Measures by who made the lists; the run's model first."""
SHOWN = ("ndcg@10", "recall@10", "precision@10", "hr@10", "mrr@10", "ndcg@50", "recall@50")
BLUE, GREY = "#0072B2", "#9A9A9A"


def headline(table: Table) -> dict[str, float]:
    """Return the numbers that are printed."""
    own, *others = table
    found = {f"test_{name}": table[own][name] for name in SHOWN[:5]}
    return found | {f"{other}_ndcg@10": table[other]["ndcg@10"] for other in others}


def text(title: str, table: Table) -> str:
    """Return a page for people."""
    width = max(24, *(len(name) + 2 for name in table))
    lines = [title, "", f"{'':{width}}" + "".join(f"{name:>14}" for name in SHOWN)]
    lines += [f"{who:{width}}" + "".join(f"{found[name]:14.4f}" for name in SHOWN) for who, found in table.items()]
    best = max(table, key=lambda who: table[who]["ndcg@10"])
    lines += ["", f"The largest NDCG@10 is that of: {best}", "", f"All measures of: {next(iter(table))}", ""]
    own = next(iter(table.values()))
    kinds = list(dict.fromkeys(name.partition("@")[0] for name in NAMES))
    lines.append(f"{'':12}" + "".join(f"{'at ' + str(cutoff):>10}" for cutoff in CUTOFFS))
    lines += [f"{kind:12}" + "".join(f"{own[f'{kind}@{cutoff}']:10.4f}" for cutoff in CUTOFFS) for kind in kinds]
    return "\n".join(lines) + "\n"


def draw(path: Path, table: Table) -> None:
    """Draw everybody's NDCG@10 and Recall@10 as bars."""
    with canvas(path, 9.0, 1.4 + 0.45 * len(table)) as figure:
        for axes, name, title in zip(
            figure.subplots(1, 2, sharey=True), ("ndcg@10", "recall@10"), ("NDCG@10", "Recall@10"), strict=True
        ):
            values = [found[name] for found in table.values()]
            bars = axes.barh(range(len(table)), values, color=[BLUE, *[GREY] * (len(table) - 1)])
            axes.bar_label(bars, fmt="%.4f", padding=3)
            axes.set_yticks(range(len(table)), list(table))
            axes.set(xlim=(0, 1.18 * max(*values, 1e-9)))
            axes.set_title(f"{title} on the test part", loc="left", fontsize=10)
            axes.spines[["top", "right"]].set_visible(False)
        axes.invert_yaxis()
