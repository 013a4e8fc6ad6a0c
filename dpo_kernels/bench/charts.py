"""Pictures of the tables: bars for each, and curves over the numbers of tokens and of vocabulary entries."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_kernels.bench.report import Row, is_ours

OURS, OTHERS, LIMIT = "#1b6ca8", "#b9b3a9", "#c8553d"
MEASURES = {"median_ms": "time, ms", "peak_mib": "extra memory, MiB"}
# What tables of one curve have in common, and what may run along its axis.
ALIKE = ("mode", "mask", "dtype", "H")
AXES = {"N": "labelled tokens", "V": "vocabulary size"}


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'dpo_kernels[bench]'") from error


def draw(tables: list[Row], folder: Path) -> Iterator[Path]:
    """Draws all that there is to draw and names the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        sizes = [f"{name}{table[name]}" for name in ("N", "H", "V") if table[name]]
        yield _bars(table, folder / f"{_file_name(table['mode'], table['mask'], *sizes, table['dtype'])}.png")
    for along in AXES:
        groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
        (other,) = set(AXES) - {along}
        for table in tables:
            groups[(*(table[name] for name in ALIKE), table[other])].append(table)
        for alike, group in groups.items():
            group.sort(key=lambda table: table[along])
            if len({table[along] for table in group}) > 1:
                mode, mask, dtype, hidden, fixed = alike
                width = f" H={hidden}" if hidden else ""
                title = f"{mode}, mask {mask}, {dtype}, {other}={fixed}{width}"
                sizes = [f"{other}{fixed}", *([f"H{hidden}"] if hidden else [])]
                name = _file_name(mode, mask, f"over {along}", *sizes, dtype)
                yield _curves(group, along, title, folder / f"{name}.png")


def _file_name(*parts: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", " ".join(parts).lower()).strip("_")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory: no display is needed
    return figure


def _bars(table: Row, path: Path) -> Path:
    """Time and memory of every row, the limit as a line."""
    rows = [row for row in table["rows"] if row.get("errors") and "median_ms" in row][::-1]
    limits = [row["median_ms"] for row in table["rows"] if row["name"] in {row.get("limit") for row in rows}]
    measures = [key for key in MEASURES if any(isinstance(row.get(key), float) for row in rows)]
    figure = _figure(4.5 + 3.5 * len(measures), 1.2 + 0.32 * len(rows))
    figure.suptitle(table["title"], fontsize="medium")
    axes = figure.subplots(1, len(measures) or 1, sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, measures, strict=False):
        values = [row[key] if isinstance(row.get(key), float) else 0.0 for row in rows]
        bars = axis.barh(
            [row["name"] for row in rows], values, color=[OURS if is_ours(row["package"]) else OTHERS for row in rows]
        )
        axis.bar_label(bars, fmt=_three_digits, padding=2, fontsize="small")
        axis.set_xlabel(MEASURES[key])
        axis.margins(x=0.15)
        axis.locator_params(axis="x", nbins=5)
        axis.spines[["top", "right"]].set_visible(False)
    for limit in limits:
        axes[0].axvline(limit, color=LIMIT, linestyle="--", linewidth=1.2, label=f"limit, {_three_digits(limit)} ms")
    if limits:
        axes[0].legend(fontsize="small", loc="lower right")
    figure.savefig(path, dpi=120)
    return path


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _curves(tables: list[Row], along: str, title: str, path: Path) -> Path:
    """Time and memory over N or V, both axes logarithmic."""
    lines: dict[str, list[tuple[float, Row]]] = defaultdict(list)
    for table in tables:
        for row in table["rows"]:
            lines[row["name"]].append((table[along], row))
    figure = _figure(11, 4.8)
    figure.suptitle(title, fontsize="medium")
    for axis, (key, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for name, found in lines.items():
            points = [(x, row[key]) for x, row in found if isinstance(row.get(key), float) and row[key] > 0]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, markersize=4, **_style([row for _, row in found]))
        axis.set(xlabel=f"{along}, {AXES[along]}", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.25)
    figure.axes[0].legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
    return path


def _style(rows: list[Row]) -> dict[str, Any]:
    if is_ours(rows[0]["package"]):
        return {"marker": "o", "linewidth": 2.0}
    if not any(row.get("errors") for row in rows):  # a limit computes nothing
        return {"color": LIMIT, "linestyle": "--", "linewidth": 1.4}
    return {"marker": ".", "linewidth": 0.9, "alpha": 0.8}
