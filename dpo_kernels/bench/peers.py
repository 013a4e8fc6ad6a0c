"""Others that compute the same: forward and backward with a trained head, where nothing else is said.

Peers are called as their own users call them; where there is a choice, the README says which one was made and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels.bench.cases import HeadInputs, LogitsInputs, Result, likelihood_loss, sigmoid_loss
from dpo_kernels.bench.contenders import Contender, finish_logits


def eager(inputs: HeadInputs) -> Result:
    """Logits of every position, in fp32 before the log-softmax, as DPO's original implementation has it."""
    return _finish(inputs, _head_logp(inputs.hidden, inputs.weight, inputs.labels))


def eager_trl(inputs: HeadInputs) -> Result:
    """As TRL did up to 1.14."""
    return _finish(inputs, _selective_logp(inputs.hidden @ inputs.weight.T, inputs))


def _selective_logp(logits: Tensor, inputs: HeadInputs | LogitsInputs) -> Tensor:
    """The label's logit less the log-sum-exp, a sequence at a time; in half precision a log-softmax in that precision
    instead, which is more exact than the difference."""
    labels = inputs.labels.clamp(min=0)[..., None]
    if logits.dtype in (torch.float32, torch.float64):
        picked = logits.gather(-1, labels)[..., 0]
        logp = picked - torch.stack([sequence.logsumexp(-1) for sequence in logits])
    else:
        logp = torch.stack([s.log_softmax(-1).gather(-1, y)[:, 0] for s, y in zip(logits, labels, strict=True)])
    return logp.float().masked_fill(~inputs.labelled, 0.0)


def eager_compiled(inputs: HeadInputs) -> Result:
    return _finish(inputs, _compiled(_head_logp)(inputs.hidden, inputs.weight, inputs.labels))


def eager_compiled_rows(inputs: HeadInputs) -> Result:
    labelled = inputs.labelled
    picked = _compiled(_head_logp)(inputs.hidden[labelled], inputs.weight, inputs.labels[labelled])
    return _finish(inputs, picked.new_zeros(labelled.shape).masked_scatter(labelled, picked))


@cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function)


def _head_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _logp((hidden @ weight.T).float(), labels)


def _logp(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return picked.masked_fill(labels == -100, 0.0)


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
    # of a reference model `DPOTrainer` asks for nothing else
    logged = ("entropy", "mean_logits", "is_top1") if torch.is_grad_enabled() else ()
    add_fused_lm_head(model, outputs=("log_probs", *logged))
    return _finish(inputs, model.forward(shift_labels=inputs.labels, fused_lm_head=True).log_probs)


def liger(inputs: HeadInputs, *, compiled: bool) -> Result:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_fn = LigerFusedLinearDPOLoss(beta=inputs.beta, use_ref_model=False, compiled=compiled)
    loss, (chosen_logps, rejected_logps, *_) = loss_fn(inputs.weight, inputs.hidden, inputs.labels)
    if loss.requires_grad:
        loss.backward()
    return Result(torch.cat([chosen_logps, rejected_logps]), None, loss, inputs.gradients())


def liger_hopper(inputs: HeadInputs, *, rows: bool = False) -> Result:
    """Liger's fused kernel for Hopper, which gives each token's negative log-likelihood."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import LigerFusedScaledCrossEntropySM90Function

    return _finish_rows(inputs, rows, lambda x, y: LigerFusedScaledCrossEntropySM90Function.apply(x, inputs.weight, y))


def torch_linear_cross_entropy(inputs: HeadInputs, *, chunk: int | None, rows: bool = False) -> Result:
    """`chunk`: rows at a time; None: what the options' defaults choose."""
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError("needs PyTorch 2.13 or newer")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    call = partial(F.linear_cross_entropy, reduction="none", options=options)
    return _finish_rows(inputs, rows, lambda x, y: call(x, inputs.weight, y))


def cut_cross_entropy(inputs: HeadInputs, **options: Any) -> Result:
    from cut_cross_entropy import linear_cross_entropy

    return _finish(
        inputs, -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels, reduction="none", **options)
    )


def quack(inputs: HeadInputs, *, rows: bool = False) -> Result:
    """It sums over all tokens and knows no sequences: the gradients are of `likelihood_loss`."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    scored = inputs.labelled if rows else torch.ones_like(inputs.labelled)
    x = inputs.hidden[scored] if rows else inputs.hidden.flatten(0, 1)
    # tuned=False: its tuner, where its default pipeline does not run, compiles for minutes
    nll = chunked_linear_cross_entropy(x, inputs.weight, inputs.labels[scored], reduction="sum", tuned=False)
    loss = inputs.beta * nll
    if loss.requires_grad:
        loss.backward()
    return Result(loss=loss, gradients=inputs.gradients())


def _finish_rows(inputs: HeadInputs, rows: bool, call: Callable[[Tensor, Tensor], Tensor]) -> Result:
    """From each position's negative log-likelihood; `rows`: of the labelled positions alone."""
    scored = inputs.labelled if rows else torch.ones_like(inputs.labelled)
    nll = call(inputs.hidden[scored] if rows else inputs.hidden.flatten(0, 1), inputs.labels[scored])
    return _finish(inputs, -nll.new_zeros(scored.shape).masked_scatter(scored, nll))


