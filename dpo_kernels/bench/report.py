"""From contenders to a table: each is checked against fp64, timed beside the others, and its memory measured."""

from __future__ import annotations

import csv
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_kernels import measure
from dpo_kernels.bench.cases import HeadCase, HeadInputs, LogitsCase, LogitsInputs, Result, errors, wrong
from dpo_kernels.bench.contenders import OURS, Contender

PACKAGES = [OURS, "torch", "trl", "liger_kernel", "cut_cross_entropy", "quack-kernels", "nvidia-cutlass-dsl"]
PACKAGES += ["transformers", "triton", "numpy"]
STARTED = time.perf_counter()

Row = dict[str, Any]


class Entry(NamedTuple):
    """A contender in a comparison, and the entries of the same comparison that it is held against, by label."""

    label: str
    contender: Contender
    case: HeadCase | LogitsCase
    limit: str | None = None
    baseline: str | None = None
    traffic: int = 0  # bytes that it has to read and write, where that is what it takes time for
    target: str = ""  # for what stands over the baseline, where there is one, else over the limit
    percent_target: str = ""
    peak_target: str = ""


@dataclass
class Harness:
    """How a comparison is run. `at` hears what is about to run: a label, and what is done with it."""

    rounds: int
    device: torch.device = measure.CPU
    seconds: float = math.inf  # after which no more rounds begin
    memory: bool = True
    excluded: dict[str, str] = field(default_factory=dict)  # labels, each with the reason
    at: Callable[[str, str], None] = lambda label, what: None
    say: Callable[[str], None] = lambda line: None


def compare(title: str, entries: list[Entry], harness: Harness) -> Row:
    """Checks every entry against fp64 (which warms it up), times those that are right, and measures their memory."""
    device, on_gpu = harness.device, harness.device.type == "cuda"
    harness.say(title)
    torch.compiler.reset()  # for these shapes, and not for all that were seen before
    rows: dict[str, Row] = {}
    for entry in entries:
        package = entry.contender.package
        rows[entry.label] = {"name": entry.label, "package": package, "version": measure.version(package)}
        if entry.label in harness.excluded:
            rows[entry.label]["reason"] = harness.excluded[entry.label]
    inputs: dict[Any, Any] = {entry.case: None for entry in entries}
    for case in inputs:
        harness.at(case.name, "inputs")
        inputs[case] = case.inputs()
        for loss in {entry.contender.loss: None for entry in entries if entry.case == case}:
            harness.at(case.name, "right answers")
            oracle = case.oracle(inputs[case], loss)
            for entry in entries:
                row = rows[entry.label]
                if entry.case != case or entry.contender.loss is not loss or "reason" in row:
                    continue
                harness.at(entry.label, "check")
                row.update(check(entry, inputs[case], oracle, device))
                if harness.memory and on_gpu and row.get("errors") and "reason" not in row:
                    row["peak_mib"] = measure.peak_allocated(entry.contender, inputs[case], device)
            del oracle  # gigabytes

    able = [entry for entry in entries if "reason" not in rows[entry.label]]
    runs = [run_of(entry, inputs[entry.case], harness) for entry in able]
    found = measure.interleaved(
        runs,
        harness.rounds,
        device=device,
        seconds=harness.seconds,
        progress=lambda line: harness.say(f"  {line}"),
    )
    for entry, seconds in zip(able, found, strict=True):
        row = rows[entry.label]
        if isinstance(seconds, str):
            row["reason"] = seconds
            continue
        row.update(measure.spread(seconds), samples_ms=[s * 1e3 for s in seconds])
        if isinstance(entry.case, HeadCase):
            row["tflops"] = entry.case.flops(entry.contender.products) / row["median_ms"] / 1e9
        if entry.traffic:
            row["gb_per_s"] = entry.traffic / row["median_ms"] / 1e6
    for entry in able:
        row = rows[entry.label]
        for what, other in (("limit", entry.limit), ("baseline", entry.baseline)):
            if other is not None and "median_ms" in row and "median_ms" in rows[other]:
                row |= {what: other, f"over_{what}": row["median_ms"] / rows[other]["median_ms"]}
        row |= {name: getattr(entry, name) for name in ("target", "percent_target", "peak_target")}
    positions = {case: made.labels.numel() for case, made in inputs.items()}
    del inputs, runs
    if harness.memory and not on_gpu:
        for entry in able:
            if rows[entry.label]["errors"]:  # a limit computes nothing
                harness.at(entry.label, "memory")
                threads = torch.get_num_threads()
                rows[entry.label]["peak_mib"] = measure.peak_memory(entry.contender, entry.case, threads)
    first = entries[0].case
    return {"title": title, "labelled": first.tokens, "positions": positions[first], "rows": list(rows.values())}


def check(
    entry: Entry, inputs: HeadInputs | LogitsInputs, oracle: Result, device: torch.device = measure.CPU
) -> dict[str, Any]:
    """Errors, and the reason why the entry takes no part, if it does not."""
    # ours is here, be it installed or on the path
    if not is_ours(entry.contender.package) and measure.version(entry.contender.package) is None:
        return {"reason": f"not installed: pip install {entry.contender.package.replace('_', '-')}"}
    inputs.prepare(entry.contender.overwrites)
    try:
        result = entry.contender.run(inputs)
        measure.synchronize(device)
    except Exception as error:  # it may fail in any way; the row says how
        reason = measure.described(error)
    else:
        found = errors(result, oracle)
        problem = wrong(found, entry.case)
        return {"errors": found} | ({"reason": problem} if problem else {})
    measure.recover(device)
    return {"reason": reason}


def is_ours(package: str) -> bool:
    return package == OURS


