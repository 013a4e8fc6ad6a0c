"""The curves of a training run as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_kernels.training.checkpoint import atomic_file, read_metrics

CHOSEN, REJECTED, EVAL = "#1b6ca8", "#c8553d", "#2b2b2b"


def plot_training_curves(metrics: Path, picture: Path) -> None:
    """Draws loss, margins, accuracies and rewards, training and held-out, from a `metrics.jsonl` into a PNG."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'dpo_kernels[train]'") from error

    rows = read_metrics(metrics)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed
    axes = figure.subplots(2, 2)
    for axis, (key, title) in zip(
        axes.flat,
        (("loss", "loss"), ("rewards/margins", "reward margin"), ("rewards/accuracies", "reward accuracy")),
        strict=False,
    ):
        _line(axis, rows, key, "train", CHOSEN)
        # rewards tie before the first step: there is no accuracy to show
        held_out = [row for row in rows if row["step"] > 0] if key == "rewards/accuracies" else rows
        _line(axis, held_out, f"eval/{key}", "held out", EVAL, style="o--")
        axis.set_title(title)
    accuracy, rewards = axes.flat[2], axes.flat[3]
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.axhline(0.5, color="0.7", linewidth=1, label="chance")
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        _line(rewards, rows, f"rewards/{side}", side, colour)
        _line(rewards, rows, f"eval/rewards/{side}", f"{side}, held out", colour, style="o--")
    rewards.set_title("rewards")
    for axis in axes.flat:
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.25)
        axis.legend(fontsize="small")
    with atomic_file(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _line(axis: Any, rows: list[dict[str, Any]], key: str, label: str, colour: str, style: str = "-") -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4, linewidth=1.4)