def _finish(inputs: HeadInputs, token_logps: Tensor) -> Result:
    logps = token_logps.sum(1)
    loss = sigmoid_loss(logps, inputs)
    if loss.requires_grad:
        loss.backward()
    return Result(logps, token_logps, loss, inputs.gradients())


def forward_only(inputs: HeadInputs, *, peer: Callable[[HeadInputs], Result]) -> Result:
    # Liger and CCE ask the tensors, not the mode, whether there is a backward to come
    with torch.no_grad():
        return peer(replace(inputs, hidden=inputs.hidden.detach(), weight=inputs.weight.detach()))


def frozen_head(inputs: HeadInputs, *, peer: Callable[[HeadInputs], Result]) -> Result:
    return peer(replace(inputs, weight=inputs.weight.detach()))


def head_peers(device: torch.device, *, padded: bool) -> dict[str, Contender]:
    """`padded`: also those on labelled positions alone, which are the same where every position is labelled. On a GPU
    the first are those of every table."""
    found = [
        Contender("eager", eager),
        Contender("TRL", trl, "trl"),
        Contender("eager, TRL <= 1.14", eager_trl),
        Contender("eager, torch.compile", eager_compiled, compiled=True),
        Contender("Liger, compiled", partial(liger, compiled=True), "liger_kernel", compiled=True),
        Contender("Liger, not compiled", partial(liger, compiled=False), "liger_kernel"),
        Contender("F.linear_cross_entropy", partial(torch_linear_cross_entropy, chunk=None)),
        Contender("F.linear_cross_entropy, 256 rows", partial(torch_linear_cross_entropy, chunk=256)),
    ]
    labelled = {"eager": eager_rows, "eager, torch.compile": eager_compiled_rows}
    if device.type == "cpu":
        cce = partial(cut_cross_entropy, impl="torch_compile")
        found.append(Contender("CCE torch_compile", cce, "cut_cross_entropy", compiled=True))
        labelled["F.linear_cross_entropy, 256 rows"] = partial(torch_linear_cross_entropy, chunk=256, rows=True)
    else:
        found += [
            Contender("CCE", partial(cut_cross_entropy, impl="cce"), "cut_cross_entropy"),
            Contender("CCE, no filter", partial(cut_cross_entropy, impl="cce", filter_eps=None), "cut_cross_entropy"),
            Contender("CCE Kahan, full c", partial(cut_cross_entropy, impl="cce_kahan_full_c"), "cut_cross_entropy"),
            Contender("QuACK", quack, "quack-kernels", loss=likelihood_loss),
            Contender("Liger Hopper", liger_hopper, "liger_kernel"),
        ]
        labelled |= {"QuACK": partial(quack, rows=True), "Liger Hopper": partial(liger_hopper, rows=True)}
    if padded:
        found += [replace(c, name=f"{c.name}, labelled", run=labelled[c.name]) for c in found if c.name in labelled]
    return {contender.name: contender for contender in found}


def eager_from_logits(
    inputs: LogitsInputs, *, backward: bool, logp: Callable[[Tensor, LogitsInputs], Tensor]
) -> Result:
    with torch.set_grad_enabled(backward):
        token_logps = logp(inputs.logits, inputs)
        return finish_logits(inputs, token_logps, token_logps.sum(1))


def _upcast(logits: Tensor, inputs: LogitsInputs) -> Tensor:
    return _logp(logits.float(), inputs.labels)


def _as_they_are(logits: Tensor, inputs: LogitsInputs) -> Tensor:
    return _logp(logits, inputs.labels)


def _by_compile(logits: Tensor, inputs: LogitsInputs) -> Tensor:
    return _compiled(_logp)(logits.float(), inputs.labels)


def _by_cross_entropy(logits: Tensor, inputs: LogitsInputs) -> Tensor:
    nll = F.cross_entropy(logits.flatten(0, 1).float(), inputs.labels.flatten(), reduction="none")
    return -nll.view(inputs.labels.shape)


def logits_peers(dtype: torch.dtype, *, backward: bool) -> dict[str, Contender]:
    """Others that start from logits."""
    ways = {"eager": _upcast, "eager, TRL <= 1.14": _selective_logp, "F.cross_entropy": _by_cross_entropy}
    if dtype != torch.float32:
        ways["eager, not in fp32"] = _as_they_are
    ways["eager, torch.compile"] = _by_compile
    return {
        name: Contender(name, partial(eager_from_logits, backward=backward, logp=logp), compiled=logp is _by_compile)
        for name, logp in ways.items()
    }
