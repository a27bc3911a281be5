"""Result files of a run: the metrics of the model and the baselines as text and as a picture."""

from pathlib import Path

from duoka.recipes.recommendation.ranking_metrics import CUTOFFS, METRICS
from duoka.utils.figures import BLUE, GREY, figure_file, hide_frame

MetricTable = dict[str, dict[str, float]]
"""Recommender name to its metrics; the run's model is first."""
SHOWN = ("ndcg@10", "recall@10", "precision@10", "hr@10", "mrr@10", "ndcg@50", "recall@50")


def headline(table: MetricTable) -> dict[str, float]:
    """Return the numbers that the command prints."""
    own, *others = table
    numbers = {f"test_{name}": table[own][name] for name in SHOWN[:5]}
    return numbers | {f"{other}_ndcg@10": table[other]["ndcg@10"] for other in others}


def format_table(title: str, table: MetricTable) -> str:
    """Return the metrics as a text page."""
    width = max(24, *(len(name) + 2 for name in table))
    lines = [title, "", f"{'':{width}}" + "".join(f"{name:>14}" for name in SHOWN)]
    lines += [f"{name:{width}}" + "".join(f"{row[metric]:14.4f}" for metric in SHOWN) for name, row in table.items()]
    best = max(table, key=lambda name: table[name]["ndcg@10"])
    name, own = next(iter(table.items()))
    lines += ["", f"Largest NDCG@10: {best}", "", f"All metrics of {name}:", ""]
    kinds = list(dict.fromkeys(metric.partition("@")[0] for metric in METRICS))
    lines.append(f"{'':12}" + "".join(f"{f'at {cutoff}':>10}" for cutoff in CUTOFFS))
    lines += [f"{kind:12}" + "".join(f"{own[f'{kind}@{cutoff}']:10.4f}" for cutoff in CUTOFFS) for kind in kinds]
    return "\n".join(lines) + "\n"


def draw_comparison(path: Path, table: MetricTable) -> None:
    """Draw NDCG@10 and Recall@10 of all recommenders as bars."""
    with figure_file(path, 9.0, 1.4 + 0.45 * len(table)) as figure:
        for axes, title in zip(figure.subplots(1, 2, sharey=True), ("NDCG@10", "Recall@10"), strict=True):
            values = [row[title.lower()] for row in table.values()]
            bars = axes.barh(range(len(table)), values, color=[BLUE, *[GREY] * (len(table) - 1)])
            axes.bar_label(bars, fmt="%.4f", padding=3)
            axes.set_yticks(range(len(table)), list(table))
            axes.set(xlim=(0, 1.18 * max(*values, 1e-9)))
            axes.set_title(f"{title} on the test part", loc="left", fontsize=10)
            hide_frame(axes)
        axes.invert_yaxis()
