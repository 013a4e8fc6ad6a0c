"""Every way to compute the same thing, one plain function each: the bare products that are the limit, ours, peers'.

A run takes the inputs of a case, does one forward (and backward) and returns what it found. Peers are called as their
own users call them; where there is a choice, the README says which one was made and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from cases import HeadInputs, LogitsInputs, Result, sigmoid_loss
from torch import Tensor

from dpo_kernels import dpo_loss, linear_dpo_loss, linear_sequence_logps, sequence_logps


@dataclass(frozen=True)
class Contender:
    """A way to do it. `run` must be picklable: memory is measured in another process."""

    name: str
    run: Callable[[Any], Result]
    package: str = "torch"
    products: int = 3  # of [N, H] by [H, V] that the task takes at least, where it has a matrix product
    compiled: bool = False  # by torch.compile, which takes memory of its own in the first call
    overwrites: bool = False  # its inputs


# The limit


def products(inputs: HeadInputs, *, count: int) -> Result:
    """x W^T; then dlogits W; then dlogits^T x; and with four, x W^T once more: nothing but matrix products."""
    x, logits, dx, dweight = inputs.buffers
    with torch.no_grad():
        for _ in range(2 if count == 4 else 1):
            torch.mm(x, inputs.weight.T, out=logits)
        if count >= 2:
            torch.mm(logits, inputs.weight, out=dx)
        if count >= 3:
            torch.mm(logits.T, x, out=dweight)
    return Result()


LIMITS = {
    count: Contender(f"{count} x torch.mm", partial(products, count=count), products=count) for count in range(1, 5)
}


# Ours


def path_a(inputs: HeadInputs, *, impl: str) -> Result:
    """Forward only."""
    with torch.no_grad():
        out = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, impl=impl)
    return Result(out.logps, out.token_logps)


def path_b(inputs: HeadInputs, *, impl: str) -> Result:
    """Frozen head, any loss."""
    return _any_loss(inputs, inputs.weight.detach(), impl)


def path_c(inputs: HeadInputs, *, impl: str) -> Result:
    """Trained head, the fused loss."""
    out = linear_dpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps, beta=inputs.beta, impl=impl)
    out.loss.backward()
    return Result(out.logps, None, out.loss, inputs.gradients())


def path_d(inputs: HeadInputs, *, impl: str) -> Result:
    """Trained head, any loss."""
    return _any_loss(inputs, inputs.weight, impl)


def _any_loss(inputs: HeadInputs, weight: Tensor, impl: str) -> Result:
    out = linear_sequence_logps(inputs.hidden, weight, inputs.labels, impl=impl)
    loss = dpo_loss(*out.logps.chunk(2), *inputs.ref_logps.chunk(2), beta=inputs.beta).losses.mean()
    loss.backward()
    return Result(out.logps, out.token_logps, loss, inputs.gradients())


def paths(impl: str) -> dict[str, Contender]:
    described = {
        "A": ("A forward", path_a, 1),
        "B": ("B frozen head", path_b, 2),
        "C": ("C fused loss", path_c, 3),
        "D": ("D any loss", path_d, 4),
    }
    return {
        key: Contender(name, partial(run, impl=impl), "dpo_kernels", products=count)
        for key, (name, run, count) in described.items()
    }


# Peers: forward and backward with a trained head


def eager(inputs: HeadInputs) -> Result:
    """Logits of every position, as trainers did."""
    logp = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
    picked = logp.gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0]
    return _finish(inputs, picked.masked_fill(~inputs.labelled, 0.0))


def eager_rows(inputs: HeadInputs) -> Result:
    """Logits of the labelled positions."""
    labelled = inputs.labelled
    logp = (inputs.hidden[labelled] @ inputs.weight.T).float().log_softmax(-1)
    picked = logp.gather(-1, inputs.labels[labelled][:, None])[:, 0]
    return _finish(inputs, picked.new_zeros(labelled.shape).masked_scatter(labelled, picked))


class _ScoredHiddenStates:
    """What TRL patches: a causal language model whose backbone has run already."""

    def __init__(self, inputs: HeadInputs) -> None:
        text_config = SimpleNamespace(model_type="given")
        self.config = SimpleNamespace(get_text_config=lambda: text_config)
        self._inputs = inputs

    def base_model(self, **kwargs: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self._inputs.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(weight=self._inputs.weight, bias=None)

    def forward(self) -> None:
        raise NotImplementedError


def trl(inputs: HeadInputs) -> Result:
    """The head that `DPOTrainer` puts on its model, with the outputs that it asks for, summed as it sums them."""
    from trl.trainer.utils import add_fused_lm_head

    model: Any = _ScoredHiddenStates(inputs)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return _finish(inputs, model.forward(shift_labels=inputs.labels, fused_lm_head=True).log_probs)


def liger(inputs: HeadInputs, *, compiled: bool) -> Result:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(beta=inputs.beta, use_ref_model=False, compiled=compiled)
    loss, (chosen_logps, rejected_logps, *_) = loss_fn(inputs.weight, inputs.hidden, inputs.labels)
    loss.backward()
    return Result(torch.cat([chosen_logps, rejected_logps]), None, loss, inputs.gradients())


def torch_linear_cross_entropy(inputs: HeadInputs, *, chunk: int | None, rows: bool = False) -> Result:
    """`chunk`: rows at a time; None: what the options' defaults choose. `rows`: of the labelled positions alone."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    scored = inputs.labelled if rows else torch.ones_like(inputs.labelled)
    x = inputs.hidden[scored] if rows else inputs.hidden.flatten(0, 1)
    nll = F.linear_cross_entropy(x, inputs.weight, inputs.labels[scored], reduction="none", options=options)
    return _finish(inputs, -nll.new_zeros(scored.shape).masked_scatter(scored, nll))


