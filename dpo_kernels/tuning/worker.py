"""The process that computes for `dpo-kernels tune`: are the kernels of a family right on this device, and how fast?

It reads a task as JSON from standard input and writes what happens as lines of JSON to standard output, each before or
after something that may be its last act. Whoever reads them knows what it was at when it hung, or was no more.

    python -m dpo_kernels.tuning.worker < task.json

Dimensions: S sequences, T positions, N labelled rows, H hidden size, V vocabulary size.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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

    def __str__(self) -> str:
        also = [f"{name} {value:g}" for name, value in self.transform.items()]
        also += [name for name in ("bias", "stats", "confident", "unaligned") if getattr(self, name)]
        return f"N={self.rows}, H={self.hidden}, V={self.vocab}" + "".join(f", {each}" for each in also)


# Each value of N (1, 130, 300), V (123, 600, 1500) and H (40, 72, 128), and each option, with others.
CASES = (
    Case(1, 123, 40, bias=True),
    Case(130, 1500, 128),
    Case(300, 600, 72, {"logit_scale": -0.7, "temperature": 1.3}, bias=True, stats=True),
    Case(130, 600, 128, {"softcap": 5.0}, stats=True),
    Case(300, 600, 128, confident=0.7),
    Case(130, 123, 72, {"softcap": 30.0, "logit_scale": 2.0}, bias=True, confident=0.5, unaligned=True),
    Case(300, 600, 128, stats=True, bias=True, unaligned=True),
)


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
    hidden, weight, bias = (t.detach().to(dtype) for t in made[:2] + (made.bias,))
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
        out = linear_dpo_loss(*leaves[:2], leaves.labels, leaves.ref_logps, beta=BETA, **options)
        return {"loss": out.loss, "logps": out.logps, **_gradients(out.loss, leaves)}
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
        return {"loss": loss, "logps": logps, **_gradients(loss, leaves)}
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
    found, again = ours(path, given, case), ours(path, given, case)
    oracle, reference = eager(path, given, case, torch.float64), eager(path, given, case, dtype)
    for name in found:
        if not torch.equal(found[name], again[name]):
            return f"{name} has other bits the second time"
        if reason := beyond_budget(found[name], reference[name], oracle[name], name):
            return reason
    if case.confident and path == "A":  # by themselves: in a norm over all rows their errors vanish
        sure = (oracle["token_logps"].exp() > SURE) & (given.labels != -100)
        one, other, right = (t["token_logps"][sure] for t in (found, reference, oracle))
        return beyond_budget(one, other, right, "token_logps of confident rows")
    return ""


# Speed


def timed_calls(path: str, given: Inputs, softcap: float | None) -> Callable[[], object]:
    """A call of `path`, forward and backward as a training step has them."""
    case = Case(0, 0, 0, {"softcap": softcap} if softcap else {})
    if path in ("A", "B", "C", "D"):
        return lambda: ours(path, given, case)
    logits = torch.randn(
        *given.labels.shape, given.weight.shape[0], dtype=given.hidden.dtype, device=given.hidden.device
    )
    logits.requires_grad_()

    def from_logits() -> Tensor:
        return torch.autograd.grad(sequence_logps(logits, given.labels).logps.sum(), logits)[0]

    return from_logits


def time_head(
    head: verdicts.Head, families: list[str], task: dict[str, Any], device: torch.device, tell: Tell
) -> Iterator[tuple[str, dict[str, list[float]], str]]:
    """(path, milliseconds of each family for each number of rows, why there are none) for each path."""
    dtype = getattr(torch, head.dtype)
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(head.vocab, head.hidden, generator=generator, device=device, dtype=dtype)
    weight *= 2 / head.hidden**0.5
    for path in verdicts.PATHS:
        ms: dict[str, list[float]] = {}
        why = ""
        for tokens in task["tokens"]:
            shape = SEQUENCES, tokens // SEQUENCES
            hidden = torch.randn(*shape, head.hidden, generator=generator, device=device, dtype=dtype)
            labels = torch.randint(head.vocab, shape, generator=generator, device=device)
            refs = torch.zeros(SEQUENCES, device=device)
            try:
                call = timed_calls(path, Inputs(hidden, weight, None, labels, refs), head.softcap)
                names = [name for name in families if path in dispatch.FORWARDS or not dispatch.is_fused(name)]
                found = _by_turns(call, names, f"path {path}, {head}, N={tokens}", task, device, tell)
            except (torch.OutOfMemoryError, MemoryError) as error:
                why = measure.described(error)
                break
            for name, seconds in found.items():
                ms.setdefault(name, []).append(1e3 * seconds)
            del call
        yield path, {} if why else ms, why


def _by_turns(
    call: Callable[[], object], families: list[str], what: str, task: dict[str, Any], device: torch.device, tell: Tell
) -> dict[str, float]:
    """Median seconds of each family that did not fail."""

    def of(family: Any) -> measure.Run:
        def prepare() -> None:
            tell(at=family, what=what)

        def run() -> object:
            with dispatch.taking(family):
                return call()

        return measure.Run(prepare, run, warm_up=True)

    runs = [of(family) for family in families]
    samples = measure.interleaved(runs, task["rounds"], device=device, seconds=task["seconds"])
    found = {}
    for family, sample in zip(families, samples, strict=True):
        if isinstance(sample, str):
            if "OutOfMemory" in sample or "MemoryError" in sample:
                raise torch.OutOfMemoryError(sample)
            tell(failed=family, what=what, reason=sample)
        else:
            found[family] = sorted(sample)[len(sample) // 2]
    return found


# The process


def work(task: dict[str, Any], tell: Tell) -> None:
    """Does what the task says, and tells each step."""
    device = torch.device(task["device"])
    if task["threads"]:
        torch.set_num_threads(task["threads"])
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index or 0)
    dispatch.say_no_more(device)
    torch.ones(1, device=device).sum().item()  # where another process may not use it, here is the end
    tell(ready=str(verdicts.key_of(device)))
    refused = set()
    for family, dtype in task["verify"]:
        for case in CASES:
            for path in ("A", "D") if dispatch.is_fused(family) else verdicts.PATHS:
                if (family, dtype) in refused or family in refused:
                    continue
                what = f"path {path}, {dtype}, {case}"
                tell(at=family, what=what)
                try:
                    with dispatch.taking(family):
                        reason = wrong(path, case, getattr(torch, dtype), device)
                    measure.synchronize(device)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # a kernel may fail in any way
                    tell(failed=family, what=what, reason=measure.described(error))
                    measure.recover(device)
                    refused.add(family)
                    continue
                if reason:
                    tell(wrong=family, dtype=dtype, what=what, reason=reason)
                    refused.add((family, dtype))
        if (family, dtype) not in refused and family not in refused:
            tell(verified=family, dtype=dtype)
    for *given, families in task["heads"]:
        head = verdicts.Head(*given)
        able = [name for name in families if name not in refused and (name, head.dtype) not in refused]
        for path, ms, why in time_head(head, ["torch", *able], task, device, tell):
            tell(timed=given, path=path, ms=ms, why=why)
        tell(finished=given)


def main(work: Callable[[dict[str, Any], Tell], None] = work) -> None:
    with os.fdopen(os.dup(1), "w", buffering=1) as lines:
        os.dup2(2, 1)  # whatever anything prints is no message

        def tell(**message: Any) -> None:
            lines.write(json.dumps(message) + "\n")
            lines.flush()

        try:
            work(json.load(sys.stdin), tell)
        except (torch.OutOfMemoryError, MemoryError) as error:
            tell(unusable=f"no memory is left for a second process: {measure.described(error)}")
        except Exception as error:
            tell(unusable=measure.described(error))
            raise
        tell(done=True)


if __name__ == "__main__":
    main()
