"""The process that computes for `dpo-kernels tune`: are the kernels of a family right on this device, and how fast?

It reads a task as a line of JSON from standard input and writes what happens as lines of JSON, each before or after
something that may be its last act. Whoever reads them knows what it was at when it hung, or was no more. It ends when
its standard input does.

Dimensions: S sequences, T positions, N labelled rows, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dpo_kernels import dispatch, measure, verdicts
from dpo_kernels.impl.reference import eager_logits, eager_stats, eager_token_logps
from dpo_kernels.linear_dpo import linear_dpo_loss
from dpo_kernels.logps import linear_sequence_logps, sequence_logps
from dpo_kernels.losses import dpo_loss
from dpo_kernels.options import Stat
from dpo_kernels.testing import beyond_budget, head_inputs

STATS: tuple[Stat, ...] = ("entropy", "mean_logit", "log_sum_sq_probs")
SEQUENCES = 8
BETA = 0.1
SURE = 0.9  # a probability
# Coefficients of path C follow from sums of hundreds, which fp32 rounds at their own size, whoever adds them up.
EPSILON = {"C": 1e-5}
FAR = 4.0
MANY = 10000  # of the vocabulary: for as many multiprocessors as there are

Tell = Callable[..., None]


class Case(NamedTuple):
    """Inputs on which kernels are held against fp64. What is ragged comes from sizes that no block divides."""

    rows: int
    vocab: int
    hidden: int
    transform: dict[str, Any] = {}
    bias: bool = False
    stats: bool = False
    confident: float = 0.0
    unaligned: bool = False
    tiles: bool = False
    """In many small tiles, and for path C in several groups, as large heads are."""
    autocast: bool = False
    """Of weights in fp32, in half precision."""

    def __str__(self) -> str:
        also = [f"{name} {value:g}" for name, value in self.transform.items()]
        also += [name for name in self._fields[4:] if getattr(self, name)]
        return f"N={self.rows}, H={self.hidden}, V={self.vocab}" + "".join(f", {each}" for each in also)


# Each value of N (1, 130, 300), V (123, 600, 1500) and H (40, 72, 128), and each option, with others.
CASES = (
    Case(1, 123, 40, bias=True),
    Case(130, 1500, 40, tiles=True),
    Case(300, 600, 72, {"logit_scale": -0.7, "temperature": 1.3}, bias=True, stats=True, tiles=True),
    Case(130, 600, 128, {"softcap": 5.0}, stats=True, tiles=True),
    Case(300, 600, 128, confident=0.7),
    Case(130, 123, 72, {"softcap": 30.0, "logit_scale": 2.0}, bias=True, confident=0.5, unaligned=True),
    Case(300, 600, 128, stats=True, bias=True, unaligned=True),
    Case(130, 600, 72, bias=True, autocast=True),
)
# What a fused forward takes, whose multiprocessors are made few, so that each has many blocks; as many as there are,
# too. H of 640 goes through the buffers of a product several times.
FUSED_CASES = (
    Case(1, 600, 80, bias=True),
    Case(300, 1500, 144, {"logit_scale": -0.7, "temperature": 1.3}, bias=True, stats=True),
    Case(300, 1500, 640),
    Case(130, 1500, 128, {"softcap": 5.0}, stats=True),
    Case(300, 600, 128, confident=0.7),
    Case(300, 40000, 128, stats=True, bias=True),
)
FEW = 4
TILE_BYTES = 2**16


def cases_of(family: str, dtype: torch.dtype) -> list[Case]:
    if dispatch.is_fused(family):
        return list(FUSED_CASES)
    return [case for case in CASES if not case.autocast or dtype in (torch.bfloat16, torch.float16)]


def paths_of(family: str) -> tuple[str, ...]:
    return tuple(path for path in verdicts.PATHS if path in dispatch.paths_of(family))


class Inputs(NamedTuple):
    hidden: Tensor  # [S, T, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [S, T]
    ref_logps: Tensor  # [S]


def inputs_of(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    sequences = 2 if case.rows == 1 else 4
    length = math.ceil(case.rows / sequences) + 3
    made = head_inputs(
        sequences,
        length,
        case.hidden,
        case.vocab,
        labelled=1.1,
        confident=case.confident,
        seed=case.rows,
        device=device,
    )
    labels = made.labels.view(-1).clone()
    order = torch.randperm(labels.numel(), generator=torch.Generator().manual_seed(case.vocab)).to(device)
    labels[order[case.rows :]] = -100
    hidden, weight, bias = (t.detach().to(dtype) for t in (made.hidden, made.weight, made.bias))
    if case.autocast:
        weight, bias = weight.float(), bias.float()
    if case.unaligned:
        hidden, weight = _unaligned(hidden), _unaligned(weight)
    # the reference of every precision is the same one
    return Inputs(hidden, weight, bias if case.bias else None, labels.view(sequences, length), made.ref_logps.detach())


def _unaligned(t: Tensor) -> Tensor:
    """The same numbers in rows that begin at odd addresses."""
    wider = t.new_empty(*t.shape[:-1], t.shape[-1] + 3)
    wider[..., 1:-2] = t
    return wider[..., 1:-2]


# One path each, on leaves of their own: what comes out, and the gradients.

Out = dict[str, Tensor]


def _leaves(given: Inputs, *names: str) -> Inputs:
    """The same with fresh leaves, of which those named want gradients. Their strides are those that were given."""
    leaves = {
        name: getattr(given, name).detach().requires_grad_() for name in names if getattr(given, name) is not None
    }
    return given._replace(**leaves)


def _gradients(of: Tensor, given: Inputs) -> Out:
    wanted = {f"d{name}": t for name, t in given._asdict().items() if t is not None and t.requires_grad}
    return dict(zip(wanted, torch.autograd.grad(of, list(wanted.values())), strict=True))


def _coefficients(given: Inputs) -> Tensor:
    """[S, T] what a loss of one's own weighs positions by, of both signs."""
    numbers = torch.arange(given.labels.numel(), device=given.labels.device, dtype=torch.float32)
    return (numbers.remainder(7) - 3).view(given.labels.shape)


