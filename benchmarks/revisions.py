"""Compares two revisions of this project, run by run: is the second one faster, and are its results the same?

    python benchmarks/revisions.py --base HEAD~3                  # against the working tree
    python benchmarks/revisions.py --base v0.1 --head main --only C --rounds 31 --json out.json

Each revision is checked out by itself, gets its native extension built, and runs in a process of its own. Both make the
same inputs and take turns. What measures them is this file's revision of `dpo_kernels.bench`, and of the lengths in
`dpo_kernels.data`, for both; nothing of the package is imported up here, since a worker has to take it from its own
revision.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
HARNESS = [REPOSITORY / "dpo_kernels" / folder for folder in ("bench", "data")]  # the cases, and their lengths
MODULES = ("verdicts", "measure")  # what it rests on, and an older revision lacks
WORKING_TREE = "working tree"
# Functions of `dpo_kernels.bench.contenders` by what they are called in the table, and what they are given.
OPERATIONS: dict[str, tuple[str, dict[str, bool]]] = {
    "A forward": ("path_a", {}),
    "B frozen head": ("path_b", {}),
    "C fused loss": ("path_c", {}),
    "D any loss": ("path_d", {}),
    "E forward": ("ours_from_logits", {"backward": False}),
    "E forward and backward": ("ours_from_logits", {"backward": True}),
}
DTYPES = ("float32", "bfloat16")
SOURCES = (".h", ".cpp", ".cu", ".cuh")
CONFIDENCE = 0.95  # that no row of a table takes noise for a difference
PAUSE = 0.01  # seconds between two turns: threads of the one go on looking for work for a while


class Operation(NamedTuple):
    """One row. Plain values: they go to processes that may have another revision of everything else."""

    name: str
    dtype: str
    device: str
    tokens: int
    hidden: int
    vocab: int

    def case(self) -> Any:
        from dpo_kernels.bench.cases import HeadCase, LogitsCase

        options: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "device": self.device}
        if self.name.startswith("E"):
            return LogitsCase(self.tokens, self.vocab, **options)
        return HeadCase(self.tokens, self.hidden, self.vocab, **options)


@dataclass
class Revision:
    """`root` holds its files. `impl` is what runs there; `problem` says why nothing does."""

    name: str
    commit: str
    root: Path
    notes: list[str] = field(default_factory=list)
    impl: str | None = None
    problem: str | None = None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.commit[:12]})"


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was checked out is taken away again
    parser, args = arguments()
    sys.path.insert(0, str(REPOSITORY))
    try:
        report = compare(args)
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")
    problems = [f"{row['operation']}, {row['dtype']}: {row['head']['reason']}" for row in report["rows"] if failed(row)]
    if problems:
        sys.exit("\n".join(problems))


def failed(row: dict[str, Any]) -> bool:
    return "reason" in row["head"]


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, metavar="REV", help="what is compared with: a commit, branch or tag")
    add("--head", default=WORKING_TREE, metavar="REV", help="what is compared (default: the %(default)s as it is)")
    add("--only", default="A,B,C,D,E", help="operations to run, by their letters (default: %(default)s)")
    add("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of the inputs (default: both)")
    add("--impl", default="auto", help="implementation; torch and triton need no build (default: %(default)s)")
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--tokens", type=int, default=512, help="labelled positions, a multiple of 16 (default: %(default)s)")
    add("--hidden", type=int, default=512, help="hidden size (default: %(default)s)")
    add("--vocab", type=int, default=32768, help="vocabulary size (default: %(default)s)")
    add("--rounds", type=int, default=21, help="timed runs of each operation in each revision (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="of each process (default: %(default)s)")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing")
    add("--json", type=Path, metavar="FILE", help="write all samples, versions and machine")
    args = parser.parse_args()
    args.only = args.only.split(",")
    known = sorted({name[0] for name in OPERATIONS})
    if unknown := sorted(set(args.only) - set(known)):
        parser.error(f"--only: expected some of {','.join(known)}, got {','.join(unknown)}")
    if args.quick:
        args.tokens, args.hidden, args.vocab, args.rounds = 64, 32, 512, min(args.rounds, 9)
    if args.tokens < 16 or args.tokens % 16:
        parser.error(f"--tokens: expected a multiple of 16, got {args.tokens}")
    if min(args.hidden, args.vocab, args.rounds, args.threads) < 1:
        parser.error("--hidden, --vocab, --rounds, --threads: expected at least 1")
    return parser, args


def compare(args: argparse.Namespace) -> dict[str, Any]:
    from dpo_kernels import measure
    from dpo_kernels.bench.report import PACKAGES, save

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="dpo_kernels-revisions-")))
        base = stack.enter_context(checked_out(args.base, "--base", scratch / "base", args))
        head = stack.enter_context(checked_out(args.head, "--head", scratch / "head", args))
        workers = [stack.enter_context(Worker(revision, args)) for revision in (base, head)]
        for revision, worker in zip((base, head), workers, strict=True):
            revision.impl, revision.problem = worker.answer()
            say("; ".join([f"{revision.label}: impl {revision.impl}", *revision.notes]))
            if revision.problem:
                raise ValueError(f"{revision.label} cannot be compared: {revision.problem}")
        if base.impl != head.impl:
            say(f"they run different implementations, {base.impl!r} and {head.impl!r}: --impl compares one")
        report: dict[str, Any] = {
            "environment": measure.environment(PACKAGES),
            "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "base": asdict(base) | {"root": str(base.root)},
            "head": asdict(head) | {"root": str(head.root)},
            "rows": [],
        }
        sizes = f"N={args.tokens} H={args.hidden} V={args.vocab}, {args.threads} threads, {args.rounds} rounds"
        print(f"base {base.label}, head {head.label}, impl {head.impl}\n{sizes}", flush=True)
        names = [name for name in OPERATIONS if name[0] in args.only]
        confidence = 1 - (1 - CONFIDENCE) / (len(names) * len(args.dtypes))
        for dtype in args.dtypes:
            oracles: dict[Any, Any] = {}
            for name in names:
                say(f"{name}, {dtype}")
                operation = Operation(name, dtype, args.device, args.tokens, args.hidden, args.vocab)
                row = compared(operation, workers, args.rounds, scratch, oracles)
                if "ratios" in row:
                    row |= interval(row["ratios"], confidence)
                report["rows"].append(row)
                if args.json:
                    save(args.json, report)
    print(text(report["rows"]))
    return report


# Revisions


@contextmanager
def checked_out(name: str, option: str, folder: Path, args: argparse.Namespace) -> Iterator[Revision]:
    """The files of a revision with its native extension, in a git worktree that goes away at the end."""
    if name == WORKING_TREE:
        yield working_tree()
        return
    commit = commit_of(name, option)
    try:
        git("worktree", "add", "--detach", str(folder), commit)
        revision = Revision(name, commit, folder)
        if wanted := extension_for(args.impl, args.device):
            build(revision, wanted)
        yield revision
    finally:
        with suppress(ValueError):  # if it was interrupted before there was one
            git("worktree", "remove", "--force", str(folder))


def working_tree() -> Revision:
    commit = commit_of("HEAD", "--head")
    notes = ["with uncommitted changes"] if git("status", "--porcelain") else []
    for extension, folder in (("_native", "cpu"), ("_cuda", "cuda")):
        sources = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in SOURCES]
        newest = max((path.stat().st_mtime for path in sources if path.parent.name in ("csrc", folder)), default=0.0)
        built = (REPOSITORY / "dpo_kernels").glob(f"{extension}.*.so")
        notes += [
            f"{path.name} is older than its sources: build it again" for path in built if path.stat().st_mtime < newest
        ]
    return Revision(WORKING_TREE, commit, REPOSITORY, notes)


def commit_of(name: str, option: str) -> str:
    if shutil.which("git") is None:
        raise ValueError(f"{option}: comparing revisions needs git, which is not installed")
    try:
        top = Path(git("rev-parse", "--show-toplevel")).resolve()
    except ValueError as error:
        raise ValueError(f"{option}: there are no revisions to compare in {REPOSITORY}: {error}") from None
    if top != REPOSITORY:
        raise ValueError(f"{option}: {REPOSITORY} is no git repository of its own, but lies in that of {top}")
    try:
        return git("rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    except ValueError:
        raise ValueError(f"{option}: expected a commit, branch or tag of {REPOSITORY}, got {name!r}") from None


def git(*arguments: str) -> str:
    """What it prints. It is never interrupted, neither by this process nor from the keyboard: one that is killed leaves
    a worktree that is locked."""
    command = ["git", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, **pipes) as process:
        try:
            out, problem = process.communicate()
        except BaseException:
            process.communicate()
            raise
    if process.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {problem.strip()}")
    return out.strip()


def extension_for(impl: str, device: str) -> str | None:
    """What DPO_KERNELS_BUILD has to say for this implementation; None: it needs no extension."""
    if impl == "auto":
        return "cuda" if device.startswith("cuda") else "cpu"
    return impl if impl in ("cpu", "cuda") else None


def build(revision: Revision, wanted: str) -> None:
    if not (revision.root / "setup.py").exists():
        revision.notes.append("it has no setup.py, so no native extension")
        return
    say(f"{revision.name}: building its extension for {wanted}")
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=revision.root,
        env={**os.environ, "DPO_KERNELS_BUILD": wanted},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-5:]
        raise ValueError(f"{revision.name}: its extension for {wanted} does not build: " + " / ".join(last))
    if not list((revision.root / "dpo_kernels").glob("*.so")):
        revision.notes.append("its setup.py builds no native extension")


# Workers


class Worker:
    """The process that runs a revision, seen from here."""

    def __init__(self, revision: Revision, args: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        settings = (str(revision.root), args.impl, args.device, args.threads)
        self.process = context.Process(target=work, args=(other, *settings), daemon=True)
        self.process.start()
        other.close()  # the worker's end is the only one: when it dies, this one hears of it

    def ask(self, *question: Any) -> Any:
        """The result and what went wrong, one of them None."""
        with suppress(OSError):  # it has died, as the answer will say
            self.pipe.send(question)
        return self.answer()

    def answer(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(10)
            return None, f"its process ended with status {self.process.exitcode}"

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.pipe.close()  # which ends it, unless it is busy
        self.process.join(1)
        self.process.kill()
        self.process.join()


def work(pipe: Connection, root: str, impl: str, device: str, threads: int) -> None:
    """Runs in a process of its own: answers with pairs of a result and what went wrong, one of them None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that asks takes care of it
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    try:
        pipe.send((load(root, impl, device), None))
    except Exception as error:  # an old revision may lack anything
        pipe.send((None, f"{type(error).__name__}: {error}"))
        return
    from dpo_kernels import measure

    runs: list[Any] = []  # the operation that is at hand

    def first(operation: Operation, file: Path) -> Path:
        runs.clear()  # and with it its inputs
        runs.append(run_of(operation, impl))
        runs[0].prepare()
        torch.save(tensors(runs[0].call()), file)
        return file

    def again() -> float:
        (found,) = measure.interleaved(runs, 1, device=torch.device(device))
        if isinstance(found, str):
            raise RuntimeError(found)
        return found[0]

    answers: dict[str, Callable[..., Any]] = {"first": first, "again": again}
    with suppress(EOFError):  # nobody asks any more
        while True:
            name, *rest = pipe.recv()
            try:
                pipe.send((answers[name](*rest), None))
            except Exception as error:
                pipe.send((None, measure.described(error)))


