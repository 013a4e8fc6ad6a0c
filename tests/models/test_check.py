"""The self-check of a head: what it refuses, what it lets pass, and what it says.

What is refused is tried on both ways to a head, in training and in evaluation; where it is not refused the
log-probabilities are those of the model's own logits."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

import transformers
from heads import ADAPTERS, VOCAB, adapt, assert_same_logps, batch, build, by_forward, by_head
from transformers.modeling_outputs import CausalLMOutput

from dpo_kernels.models.check import CheckFailed, NotFinite, what_is_done_by
from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead

WIDTH = 56  # positions compared, of the 64 that the models have room for

# Models that do something to their logits


def changed(change):
    """Qwen2 with its logits z changed by `change(z, positions [T, 1], whether it is training)`."""

    class Peculiar(transformers.Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            positions = torch.arange(output.logits.shape[-2]).unsqueeze(-1)
            output.logits = change(output.logits, positions, self.training)
            return output

    return lambda: Peculiar(build("qwen2").config).eval()


def masked(entries, value=-torch.inf):
    return lambda z, positions, training: z.index_fill(-1, torch.tensor(entries), value)


LOGITS = {
    "a range is masked": masked(range(60, 80)),
    "with the lowest number": lambda z, *_: masked(range(60, 80), torch.finfo(z.dtype).min)(z),
    "with -1e4": masked(range(97, VOCAB), -1e4),
    "one entry is masked": masked([77]),
    "one entry is masked late": lambda z, t, _: torch.where((t >= 50) & (torch.arange(VOCAB) == 40), -torch.inf, z),
    "a factor": lambda z, *_: 1.02 * z,
    "a factor below one": lambda z, *_: 0.98 * z,
    "a small factor": lambda z, *_: 1.012 * z,
    "a high cap": lambda z, *_: 100 * torch.tanh(z / 100),
    "an offset of one entry": lambda z, *_: z + 0.05 * functional.one_hot(torch.tensor(55), VOCAB),
    "an offset of all": lambda z, *_: z + 0.5,
    "noise": lambda z, *_: z + 0.1 * torch.randn_like(z),
    "a softmax": lambda z, *_: z.log_softmax(-1),
    "a scale by position": lambda z, t, _: (1 + 0.01 * t) * z,
    "a small scale by position": lambda z, t, _: (1 + 0.001 * t) * z,
    "another scale late": lambda z, t, _: torch.where(t >= 48, 0.5 * z, z),
    "a factor late": lambda z, t, _: torch.where(t >= 48, 1.03 * z, z),
    "another scale at one position": lambda z, t, _: torch.where(t == 31, 1.1 * z, z),
}
ONLY_TRAINING = {
    "a temperature in training": lambda z, t, training: z / 2 if training else z,
    "a small temperature in training": lambda z, t, training: z / 1.03 if training else z,
    "dropout of logits": lambda z, t, training: functional.dropout(z, 0.1, training),
    "a mask in training": lambda z, t, training: masked([3])(z, t, training) if training else z,
}
ONLY_EVALUATION = {
    "a temperature in evaluation": lambda z, t, training: z if training else z / 2,
    "a mask in evaluation": lambda z, t, training: z if training else masked([3])(z, t, training),
}


class WithSomethingBefore(transformers.Qwen2ForCausalLM):
    """Something happens to the hidden states on their way to the output layer."""

    def before(self, hidden):
        return hidden

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, logits_to_keep=0):
        hidden = self.before(self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0])
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutput(logits=self.lm_head(hidden[:, kept]))


class DropoutBefore(WithSomethingBefore):
    def __init__(self, config):
        super().__init__(config)
        self.drop = nn.Dropout(0.3)

    def before(self, hidden):
        return self.drop(hidden)


class DropoutFunctionBefore(WithSomethingBefore):
    def before(self, hidden):
        return functional.dropout(hidden, 0.3, self.training)


class ScaleBefore(WithSomethingBefore):
    def before(self, hidden):
        return hidden * (1 + 0.01 * torch.arange(hidden.shape[1]).unsqueeze(-1)).to(hidden)


class TwiceTheWhole(transformers.Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class TwiceTheWholeInTraining(transformers.Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        if self.training:
            super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class TwiceTheMean(transformers.Qwen2ForCausalLM):
    def forward(self, *args, **kwargs):
        first, second = super().forward(*args, **kwargs), super().forward(*args, **kwargs)
        first.logits = (first.logits + second.logits) / 2
        return first


class TwiceTheBase(WithSomethingBefore):
    def before(self, hidden):
        return hidden + self.model(inputs_embeds=hidden, use_cache=False)[0]


class ColdInTraining(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * (1.5 if self.training else 1.0)


class ByPosition(nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden) * (1 + 0.01 * torch.arange(hidden.shape[-2]).unsqueeze(-1))


class Dropping(nn.Linear):
    def forward(self, hidden):
        return super().forward(functional.dropout(hidden, 0.2, self.training))


class Normalised(nn.Linear):
    def forward(self, hidden):
        return functional.linear(hidden, functional.normalize(self.weight))


class Masking(nn.Linear):
    def forward(self, hidden):
        return masked(range(60, 80))(super().forward(hidden), None, None)


def with_output_layer(layer_class):
    def make():
        model = build("llama")
        layer = layer_class(32, VOCAB, bias=False)
        layer.weight = model.lm_head.weight
        model.lm_head = layer
        return model.eval()

    return make


class DropoutInListBefore(WithSomethingBefore):
    def __init__(self, config):
        super().__init__(config)
        self.behind = nn.ModuleList([nn.Dropout(0.2)])

    def before(self, hidden):
        return self.behind[0](hidden)


class Cold(nn.Module):
    def forward(self, z):
        return z / 1.5 if self.training else z


def with_list_after(make_module):
    class Listed(transformers.Qwen2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.after = nn.ModuleList([make_module()])

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = self.after[0](output.logits)
            return output

    return qwen2(Listed)


def qwen2(model_class):
    return lambda: model_class(build("qwen2").config).eval()


# name: (how it is made, when LMHead refuses it, when add_fused_lm_head does); T in training, E in evaluation
PECULIAR = {
    **{name: (changed(change), "TE", "TE") for name, change in LOGITS.items()},
    **{name: (changed(change), "T", "T") for name, change in ONLY_TRAINING.items()},
    **{name: (changed(change), "E", "E") for name, change in ONLY_EVALUATION.items()},
    # the output layer is after those
    "dropout before the head": (qwen2(DropoutBefore), "T", ""),
    "dropout before the head, no module": (qwen2(DropoutFunctionBefore), "T", ""),
    "a scale by position before the head": (qwen2(ScaleBefore), "TE", ""),
    "twice the base model": (qwen2(TwiceTheBase), "TE", ""),
    "twice the whole": (qwen2(TwiceTheWhole), "TE", "TE"),
    "twice the whole in training": (qwen2(TwiceTheWholeInTraining), "T", "T"),
    "the mean of two": (qwen2(TwiceTheMean), "TE", "TE"),
    "an output layer with a temperature": (with_output_layer(ColdInTraining), "T", "T"),
    "an output layer that scales by position": (with_output_layer(ByPosition), "TE", "TE"),
    "an output layer that drops": (with_output_layer(Dropping), "T", "T"),
    "an output layer that is normalised": (with_output_layer(Normalised), "TE", "TE"),
    "an output layer that masks": (with_output_layer(Masking), "TE", "TE"),
}
# a list of modules on either side of the base model
PECULIAR |= {
    "a list of modules after the head, with a temperature": (with_list_after(Cold), "T", "T"),
    "a list of modules after the head, with dropout": (with_list_after(lambda: nn.Dropout(0.2)), "T", "T"),
    "a list of modules before the head, with dropout": (qwen2(DropoutInListBefore), "T", ""),
}
IN_BF16 = {"a factor", "a factor below one", "a small factor", "a factor late", "a high cap", "an offset of one entry"}
IN_BF16 |= {"a range is masked", "a small scale by position", "a small temperature in training", "an offset of all"}


def long_batch():
    tokens = torch.randint(3, 95, (2, WIDTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@pytest.mark.parametrize("way", [by_head, by_forward])
@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in PECULIAR]
    + [pytest.param(name, torch.bfloat16, marks=() if name in IN_BF16 else pytest.mark.full) for name in PECULIAR],
)
@torch.no_grad()
def test_a_model_that_does_something_else_is_refused_or_right(name, dtype, way):
    make, *refused = PECULIAR[name]
    inputs = long_batch()
    for mode in "TE":
        model = make().to(dtype).train(mode == "T")
        if mode in refused[way is by_forward]:
            with pytest.raises(CheckFailed, match=type(model).__name__):
                way(model, inputs)
        else:
            assert_same_logps(way, model, inputs, 1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("name", ["a temperature in training", "dropout before the head", "an output layer that drops"])
def test_the_check_comes_again_in_the_other_mode(name):
    model = PECULIAR[name][0]()
    head = LMHead.from_model(model)
    hidden, _ = head.hidden_states(**long_batch())
    model.train()
    labels = long_batch()["input_ids"]
    for use in (
        lambda: head.hidden_states(**long_batch()),
        lambda: head.sequence_logps(hidden, labels, shift=True),
        lambda: head.dpo_loss(hidden, labels, torch.zeros(2), shift=True),
    ):
        with pytest.raises(CheckFailed, match="in training"):
            use()
    model.eval()
    head.sequence_logps(hidden, labels, shift=True)
    LMHead.from_model(model.eval(), check=False).hidden_states(**long_batch())  # whoever leaves it out, leaves it out


def test_what_one_mode_settled_holds_in_the_other():
    class UnscaledInTraining(transformers.CohereForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits / self.logit_scale if self.training else output.logits
            return output

    model = UnscaledInTraining(build("cohere").config).eval()
    head = LMHead.from_model(model)
    model.train()
    with pytest.raises(CheckFailed, match="in training"):
        head.hidden_states(**batch())
    assert head.logit_scale == 0.37
    head.check()  # whoever asks for it may settle it anew
    assert head.logit_scale == 1.0


def scaling(factor):
    def hook(module, args, output):
        return output * factor

    return hook


class Scaling:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, args, output):
        return output * self.factor


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def scaling_logits(module, args, output):
    return CausalLMOutput(logits=1.5 * output.logits) if "logits" in output else None


@pytest.mark.parametrize("make", [scaling, Scaling])
@torch.no_grad()
def test_hooks_that_come_after_the_check_are_seen(make):
    model, inputs = build("qwen2"), long_batch()
    fused = functools.partial(model, **inputs, labels=inputs["input_ids"], fused_lm_head=True)
    head = LMHead.from_model(model)
    hidden, _ = head.hidden_states(**inputs)
    add_fused_lm_head(model)
    harmless = model.lm_head.register_forward_hook(make(1.0))
    head.sequence_logps(hidden, inputs["input_ids"], shift=True)
    fused()
    harmless.remove()
    scales = model.lm_head.register_forward_hook(make(1.5))
    for use in (lambda: head.hidden_states(**inputs), lambda: head.sequence_logps(hidden, inputs["input_ids"]), fused):
        with pytest.raises(CheckFailed, match="its output layer has the forward hook"):
            use()
    scales.remove()
    fused()
    doubled = Doubled(*reversed(model.lm_head.weight.shape), bias=False)
    doubled.weight = model.lm_head.weight
    model.lm_head = doubled
    for use in (lambda: head.sequence_logps(hidden, inputs["input_ids"]), fused):
        with pytest.raises(CheckFailed, match="a factor on all entries|at all entries"):
            use()


@pytest.mark.parametrize("make", [scaling, Scaling, lambda factor: functools.partial(scaling, [factor])])
def test_a_hook_at_the_address_of_one_that_is_gone_is_another(make):
    gone = make(1.0)
    before = what_is_done_by(gone)
    assert before == what_is_done_by(gone)
    del gone
    others = [make(1.5) for _ in range(1000)]
    assert before not in map(what_is_done_by, others)


@torch.no_grad()
def test_a_hook_on_the_model_that_changes_logits_is_seen():
    model, inputs = build("qwen2"), long_batch()
    model.register_forward_hook(scaling_logits)
    add_fused_lm_head(model)
    with pytest.raises(CheckFailed, match="the model has the forward hook scaling_logits"):
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan])
@torch.no_grad()
def test_entries_that_are_not_finite_hide_no_others(value):
    inputs = long_batch()
    for factor in (1.0, 1.5):
        model = build("phi")
        model.lm_head.bias[-3:] = value
        model.lm_head.register_forward_hook(scaling(factor))
        for way in (by_head, by_forward):
            if factor != 1:
                with pytest.raises(CheckFailed):
                    way(model, inputs)
            elif value == -torch.inf:
                assert_same_logps(way, model, inputs)
            elif way is by_head:
                with pytest.raises(NotFinite, match="NaN or infinity in its weights"):
                    way(model, inputs)
            else:
                assert way(model, inputs).isnan().all()


def test_no_entry_of_a_large_vocabulary_is_left_out():
    for entry in (1, 2345, 5002):
        model = changed(masked([entry]))
        config = build("qwen2").config
        config.vocab_size = 5003
        with pytest.raises(CheckFailed, match=f"at 1 of 5003 entries, {entry}[. ]"):
            LMHead.from_model(type(model())(config))


def test_check_leaves_training_mode_and_random_state_alone():
    class Drawing(transformers.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            torch.rand(1)
            return super().forward(*args, **kwargs)

    model = Drawing(build("gpt2").config).train()  # dropout 0.1 everywhere
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    LMHead.from_model(model)
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_check_settles_what_the_config_leaves_open():
    model = build("llama")
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 4.0  # Llama uses neither
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (1.0, None)
    model = build("cohere")
    head = LMHead(model)
    head.logit_scale = 1 / head.logit_scale  # a multiplier taken for a divisor
    head.check()
    assert head.logit_scale == pytest.approx(0.37)


# each a thing that no reading of the config explains: an offset of one entry, an unknown factor, an unknown cap, an
# entry masked out; in bf16 as well, where the rounding must not cover them
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + 0.1 * nn.functional.one_hot(torch.tensor(5), z.shape[-1]),
        lambda z: 1.1 * z,
        lambda z: 50 * torch.tanh(z / 50),
        lambda z: z.index_fill(-1, torch.tensor([7]), torch.finfo(z.dtype).min),
        lambda z: z * float("nan"),
        lambda z: z[..., :-1],
    ],
)
def test_check_catches_a_model_that_does_something_else(change, dtype):
    class Peculiar(transformers.Qwen2ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits)
            return output

    model = Peculiar(build("qwen2").config).to(dtype)
    with pytest.raises(ValueError, match="Peculiar"):
        LMHead.from_model(model)
    assert LMHead.from_model(model, check=False).logit_scale == 1.0


def test_check_says_what_it_found_and_what_to_do():
    class Peculiar(transformers.Gemma2ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1
            return output

    with pytest.raises(ValueError) as error:
        LMHead.from_model(Peculiar(build("gemma2").config))
    for part in ("Peculiar", "largest difference is 1,", "Linear", "logit_scale 1,", "softcap 0.8", "no bias"):
        assert part in str(error.value)
    for part in ("no dense transform", "check=False", "sequence_logps"):
        assert part in str(error.value)


def test_check_takes_as_many_positions_as_there_is_room_for():
    for name, sizes in (
        ("gpt2", {"n_positions": 9}),
        ("roberta", {"max_position_embeddings": 40, "pad_token_id": 1}),  # whose positions begin at 2
        ("opt", {"max_position_embeddings": 12}),
        ("llama", {"max_position_embeddings": 4096}),
    ):
        assert LMHead.from_model(build(name, **sizes)).logit_scale == 1.0

    class Short(transformers.LlamaForCausalLM):  # and does not say so in its config
        def forward(self, input_ids=None, **kwargs):
            if input_ids.shape[1] > 5:
                raise IndexError("index out of range in self")
            return super().forward(input_ids=input_ids, **kwargs)

    LMHead.from_model(Short(build("llama").config))


def test_check_gives_the_model_no_special_tokens():
    class Seeing(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            assert not {0, 1, 2, 5} & set(input_ids.flatten().tolist())
            return super().forward(input_ids=input_ids, **kwargs)

    config = build("llama").config
    config.update({"image_token_id": 2, "audio": {"start_token_ids": [1, 5]}})
    LMHead.from_model(Seeing(config))


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights
@pytest.mark.parametrize("name", ADAPTERS)
def test_dropout_of_adapters_is_no_dropout_of_the_model(name):
    options = {"lora_dropout": 0.5} if ADAPTERS[name][0] == "LoraConfig" and name != "head_dora" else {}
    model = adapt(build("llama"), name, **options).train()
    modes = [module.training for module in model.modules()]
    LMHead.from_model(model)
    assert [module.training for module in model.modules()] == modes
