"""Times the fused head on the CPU beside the bare matrix products and beside its peers; see README.md.

python benchmarks/cpu.py --impl cpu --rounds 5 --json out.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contenders
import measure
import torch
from cases import SEQUENCES, HeadCase, LogitsCase, batches
from contenders import LIMITS, Contender
from peers import eager, peers
from report import PACKAGES, Entry, Harness, Row, compare, failed, progress, save, text

from dpo_kernels.dispatch import choose

PARTS = ("A", "B", "C", "D", "peers", "batches", "E", "bf16")
SIZES = ((1024, 1024, 65536), (512, 2048, 151936))  # N, H, V
LIMIT_TARGETS = {"A": "<= 1.08", "B": "<= 1.12", "C": "<= 1.10", "D": "<= 1.10"}
PEER_TARGETS = {"eager": ">= 1.2", "TRL": ">= 2.2"}
BATCH_TARGETS = {"eager": ">= 3", "TRL": ">= 5"}


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
            save(args.json, report)
    if without := failed(report["tables"]):
        sys.exit("\n".join(without))


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
    if unknown := set(args.peers or ()) - set(peers(padded=True)):
        parser.error(f"--peers: expected some of {list(peers(padded=True))}, got {sorted(unknown)}")
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
    ours = contenders.paths(args.impl)
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


def all_labelled(case: HeadCase, ours: dict[str, Contender], wanted: list[str], args: argparse.Namespace) -> Row:
    others = chosen(peers(padded=False), args) if "peers" in args.only else {}
    if others and "C" not in wanted:  # what the peers are held against
        wanted = [*wanted, "C"]
    counts = sorted({ours[key].products for key in wanted})
    entries = [Entry(LIMITS[count].name, LIMITS[count], case) for count in counts]
    for key in wanted:
        limit = LIMITS[ours[key].products].name
        entries.append(Entry(ours[key].name, ours[key], case, limit, target=LIMIT_TARGETS[key]))
    entries += held_against_c(others, case, ours, PEER_TARGETS)
    return compare(f"Every position labelled: {case.name}", entries, harness(args))


def harness(args: argparse.Namespace, rounds: int | None = None, *, memory: bool = True) -> Harness:
    def at(label: str, what: str) -> None:
        if what != "time":
            progress(f"  {label}: {what}")

    return Harness(rounds or args.rounds, memory=memory and not args.no_memory, at=at)


def chosen(others: dict[str, Contender], args: argparse.Namespace) -> dict[str, Contender]:
    return {name: other for name, other in others.items() if args.peers is None or name in args.peers}


def held_against_c(
    others: dict[str, Contender], case: HeadCase, ours: dict[str, Contender], targets: dict[str, str]
) -> list[Entry]:
    limit, c = LIMITS[3].name, ours["C"].name
    return [Entry(name, other, case, limit, c, targets.get(name, "")) for name, other in others.items()]


def real_batches(size: tuple[int, int, int], ours: dict[str, Contender], args: argparse.Namespace) -> Row:
    """Medians over the batches, of times and of ratios; memory of the first."""
    _, hidden, vocab = size
    found: list[Row] = []
    for case in batches(args.lengths, args.batches, args.pairs, args.max_length, hidden, vocab):
        limits = [Entry(LIMITS[count].name, LIMITS[count], case) for count in (3, 4)]
        mine = [Entry(ours[k].name, ours[k], case, LIMITS[ours[k].products].name) for k in ("C", "D")]
        others = held_against_c(chosen(peers(padded=True), args), case, ours, BATCH_TARGETS)
        entries = [*limits, *mine, *others]
        found.append(compare(case.name, entries, harness(args, args.batch_rounds, memory=not found)))
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
        held = contenders.from_logits(args.impl, case.dtype, backward=backward)
        limit = next(iter(held))
        entries = []
        for name, contender in held.items():
            against = "E" if name.startswith("eager") else None
            exact = name == ("eager" if case.dtype == torch.float32 else "eager in fp32")
            target = ">= 2.5" if exact and not backward else ""
            entries.append(Entry(name, contender, case, None if name == limit else limit, against, target))
        table = compare(f"E, forward{' and backward' * backward}: {case.name}", entries, harness(args))
        for row in table["rows"]:
            if "median_ms" in row:  # as much traffic as there must be
                row["gb_per_s"] = (3 if backward else 1) * case.nbytes / row["median_ms"] / 1e6
        yield table


def half_precision(case: HeadCase, ours: dict[str, Contender], args: argparse.Namespace) -> Row:
    half = HeadCase(case.tokens, case.hidden, case.vocab, dtype=torch.bfloat16)
    entries = []
    for contender in [*ours.values(), Contender("eager", eager)]:
        target = "" if contender.name == "eager" else "<= 1.3"
        entries.append(Entry(f"{contender.name}, fp32", contender, case))
        entries.append(Entry(f"{contender.name}, bf16", contender, half, None, entries[-1].label, target))
    return compare(f"bf16 over fp32: {case.size}", entries, harness(args))


if __name__ == "__main__":
    main()
