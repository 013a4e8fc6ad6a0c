"""Times the fused head on a GPU in bf16 beside the bare matrix products and beside its peers; see README.md.

python benchmarks/gpu.py --seconds 280 --json out.json

One process does all of it, so that everything is interleaved. A second one only watches: a kernel that hangs, or that
leaves the device of no more use, is named in the table and left out, and the rest goes on without it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_kernels import dispatch, measure
from dpo_kernels.bench import contenders
from dpo_kernels.bench.cases import FLAT, HeadCase, LogitsCase
from dpo_kernels.bench.contenders import COPY, FP32_OUT, LIMITS, READ, READ_AND_SCALE, Contender, from_logits
from dpo_kernels.bench.peers import forward_only, frozen_head, head_peers, logits_peers
from dpo_kernels.bench.report import PACKAGES, Entry, Harness, Row, compare, failed, is_ours, progress, save, text
from dpo_kernels.data.lengths import real_lengths
from dpo_kernels.planning.head_memory import eager_bytes, ours_bytes, trl_bytes

PARTS = ("paths", "peers", "E", "tiles", "sizes", "memory", "masks", "flat")  # the most important first
SIZES = ((8192, 4096, 128256), (8192, 4096, 151936), (8192, 2048, 151936), (8192, 2048, 256000))  # N, H, V
LARGE, LARGE_SEQUENCES = (32768, 4096, 151936), 32
QUICK = (32, 32, 256)
ONE_TILE = 4096  # columns of a head whose logits fit in one tile of 128 MiB, at the rows of SIZES
TILE_MIB = (32, 64, 128, 256)
TARGETS = {"A": "<= 1.08", "B": "<= 2.2", "C": "<= 3.3", "D": "<= 4.3"}
GPU = torch.device("cuda")  # whose peers are compared, on a CPU too
FIRST_PEERS = ("eager", "TRL")
TABLE_SECONDS = 15  # of timed rounds
GRACE_SECONDS = 15


class Job(NamedTuple):
    """One table."""

    part: str
    case: HeadCase | LogitsCase
    peers: tuple[str, ...] = ()
    rounds: int = 1
    backward: bool = False

    @property
    def title(self) -> str:
        if isinstance(self.case, LogitsCase):
            return f"E, forward{' and backward' * self.backward}: {self.case.name}"
        mask = "Real batch" if self.case.lengths else "Every position labelled"
        return f"{self.part}. {mask}: {self.case.name}"


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    reasons = {impl: dispatch.unavailable_reason(impl, device) for impl in args.impl}
    args.impl = [impl for impl, reason in reasons.items() if reason is None]
    report: dict[str, Any] = {
        "environment": measure.environment(PACKAGES),
        "gpu": measure.gpu(),
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "unavailable": {impl: reason for impl, reason in reasons.items() if reason is not None},
        "tables": [],
        "left_out": [],
    }
    print(json.dumps({name: value for name, value in report.items() if value != []}, indent=2), flush=True)
    args.deadline = time.time() + args.seconds
    if args.once:
        if failures := launch_once(args):
            sys.exit("\n".join(failures))
        return
    supervise(work, list(jobs(args)), args, report)
    for reason in report["left_out"]:
        print(f"\nleft out: {reason}")
    missed = [line for table in report["tables"] for line in misplanned(table)]
    if without := failed(report["tables"]) + report["left_out"] + missed:
        sys.exit("\n".join(without))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--impl", nargs="+", default=list(dispatch.IMPLEMENTATIONS), help="of dpo_kernels; default: all that run here")
    add("--only", default=",".join(PARTS), help="parts to run, in this order (default: %(default)s)")
    add("--peers", nargs="+", metavar="NAME", help="of the peers only these, as the tables name them")
    add("--rounds", type=int, default=15, help="timed runs of each contender (default: %(default)s)")
    add("--seconds", type=float, default=600, help="when they are over no table begins (default: %(default)s)")
    add("--patience", type=float, default=90, help="seconds that one call may take (default: %(default)s)")
    add("--chunk-gib", type=float, default=4, help="path C runs with its default, and with this (default: %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens at which real pairs are cut (default: %(default)s)")
    add("--device", default="cuda", help="cuda, or cpu to see that everything runs (default: %(default)s)")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing")
    add("--once", action="store_true", help="each of our kernels once, untimed, for a profiler; no tables")
    add("--commit", help="of a copy without its repository; default: DPO_KERNELS_COMMIT")
    add("--json", type=Path, help="where to write the results, after every table")
    args = parser.parse_args()
    for name, found, known in (
        ("--only", args.only.split(","), PARTS),
        ("--impl", args.impl, dispatch.IMPLEMENTATIONS),
        ("--peers", args.peers or (), head_peers(GPU, padded=True)),
    ):
        if unknown := sorted(set(found) - set(known)):
            parser.error(f"{name}: expected some of {list(known)}, got {unknown}")
    if args.rounds < 1 or args.max_length < 2:
        parser.error("--rounds: at least 1; --max-length: at least 2")
    if args.quick:
        args.rounds, args.max_length = min(args.rounds, 2), 16
    if args.commit:
        os.environ["DPO_KERNELS_COMMIT"] = args.commit
    return args


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    sizes, large = (SIZES, LARGE) if not args.quick else ((QUICK, QUICK), (2 * LARGE_SEQUENCES, *QUICK[1:]))
    half = {"dtype": torch.bfloat16, "device": args.device}
    case = HeadCase(*sizes[0], **half)
    tokens, hidden, vocab = sizes[0]
    everyone = tuple(name for name in head_peers(GPU, padded=True) if args.peers is None or name in args.peers)
    first = tuple(name for name in everyone if name in FIRST_PEERS)
    rest = tuple(name for name in everyone if name not in FIRST_PEERS)
    for part in args.only.split(","):
        job = partial(Job, part, rounds=args.rounds)
        if part == "paths":
            yield job(case, first)
        elif part == "peers" and rest:
            yield job(case, rest)
        elif part == "E":
            for dtype in (torch.bfloat16, torch.float32):
                for backward in (False, True):
                    yield job(LogitsCase(tokens, vocab, dtype=dtype, device=args.device), backward=backward)
        elif part == "tiles":
            yield job(case)
        elif part == "sizes":
            yield from (job(HeadCase(*size, **half), everyone) for size in sizes[1:])
        elif part == "memory":
            yield job(HeadCase(*large, **half, sequences=LARGE_SEQUENCES), everyone, rounds=1)
        elif part == "masks":
            lengths = real_lengths(tokens, args.max_length)
            yield job(HeadCase.of_pairs(lengths, hidden, vocab, **half), everyone)
        elif part == "flat":
            yield job(HeadCase(*sizes[0], **half, **FLAT), everyone)


def supervise(worker: Callable[..., None], left: list[Job], args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Starts the process that measures, writes down what it finds, and starts another after one that was lost."""
    excluded: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    while left and time.time() < args.deadline:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=worker, args=(left, excluded, args, sender))
        process.start()
        sender.close()
        try:
            done, at, lost = follow(receiver, left[0].title, args, report)
        finally:
            process.kill()
            process.join()
        left = left[done:]
        if left and time.time() < args.deadline:
            progress(f"lost at {at}: {lost}")
            if at in [entry.label for entry in entries_of(left[0], args)]:
                excluded[at] = lost
            else:  # nothing to leave out but the table
                report["left_out"].append(f"{left[0].title}: {lost}")
                left = left[1:]
    report["left_out"] += [f"{job.title}: out of time" for job in left]
    if args.json:
        save(args.json, report)


