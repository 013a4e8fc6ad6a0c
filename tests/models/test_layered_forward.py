"""A head that is added to a model again: after itself, after TRL's, after accelerate, in adapters, in copies."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

from heads import assert_close, batch, build, eager_logps

from dpo_kernels.models.check import CheckFailed
from dpo_kernels.models.fused_forward import STATS, add_fused_lm_head
from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.models.layered_forward import layers_of


def trls_head(model):
    utils = pytest.importorskip("trl.trainer.utils", reason="puts TRL's head over ours, and TRL is not installed")
    utils.add_fused_lm_head(model, outputs=("log_probs", *STATS))


def assert_as_plain(model):
    """Its log-probabilities, logits and what it generates are those of a model that nothing was done to."""
    plain = type(unwrap(model))(unwrap(model).config).eval()
    plain.load_state_dict(unwrap(model).state_dict())
    tokens = torch.arange(3, 15).view(2, 6)
    logits = plain(input_ids=tokens).logits
    assert torch.equal(model(input_ids=tokens).logits, logits)
    expected = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    found = model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    generated = [each.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0) for each in (model, plain)]
    assert torch.equal(*generated)


def assert_as_eager(model):
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    assert_close(found, eager_logps(model(**inputs).logits, labels))


def under_accelerate(model):
    """As its `prepare` leaves a model for bf16, and then without the mark that it was there."""
    accelerate = pytest.importorskip("accelerate", reason="wraps forwards in autocast, and is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    del model._is_accelerate_prepared


def between_devices(model):
    """As `device_map` does it."""
    hooks = pytest.importorskip("accelerate.hooks", reason="moves inputs between devices, and is not installed")
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))


@pytest.mark.parametrize(
    "steps",
    [
        [add_fused_lm_head] * 2,
        [add_fused_lm_head] * 400,
        [trls_head, add_fused_lm_head],
        [add_fused_lm_head, trls_head, add_fused_lm_head],
        [trls_head, add_fused_lm_head] * 300,
        [add_fused_lm_head, under_accelerate, add_fused_lm_head],
        [add_fused_lm_head, under_accelerate, trls_head, under_accelerate, add_fused_lm_head],
        [trls_head, under_accelerate, add_fused_lm_head, under_accelerate, add_fused_lm_head],
        [add_fused_lm_head, between_devices, add_fused_lm_head],
        [between_devices, trls_head, add_fused_lm_head, add_fused_lm_head],
    ],
    ids=lambda steps: f"{len(steps)}: {', '.join(step.__name__ for step in steps[:6])}",
)
def test_head_is_added_again(steps):
    model = build("llama")
    for step in steps:
        step(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in copied.parameters():
            weight.mul_(1.1)
    for each in (model, copied):
        if under_accelerate in steps:
            add_fused_lm_head(each)
            each.forward = layers_of(each)[-1].own  # other calls are under its autocast, as they were
            add_fused_lm_head(each)
        assert_as_plain(each)
    assert len(layers_of(model)) < 4


@pytest.mark.filterwarnings("ignore")
def test_head_is_added_again_to_what_is_wrapped():
    peft = pytest.importorskip("peft")
    lora = {"r": 2, "init_lora_weights": False}
    model = build("llama")
    add_fused_lm_head(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **lora))
    add_fused_lm_head(adapted)
    assert_as_eager(adapted)
    merged = adapted.merge_and_unload()
    assert_as_plain(merged)
    anew = peft.get_peft_model(merged, peft.LoraConfig(target_modules=["v_proj", "lm_head"], **lora))
    add_fused_lm_head(anew.get_base_model())
    assert_as_eager(anew)


def test_what_a_user_put_between_two_heads_stays():
    model = build("llama")
    add_fused_lm_head(model)
    forward = model.forward

    @functools.wraps(forward)
    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        if "logits" in output:
            output.logits = 1.5 * output.logits
        return output

    model.forward = scaled
    add_fused_lm_head(model)
    inputs = batch()
    with pytest.raises(CheckFailed, match="does not give the model's own logits"):
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)


def test_models_that_share_a_head():
    one, other = build("llama"), build("llama", seed=1)
    other.lm_head = one.lm_head
    for model in (one, other, one):
        add_fused_lm_head(model)
        assert_as_plain(model)
    assert_as_plain(other)


def test_the_latest_options_hold():
    model, tokens = build("llama"), torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": tokens, "labels": tokens, "fused_lm_head": True}
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    assert "entropy" in model(**inputs)
    add_fused_lm_head(model, outputs=("log_probs", "is_top1"))
    found = model(**inputs)
    assert "is_top1" in found and "entropy" not in found
    found = model(**inputs, outputs=("mean_logits",))
    assert "mean_logits" in found and "is_top1" not in found
    with pytest.raises(ValueError, match=r"outputs: expected some of .*got \['logits'\]"):
        model(**inputs, outputs=("logits",))


@pytest.mark.parametrize(
    "first, then, checked",
    [
        (None, [], True),
        (False, [None], False),
        (False, [None, True], True),
        (True, [None, False, None], False),
        (False, [trls_head, None], False),
    ],
)
def test_check_stays_as_it_was_said(monkeypatch, first, then, checked):
    calls = []
    monkeypatch.setattr(LMHead, "ensure_checked", lambda self, forward, inputs: calls.append(forward))
    model = build("llama")
    add_fused_lm_head(model, check=first)
    for each in then:
        trls_head(model) if each is trls_head else add_fused_lm_head(model, check=each)
    model(**batch(), labels=batch()["input_ids"], fused_lm_head=True)
    assert bool(calls) == checked


def test_forward_that_torch_compile_wraps():
    model = build("llama")
    add_fused_lm_head(model)
    model.forward = torch.compile(model.forward, disable=True)
    add_fused_lm_head(model)
    assert_as_plain(model)


@pytest.mark.full
def test_compiled_and_added_again():
    model, tokens = build("llama", num_hidden_layers=1), torch.arange(3, 15).view(2, 6)
    add_fused_lm_head(model)
    compiled = torch.compile(model, backend="eager")
    inputs = {"input_ids": tokens, "labels": tokens, "fused_lm_head": True}
    expected = compiled(**inputs).log_probs
    add_fused_lm_head(compiled, outputs=("log_probs", "entropy"))
    found = compiled(**inputs)
    assert torch.equal(found.log_probs, expected) and found.entropy.shape == expected.shape
    assert_as_plain(model)


def test_a_model_that_was_pickled_comes_back_without():
    model, file = build("llama"), io.BytesIO()
    add_fused_lm_head(model)
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    tokens = torch.arange(3, 15).view(2, 6)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    add_fused_lm_head(again)
    assert_as_plain(again)


def test_a_model_that_was_saved_is_as_before(tmp_path):
    model = build("llama")
    add_fused_lm_head(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == build("llama").state_dict().keys()
    add_fused_lm_head(again)
    assert_as_plain(again)
