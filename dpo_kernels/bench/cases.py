"""What is computed: inputs like those of a language model's head in a DPO step, and the right answers in fp64.

S sequences of T positions, N of them labelled; H hidden size, V vocabulary size. A case is small and hashable, so that
another process can make the same inputs from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.data.lengths import Lengths, blank_labels
from dpo_kernels.testing import rms

# Reference log-probabilities are zero, since not every peer takes them as an input (what they are changes nothing in
# the work). Whole responses then differ by thousands of nats, and only a small beta keeps the sigmoid from saturating.
BETA = 1e-3
SEQUENCES = 8
TINY_LENGTHS = ((3, 2, 4), (2, 3, 1))
LOGIT_STD, CONFIDENT = 3.0, 0.5
FLAT = {"logit_std": 0.5, "confident": 0.0}  # as a model has them that was not trained
ORACLE_BYTES = 2**30  # of logits in fp64 that exist at a time


class Result(NamedTuple):
    """What one run gave; None where it does not have that."""

    logps: Tensor | None = None  # [S]
    token_logps: Tensor | None = None  # [S, T]
    loss: Tensor | None = None
    gradients: dict[str, Tensor] = {}


Loss = Callable[[Tensor, "HeadInputs"], Tensor]


class Buffers(NamedTuple):
    """Where the bare products write."""

    x: Tensor  # [N, H] labelled rows
    logits: Tensor  # [N, V]
    dx: Tensor
    dweight: Tensor


@dataclass
class HeadInputs:
    hidden: Tensor  # [S, T, H], a leaf
    weight: Tensor  # [V, H], a leaf
    labels: Tensor  # [S, T]: labels[s, t] is what hidden[s, t] predicts; -100: nothing
    ref_logps: Tensor  # [S]
    num_labelled: int
    beta: float = BETA

    @property
    def labelled(self) -> Tensor:
        return self.labels != -100

    def prepare(self, overwrites: bool) -> None:
        """Before every run; `overwrites`: the run does not leave its inputs as they were."""
        assert not overwrites, "no contender overwrites hidden states"
        self.hidden.grad = self.weight.grad = None

    def gradients(self) -> dict[str, Tensor]:
        leaves = {"hidden": self.hidden, "weight": self.weight}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    @cached_property
    def buffers(self) -> Buffers:
        x = self.hidden.detach()[self.labelled]
        return Buffers(
            x, x.new_empty(x.shape[0], self.weight.shape[0]), torch.empty_like(x), torch.empty_like(self.weight)
        )


@dataclass(frozen=True)
class HeadCase:
    """`tokens` labelled positions in `sequences` sequences; or, with `lengths`, as many in one batch of such pairs."""

    tokens: int
    hidden: int
    vocab: int
    lengths: Lengths = ()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    sequences: int = SEQUENCES
    logit_std: float = LOGIT_STD
    confident: float = CONFIDENT  # part of the labels, at p > 0.99

    @staticmethod
    def of_pairs(lengths: Lengths, hidden: int, vocab: int, **options: Any) -> HeadCase:
        tokens = sum(chosen + rejected for _, chosen, rejected in lengths)
        return HeadCase(tokens, hidden, vocab, lengths, **options)

    @property
    def name(self) -> str:
        flat = ", flat logits" * (self.confident == 0)
        return f"N={self.tokens} H={self.hidden} V={self.vocab}{_described(self.lengths, self.dtype)}{flat}"

    def tiny(self) -> HeadCase:
        """The same kind of case with next to no memory, to load and start whatever a first call does."""
        return replace(self, tokens=2 * self.sequences, hidden=8, vocab=64, lengths=TINY_LENGTHS[: len(self.lengths)])

    def flops(self, products: int) -> float:
        return 2.0 * products * self.tokens * self.hidden * self.vocab

    def labels(self) -> Tensor:
        """[S, T] with 0 where a label belongs."""
        return blank_labels(self.tokens, self.sequences, self.lengths)

    def inputs(self) -> HeadInputs:
        """Logits of standard deviation `logit_std`; a confident label's hidden state is turned to it."""
        drawn: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        labelled = self.labels().to(self.device) == 0
        hidden = torch.randn(*labelled.shape, self.hidden, **drawn)
        weight = torch.randn(self.vocab, self.hidden, **drawn).mul_(self.logit_std / self.hidden**0.5)
        labels = torch.randint(self.vocab, labelled.shape, **drawn)
        turned = (torch.rand(labelled.shape, **drawn) < self.confident)[..., None]
        toward = weight[labels]
        missing = _confident_logit(self.vocab, self.logit_std) - (hidden * toward).sum(-1, keepdim=True)
        hidden += turned * toward * missing / toward.square().sum(-1, keepdim=True)
        hidden, weight = (t.to(self.dtype).requires_grad_() for t in (hidden, weight))
        ref_logps = torch.zeros(len(labels), device=self.device)
        return HeadInputs(hidden, weight, labels.where(labelled, -100), ref_logps, int(labelled.sum()))

    def oracle(self, inputs: HeadInputs, loss: Loss) -> Result:
        """Eager fp64, some rows at a time: once for the log-probabilities, then once more for the gradients."""
        labelled = inputs.labelled
        x, weight = inputs.hidden.detach()[labelled].double(), inputs.weight.detach().double()
        rows = max(1, ORACLE_BYTES // (8 * self.vocab))

        def row_logps(x: Tensor, y: Tensor) -> Tensor:
            return (x @ weight.T).log_softmax(-1).gather(-1, y[:, None])[:, 0]

        parts = list(zip(x.split(rows), inputs.labels[labelled].split(rows), strict=True))
        token_logps = x.new_zeros(labelled.shape)
        token_logps[labelled] = torch.cat([row_logps(*part) for part in parts])
        logps = token_logps.requires_grad_().sum(1)
        value = loss(logps, inputs)
        (g,) = torch.autograd.grad(value, token_logps)
        dhidden, dweight = x.new_zeros(inputs.hidden.shape), torch.zeros_like(weight)
        weight.requires_grad_()
        dx = []
        for (x_part, y_part), g_part in zip(parts, g[labelled].split(rows), strict=True):
            x_part.requires_grad_()
            of_part = torch.autograd.grad(row_logps(x_part, y_part), (x_part, weight), g_part)
            dx.append(of_part[0])
            dweight += of_part[1]
        dhidden[labelled] = torch.cat(dx)
        gradients = {"hidden": dhidden, "weight": dweight}
        return Result(logps.detach(), token_logps.detach(), value.detach(), gradients)


@dataclass
class LogitsInputs:
    logits: Tensor  # [S, T, V], a leaf
    labels: Tensor  # [S, T]
    dlogps: Tensor  # [S], what the backward starts from
    num_labelled: int
    original: Tensor | None = None

    @property
    def labelled(self) -> Tensor:
        return self.labels != -100

    @cached_property
    def rows(self) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the labelled rows, which are neighbours in each sequence, and of the others."""
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for logits, labelled in zip(self.logits.detach(), self.labelled, strict=True):
            positions = labelled.nonzero()
            first, last = int(positions[0]), int(positions[-1])
            found[0].append(logits[first : last + 1])
            found[1].extend(part for part in (logits[:first], logits[last + 1 :]) if len(part))
        return found

    def prepare(self, overwrites: bool) -> None:
        if self.original is not None:
            self.logits.detach().copy_(self.original)
        elif overwrites:
            self.original = self.logits.detach().clone()


@dataclass(frozen=True)
class LogitsCase:
    """Logits that exist already; `tokens` and `lengths` as above."""

    tokens: int
    vocab: int
    lengths: Lengths = ()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @staticmethod
    def of_pairs(lengths: Lengths, vocab: int, **options: Any) -> LogitsCase:
        return LogitsCase(sum(chosen + rejected for _, chosen, rejected in lengths), vocab, lengths, **options)

    @property
    def name(self) -> str:
        return f"N={self.tokens} V={self.vocab}{_described(self.lengths, self.dtype)}"

    def traffic(self, *, backward: bool) -> int:
        """Bytes that must be read and written: labelled rows once; with the backward once more, and all of the
        gradient."""
        read = self.tokens * (1 + backward)
        written = self.labels().numel() * backward
        return (read + written) * self.vocab * self.dtype.itemsize

    def labels(self) -> Tensor:
        return blank_labels(self.tokens, SEQUENCES, self.lengths)

    def tiny(self) -> LogitsCase:
        return replace(self, tokens=2 * SEQUENCES, vocab=64, lengths=TINY_LENGTHS[: len(self.lengths)])

    def inputs(self) -> LogitsInputs:
        drawn: dict[str, Any] = {"generator": torch.Generator(self.device).manual_seed(0), "device": self.device}
        labelled = self.labels().to(self.device) == 0
        logits = torch.randn(*labelled.shape, self.vocab, **drawn).mul_(LOGIT_STD)
        labels = torch.randint(self.vocab, labelled.shape, **drawn)
        at_label = logits.gather(-1, labels[..., None])
        sure = (torch.rand(labelled.shape, **drawn) < CONFIDENT)[..., None]
        confident = _confident_logit(self.vocab, LOGIT_STD)
        logits.scatter_(-1, labels[..., None], torch.where(sure, confident, at_label))
        dlogps = torch.linspace(-1, 1, len(labels), device=self.device)
        return LogitsInputs(
            logits.to(self.dtype).requires_grad_(), labels.where(labelled, -100), dlogps, int(labelled.sum())
        )

    def oracle(self, inputs: LogitsInputs, loss: Loss) -> Result:
        """Eager fp64, a sequence at a time. `loss` has no part in it."""
        token_logps = []
        dlogits = torch.empty_like(inputs.logits, dtype=torch.float64, requires_grad=False)
        parts = zip(inputs.logits.detach(), inputs.labels, inputs.dlogps, dlogits, strict=True)
        for logits, labels, dlogp, gradient in parts:
            wide = logits.double().requires_grad_()
            picked = wide.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
            token_logps.append(picked * (labels != -100))
            gradient.copy_(torch.autograd.grad(token_logps[-1].sum(), wide, dlogp.double())[0])
        found = torch.stack(token_logps).detach()
        return Result(found.sum(1), found, gradients={"logits": dlogits})


def _confident_logit(vocab: int, std: float) -> float:
    """A label's logit 6 nats above the log-sum-exp of all others, if these are normal: log V + std^2 / 2."""
    return math.log(vocab) + std**2 / 2 + 6


def _described(lengths: Lengths, dtype: torch.dtype) -> str:
    longest = max((prompt + max(rest) for prompt, *rest in lengths), default=0)
    batch = f", {len(lengths)} pair{'s' * (len(lengths) > 1)} padded to {longest}" if lengths else ""
    return f"{batch}, {str(dtype).removeprefix('torch.')}"


def sigmoid_loss(logps: Tensor, inputs: HeadInputs) -> Tensor:
    """DPO (arXiv 2305.18290, Eq. 7) from the log-probabilities of chosen, then rejected responses."""
    chosen, rejected = (logps - inputs.ref_logps).chunk(2)
    return -F.logsigmoid(inputs.beta * (chosen - rejected)).mean()


def likelihood_loss(logps: Tensor, inputs: HeadInputs) -> Tensor:
    """For a peer that knows no other sum than one over all tokens: the same work, with one weight for all of them."""
    return -inputs.beta * logps.sum()


def errors(result: Result, oracle: Result) -> dict[str, float]:
    """rms error of log-probabilities in nats, error of the loss, and rms error of each gradient over its own rms."""
    found = {}
    for name in ("logps", "token_logps", "loss"):
        value = getattr(result, name)
        if value is not None:
            error = value.detach().double() - getattr(oracle, name)
            # where nothing is labelled nothing can be wrong
            found[name] = rms(error[oracle.token_logps != 0] if name == "token_logps" else error)
    for name, gradient in result.gradients.items():
        # a few rows at a time: a whole difference in fp64 would take gigabytes
        pairs = zip(*(t.flatten(0, -2).split(512) for t in (gradient, oracle.gradients[name])), strict=True)
        squares = [((ours.double() - right).square().sum(), right.square().sum()) for ours, right in pairs]
        error, scale = (torch.stack(column).sum() for column in zip(*squares, strict=True))
        found["d" + name] = (error / scale).sqrt().item()
    return found


def wrong(found: dict[str, float], case: HeadCase | LogitsCase) -> str | None:
    """Which error no rounding explains. Logits rounded to bf16, as some peers have them, are let pass."""
    token_logp, gradient = (1e-3, 1e-3) if case.dtype == torch.float32 else (0.2, 0.1)
    logp = token_logp * case.tokens**0.5  # of a sequence, whose tokens are a part of them
    limits = {"logps": logp, "token_logps": token_logp, "loss": max(BETA * logp, 1e-4)}
    for name, error in found.items():
        limit = limits.get(name, gradient)
        if not error <= limit:  # NaN is wrong too
            return f"wrong: error of {name} {error:.1e}, more than {limit:.1e}"
    return None