def load(root: str, impl: str, device: str) -> str:
    """The package of a revision, with this file's harness inside; what `impl` comes to there."""
    if not Path(root, "dpo_kernels", "__init__.py").exists():
        raise ImportError("it has no dpo_kernels/__init__.py")
    sys.path.insert(0, root)
    import dpo_kernels

    found = Path(dpo_kernels.__file__).resolve()
    if not found.is_relative_to(Path(root).resolve()):
        raise ImportError(f"dpo_kernels was imported from {found}, not from {root}")
    for folder in HARNESS:
        harness = ModuleType(f"dpo_kernels.{folder.name}")
        harness.__path__ = [str(folder)]
        sys.modules[harness.__name__] = harness
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(f"dpo_kernels.{name}", REPOSITORY / "dpo_kernels" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        setattr(dpo_kernels, name, sys.modules[spec.name])
        spec.loader.exec_module(sys.modules[spec.name])
    import dpo_kernels.bench.contenders
    from dpo_kernels import dispatch

    if not hasattr(dispatch, "check_runs"):  # of a revision from before there were verdicts
        return dispatch.choose(impl, torch.device(device))
    return dispatch.default(torch.device(device)) if impl == "auto" else dispatch.check_runs(impl, torch.device(device))


def run_of(operation: Operation, impl: str) -> Any:
    from dpo_kernels import measure
    from dpo_kernels.bench import contenders

    name, options = OPERATIONS[operation.name]
    inputs = operation.case().inputs()
    call = partial(getattr(contenders, name), inputs, impl=impl, **options)
    return measure.Run(partial(inputs.prepare, False), call)


def tensors(result: Any) -> dict[str, torch.Tensor]:
    found = {name: getattr(result, name) for name in ("logps", "token_logps", "loss")}
    found |= {f"d{name}": gradient for name, gradient in result.gradients.items()}
    return {name: value.detach().cpu() for name, value in found.items() if value is not None}


# Comparison


def compared(
    operation: Operation, workers: list[Worker], rounds: int, scratch: Path, oracles: dict[Any, Any]
) -> dict[str, Any]:
    """Both revisions' results are held against fp64 and against one another; those that are right are timed."""
    from dpo_kernels import measure
    from dpo_kernels.bench.cases import sigmoid_loss

    case = operation.case()
    if case not in oracles:
        oracles.clear()  # gigabytes
        oracles[case] = case.oracle(case.inputs(), sigmoid_loss)
    sides: list[dict[str, Any]] = [{}, {}]
    results = []
    for number, (side, worker) in enumerate(zip(sides, workers, strict=True)):
        file, problem = worker.ask("first", operation, scratch / f"{number}.pt")
        if problem:
            side["reason"] = problem
            continue
        results.append(torch.load(file, weights_only=True))
        side.update(check(results[-1], oracles[case], case))
    row: dict[str, Any] = {"operation": operation.name, "dtype": operation.dtype}
    row |= {"base": sides[0], "head": sides[1]}
    if len(results) == 2:
        row["difference"] = differences(*results)
    samples: list[list[float]] = [[], []]
    for number in range(rounds):
        for turn in (0, 1):
            which = (number + turn) % 2
            if "reason" in sides[which]:
                continue
            time.sleep(PAUSE)
            seconds, problem = workers[which].ask("again")
            if problem:
                sides[which]["reason"] = problem
            else:
                samples[which].append(seconds)
    for side, seconds in zip(sides, samples, strict=True):
        if "reason" not in side:
            side.update(measure.spread(seconds), samples_ms=[1e3 * s for s in seconds])
    if not any("reason" in side for side in sides):
        ratios = [after / before for before, after in zip(*samples, strict=True)]
        row |= {"ratio": statistics.median(ratios), "ratios": ratios}
    return row


def check(found: dict[str, torch.Tensor], oracle: Any, case: Any) -> dict[str, Any]:
    from dpo_kernels.bench.cases import Result, errors, wrong

    gradients = {name: found[f"d{name}"].to(case.device) for name in oracle.gradients if f"d{name}" in found}
    values = {name: found[name].to(case.device) for name in ("logps", "token_logps", "loss") if name in found}
    error = errors(Result(**values, gradients=gradients), oracle)
    reason = wrong(error, case)
    return {"errors": error} | ({"reason": reason} if reason else {})


def differences(base: dict[str, torch.Tensor], head: dict[str, torch.Tensor]) -> dict[str, float]:
    """rms in nats of log-probabilities; of gradients over the base's own rms."""
    from dpo_kernels.testing import rms

    found = {}
    for name in base.keys() & head.keys():
        is_gradient = name not in ("logps", "token_logps", "loss")
        scale = rms(base[name]) if is_gradient else 1.0
        found[name] = rms(head[name].double() - base[name].double()) / max(scale, 1e-300)
    return found


def interval(ratios: list[float], confidence: float) -> dict[str, Any]:
    """Of the median ratio, by ranks: whatever the distribution, the k-th smallest of n values lies above the median
    with the probability that fewer than k of n coins show heads. The narrowest that covers it with `confidence`, else
    the widest; `verdict` is what it says."""
    ordered, n = sorted(ratios), len(ratios)
    rank, outside = 0, 0.5**n  # on each side, with the smallest and the largest as ends
    while (further := outside + math.comb(n, rank + 1) * 0.5**n) <= (1 - confidence) / 2:
        rank, outside = rank + 1, further
    low, high, coverage = ordered[rank], ordered[n - 1 - rank], 1 - 2 * outside
    if coverage < confidence:
        verdict = "too few rounds to tell"
    else:
        verdict = "slower" if low > 1 else "faster" if high < 1 else "no difference seen"
    return {"low": low, "high": high, "coverage": coverage, "verdict": verdict}


def text(rows: list[dict[str, Any]]) -> str:
    lines = [["", "", "base ms", "iqr", "head ms", "iqr", "head/base", "interval", "", "rms logps", "rms gradients"]]
    reasons = []
    for row in rows:
        cells = [row["operation"], row["dtype"]]
        for name in ("base", "head"):
            side = row[name]
            cells += [f"{side[key]:.2f}" if key in side else "-" for key in ("median_ms", "iqr_ms")]
            if "reason" in side:
                reasons.append(f"{row['operation']}, {row['dtype']}, {name}: {side['reason']}")
        if "ratio" in row:
            cells += [f"{row['ratio']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", row["verdict"]]
        else:
            cells += ["-", "-", ""]
        found = row.get("difference", {})
        logps = [found[name] for name in ("token_logps", "logps") if name in found][:1]
        gradients = [value for name, value in found.items() if name not in ("logps", "token_logps", "loss")]
        cells += [f"{max(values):.1e}" if values else "-" for values in (logps, gradients)]
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    covered = {f"{row['coverage']:.1%}" for row in rows if "coverage" in row}
    notes = [f"interval: holds the median ratio with a probability of {', '.join(sorted(covered))}"] if covered else []
    return "\n".join([*shown, *notes, *reasons])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