def ours(path: str, given: Inputs, case: Case) -> Out:
    """`path` of this package, by what "auto" takes."""
    options: dict[str, Any] = {"bias": given.bias, "check_hidden": False, **case.transform}
    stats = STATS if case.stats else ()
    if path == "A":
        with torch.no_grad():
            found = linear_sequence_logps(*given[:2], given.labels, stats=stats, **options)
        return {"token_logps": found.token_logps, "logps": found.logps, **found.stats}
    if path == "E":
        logits = logits_of(given, case).requires_grad_()
        found = sequence_logps(logits, given.labels, stats=stats)
        dlogits = torch.autograd.grad((found.token_logps * _coefficients(given)).sum(), logits)[0]
        return {"token_logps": found.token_logps, "dlogits": dlogits, **found.stats}
    leaves = _leaves(given, "hidden") if path == "B" else _leaves(given, "hidden", "weight", "bias")
    options["bias"] = leaves.bias
    if path == "C":
        budget = case.rows * case.vocab * 4 - 1  # less than all pairs take
        out = linear_dpo_loss(
            *leaves[:2],
            leaves.labels,
            leaves.ref_logps,
            beta=BETA,
            chunk_bytes=budget if case.tiles else None,
            **options,
        )
        return {"logps": out.logps, **_gradients(out.loss, leaves)}
    found = linear_sequence_logps(*leaves[:2], leaves.labels, stats=stats, **options)
    weighed = (found.token_logps * _coefficients(given)).sum()
    return {"token_logps": found.token_logps, **found.stats, **_gradients(weighed, leaves)}


