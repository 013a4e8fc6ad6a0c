"""Heads of models in low precision, in several, and in numbers that are none."""

from __future__ import annotations

import types

import pytest
import torch

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

import transformers
from heads import adapt, assert_same_logps, batch, build, by_forward, by_head, eager_logps

from dpo_kernels.models.check import CheckFailed, NotFinite
from dpo_kernels.models.head import LMHead, unwrap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_check_passes_in_other_dtypes(dtype):
    model = build("gemma2", final_logit_softcapping=5.0).to(dtype)
    head = LMHead.from_model(model)
    assert head.softcap == 5.0
    assert {t.dtype for t in head.operands(head.hidden_states(**batch())[0]) if t is not None} == {dtype}


def test_check_allows_for_autocast_inside_the_forward():
    model = build("gemma2", final_logit_softcapping=5.0)
    forward = model.forward

    def rounded_forward(self, *args, **kwargs):  # as accelerate does for mixed precision
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output

    model.forward = types.MethodType(rounded_forward, model)
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (1.0, 5.0)


# Several precisions in one model


def mixed(name, low, parts, adapter=None):
    """A model in that low precision, but for parts of it."""
    model = build(name).to(low)
    if adapter is not None:
        model = adapt(model, adapter)
    for path, module in unwrap(model).named_modules():
        kinds = {"norms": "norm" in path.lower(), "final norm": path.endswith(("model.norm", "final_layernorm"))}
        if any(kinds.get(part) for part in parts) and next(module.children(), None) is None:
            module.float()
    if "embeddings" in parts:
        unwrap(model).get_input_embeddings().float()
    if "head" in parts:
        unwrap(model).get_output_embeddings().float()
    return model


MIXED = {
    "head": ("llama", ("head",)),
    "head with a bias": ("phi", ("head",)),
    "head and final norm": ("llama", ("final norm", "head")),
    "head with a softcap": ("gemma2", ("head", "embeddings", "norms")),  # tied: embeddings come with it
    "all that PEFT prepares": ("llama", ("norms", "embeddings", "head")),
    "norms": ("qwen3", ("norms",)),
    "transform and head": ("modernbert_decoder", ("norms", "embeddings", "head")),
    "an adapter": ("llama", ("norms", "embeddings", "head"), "head"),
    "a saved module": ("llama", ("norms", "embeddings", "head"), "modules_to_save"),
}
RUN_ALONE = ("head", "head with a bias", "head and final norm")  # others run under autocast, if at all


@pytest.mark.parametrize("way", [by_head, by_forward])
@pytest.mark.parametrize("low", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)])
@pytest.mark.parametrize("name, autocast", [*((name, True) for name in MIXED), *((name, False) for name in RUN_ALONE)])
@torch.no_grad()
def test_a_model_in_several_precisions(name, autocast, low, way):
    model = mixed(MIXED[name][0], low, *MIXED[name][1:])
    labels = batch()["input_ids"]
    inside = unwrap(model) if way is by_forward else model
    LMHead.from_model(model)  # outside of autocast
    with torch.autocast("cpu", low, enabled=autocast):
        found = way(inside, batch())
        if not autocast:  # F.linear takes one precision
            model.get_output_embeddings().register_forward_pre_hook(lambda layer, args: (args[0].float(),))
        expected = eager_logps(model(**batch()).logits.float(), labels)
    assert (found - expected).abs().max() <= (2e-3 if autocast else 1e-5) * expected.abs().max()


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_several_precisions_hide_no_factor(factor, autocast):
    class Peculiar(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = factor * output.logits
            return output

    for parts in ("head",), ("norms", "embeddings", "head"):
        model = mixed("llama", torch.bfloat16, parts)
        model.__class__ = Peculiar
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(CheckFailed, match="does not give"):
            LMHead.from_model(model)


def test_the_check_leaves_no_weights_in_the_cache_of_autocast():
    """They would be cast without a gradient, which whoever comes next under the same autocast would then miss."""
    model = mixed("llama", torch.bfloat16, ("norms", "embeddings", "head"))
    with torch.autocast("cpu", torch.bfloat16):
        LMHead.from_model(model)
        model(**batch()).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# What is not finite


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_a_head_that_is_not_finite_is_said_to_be(where, value):
    model = build("phi")
    with torch.no_grad():
        getattr(model.lm_head, where)[40:42] = value
    if where == "bias" and value == -torch.inf:  # these entries have no chance: that is what they mean, on both sides
        assert_same_logps(by_head, model)
        assert_same_logps(by_forward, model)
        return
    for head in (LMHead(model), LMHead(model, at_output_layer=True)):
        with pytest.raises(NotFinite, match="the head of PhiForCausalLM gives logits that are not finite"):
            head.check(model.forward)
    assert issubclass(NotFinite, ValueError) and not issubclass(NotFinite, CheckFailed)


@pytest.mark.parametrize("name", ["llama", "modernbert_decoder"])
def test_hidden_states_that_are_not_finite_do_not_matter(name):
    model = build(name)
    with torch.no_grad():
        next(model.model.layers.parameters())[:] = torch.nan
    head = LMHead.from_model(model)
    assert not head.hidden_states(**batch())[0].isfinite().any()
