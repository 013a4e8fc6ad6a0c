"""From figures that are missing to a verdict; and what trainers ask for before they begin."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dpo_kernels import dispatch, verdicts
from dpo_kernels.tuning.process import Lost, watched
from dpo_kernels.tuning.worker import cases_of, paths_of
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
    command: Sequence[str] = (),
) -> Verdict:
    """Proves and times, in a process of its own, what is not in the verdict of this device yet, and writes it there as
    it is found. Where somebody else does so, this waits, and takes what was found.

    Args:
        heads: to time kernels for; what is verified is in their dtypes.
        again: time these heads, and verify all kernels, again; what hung, failed or took its process along stays
            refused.
        say: is given lines for people; `step` what is being done, once each `steps` times.
        tokens: numbers of rows; by default those of the type of device.
        patience: seconds that one step may take.

    Raises:
        Untuned: there is nothing to choose from, the device takes no second process, no memory is left for one, or
            somebody ended it.
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
            asked = {head[:3] for head in heads}
            verdict.times = [times for times in verdict.times if times.head[:3] not in asked]
            verdict.verified = []
            verdict.refused = [each for each in verdict.refused if each.kind != "wrong"]
        missing = [head for head in heads if not verdict.knows(head)]
        _fill(verdict, missing, others, device, tuple(tokens) or tokens_of(device), patience, command, say, step)
    dispatch.forget()
    return verdict


def tokens_of(device: torch.device) -> tuple[int, ...]:
    return TOKENS.get(device.type, TOKENS_OF_ACCELERATORS)


def steps(device: torch.device, heads: Sequence[Head]) -> int:
    """How often `tune` calls its `step` if nothing is known yet."""
    families = [family for family in dispatch.families(device) if family != "torch"]
    tried = [(family, dtype) for family in families for dtype in _dtypes(heads, family)]
    cases = sum(len(cases_of(family, getattr(torch, dtype))) * len(paths_of(family)) for family, dtype in tried)
    return cases + len(heads) * len(verdicts.PATHS) * len(tokens_of(device))


def _dtypes(heads: Sequence[Head], family: str) -> list[str]:
    """Of the heads, those that a family is for."""
    found = sorted({head.dtype for head in heads})
    return [dtype for dtype in found if not dispatch.is_fused(family) or dtype in ("bfloat16", "float16")]