def eager(path: str, given: Inputs, case: Case, dtype: torch.dtype) -> Out:
    """The same by the textbook, in this dtype."""
    if path == "E":
        logits = logits_of(given, case).to(dtype).requires_grad_()
        token_logps = eager_token_logps(logits, given.labels)
        dlogits = torch.autograd.grad((token_logps * _coefficients(given)).sum(), logits)[0]
        return {"token_logps": token_logps, "dlogits": dlogits, **_eager_stats(logits, given, case)}
    wide = given._replace(
        **{n: t.to(dtype) for n, t in given._asdict().items() if n in Inputs._fields[:3] and t is not None}
    )
    leaves = _leaves(wide, *{"A": (), "B": ("hidden",)}.get(path, ("hidden", "weight", "bias")))
    logits = eager_logits(*leaves[:2], bias=leaves.bias, **case.transform)
    token_logps = eager_token_logps(logits, given.labels)
    logps = token_logps.sum(1)
    if path == "A":
        return {"token_logps": token_logps, "logps": logps, **_eager_stats(logits, given, case)}
    if path == "C":
        refs = given.ref_logps.to(logps.dtype)
        loss = dpo_loss(*logps.chunk(2), *refs.chunk(2), beta=BETA).losses.mean()
        return {"logps": logps, **_gradients(loss, leaves)}
    found = _gradients((token_logps * _coefficients(given)).sum(), leaves)
    return {"token_logps": token_logps, **_eager_stats(logits, given, case), **found}


def _eager_stats(logits: Tensor, given: Inputs, case: Case) -> Out:
    return {name: t for name, t in eager_stats(logits.detach(), given.labels).items() if name in STATS and case.stats}


def logits_of(given: Inputs, case: Case) -> Tensor:
    """[S, T, V] in the dtype of the inputs, for path E."""
    with torch.no_grad():
        bias = None if given.bias is None else given.bias.double()
        logits = eager_logits(given.hidden.double(), given.weight.double(), bias=bias, **case.transform)
        logits = logits.to(given.hidden.dtype)
        return _unaligned(logits) if case.unaligned else logits


