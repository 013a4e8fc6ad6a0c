"""What the check of a head says: of hooks, of what stands between base model and output layer, of models that it cannot
run; and heads whose base model is not found."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

import transformers
from heads import (
    VOCAB,
    adapt,
    assert_close,
    assert_same_logps,
    batch,
    build,
    by_forward,
    by_head,
    logits_of,
)
from transformers.modeling_outputs import CausalLMOutput

from dpo_kernels.models.check import CheckFailed
from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead, unwrap

# Hooks


def scale_logits(module, args, output):
    return 1.5 * output


def scale_hidden(module, args):
    return (1.5 * args[0],)


class Scaling:
    def __call__(self, module, args, output):
        return 1.5 * output


@pytest.mark.parametrize("way", [by_head, by_forward])
@pytest.mark.parametrize(
    "hook, name",
    [
        (scale_logits, r"the forward hook scale_logits \(test_check_messages.py, line \d+\)"),
        (
            lambda module, args, output: output.clamp(max=1.0),
            r"the forward hook <lambda> \(test_check_messages.py, line",
        ),
        (functools.partial(lambda factor, *args: factor * args[2], 0.5), "the forward hook <lambda>"),
        (Scaling(), "the forward hook Scaling"),
        (Scaling().__call__, "the forward hook Scaling.__call__"),
    ],
)
def test_a_hook_that_changes_logits_is_named(hook, name, way):
    for mode in (True, False):
        model = build("llama").train(mode)
        model.lm_head.register_forward_hook(hook)
        with pytest.raises(CheckFailed, match=f"output layer has {name}"):
            way(model, batch())


def test_a_hook_on_what_is_inside_the_output_layer_or_on_the_model_is_named():
    model = adapt(build("llama"), "head")
    unwrap(model).lm_head.base_layer.register_forward_hook(scale_logits)
    for way in (LMHead.from_model, lambda model: by_forward(unwrap(model), batch())):
        with pytest.raises(CheckFailed, match="output layer has the forward hook scale_logits"):
            way(model)
    model = build("llama")
    model.lm_head.register_forward_pre_hook(scale_hidden)
    with pytest.raises(CheckFailed, match="output layer has the forward pre-hook scale_hidden.*add_fused_lm_head"):
        LMHead.from_model(model)
    model = build("llama")

    def scale_output(module, args, output):
        output.logits = 1.5 * output.logits
        return output

    model.register_forward_hook(scale_output)
    with pytest.raises(CheckFailed, match="the model has the forward hook scale_output"):
        LMHead.from_model(model)


@torch.no_grad()
def test_a_hook_that_changes_no_logits_is_let_be():
    seen = []
    for way in (by_head, by_forward):
        model = build("llama")
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(type(output)))
        model.model.register_forward_hook(lambda module, args, output: None)
        assert way(model, batch()).isfinite().all()
    model = build("llama")  # after that hook come the hidden states of the forward
    model.lm_head.register_forward_pre_hook(scale_hidden)
    assert_same_logps(by_forward, model)
    assert seen


def test_a_hook_that_comes_later_is_found():
    model = build("llama")
    add_fused_lm_head(model)
    inputs = batch() | {"labels": batch()["input_ids"], "fused_lm_head": True}
    model(**inputs)
    handle = model.lm_head.register_forward_hook(scale_logits)
    with pytest.raises(CheckFailed, match="scale_logits"):
        model(**inputs)
    handle.remove()
    model(**inputs)


# What the check says


def test_what_a_model_raises_is_wrapped():
    class Needy(transformers.LlamaForCausalLM):
        problem = KeyError("pixel_values")

        def forward(self, *args, **kwargs):
            raise self.problem

    model = Needy(build("llama").config)
    problems = [KeyError("pixel_values"), TypeError("'NoneType' has no len()"), ValueError("an image. "), IndexError()]
    for problem in problems:
        Needy.problem = problem
        for head in (LMHead(model), LMHead(model, at_output_layer=True)):
            message = rf"Needy raised {type(problem).__name__} .* runs it on text alone.*without images.*check=False"
            with pytest.raises(CheckFailed, match=message) as error:
                head.check()
            assert error.value.__cause__ is problem
    LMHead.from_model(model, check=False)


@pytest.mark.parametrize("narrow", [True, False])
def test_a_dense_transform_that_is_not_known_is_named(narrow):
    sizes = {"hidden_size": 32, "input_embedding_size": 16, "output_embedding_size": 24 if narrow else 32}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": VOCAB}
    model = transformers.RemBertForCausalLM(transformers.RemBertConfig(**sizes, is_decoder=True)).eval()
    with pytest.raises(CheckFailed) as error:
        LMHead.from_model(model)
    for part in ("RemBertForCausalLM", "a dense transform", "cls.predictions.dense (Linear)", "LayerNorm", "add_fused"):
        assert part in str(error.value)
    assert_same_logps(by_forward, model)


class DropoutBefore(transformers.OPTForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.3)

    def forward(self, input_ids=None, use_cache=None, logits_to_keep=0):
        return CausalLMOutput(logits=self.lm_head(self.drop(self.model(input_ids=input_ids, use_cache=False)[0])))


class DropoutFunctionBefore(DropoutBefore):
    def forward(self, input_ids=None, use_cache=None, logits_to_keep=0):
        hidden = functional.dropout(self.model(input_ids=input_ids, use_cache=False)[0], 0.3, self.training)
        return CausalLMOutput(logits=self.lm_head(hidden))


def test_dropout_before_the_head_is_named():
    with pytest.raises(CheckFailed, match=r"ran drop \(Dropout\).*\d+% of it is 0, as after dropout.*add_fused"):
        LMHead.from_model(DropoutBefore(build("opt").config).train())
    with pytest.raises(CheckFailed, match=r"\d+% of it is 0, as after dropout"):
        LMHead.from_model(DropoutFunctionBefore(build("opt").config).train())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_output_layer_is_said_to_be(dtype):
    model = build("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCAB, 32).to(dtype), requires_grad=False)
    for way in (LMHead.from_model, lambda model: by_forward(model, batch())):
        with pytest.raises(CheckFailed, match=rf"floating-point matrix \[V, 32\] in one piece.* of {dtype}"):
            way(model)


def test_outputs_may_be_tuples():
    class Older(transformers.LlamaForCausalLM):
        def forward(self, *args, logits_to_keep=0, **kwargs):
            return super().forward(*args, logits_to_keep=logits_to_keep, **kwargs).to_tuple()

    model = Older(build("llama").config).eval()
    head = LMHead.from_model(model)
    assert_close(logits_of(head, head.hidden_states(**batch())[0]), model(**batch())[0])


def test_what_gives_no_logits_of_each_token_is_refused():
    class Peculiar(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = self.change(output.logits)
            return output

    for change, found in (
        (lambda z: z[:, -1:], r"\[1, 1, 101\]"),
        (lambda z: z[..., :-1], r"\[1, 62, 100\]"),
        (lambda z: functional.pad(z, (0, 27)), r"\[1, 62, 128\]"),
        (lambda z: None, "NoneType"),
    ):
        Peculiar.change = staticmethod(change)
        with pytest.raises(CheckFailed, match=f"101 rows in its output layer Linear.*of 62 tokens {found}, expected"):
            LMHead.from_model(Peculiar(build("llama").config))


# Models whose base model is not found


def test_a_head_without_a_base_model():
    class Nested(transformers.PreTrainedModel):
        """As Llama 4 has it with images."""

        config_class, base_model_prefix, _supports_sdpa = transformers.LlamaConfig, "", True

        def __init__(self, config):
            super().__init__(config)
            self.language_model = build("llama")

        def forward(self, input_ids=None, **kwargs):
            return self.language_model(input_ids=input_ids, **kwargs)

        def get_input_embeddings(self):
            return self.language_model.get_input_embeddings()

    model = Nested(build("llama").config).eval()
    with pytest.raises(ValueError, match="no base model found on Nested.*add_fused_lm_head .* needs none"):
        LMHead.from_model(model)
    assert LMHead(model, at_output_layer=True).output_layer() is model.language_model.lm_head
    assert_same_logps(by_forward, model)


@pytest.mark.parametrize("adapter", ["attention", "head", "modules_to_save"])
def test_adapters_around_a_forward_without_logits_to_keep_are_refused_at_once(adapter):
    """As in Qwen-Omni and MiniCPM-V."""

    class Older(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids, attention_mask, use_cache=use_cache)

    model = adapt(Older(build("llama").config), adapter)
    with pytest.raises(ValueError, match="Older inside PeftModel.*no logits_to_keep.*add_fused_lm_head"):
        LMHead.from_model(model)
    for way in (by_head, by_forward):  # the model inside has the adapters
        assert_same_logps(way, unwrap(model))