def failed(tables: Iterable[Row]) -> list[str]:
    """What of ours has no result."""
    rows = [row for table in tables for row in table["rows"]]
    return [f"{row['name']}: {row['reason']}" for row in rows if is_ours(row["package"]) and "reason" in row]


def hold_against(table: Row, label: str) -> Row:
    """Every row's time over that of `label`, ours as default options take it. For tables whose rows all give the
    same."""
    table["ours"] = label
    own = next((row["median_ms"] for row in table["rows"] if row["name"] == label and "median_ms" in row), None)
    for row in table["rows"]:
        if own and "median_ms" in row and row.get("errors"):  # a limit computes nothing
            row["over_ours"] = row["median_ms"] / own
    return table


def faster(table: Row) -> list[str]:
    """Who is faster than ours, by default options; and which of ours would be."""
    held = [row for row in table["rows"] if "over_ours" in row]
    others = [row for row in held if not is_ours(row["package"])]
    said = [
        f"{row['name']} takes {row['over_ours']:.2f} of the time of {table['ours']}"
        for row in others
        if row["over_ours"] < 1
    ]
    if others and not said:
        said = [f"none of {len(others)} others is faster than {table['ours']} here"]
    best = min((row for row in held if is_ours(row["package"])), key=lambda row: row["over_ours"], default=None)
    if best is not None and best["over_ours"] < 1:
        said.append(f"of ours {best['name']} is the fastest, {best['over_ours']:.2f}")
    return said


def run_of(entry: Entry, inputs: Any, harness: Harness) -> measure.Run:
    def prepare() -> None:
        harness.at(entry.label, "time")
        inputs.prepare(entry.contender.overwrites)

    return measure.Run(prepare, lambda: entry.contender.run(inputs), entry.contender.compiled)


COLUMNS = {
    "median_ms": ("ms", "{:.1f}"),
    "min_ms": ("min", "{:.1f}"),
    "iqr_ms": ("iqr", "{:.1f}"),
    "over_limit": ("x limit", "{:.2f}"),
    "over_baseline": ("x base", "{:.2f}"),
    "over_ours": ("x ours", "{:.2f}"),
    "target": ("target", "{}"),
    "tflops": ("TFLOP/s", "{:.3f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "percent": ("% limit", "{:.1f}"),
    "percent_target": ("target", "{}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "planned_mib": ("planned", "{:.0f}"),
    "peak_target": ("target", "{}"),
}
ERRORS = ("logps", "token_logps", "loss", "dhidden", "dweight", "dlogits")


def text(table: Row) -> str:
    """The table for the terminal: columns that no row has are left out."""
    rows = table["rows"]
    errors_found = [name for name in ERRORS if any(name in row.get("errors", {}) for row in rows)]
    columns = {key: column for key, column in COLUMNS.items() if any(row.get(key) not in (None, "") for row in rows)}
    lines = [["", *(name for name, _ in columns.values()), *(f"err {name}" for name in errors_found)]]
    for row in rows:
        cells = [row["name"]]
        for key, (_, form) in columns.items():
            value = row.get(key)
            cells.append("" if value is None else value if isinstance(value, str) else form.format(value))
        cells += [f"{row['errors'][name]:.1e}" if name in row.get("errors", {}) else "" for name in errors_found]
        lines.append(cells)
    notes = [f"{row['name']}: {row['reason']}" for row in rows if "reason" in row]
    if "ours" in table:
        notes += faster(table)
    return "\n".join([table["title"], *aligned(lines), *notes])


CSV_TABLE = ("mode", "mask", "dtype", "model", "N", "positions", "H", "V")
CSV_ROW = [
    *("name", "package", "version", "median_ms", "min_ms", "iqr_ms", "tflops", "gb_per_s", "limit", "over_limit"),
    *("over_ours", "peak_mib", "reason"),
]


def save_csv(path: Path, report: dict[str, Any]) -> None:
    """A line for each row of each table, with where it was measured."""
    environment = report["environment"]
    where = {"device": environment["device"]["name"], "threads": environment["threads"]}
    where |= {"commit": environment["commit"], "torch": environment["versions"]["torch"], "date": environment["date"]}
    errors_of = [f"err_{name}" for name in ERRORS]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*CSV_TABLE, *CSV_ROW, *errors_of, *where], extrasaction="ignore")
        writer.writeheader()
        for table in report["tables"]:
            for row in table["rows"]:
                found = {f"err_{name}": value for name, value in row.get("errors", {}).items()}
                writer.writerow(table | row | found | where)


def summary(tables: list[Row]) -> str:
    """A line for each table: ours by default options, and the time of others over it."""
    lines = [["", "ours", "ms", "x limit", "eager", "fastest other", "x ours"]]
    for table in tables:
        rows = {row["name"]: row for row in table["rows"]}
        others = [row for row in rows.values() if "over_ours" in row and not is_ours(row["package"])]
        cells = [table["title"], table["ours"]]
        own = rows.get(table["ours"], {})
        if "median_ms" in own:
            first: Row = min(others, key=lambda row: row["over_ours"], default={})
            found = (own["median_ms"], own.get("over_limit"), rows.get("eager", {}).get("over_ours"))
            cells += ["" if value is None else f"{value:.2f}" for value in found]
            cells += [first["name"], f"{first['over_ours']:.2f}"] if first else ["", ""]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    return "\n".join(["Others' time over ours by default options: below 1 they are faster", *aligned(lines)])


def aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def save(path: Path, report: dict[str, Any]) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=2) + "\n")
    part.replace(path)


def progress(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.0f} s  {line}", file=sys.stderr, flush=True)
