"""From figures that are missing to a verdict; and what trainers ask for before they begin."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dpo_kernels import dispatch, verdicts
from dpo_kernels.tuning.process import WORKER, Lost, watched
from dpo_kernels.tuning.worker import CASES
from dpo_kernels.verdicts import Head, Refusal, Times, Verdict

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds without progress
ROUNDS = 5
SECONDS = 4.0  # of a path's rounds beyond the third, for each number of rows
TOKENS = {"cpu": (256, 1024)}
TOKENS_OF_ACCELERATORS = (2048, 8192)
# Heads of models that many people align: hidden size, vocabulary.
HEADS = {
    "cpu": tuple(Head("float32", hidden, vocab) for hidden, vocab in ((576, 49152), (896, 151936))),
    "accelerator": tuple(
        Head("bfloat16", hidden, vocab)
        for hidden, vocab in ((1024, 151936), (2048, 128256), (4096, 128256), (4096, 151936), (2560, 262144))
    ),
}
# Of verified kernels, beside those of the heads asked for
DTYPES = ("bfloat16", "float16", "float32")


class Untuned(Exception):
    """There is no verdict to be had here, and why."""


def usual_heads(device: torch.device) -> tuple[Head, ...]:
    return HEADS["cpu" if device.type == "cpu" else "accelerator"]


def tune(
    device: torch.device,
    heads: Sequence[Head],
    *,
    again: bool = False,
    say: Callable[[str], None] = lambda text: None,
    step: Callable[[str], None] = lambda what: None,
    tokens: Sequence[int] = (),
    patience: float = PATIENCE,
    command: Sequence[str] = WORKER,
) -> Verdict:
    """Proves and times, in a process of its own, what is not in the verdict of this device yet, and writes it there as
    it is found. Where somebody else does so, this waits, and takes what was found.

    Args:
        heads: to time kernels for.
        again: time these heads, and verify all kernels, again; what hung, failed or took its process along stays
            refused.
        say: is given lines for people; `step` what is being done, once each `steps` times.
        tokens: numbers of rows; by default those of the type of device.
        patience: seconds that one step may take.

    Raises:
        Untuned: there is nothing to choose from, the device takes no second process, or no memory is left for one.
        OSError: the verdict cannot be written.
    """
    key = verdicts.key_of(device)
    if key is None:
        raise Untuned(f"PyTorch sees no device {str(device)!r}")
    others = [family for family in dispatch.families(device) if family != "torch"]
    if not others:
        reasons = (f"{impl}: {dispatch.unavailable_reason(impl, device)}" for impl in dispatch.IMPLEMENTATIONS[1:])
        raise Untuned(f"there is nothing but plain PyTorch to choose from on {device}; {'; '.join(reasons)}")
    with verdicts.lock(key, lambda: say(f"another process tunes {key['name']}: waiting for what it finds")):
        verdict = verdicts.read(key) or Verdict(key)
        if again:
            verdict.times = [times for times in verdict.times if times.head not in heads]
            verdict.verified = []
            verdict.refused = [each for each in verdict.refused if each.kind != "wrong"]
        missing = [head for head in heads if not verdict.knows(head)]
        _fill(verdict, missing, others, device, tuple(tokens) or tokens_of(device), patience, command, say, step)
    dispatch.forget()
    return verdict


def tokens_of(device: torch.device) -> tuple[int, ...]:
    return TOKENS.get(device.type, TOKENS_OF_ACCELERATORS)


def steps(device: torch.device, heads: Sequence[Head]) -> int:
    """How often `tune` calls its `step` if nothing is known yet; a few less, since halves are not all."""
    families = [family for family in dispatch.families(device) if family != "torch"]
    cases = sum(2 if dispatch.is_fused(family) else len(verdicts.PATHS) for family in families) * len(CASES)
    return cases * len(_dtypes(heads)) + len(heads) * len(verdicts.PATHS) * len(tokens_of(device))


def _dtypes(heads: Sequence[Head]) -> list[str]:
    return sorted({*DTYPES, *(head.dtype for head in heads)})


def _fill(
    verdict: Verdict, heads: list[Head], families: Sequence[str], device: torch.device, tokens: Sequence[int],
    patience: float, command: Sequence[str], say: Callable[[str], None], step: Callable[[str], None],
) -> None:  # fmt: skip
    """Until nothing is missing: a worker a time, and another one after each that was lost, without what lost it."""
    half = [dtype for dtype in _dtypes(heads) if dtype in ("bfloat16", "float16")]
    while heads:
        verify = [
            (family, dtype)
            for family in families
            for dtype in (half if dispatch.is_fused(family) else _dtypes(heads))
            if (family, dtype) not in verdict.verified and not verdict.refuses(family, dtype)
        ]
        able = {head: [family for family in families if not verdict.refuses(family, head.dtype)] for head in heads}
        task = {
            "device": str(device), "tokens": list(tokens), "rounds": ROUNDS, "seconds": SECONDS,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0, "verify": verify,
            "heads": [[*head, able[head]] for head in heads],
        }  # fmt: skip
        at = ("torch", "the start")
        try:
            for message in watched(task, patience, command):
                if "at" in message:
                    if message["what"] != at[1]:
                        step(f"{message['at']}: {message['what']}")
                    at = message["at"], message["what"]
                    continue
                _take(message, verdict, tokens, say)
                if "finished" in message:
                    heads.remove(Head(*message["finished"]))
                if "ready" not in message:
                    verdicts.write(verdict)
            break
        except Lost as error:
            family, what = at
            if family == "torch":  # no kernel of ours
                raise Untuned(f"the process that was to try the kernels was lost at {what}: {error}") from error
            verdict.refused.append(Refusal(family, None, error.kind, what, str(error)))
            say(f"{verdict.refused[-1]}; it is not tried again")
            verdicts.write(verdict)


def _take(message: dict[str, Any], verdict: Verdict, tokens: Sequence[int], say: Callable[[str], None]) -> None:
    if "unusable" in message:
        raise Untuned(message["unusable"])
    if "verified" in message:
        verdict.verified.append((message["verified"], message["dtype"]))
    elif "wrong" in message:
        verdict.refused.append(Refusal(message["wrong"], message["dtype"], "wrong", message["what"], message["reason"]))
        say(str(verdict.refused[-1]))
    elif "failed" in message:
        verdict.refused.append(Refusal(message["failed"], None, "failed", message["what"], message["reason"]))
        say(str(verdict.refused[-1]))
    elif "timed" in message:
        head = Head(*message["timed"])
        times = verdict.of(head)
        if times is None:
            times = Times(head, tuple(tokens))
            verdict.times.append(times)
        if message["why"]:
            times.untimed[message["path"]] = message["why"]
        else:
            times.ms[message["path"]] = message["ms"]


# What trainers ask for


def tune_first(
    impl: str, device: torch.device, head: Head, *, wanted: bool = True, bar: bool = True
) -> dict[str, dispatch.Family]:
    """The kernels that a training run takes for its head, for each path: proven here and now if there is no verdict.

    Nothing is tried where `impl` is explicit, where measurements that come with the package speak for the device, where
    there is nothing to choose from, and where it is not `wanted`, or DPO_KERNELS_TUNE is 0. Where it cannot be done,
    plain PyTorch is kept, and a line says why. Of several processes the first one of each machine tries, and all take
    what the verdicts of all allow. Never raises for what was found.
    """
    dtype: torch.dtype = getattr(torch, head.dtype)
    wanted = wanted and os.environ.get("DPO_KERNELS_TUNE") != "0" and impl == "auto"
    if wanted and dispatch.needs_tuning(device) and is_first_of_machine() and _lacks(device, head):
        logger.info("trying the kernels for this head (%s) on this %s, once", head, device.type)
        try:
            with_bar(device, [head], bar)
        except (Untuned, OSError) as error:
            logger.warning("the kernels could not be tried, and plain PyTorch computes: %s", error)
            dispatch.say_no_more(device)
    _barrier()
    dispatch.forget()
    found = dispatch.choices(impl, device, dtype, head.vocab, head.hidden)
    if impl == "auto":
        found = _agreed(found, head, dtype)
    return found


def with_bar(device: torch.device, heads: Sequence[Head], bar: bool, **options: Any) -> Verdict:
    """`tune` with a progress bar on standard error."""
    from tqdm import tqdm

    total = steps(device, heads)
    with tqdm(total=total, unit="step", leave=False, disable=not bar) as shown:

        def step(what: str) -> None:
            shown.set_postfix_str(what, refresh=False)
            shown.update(1 if shown.n < total else 0)

        return tune(device, heads, step=step, say=lambda text: shown.write(text, file=sys.stderr), **options)


def _lacks(device: torch.device, head: Head) -> bool:
    key = verdicts.key_of(device)
    verdict = None if key is None else verdicts.read(key)
    return key is not None and (verdict is None or not verdict.knows(head))


def is_first_of_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _barrier() -> None:
    if _distributed():
        torch.distributed.barrier()


def _from_all(mine: Any) -> list[Any]:
    """Of every process of a run."""
    if not _distributed():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _agreed(found: dict[str, dispatch.Family], head: Head, dtype: torch.dtype) -> dict[str, dispatch.Family]:
    """What all processes of a run take: where they differ, plain PyTorch."""
    everyone = _from_all(found)
    if all(each == found for each in everyone):
        return found
    agreed = common(everyone)
    logger.warning(
        "the verdicts of this run's machines differ: %s; all processes take %s",
        " and ".join(sorted({spelled(each) for each in everyone})),
        spelled(agreed),
    )
    dispatch.pin(agreed, dtype, head.vocab, head.hidden)
    return agreed


def common(everyone: Sequence[dict[str, dispatch.Family]]) -> dict[str, dispatch.Family]:
    first = everyone[0]
    return {path: first[path] if all(each[path] == first[path] for each in everyone) else "torch" for path in first}


def spelled(families: dict[str, Any]) -> str:
    """Of each path, in a line."""
    if len(set(families.values())) == 1:
        return next(iter(families.values()))
    return ", ".join(f"{path} {family}" for path, family in families.items())


def keep(recorded: dict[str, Any], impl: str, device: torch.device, head: Head) -> tuple[dict[str, Any], str]:
    """A run that goes on takes the kernels that it was begun with, if those can run in all of its processes. What it
    takes, and why that is something else; "" if it is not."""
    dtype: torch.dtype = getattr(torch, head.dtype)
    now: dict[str, Any] = dict(dispatch.choices(impl, device, dtype, head.vocab, head.hidden))
    able = impl != "auto" or set(dispatch.families(device)).issuperset(recorded.values())
    if not all(_from_all(able)):
        return now, f"it was computed by {spelled(recorded)}, which cannot run here, and goes on with {spelled(now)}"
    if impl == "auto":
        dispatch.pin(recorded, dtype, head.vocab, head.hidden)
        now = recorded
    return now, ""