def follow(receiver: Connection, at: str, args: argparse.Namespace, report: dict[str, Any]) -> tuple[int, str, str]:
    """Until the process ends, or hangs: how many tables it finished, what it was at, and what became of it."""
    done = 0
    lost = "the process ended"
    while True:
        patience = min(args.patience, max(0.0, args.deadline + GRACE_SECONDS - time.time()))
        if not receiver.poll(patience):
            return done, at, f"it did not return within {patience:.0f} s"
        try:
            kind, content = receiver.recv()
        except (EOFError, OSError):  # within a message
            return done, at, lost
        if kind == "device":
            report["environment"]["device"] = content
        elif kind == "at":
            at = content
        elif kind == "error":
            lost = f"the process failed: {content}"
        else:
            done += 1
            report["tables"].append(content | {"gpu_then": measure.gpu()})
            print("\n" + text(content), flush=True)
            if args.json:
                save(args.json, report)


def work(left: list[Job], excluded: dict[str, str], args: argparse.Namespace, pipe: Connection) -> None:
    def at(label: str, what: str) -> None:
        pipe.send(("at", label))
        if what != "time":
            progress(f"  {label}: {what}")

    device = torch.device(args.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        pipe.send(("device", measure.describe(device)))
        for job in left:
            seconds = args.deadline - time.time()
            if seconds < 0:
                return
            seconds = min(TABLE_SECONDS, seconds)
            harness = Harness(job.rounds, device, seconds, device.type == "cuda", excluded, at, progress)
            pipe.send(("table", table(job, harness, args)))
    except Exception as error:
        pipe.send(("error", measure.described(error)))
        raise


def table(job: Job, harness: Harness, args: argparse.Namespace) -> Row:
    found = compare(job.title, entries_of(job, args), harness)
    rows = {row["name"]: row for row in found["rows"]}
    for row in rows.values():
        if "gb_per_s" in row:
            row["percent"] = 100 * row["gb_per_s"] / rows[COPY.name]["gb_per_s"]
        elif "over_limit" in row:
            row["percent"] = 100 / row.pop("over_limit")
    if isinstance(job.case, HeadCase) and job.part != "tiles":
        for name, mib in planned(job.case, args).items():
            if name in rows and "reason" not in rows[name]:
                rows[name]["planned_mib"] = mib
    return found | {"part": job.part}


def misplanned(table: Row) -> list[str]:
    """Which of ours took a tenth more or less than was planned."""
    rows = [row for row in table["rows"] if is_ours(row["package"]) and isinstance(row.get("peak_mib"), float)]
    return [
        f"{table['title']}: {row['name']} took {row['peak_mib']:.0f} MiB, planned were {row['planned_mib']:.0f}"
        for row in rows
        if "planned_mib" in row and abs(row["peak_mib"] / row["planned_mib"] - 1) > 0.1
    ]


def entries_of(job: Job, args: argparse.Namespace) -> list[Entry]:
    if isinstance(job.case, LogitsCase):
        return list(logits_entries(job, args))
    return list(tile_entries(job, args) if job.part == "tiles" else head_entries(job, args))


def tile_entries(job: Job, args: argparse.Namespace) -> Iterator[Entry]:
    """Every path with smaller tiles, that stay in the second-level cache, and larger ones, with less to add up."""
    yield Entry(LIMITS[1].name, LIMITS[1], job.case)
    for impl in args.impl:
        for key, contender in contenders.paths(impl).items():
            options = {"chunk_bytes": int(args.chunk_gib * 2**30)} if key == "C" else {}
            run = partial(contenders.with_tiles, run=partial(contender.run, **options), impl=impl)
            for mib in TILE_MIB:
                sized = replace(contender, name=f"{contender.name}, tiles of {mib} MiB")
                sized = replace(sized, run=partial(run, tile_bytes=mib * 2**20))
                yield Entry(sized.name, sized, job.case, baseline=LIMITS[1].name)


def head_entries(job: Job, args: argparse.Namespace) -> Iterator[Entry]:
    """The limits; then forward only, frozen head and trained head, each ours and then the peers."""
    g = LIMITS[1].name
    for contender in (*LIMITS.values(), FP32_OUT):
        yield Entry(contender.name, contender, job.case, baseline=None if contender.name == g else g)
    others = [peer for name, peer in head_peers(GPU, padded=bool(job.case.lengths)).items() if name in job.peers]
    modes = {"A": ("forward", forward_only, 1), "B": ("frozen head", frozen_head, 2), "CD": ("", None, 3)}
    for keys, (mode, restricted, products) in modes.items():
        for own in ours(job.case, args):
            if own.key in keys:
                limit = LIMITS[own.contender.products].name
                targets = {"target": TARGETS[own.key], "peak_target": f"<= {own.budget_mib:.0f}"}
                yield Entry(own.contender.name, own.contender, job.case, limit, g, **targets)
        for peer in others:
            if restricted is not None:
                if measure.version(peer.package) is None:
                    continue  # said once, where the head is trained
                run = partial(restricted, peer=peer.run)
                peer = replace(peer, name=f"{peer.name}, {mode}", run=run, products=products)
            yield Entry(peer.name, peer, job.case, LIMITS[products].name, g)


class Own(NamedTuple):
    """One of ours."""

    key: str  # of the path
    impl: str
    contender: Contender
    chunk_bytes: int | None

    @property
    def budget_mib(self) -> float:
        return (self.chunk_bytes or 2**30) / 2**20 if self.key == "C" else 0.3 * 1024


def ours(case: HeadCase, args: argparse.Namespace) -> Iterator[Own]:
    chunk_bytes = int(args.chunk_gib * 2**30)
    for impl in args.impl:
        for key in contenders.paths(impl):
            for contender in contenders.variants(key, impl, case, chunk_bytes):
                yield Own(key, impl, contender, chunk_bytes if contender.name.endswith("GiB") else None)


def planned(case: HeadCase, args: argparse.Namespace) -> dict[str, float]:
    """What `dpo-kernels plan` says each of ours, eager and TRL need, in MiB beside the gradients that they return."""
    labels = case.labels()
    common: dict[str, Any] = {"positions": labels.numel(), "hidden": case.hidden, "vocab": case.vocab}
    common["dtype"] = case.dtype
    found = {}
    for own in ours(case, args):
        if own.key == "A" and contenders.has_fused_forward(own.impl) and "fused" not in own.contender.name:
            continue  # not what would be taken
        options = {"impl": own.impl, "chunk_bytes": own.chunk_bytes, "pairs": len(labels) // 2}
        found[own.contender.name] = ours_bytes(
            own.key, tokens=case.tokens, device=case.device, **options, **common
        ).temporary
    for suffix, head, backward in ((", forward", True, False), (", frozen head", False, True), ("", True, True)):
        mode = {"train_head": head, "backward": backward}
        found[f"eager{suffix}"] = eager_bytes(**common, **mode).temporary
        found[f"TRL{suffix}"] = trl_bytes(tokens=case.tokens, device=case.device, **common, **mode).temporary
    return {name: size / 2**20 for name, size in found.items()}


def logits_entries(job: Job, args: argparse.Namespace) -> Iterator[Entry]:
    case = job.case
    assert isinstance(case, LogitsCase)
    yield Entry(COPY.name, COPY, case, traffic=2 * case.traffic(backward=False))
    limit = READ_AND_SCALE if job.backward else READ
    own = [contender for impl in args.impl for contender in from_logits(impl, backward=job.backward)]
    for contender in (limit, *own, *logits_peers(case.dtype, backward=job.backward).values()):
        target = ">= 85" if contender in own and not job.backward else ""
        traffic = case.traffic(backward=job.backward)
        yield Entry(contender.name, contender, case, traffic=traffic, percent_target=target)


def launch_once(args: argparse.Namespace) -> list[str]:
    """Runs what `launches` says between the marks that profilers take (`ncu --profile-from-start off`); what failed."""
    device, failures = torch.device(args.device), []
    for case, own in launches(args):
        inputs: Any = case.inputs()
        for contender in own:
            if time.time() > args.deadline:
                return [*failures, f"{contender.name}: out of time"]
            progress(f"{contender.name}: {case.name}")
            inputs.prepare(contender.overwrites)
            try:
                with profiled(device):
                    contender.run(inputs)
            except Exception as error:  # a kernel may fail in any way
                failures.append(f"{contender.name}: {measure.described(error)}")
        del inputs
    return failures


def launches(args: argparse.Namespace) -> Iterator[tuple[HeadCase | LogitsCase, list[Contender]]]:
    """What is one kernel on all of a head's logits, then what works on tiles, with a head of a single one: all of them
    at the sizes that the tables have."""
    tokens, hidden, vocab = QUICK if args.quick else SIZES[0]
    half = {"dtype": torch.bfloat16, "device": args.device}
    whole = HeadCase(tokens, hidden, vocab, **half)
    if fused := [own for impl in args.impl for own in contenders.variants("A", impl, whole)[1:]]:
        yield whole, fused
    yield LogitsCase(tokens, vocab, **half), [from_logits(impl, backward=True)[0] for impl in args.impl]
    in_tiles = [contenders.variants(key, impl, whole)[0] for key in "ABD" for impl in args.impl]
    yield replace(whole, vocab=min(vocab, ONE_TILE)), in_tiles


@contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize(device)
    finally:
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
