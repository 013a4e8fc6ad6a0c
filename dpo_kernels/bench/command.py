"""`dpo-kernels bench`: ours, eager PyTorch and every peer that is installed, on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dpo_kernels import dispatch, measure
from dpo_kernels.bench import charts
from dpo_kernels.bench.cases import SEQUENCES, HeadCase, LogitsCase
from dpo_kernels.bench.contenders import LIMITS, READ, READ_AND_SCALE, from_logits, variants
from dpo_kernels.bench.peers import forward_only, frozen_head, head_peers, logits_peers
from dpo_kernels.bench.report import (
    PACKAGES,
    Entry,
    Harness,
    Row,
    compare,
    failed,
    hold_against,
    save,
    save_csv,
    summary,
    text,
)
from dpo_kernels.data.lengths import real_lengths
from dpo_kernels.models.shapes import find_shape
from dpo_kernels.options import Impl
from dpo_kernels.tuning.trial import tune_first
from dpo_kernels.verdicts import Head

DESCRIPTION = """\
Times the head and the loss of DPO, from hidden states (or from logits) to the gradients, beside what others compute the
same with and beside the bare matrix products, which are the limit. Takes one table for each combination of what is
given. Every result is checked against fp64 before it is timed, all are run by turns, and peers that are missing are
named.
"""
MODES = ("forward", "frozen", "train", "logits")
MASKS = {"all": "every position labelled", "real": "real batch", "responses": "responses of a real batch"}
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_SIZE = {"cpu": (512, 512, 32768), "cuda": (8192, 4096, 128256)}  # N, H, V
LONGEST = 1024  # positions of a sequence where all are labelled
QUICK_SIZE = (64, 32, 512)
# What takes less, in milliseconds, is too small: a call by itself takes one to three, whose work a GPU does meanwhile.
TOO_SHORT = {"cpu": 10.0, "cuda": 1.0}
# Of ours, the paths that do what a mode asks for; the products that it takes at least; what peers leave out.
PATHS = {"forward": ("A", 1, forward_only), "frozen": ("B", 2, frozen_head), "train": ("CD", 3, None)}
# Shown once, where the head is trained: on a CPU the same peers do better in another row.
SLOWER_ON_CPU = ("Liger, not compiled", "F.linear_cross_entropy")


class Job(NamedTuple):
    """One table."""

    mode: str
    mask: str
    case: HeadCase | LogitsCase
    model: str
    backward: bool = True

    @property
    def title(self) -> str:
        what = {"forward": "Forward only", "frozen": "Frozen head", "train": "Trained head"}.get(self.mode)
        what = what or f"From logits, forward{' and backward' * self.backward}"
        return f"{what}, {MASKS[self.mask]}: {self.case.name}{f' ({self.model})' * bool(self.model)}"

    @property
    def labels(self) -> Row:
        """What distinguishes this table from the others, for CSV and charts."""
        mode = self.mode if self.mode != "logits" else f"logits, forward{' and backward' * self.backward}"
        dtype = str(self.case.dtype).removeprefix("torch.")
        hidden = self.case.hidden if isinstance(self.case, HeadCase) else None
        return {
            "mode": mode,
            "mask": self.mask,
            "dtype": dtype,
            "model": self.model,
            "N": self.case.tokens,
            "H": hidden,
            "V": self.case.vocab,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="NAME", help="hidden and vocabulary size of these models")
    add("--tokens", nargs="+", type=int, metavar="N", help="labelled tokens; default: 512 on a CPU, 8192 on a GPU")
    add("--hidden", nargs="+", type=int, metavar="H", help="hidden size; default: 512 on a CPU, 4096 on a GPU")
    add("--vocab", nargs="+", type=int, metavar="V", help="vocabulary size; default: 32768 on a CPU, 128256 on a GPU")
    add("--mode", nargs="+", choices=MODES, default=["train"], help="what is computed (default: train)")
    add(
        "--mask",
        nargs="+",
        choices=MASKS,
        default=["all"],
        help="every position labelled; or a padded batch with lengths of real preference pairs; or its responses "
        "alone, as the head gets them where each prompt is there once (default: all)",
    )
    add("--max-length", type=int, default=1024, help="tokens at which real pairs are cut (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, help="of the inputs; default: float32 on a CPU, bfloat16 on a GPU")
    add("--device", help="default: the first GPU, else the CPU")
    add("--impl", nargs="+", choices=dispatch.IMPLEMENTATIONS, help="of ours only these; default: all that run here")
    add("--peers", nargs="*", metavar="NAME", help="of the others only these, as the tables name them; none, if empty")
    add("--chunk-gib", type=float, metavar="GIB", help="time the fused loss with this chunk_bytes too")
    add("--rounds", type=int, default=7, help="timed runs of each (default: %(default)s)")
    add("--seconds", type=float, default=120, help="of a table's rounds beyond the third (default: %(default)s)")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--no-memory", action="store_true", help="do not measure memory, for which a CPU needs a process each")
    add("--json", type=Path, metavar="FILE", help="write all samples, versions and machine, after every table")
    add("--csv", type=Path, metavar="FILE", help="write a line for each row")
    add("--plot", type=Path, metavar="FOLDER", help="draw bars for every table, and curves over --tokens and --vocab")
    add("--no-tune", action="store_true", help="do not try our kernels first on a device that has no verdict")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing")


def run(options: argparse.Namespace) -> int:
    device = _device(options.device)
    if options.plot:
        charts.require_matplotlib()
    for path in (options.json, options.csv):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads: expected at least 1, got {options.threads}")
        torch.set_num_threads(options.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # whose streams the events are recorded on
    impls, unavailable = _implementations(options.impl, device)
    _check_peers(options.peers or (), device)
    jobs = list({(job.mode, job.case, job.backward): job for job in _jobs(options, device)}.values())
    for head in dict.fromkeys(_head(job, device) for job in jobs):
        tune_first("auto", device, head, wanted=not (options.no_tune or options.quick or options.impl))
    entries = [list(_entries(job, impls, device, options)) for job in jobs]
    report: dict[str, Any] = {
        "environment": measure.environment(PACKAGES) | {"device": measure.describe(device)},
        "gpu": measure.gpu(device) if device.type == "cuda" else None,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "unavailable": unavailable,
        "tables": [],
        "left_out": [],
    }
    print("\n".join([_heading(report), *_not_compared(options, device)]))
    bar = _Bar([len(of_job) * (1 + options.rounds + (not options.no_memory)) for of_job in entries])
    try:
        for job, of_job in zip(jobs, entries, strict=True):
            harness = Harness(options.rounds, device, options.seconds, not options.no_memory, at=bar.step)
            try:
                table = compare(job.title, of_job, harness) | job.labels
            except (RuntimeError, MemoryError) as error:  # no memory for the inputs, or for the right answers
                report["left_out"].append(f"{job.title}: {measure.described(error)}")
                bar.finish_table("\nleft out: " + report["left_out"][-1])
                continue
            report["tables"].append(hold_against(table, _default_row(job, impls, device)))
            bar.finish_table("\n".join(["", text(table), *_too_small(job, table, device)]))
            if options.json:
                save(options.json, report)
            if options.csv:
                save_csv(options.csv, report)
    except KeyboardInterrupt:
        if not report["tables"]:
            raise
        print(f"\ninterrupted in table {len(report['tables']) + 1} of {len(jobs)}", file=sys.stderr)
    finally:
        bar.close()
    if len(report["tables"]) > 1:
        print("\n" + summary(report["tables"]))
    for picture in charts.draw(report["tables"], options.plot) if options.plot else ():
        print(picture)
    without = failed(report["tables"]) + report["left_out"]
    if without:
        print("\n".join(["without a result:", *without]), file=sys.stderr)
    return 1 if without or len(report["tables"]) < len(jobs) else 0


def _device(name: str | None) -> torch.device:
    try:
        found = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:  # torch knows no such device
        raise ValueError(f"--device: {error}") from error
    if found.type not in DEFAULT_SIZE:
        raise ValueError(f"--device: expected a CPU or a CUDA device, got {name!r}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: this PyTorch sees no GPU, got {name!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    return found


def _implementations(wanted: Sequence[str] | None, device: torch.device) -> tuple[list[Impl], dict[str, str]]:
    """Ours that run here, and why the others do not. One that was asked for must."""
    if wanted:
        return list(dict.fromkeys(dispatch.check_runs(impl, device) for impl in wanted)), {}
    reasons = {impl: dispatch.unavailable_reason(impl, device) for impl in dispatch.IMPLEMENTATIONS}
    able = [impl for impl, reason in reasons.items() if reason is None]
    return able, {impl: reason for impl, reason in reasons.items() if reason is not None}


def _head(job: Job, device: torch.device) -> Head:
    """What kernels are tried for; logits come of no hidden size."""
    hidden = job.case.hidden if isinstance(job.case, HeadCase) else DEFAULT_SIZE[device.type][1]
    return Head(str(job.case.dtype).removeprefix("torch."), hidden, job.case.vocab)


def _jobs(options: argparse.Namespace, device: torch.device) -> Iterator[Job]:
    """Checks all that was given before anything runs."""
    for name in ("tokens", "hidden", "vocab"):
        for value in getattr(options, name) or ():
            if value < 1:
                raise ValueError(f"--{name}: expected positive numbers, got {value}")
    if min(options.rounds, options.max_length - 1) < 1:
        raise ValueError("--rounds: expected at least 1; --max-length: at least 2")
    if options.chunk_gib is not None and options.chunk_gib <= 0:
        raise ValueError(f"--chunk-gib: expected a positive number, got {options.chunk_gib}")
    if options.model and (options.hidden or options.vocab):
        raise ValueError("--model: a model says --hidden and --vocab already, got both")
    tokens, hidden, vocab = QUICK_SIZE if options.quick else DEFAULT_SIZE[device.type]
    heads = [(h, v, "") for h, v in product(options.hidden or [hidden], options.vocab or [vocab])]
    if options.model:
        shapes = [(name, find_shape(name)) for name in options.model]
        heads = [(shape.hidden, shape.vocab, name) for name, shape in shapes]
    dtypes = options.dtype or ["float32" if device.type == "cpu" else "bfloat16"]
    for (h, v, model), mode, mask, dtype, n in product(
        heads, options.mode, options.mask, dtypes, options.tokens or [tokens]
    ):
        sequences = max(SEQUENCES, 2 * (n // (2 * LONGEST)))
        if mask == "all" and n % sequences:
            raise ValueError(f"--tokens: expected a multiple of {sequences}, the number of sequences, got {n}")
        lengths = () if mask == "all" else real_lengths(n, options.max_length)
        if mask == "responses":  # behind the one hidden state that predicts the first token of either
            lengths = tuple((1, chosen, rejected) for _, chosen, rejected in lengths)
        of = {"lengths": lengths, "dtype": getattr(torch, dtype), "device": str(device)}
        labelled = sum(chosen + rejected for _, chosen, rejected in lengths) or n
        if mode == "logits":
            yield Job(mode, mask, LogitsCase(labelled, v, **of), model, backward=False)
            yield Job(mode, mask, LogitsCase(labelled, v, **of), model)
        else:
            yield Job(mode, mask, HeadCase(labelled, h, v, sequences=sequences, **of), model)


def _entries(job: Job, impls: Sequence[Impl], device: torch.device, options: argparse.Namespace) -> Iterator[Entry]:
    """The limit, ours, and the others."""
    chunk_bytes = None if options.chunk_gib is None else int(options.chunk_gib * 2**30)
    traffic = 0
    if isinstance(job.case, LogitsCase):
        limit = READ_AND_SCALE if job.backward else READ
        ours = [contender for impl in impls for contender in from_logits(impl, backward=job.backward)]
        others = list(logits_peers(job.case.dtype, backward=job.backward).values())
        traffic = job.case.traffic(backward=job.backward)
    else:
        keys, products, restrict = PATHS[job.mode]
        limit = LIMITS[products]
        ours = [contender for key in keys for impl in impls for contender in variants(key, impl, job.case, chunk_bytes)]
        others = [
            replace(peer, products=products, run=peer.run if restrict is None else partial(restrict, peer=peer.run))
            for name, peer in head_peers(device, padded=job.mask != "all").items()
            if name not in _left_out(job.mode, options, device)
        ]
    yield Entry(limit.name, limit, job.case, traffic=traffic)
    for contender in [*ours, *(peer for peer in others if options.peers is None or peer.name in options.peers)]:
        yield Entry(contender.name, contender, job.case, limit.name, traffic=traffic)


def _default_row(job: Job, impls: Sequence[Impl], device: torch.device) -> str:
    """The name of what default options take; of the first implementation, if others were asked for."""
    case = job.case
    path: Any = "E" if isinstance(case, LogitsCase) else PATHS[job.mode][0][0]
    hidden = case.hidden if isinstance(case, HeadCase) else None
    family = dispatch.choose("auto", device, path, case.dtype, case.vocab, hidden)
    if dispatch.impl_of(family) not in impls:
        family = dispatch.choose(impls[0], device, path, case.dtype, case.vocab, hidden)
    impl = dispatch.impl_of(family)
    if isinstance(case, LogitsCase):
        return from_logits(impl, backward=job.backward)[0].name
    return variants(path, impl, case)[-1 if dispatch.is_fused(family) else 0].name


def _left_out(mode: str, options: argparse.Namespace, device: torch.device) -> tuple[str, ...]:
    """Unless they are asked for by name."""
    return SLOWER_ON_CPU if device.type == "cpu" and mode in ("forward", "frozen") and options.peers is None else ()


def _not_compared(options: argparse.Namespace, device: torch.device) -> Iterator[str]:
    if device.type == "cpu" and options.peers is None:
        others = [name for name in head_peers(torch.device("cuda"), padded=False)]
        missing = [name for name in others if name not in head_peers(device, padded=False)]
        yield f"need a GPU: {', '.join(missing)}"
    for mode in options.mode:
        if left_out := _left_out(mode, options, device):
            yield f"mode {mode} is without {' and '.join(left_out)}: slower than other rows of the same peers"


def _check_peers(wanted: Sequence[str], device: torch.device) -> None:
    known = [*head_peers(device, padded=True), *logits_peers(torch.bfloat16, backward=True)]
    if unknown := sorted(set(wanted) - set(known)):
        raise ValueError(f"--peers: expected some of {sorted(set(known))}, got {unknown}")


def _too_small(job: Job, table: Row, device: torch.device) -> Iterator[str]:
    """Whose times are more the call's than the work's, and what to raise."""
    least = TOO_SHORT[device.type]
    short = [row["name"] for row in table["rows"] if row.get("errors") and row.get("median_ms", least) < least]
    if short:
        sizes = "--tokens or --vocab" if isinstance(job.case, LogitsCase) else "--tokens, --hidden or --vocab"
        yield f"too small to mean anything, less than {least:g} ms a call: {'; '.join(short)}. Raise {sizes}"


def _heading(report: dict[str, Any]) -> str:
    """The machine, and what is not compared."""
    environment = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    device = environment["device"]
    name = device["name"] if device["type"] == "cuda" else f"{environment['cpu']}, {environment['threads']} threads"
    lines = [f"{name}; {versions}"]
    lines += [f"dpo_kernels impl={impl!r} does not run here: {why}" for impl, why in report["unavailable"].items()]
    return "\n".join(lines)


class _Bar:
    """Progress on standard error, in runs; `planned`: of each table."""

    def __init__(self, planned: list[int]) -> None:
        from tqdm import tqdm

        self._planned, self._bar = planned, tqdm(total=sum(planned), unit="run", leave=False)
        self._tables = 0

    def step(self, label: str, what: str) -> None:
        self._bar.set_postfix_str(f"{label}: {what}", refresh=sys.stderr.isatty())
        if what in ("check", "time", "memory"):
            self._bar.update()

    def finish_table(self, table: str) -> None:
        """Entries that failed, or rounds that there was no time for, count as done."""
        self._tables += 1
        self._bar.write(table, file=sys.stdout)
        self._bar.update(sum(self._planned[: self._tables]) - self._bar.n)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()