def _fill(
    verdict: Verdict, heads: list[Head], families: Sequence[str], device: torch.device, tokens: Sequence[int],
    patience: float, command: Sequence[str], say: Callable[[str], None], step: Callable[[str], None],
) -> None:  # fmt: skip
    """Until nothing is missing: a worker a time, and another one after each that was lost, without what lost it."""
    while heads:
        verify = [
            (family, dtype)
            for family in families
            for dtype in _dtypes(heads, family)
            if (family, dtype) not in verdict.verified and not verdict.refuses(family, dtype)
        ]
        able = {head: [family for family in families if not verdict.refuses(family, head.dtype)] for head in heads}
        task = {
            "device": str(device), "tokens": list(tokens), "rounds": ROUNDS, "seconds": SECONDS,
            "threads": torch.get_num_threads() if device.type == "cpu" else 0, "verify": verify,
            "precision": torch.get_float32_matmul_precision(),
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
                if "ready" in message and message["ready"] != str(verdict.key):
                    raise Untuned(f"another process sees another device: {message['ready']}, and not {verdict.key}")
                _take(message, verdict, tokens, say)
                if "finished" in message:
                    heads.remove(Head(*message["finished"]))
                if "ready" not in message:
                    verdicts.write(verdict)
            break
        except Lost as error:
            family, what = at
            if family == "torch" or error.kind == "killed":  # no kernel of ours
                raise Untuned(f"the process that was to try the kernels was lost at {what}: {error}") from error
            lost = Refusal(family, None, error.kind, what, str(error))
            if verdict.refuses(family, "") is None:  # it was not told that it failed
                verdict.refused.append(lost)
            say(f"{lost}; it is not tried again")
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
        times.ms[message["path"]] = message["ms"]
        times.untimed.pop(message["path"], None)
        if message["why"]:
            times.untimed[message["path"]] = message["why"]
            say(f"path {message['path']}, {head}, was not timed in full: {message['why']}")


# What trainers ask for


class Kernels:
    """What a run takes for its head, of each path, until `release`.

    Nothing is tried where `impl` is explicit, where measurements that come with the package speak for the device, where
    there is nothing to choose from, where it is not `wanted`, or DPO_KERNELS_TUNE is 0. Where it cannot be done, plain
    PyTorch is kept, and a line says why. Of several processes the first one of each machine tries, and all take what
    the verdicts of all allow.

    Attributes:
        families: of each path.
        reason: why those that were `recorded` in a checkpoint could not be kept; "" otherwise.
    """

    def __init__(
        self,
        impl: str,
        device: torch.device,
        head: Head,
        *,
        recorded: Mapping[str, Any] | None = None,
        wanted: bool = True,
        bar: bool = True,
    ) -> None:
        self.impl, self.device, self.head = impl, device, head
        self.reason = ""
        self._row: dispatch.Row | None = None
        self.families: dict[str, Any] = {}
        self.take(recorded, wanted=wanted, bar=bar)

    def take(self, recorded: Mapping[str, Any] | None, *, wanted: bool = True, bar: bool = True) -> None:
        """Again, with what a checkpoint has recorded, if it has."""
        self.release()
        if recorded is None:
            tune_first(self.impl, self.device, self.head, wanted=wanted, bar=bar)
        dtype: torch.dtype = getattr(torch, self.head.dtype)
        now = dict(dispatch.choices(self.impl, self.device, dtype, self.head.vocab, self.head.hidden))
        self.families, self.reason = now, ""
        if self.impl != "auto":
            return
        together = not _table_speaks(self.device)  # what all processes know alike
        if recorded is not None:
            reasons = [reason for reason in _from_all(self._hindrance(recorded), together) if reason]
            if not reasons:
                self.families = dict(recorded)
            else:
                self.reason = (
                    f"it was computed by {spelled(recorded)}, and goes on with {spelled(now)}, since {reasons[0]}"
                )
        if recorded is None or self.reason:
            everyone = _from_all(now, together)
            self.families = common(everyone)
            if self.families != now or any(each != now for each in everyone):
                logger.warning(
                    "the verdicts of this run's machines differ: %s; all processes take %s",
                    " and ".join(sorted({spelled(each) for each in everyone})),
                    spelled(self.families),
                )
        if self.families != now:
            self._row = dispatch.pin(self.families, self.device.type, dtype, self.head.vocab, self.head.hidden)

    def release(self) -> None:
        """From now on, "auto" is what it was before."""
        if self._row is not None:
            dispatch.unpin(self._row)
            self._row = None

    def _hindrance(self, recorded: Mapping[str, Any]) -> str:
        """Why these cannot be taken here."""
        able = dispatch.families(self.device)
        key = verdicts.key_of(self.device)
        verdict = None if key is None else verdicts.read(key)
        for family in recorded.values():
            if family not in able:
                return f"{family} cannot run here"
            refusal = verdict.refuses(family, self.head.dtype) if verdict is not None else None
            if refusal is not None:
                return f"here {refusal}"
        return ""


def tune_first(impl: str, device: torch.device, head: Head, *, wanted: bool = True, bar: bool = True) -> None:
    """Proves the kernels for a head here and now, where there is no verdict and it is `Kernels`' turn to ask for one.
    Never raises: whoever else takes part in a run waits for this process."""
    if impl != "auto":
        return
    try:
        wanted = wanted and os.environ.get("DPO_KERNELS_TUNE") != "0"
        if wanted and dispatch.needs_tuning(device) and is_first_of_machine() and _lacks(device, head):
            logger.info("trying the kernels for this head (%s) on this %s, once", head, device.type)
            with_bar(device, [head], bar)
    except Exception as error:
        logger.warning("the kernels could not be tried, and plain PyTorch computes: %s", error)
        dispatch.say_no_more(device)
    if _distributed() and not _table_speaks(device):
        torch.distributed.barrier()
    dispatch.forget()


def _table_speaks(device: torch.device) -> bool:
    """Whether measurements that come with the package do."""
    return any(choice.device == device.type for choice in dispatch.CHOICES)


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
    return key is not None and (verdict is None or not verdict.knows(head, whole=False))


def is_first_of_machine() -> bool:
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _from_all(mine: Any, together: bool) -> list[Any]:
    """Of every process of a run; of this one, where all are known to have the same."""
    if not (together and _distributed()):
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def common(everyone: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all take: where they differ, plain PyTorch."""
    first = everyone[0]
    return {path: first[path] if all(each[path] == first[path] for each in everyone) else "torch" for path in first}


def spelled(families: Mapping[str, Any]) -> str:
    """Of each path, in a line."""
    if len(set(families.values())) == 1:
        return next(iter(families.values()))
    return ", ".join(f"{path} {family}" for path, family in families.items())
