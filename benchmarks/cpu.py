"""Times the fused head on the CPU beside the bare matrix products and beside its peers; see README.md.

python benchmarks/cpu.py --impl cpu --rounds 5 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import peers
import torch
from cases import SEQUENCES, HeadCase, LogitsCase, batches, errors, wrong

from dpo_kernels.dispatch import choose

PARTS = ("A", "B", "C", "D", "peers", "batches", "E", "bf16")
SIZES = ((1024, 1024, 65536), (512, 2048, 151936))  # N, H, V
PACKAGES = ("dpo_kernels", "torch", "trl", "liger_kernel", "cut_cross_entropy", "transformers", "triton", "numpy")
LIMIT_TARGETS = {"A": "<= 1.08", "B": "<= 1.12", "C": "<= 1.10", "D": "<= 1.10"}
PEER_TARGETS = {"eager": ">= 1.2", "TRL": ">= 2.2"}
BATCH_TARGETS = {"eager": ">= 3", "TRL": ">= 5"}

STARTED = time.perf_counter()

Row = dict[str, Any]


class Entry(NamedTuple):
    """A contender in a comparison, and the entries of the same comparison that it is held against, by label."""

    label: str
    contender: peers.Contender
    case: HeadCase | LogitsCase
    limit: str | None = None
    baseline: str | None = None
    target: str = ""  # for what stands over the baseline, where there is one, else over the limit


def main() -> None:
    args = arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {
        "environment": measure.environment(PACKAGES),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "impl": choose(args.impl, torch.device("cpu")),
        "tables": [],
    }
    print(json.dumps(report["environment"], indent=2))
    for table in tables(args):
        report["tables"].append(table)
        print("\n" + text(table), flush=True)
        if args.json:  # after every table: a long run that is stopped leaves what it has
            args.json.write_text(json.dumps(report, indent=2) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--impl", default="auto", help="implementation of dpo_kernels (default: %(default)s)")
    add("--only", default=",".join(PARTS), help="parts to run (default: %(default)s)")
    add("--peers", nargs="+", metavar="NAME", help="of the peers only these, as the tables name them")
    add("--rounds", type=int, default=5, help="timed runs of each contender (default: %(default)s)")
    add("--batch-rounds", type=int, default=2, help="the same, on each real batch (default: %(default)s)")
    add("--tokens", type=int, help="labelled positions; one size instead of the two default ones")
    add("--hidden", type=int, help="hidden size, alike")
    add("--vocab", type=int, help="vocabulary size, alike")
    add("--lengths", type=Path, default=Path(__file__).with_name("lengths_en.json"), help="made by lengths.py")
    add("--batches", type=int, default=3, help="real batches (default: %(default)s)")
    add("--pairs", type=int, default=4, help="pairs in a real batch (default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens at which real pairs are cut (default: %(default)s)")
    add("--threads", type=int, help="default: PyTorch's own choice")
    add("--no-memory", action="store_true", help="do not measure memory, which takes a process for each contender")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing")
    add("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: expected some of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    if unknown := set(args.peers or ()) - set(peers.peers(padded=True)):
        parser.error(f"--peers: expected some of {list(peers.peers(padded=True))}, got {sorted(unknown)}")
    if args.quick:
        args.tokens, args.hidden, args.vocab = args.tokens or 64, args.hidden or 32, args.vocab or 512
        args.batches, args.pairs, args.max_length, args.rounds = 2, 2, 24, 2
    if args.tokens and args.tokens % (2 * SEQUENCES):
        parser.error(f"--tokens: expected a multiple of {2 * SEQUENCES}, got {args.tokens}")
    if min(args.rounds, args.batch_rounds, args.batches, args.pairs) < 1 or args.max_length < 2:
        parser.error("--rounds, --batch-rounds, --batches, --pairs: at least 1; --max-length: at least 2")
    return args


def tables(args: argparse.Namespace) -> Iterator[Row]:
    first = SIZES[0]
    sizes = list(SIZES)
    if args.tokens or args.hidden or args.vocab:
        sizes = [(args.tokens or first[0], args.hidden or first[1], args.vocab or first[2])]
    ours = peers.paths(args.impl)
    wanted = [key for key in ours if key in args.only]
    for size in sizes:
        if wanted or "peers" in args.only:
            yield all_labelled(HeadCase(*size), ours, wanted, args)
    if "batches" in args.only:
        yield real_batches(sizes[0], ours, args)
    for tokens, hidden, vocab in sizes:
        if "E" in args.only:
            for dtype in (torch.float32, torch.bfloat16):
                yield from from_logits(LogitsCase(tokens, vocab, dtype), args)
        if "bf16" in args.only:
            yield half_precision(HeadCase(tokens, hidden, vocab), ours, args)


def all_labelled(case: HeadCase, ours: dict[str, peers.Contender], wanted: list[str], args: argparse.Namespace) -> Row:
    others = chosen(peers.peers(padded=False), args) if "peers" in args.only else {}
    if others and "C" not in wanted:  # what the peers are held against
        wanted = [*wanted, "C"]
    counts = sorted({ours[key].products for key in wanted})
    entries = [Entry(peers.LIMITS[count].name, peers.LIMITS[count], case) for count in counts]
    for key in wanted:
        limit = peers.LIMITS[ours[key].products].name
        entries.append(Entry(ours[key].name, ours[key], case, limit, target=LIMIT_TARGETS[key]))
    entries += held_against_c(others, case, ours, PEER_TARGETS)
    return compare(f"Every position labelled: {case.name}", entries, args.rounds, args)


def chosen(others: dict[str, peers.Contender], args: argparse.Namespace) -> dict[str, peers.Contender]:
    return {name: other for name, other in others.items() if args.peers is None or name in args.peers}


def held_against_c(
    others: dict[str, peers.Contender], case: HeadCase, ours: dict[str, peers.Contender], targets: dict[str, str]
) -> list[Entry]:
    limit, c = peers.LIMITS[3].name, ours["C"].name
    return [Entry(name, other, case, limit, c, targets.get(name, "")) for name, other in others.items()]


def real_batches(size: tuple[int, int, int], ours: dict[str, peers.Contender], args: argparse.Namespace) -> Row:
    """Medians over the batches, of times and of ratios; memory of the first."""
    _, hidden, vocab = size
    found: list[Row] = []
    for case in batches(args.lengths, args.batches, args.pairs, args.max_length, hidden, vocab):
        limits = [Entry(peers.LIMITS[count].name, peers.LIMITS[count], case) for count in (3, 4)]
        mine = [Entry(ours[k].name, ours[k], case, peers.LIMITS[ours[k].products].name) for k in ("C", "D")]
        others = held_against_c(chosen(peers.peers(padded=True), args), case, ours, BATCH_TARGETS)
        entries = [*limits, *mine, *others]
        found.append(compare(case.name, entries, args.batch_rounds, args, memory=not found))
    rows = []
    for alike in zip(*(table["rows"] for table in found), strict=True):
        row = dict(alike[0])
        for name in ("median_ms", "min_ms", "iqr_ms", "over_limit", "over_baseline", "tflops"):
            values = [other[name] for other in alike if name in other]
            if values:
                row[name] = statistics.median(values)
        rows.append(row)
    share = sum(table["labelled"] for table in found) / sum(table["positions"] for table in found)
    title = f"Real batches: {args.batches} of {args.pairs} pairs, cut at {args.max_length} tokens, {share:.0%} of the "
    return {"title": f"{title}positions labelled, H={hidden} V={vocab}", "rows": rows, "batches": found}


def from_logits(case: LogitsCase, args: argparse.Namespace) -> Iterator[Row]:
    for backward in (False, True):
        contenders = peers.from_logits(args.impl, case.dtype, backward=backward)
        limit = next(iter(contenders))
        entries = []
        for name, contender in contenders.items():
            against = "E" if name.startswith("eager") else None
            exact = name == ("eager" if case.dtype == torch.float32 else "eager in fp32")
            target = ">= 2.5" if exact and not backward else ""
            entries.append(Entry(name, contender, case, None if name == limit else limit, against, target))
        table = compare(f"E, forward{' and backward' * backward}: {case.name}", entries, args.rounds, args)
        for row in table["rows"]:
            if "median_ms" in row:  # as much traffic as there must be
                row["gb_per_s"] = (3 if backward else 1) * case.nbytes / row["median_ms"] / 1e6
        yield table


def half_precision(case: HeadCase, ours: dict[str, peers.Contender], args: argparse.Namespace) -> Row:
    half = HeadCase(case.tokens, case.hidden, case.vocab, dtype=torch.bfloat16)
    entries = []
    for contender in [*ours.values(), peers.Contender("eager", peers.eager)]:
        target = "" if contender.name == "eager" else "<= 1.3"
        entries.append(Entry(f"{contender.name}, fp32", contender, case))
        entries.append(Entry(f"{contender.name}, bf16", contender, half, None, entries[-1].label, target))
    return compare(f"bf16 over fp32: {case.size}", entries, args.rounds, args)


def compare(title: str, entries: list[Entry], rounds: int, args: argparse.Namespace, *, memory: bool = True) -> Row:
    """Checks every entry against fp64 (which warms it up), times those that are right, and measures their memory."""
    progress(title)
    rows: dict[str, Row] = {}
    for entry in entries:
        package = entry.contender.package
        rows[entry.label] = {"name": entry.label, "package": package, "version": measure.version(package)}
    inputs: dict[Any, Any] = {entry.case: None for entry in entries}
    for case in inputs:
        inputs[case] = case.inputs()
        oracle = case.oracle(inputs[case])
        for entry in entries:
            if entry.case == case:
                progress(f"  {entry.label}: check")
                rows[entry.label].update(check(entry, inputs[case], oracle))
        del oracle  # gigabytes

    able = [entry for entry in entries if "reason" not in rows[entry.label]]
    runs = [run_of(entry, inputs[entry.case]) for entry in able]
    samples = measure.interleaved(runs, rounds, progress=lambda line: progress(f"  {line}"))
    for entry, seconds in zip(able, samples, strict=True):
        row = rows[entry.label]
        row.update(measure.spread(seconds), samples_ms=[s * 1e3 for s in seconds])
        if isinstance(entry.case, HeadCase):
            row["tflops"] = entry.case.flops(entry.contender.products) / row["median_ms"] / 1e9
    for entry in able:
        row = rows[entry.label]
        for what, other in (("limit", entry.limit), ("baseline", entry.baseline)):
            if other is not None and "median_ms" in rows[other]:
                row |= {what: other, f"over_{what}": row["median_ms"] / rows[other]["median_ms"]}
        row["target"] = entry.target
    positions = {case: made.labels.numel() for case, made in inputs.items()}
    del inputs, runs
    if memory and not args.no_memory:
        for entry in able:
            if rows[entry.label]["errors"]:  # a limit computes nothing
                progress(f"  {entry.label}: memory")
                rows[entry.label]["peak_mib"] = measure.peak_memory(
                    entry.contender, entry.case, torch.get_num_threads()
                )
    first = entries[0].case
    return {"title": title, "labelled": first.tokens, "positions": positions[first], "rows": list(rows.values())}


def check(entry: Entry, inputs: Any, oracle: Any) -> Row:
    """Errors, and the reason why the entry takes no part, if it does not."""
    ours = entry.contender.package == "dpo_kernels"  # which is here, be it installed or on the path
    if not ours and measure.version(entry.contender.package) is None:
        return {"reason": f"{entry.contender.package} is not installed"}
    inputs.prepare(entry.contender.overwrites)
    try:
        result = entry.contender.run(inputs)
    except Exception as error:  # a peer may fail in any way; the row says how
        if ours:
            raise
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}
    found = errors(result, oracle)
    reason = wrong(found, entry.case)
    return {"errors": found} | ({"reason": reason} if reason else {})


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def run_of(entry: Entry, inputs: Any) -> measure.Run:
    return measure.Run(lambda: inputs.prepare(entry.contender.overwrites), lambda: entry.contender.run(inputs))


COLUMNS = {
    "median_ms": ("ms", "{:.1f}"),
    "min_ms": ("min", "{:.1f}"),
    "iqr_ms": ("iqr", "{:.1f}"),
    "over_limit": ("x limit", "{:.2f}"),
    "over_baseline": ("x base", "{:.2f}"),
    "target": ("target", "{}"),
    "tflops": ("TFLOP/s", "{:.3f}"),
    "gb_per_s": ("GB/s", "{:.1f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
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
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    reasons = [f"{row['name']}: {row['reason']}" for row in rows if "reason" in row]
    return "\n".join([table["title"], *shown, *reasons])


def progress(line: str) -> None:
    print(f"{time.perf_counter() - STARTED:6.0f} s  {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