def cut_cross_entropy(inputs: HeadInputs) -> Result:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, reduction="none", impl="torch_compile")
    return _finish(inputs, -nll)


def _finish(inputs: HeadInputs, token_logps: Tensor) -> Result:
    logps = token_logps.sum(1)
    loss = sigmoid_loss(logps, inputs)
    loss.backward()
    return Result(logps, token_logps, loss, inputs.gradients())


def peers(*, padded: bool) -> dict[str, Contender]:
    """`padded`: also those on labelled positions alone, which are the same where every position is labelled."""
    found = [
        Contender("eager", eager),
        Contender("TRL", trl, "trl"),
        Contender("Liger, compiled", partial(liger, compiled=True), "liger_kernel", compiled=True),
        Contender("Liger, not compiled", partial(liger, compiled=False), "liger_kernel"),
        Contender("F.linear_cross_entropy", partial(torch_linear_cross_entropy, chunk=None)),
        Contender("F.linear_cross_entropy, 256 rows", partial(torch_linear_cross_entropy, chunk=256)),
        Contender("CCE torch_compile", cut_cross_entropy, "cut_cross_entropy", compiled=True),
    ]
    if padded:
        lce_rows = partial(torch_linear_cross_entropy, chunk=256, rows=True)
        found += [Contender("eager, labelled", eager_rows), Contender("F.linear_cr., 256, labelled", lce_rows)]
    return {contender.name: contender for contender in found}


# From logits


def read_logits(inputs: LogitsInputs) -> Result:
    """One read."""
    inputs.logits.detach().sum()
    return Result()


def read_and_scale_logits(inputs: LogitsInputs) -> Result:
    """One read, and one read and write."""
    inputs.logits.detach().sum()
    inputs.logits.detach().mul_(1.0)
    return Result()


def ours_from_logits(inputs: LogitsInputs, *, impl: str, backward: bool, inplace: bool = False) -> Result:
    with torch.set_grad_enabled(backward):
        out = sequence_logps(inputs.logits, inputs.labels, inplace_backward=inplace, impl=impl)
    return _finish_logits(inputs, out.token_logps, out.logps)


def eager_from_logits(inputs: LogitsInputs, *, backward: bool, upcast: bool = False) -> Result:
    with torch.set_grad_enabled(backward):
        logits = inputs.logits.float() if upcast else inputs.logits
        token_logps = logits.log_softmax(-1).gather(-1, inputs.labels[..., None])[..., 0]
        return _finish_logits(inputs, token_logps, token_logps.sum(1))


def _finish_logits(inputs: LogitsInputs, token_logps: Tensor, logps: Tensor) -> Result:
    if not logps.requires_grad:
        return Result(logps, token_logps)
    (dlogits,) = torch.autograd.grad(logps, inputs.logits, inputs.dlogps.to(logps.dtype))
    return Result(logps, token_logps, gradients={"logits": dlogits})


def from_logits(impl: str, dtype: torch.dtype, *, backward: bool) -> dict[str, Contender]:
    limit = Contender("read, scale in place", read_and_scale_logits) if backward else Contender("read", read_logits)
    found = [limit, Contender("E", partial(ours_from_logits, impl=impl, backward=backward), "dpo_kernels")]
    if backward:
        inplace = partial(ours_from_logits, impl=impl, backward=True, inplace=True)
        found.append(Contender("E in place", inplace, "dpo_kernels", overwrites=True))
    found.append(Contender("eager", partial(eager_from_logits, backward=backward)))
    if dtype != torch.float32:
        found.append(Contender("eager in fp32", partial(eager_from_logits, backward=backward, upcast=True)))
    return {contender.name: contender for contender in found}