def wrong(path: str, case: Case, dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with this path by what "auto" takes: beyond the error of eager code in the same dtype, or other
    bits the second time; "" if nothing is."""
    given = inputs_of(case, dtype, device)
    with torch.autocast(device.type, dtype=dtype, enabled=case.autocast):
        found, again = ours(path, given, case), ours(path, given, case)
    oracle, reference = eager(path, given, case, torch.float64), eager(path, given, case, dtype)
    for name in found:
        if not torch.equal(found[name], again[name]):
            return f"{name} has other bits the second time"
        if reason := beyond_budget(found[name], reference[name], oracle[name], name, EPSILON.get(path, 1e-6)):
            return reason
        if reason := _far(found[name], reference[name], oracle[name], name):
            return reason
    if case.confident and path == "A":  # by themselves: in a norm over all rows their errors vanish
        sure = (oracle["token_logps"].exp() > SURE) & (given.labels != -100)
        one, other, right = (t["token_logps"][sure] for t in (found, reference, oracle))
        return beyond_budget(one, other, right, "token_logps of confident rows")
    return ""


def _far(ours: Tensor, eager: Tensor, oracle: Tensor, what: str) -> str:
    """One row that is wrong among many: no number may be further off than a few times the worst of eager code."""
    worst, theirs = ((t.double() - oracle).abs().max().item() for t in (ours, eager))
    limit = FAR * theirs + 1e-5 * oracle.abs().max().item()
    return "" if worst <= limit else f"{what}: one number is {worst:.3e} off, eager's {theirs:.3e}, limit {limit:.3e}"


@contextmanager
def _taken(family: str, case: Case) -> Iterator[list[bool]]:
    """The family in the sizes of the case; and whether its fused forward was taken, each time."""
    kernels, fused = cast(Any, dispatch.load(family)), dispatch.is_fused(family)
    home: Any = importlib.import_module(f"dpo_kernels.impl.{dispatch.impl_of(family)}_linear") if fused else None
    taken: list[bool] = []
    with ExitStack() as stack:
        stack.enter_context(dispatch.taking(cast(Any, family)))
        if case.tiles:
            stack.enter_context(_replaced(kernels, "tile_bytes", lambda device: TILE_BYTES))
        if dispatch.is_fused(family):
            machine = home._machine
            for name in ("linear_fold_", "linear_token_logps"):  # of rows, and of all positions
                if hasattr(kernels, name):
                    stack.enter_context(_replaced(kernels, name, _noting(getattr(kernels, name), taken)))
            if case.vocab < MANY:
                stack.enter_context(_replaced(home, "_machine", lambda device: (machine(device)[0], FEW)))
        yield taken


def _noting(forward: Callable[..., Any], taken: list[bool]) -> Callable[..., Any]:
    """The same function, which notes whether it took what it was given."""

    def noted(*operands: Any, **options: Any) -> Any:
        found = forward(*operands, **options)
        taken.append(found is not None and found is not False)
        return found

    return noted


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


# Speed


NO_MEMORY = (torch.OutOfMemoryError, MemoryError)
AGREES = 0.01  # of sizes of results at a real head, between two ways to sum them


def timed_call(path: str, given: Inputs, softcap: float | None) -> Callable[[], Out]:
    """A call of `path`, forward and backward as a training step has them."""
    case = Case(0, 0, 0, {"softcap": softcap} if softcap else {})
    if path in ("A", "B", "C", "D"):
        return lambda: ours(path, given, case)
    logits = torch.randn(
        *given.labels.shape, given.weight.shape[0], dtype=given.hidden.dtype, device=given.hidden.device
    )
    logits.requires_grad_()

    def from_logits() -> Out:
        logps = sequence_logps(logits, given.labels).logps
        return {"logps": logps, "dlogits": torch.autograd.grad(logps.sum(), logits)[0]}

    return from_logits


def time_head(
    head: verdicts.Head, families: list[str], refused: set[Any], task: dict[str, Any], device: torch.device, tell: Tell
) -> Iterator[tuple[str, dict[str, list[float]], str]]:
    """(path, milliseconds of each family for each number of rows, why one is missing) for each path."""
    dtype = getattr(torch, head.dtype)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(head.vocab, head.hidden, generator=generator, device=device, dtype=dtype)
    weight *= 2 / head.hidden**0.5
    for path in verdicts.PATHS:
        names = [name for name in families if not refused.intersection([name, (name, head.dtype)])]
        names = [name for name in names if path in dispatch.paths_of(name)]
        ms: dict[str, list[float]] = {name: [] for name in names}
        why = ""
        for tokens in task["tokens"]:
            shape = SEQUENCES, tokens // SEQUENCES
            what = f"path {path}, {head}, N={tokens}"
            try:
                hidden = torch.randn(*shape, head.hidden, generator=generator, device=device, dtype=dtype)
                labels = torch.randint(head.vocab, shape, generator=generator, device=device)
                refs = torch.zeros(SEQUENCES, device=device)
                call = timed_call(path, Inputs(hidden, weight, None, labels, refs), head.softcap)
                tell(at="torch", what=what)
                right = _sizes("torch", call, device)
            except NO_MEMORY as error:
                why = measure.described(error)
                break
            names = [
                name for name in names if name == "torch" or _agrees(name, right, call, head.dtype, what, device, tell)
            ]
            found, missing = _by_turns(call, names, what, task, device, tell)
            for name, seconds in found.items():
                ms[name].append(1e3 * seconds)
            why = why or missing
            names = [name for name in names if name in found]
            del call
            if "torch" not in found:
                break
        yield path, {name: times for name, times in ms.items() if times}, why


def _agrees(
    family: str,
    right: dict[str, float],
    call: Callable[[], Out],
    dtype: str,
    what: str,
    device: torch.device,
    tell: Tell,
) -> bool:
    """Whether, at this size, the family finds what is `right` for plain PyTorch: fp64 has no room here."""
    tell(at=family, what=what)
    try:
        found = _sizes(family, call, device)
    except NO_MEMORY:
        return True  # as is seen when it is timed
    except Exception as error:  # a kernel may fail in any way
        tell(failed=family, what=what, reason=measure.described(error))
        measure.recover(device)
        return False
    for name, theirs in right.items():
        limit = AGREES * max(abs(theirs), 1e-6)
        if not abs(found[name] - theirs) <= limit:
            reason = f"{name} is {found[name]:.6g}, plain PyTorch's {theirs:.6g}"
            tell(wrong=family, dtype=dtype, what=what, reason=reason)
            return False
    return True


def _sizes(family: Any, call: Callable[[], Out], device: torch.device) -> dict[str, float]:
    """Norms of what comes out, which take no memory of its size."""
    with dispatch.taking(family):
        out = call()
    found = {name: torch.linalg.vector_norm(t.detach(), dtype=torch.float32).item() for name, t in out.items()}
    measure.synchronize(device)
    return {f"the size of {name}": size for name, size in found.items()}


def _by_turns(
    call: Callable[[], Out], families: list[str], what: str, task: dict[str, Any], device: torch.device, tell: Tell
) -> tuple[dict[str, float], str]:
    """Median seconds of each family that did not fail; and which had no memory."""
    short = ""

    def of(family: Any) -> measure.Run:
        def prepare() -> None:
            tell(at=family, what=what)

        def run() -> object:
            nonlocal short
            try:
                with dispatch.taking(family):
                    return call()
            except NO_MEMORY as error:
                short = short or f"{family}: {measure.described(error)}"
                raise
            except Exception as error:  # said now: the device may be of no more use
                tell(failed=family, what=what, reason=measure.described(error))
                raise

        return measure.Run(prepare, run, warm_up=True)

    samples = measure.interleaved(
        [of(each) for each in families], task["rounds"], device=device, seconds=task["seconds"]
    )
    found = {
        family: sorted(sample)[len(sample) // 2]
        for family, sample in zip(families, samples, strict=True)
        if not isinstance(sample, str)
    }
    return found, short


# The process


def work(task: dict[str, Any], tell: Tell) -> None:
    """Does what the task says, and tells each step."""
    device = torch.device(task["device"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision(task["precision"])
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    dispatch.say_no_more(device)
    torch.ones(1, device=device).sum().item()  # where another process may not use it, here is the end
    tell(ready=str(verdicts.key_of(device)))
    refused: set[Any] = set()

    def heard(**message: Any) -> None:
        """What failed or is wrong is not tried again, nor is it in what comes later."""
        if "failed" in message:
            refused.add(message["failed"])
        if "wrong" in message:
            refused.add((message["wrong"], message["dtype"]))
        tell(**message)

    for family, dtype in task["verify"]:
        if family not in refused and verify(family, dtype, device, heard):
            tell(verified=family, dtype=dtype)
    for *given, families in task["heads"]:
        head = verdicts.Head(*given)
        for path, ms, why in time_head(head, ["torch", *families], refused, task, device, heard):
            tell(timed=given, path=path, ms=ms, why=why)
        tell(finished=given)


def verify(family: str, dtype: str, device: torch.device, tell: Tell) -> bool:
    """Whether a family is right in a dtype, in all cases; otherwise it is told why not."""
    took = not dispatch.is_fused(family)
    for case in cases_of(family, getattr(torch, dtype)):
        for path in paths_of(family):
            what = f"path {path}, {dtype}, {case}"
            tell(at=family, what=what)
            try:
                with _taken(family, case) as taken:
                    reason = wrong(path, case, getattr(torch, dtype), device)
                measure.synchronize(device)
            except NO_MEMORY:
                raise
            except Exception as error:  # a kernel may fail in any way
                tell(failed=family, what=what, reason=measure.described(error))
                measure.recover(device)  # ends here where the device is of no more use
                return False
            took = took or any(taken)
            if reason:
                tell(wrong=family, dtype=dtype, what=what, reason=reason)
                return False
    if not took:
        tell(wrong=family, dtype=dtype, what="all cases", reason="its fused forward took none of them")
    return took


def main(messages: int | None = None, work: Callable[[dict[str, Any], Tell], None] = work) -> None:
    """Writes to the file descriptor `messages`; by default to standard output, which is then out of reach."""
    if messages is None:
        messages = os.dup(1)
        os.dup2(2, 1)
    begun = False
    with os.fdopen(messages, "w", buffering=1) as lines:

        def tell(**message: Any) -> None:
            nonlocal begun
            begun = begun or "at" in message
            lines.write(json.dumps(message) + "\n")
            lines.flush()

        task = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_input, daemon=True).start()
        try:
            work(task, tell)
        except NO_MEMORY as error:
            tell(unusable=f"no memory is left for a second process: {measure.described(error)}")
        except Exception as error:
            if not begun:
                tell(unusable=measure.described(error))
            raise  # of what it was at, the exit status speaks
        tell(done=True)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)
