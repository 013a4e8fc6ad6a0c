"""TRL's trainers with this package's head, beside TRL's own: the same models, data and settings, log by log."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import trl
from grids import each_value
from heads import build
from peft import LoraConfig, get_peft_model
from trl_runs import (
    ARCHITECTURES,
    LORA,
    LOSS_OPTIONS,
    MPO,
    PAIRS,
    VOCAB,
    assert_agree,
    assert_weights_agree,
    dpo,
    logs_of,
    lora_config,
    preferences,
    prototype,
    settings,
    tokenizer,
    trl_names,
    weights_of,
)

import dpo_kernels.trl as ours
from dpo_kernels.losses import F_DIVERGENCE_LOSSES
from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.trl._head import TRLS_HEAD

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")


# DPO


@cache
def of_trl(name, adapted):
    """The weights that TRL's own trainer ends with, and its logs."""
    with TemporaryDirectory() as directory:
        trainer, logs = dpo(trl.DPOTrainer, directory, prototype(name), lora=LORA if adapted else None)
    return weights_of(trainer), logs


@pytest.mark.parametrize(
    "name, lora",
    each_value(ARCHITECTURES, [None, LORA]),
    ids=lambda value: value if isinstance(value, str) else "LoRA" if value else "full",
)
def test_logs_of_every_architecture_agree(tmp_path, name, lora):
    mine, my_logs = dpo(ours.DPOTrainer, tmp_path, prototype(name), lora=lora)
    weights, their_logs = of_trl(name, lora is LORA)
    assert_agree(my_logs, their_logs)
    assert_weights_agree(weights_of(mine), weights)
    assert {"loss", "rewards/margins", "logits/chosen", "entropy", "num_tokens"} <= my_logs[0].keys()
    assert ("aux_loss" in my_logs[0]) == (name == "mixtral")


LOSSES = [{"loss_type": name, **options} for name, options in LOSS_OPTIONS.items()]
DIVERGENCES = [
    {"loss_type": loss_type, "f_divergence": f_divergence, "f_alpha": 0.4, **LOSS_OPTIONS[loss_type]}
    for loss_type, f_divergence in zip(
        sorted(F_DIVERGENCE_LOSSES.intersection(LOSS_OPTIONS) - {"sft"}),
        ["forward_kl", "js", "alpha"] * 3,
        strict=False,
    )
]
COMBINATIONS = [
    MPO,
    {**MPO, "ld_alpha": 0.3},
    {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
    {"loss_type": "sigmoid", "label_smoothing": 0.1},  # of which TRL takes no notice
    {"loss_type": "sigmoid", "use_weighting": True},
    {"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.3},
    {"loss_type": "sigmoid", "precompute_ref_log_probs": True},
    {"loss_type": "sigmoid", "precompute_ref_log_probs": True, "ld_alpha": 0.3},
    {"loss_type": "sigmoid", "gradient_checkpointing": True},
    {"loss_type": "sigmoid", "gradient_accumulation_steps": 2},
    {"loss_type": "sigmoid", "gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 6},
    {"loss_type": "sigmoid", "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6},
    {"loss_type": "sigmoid", "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
]


@pytest.mark.parametrize("options", [*LOSSES, *DIVERGENCES, *COMBINATIONS], ids=str)
def test_logs_of_every_setting_agree(tmp_path, options):
    options = trl_names(**options)
    _, mine = dpo(ours.DPOTrainer, tmp_path / "ours", prototype("qwen2"), evaluate=True, **options)
    _, theirs = dpo(trl.DPOTrainer, tmp_path / "trl", prototype("qwen2"), evaluate=True, **options)
    assert_agree(mine, theirs)
    assert any("eval_rewards/margins" in log for log in mine)


def test_adapter_that_exists_is_its_own_reference(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(prototype("llama")), LoraConfig(**LORA))
    found = []
    for trainer_class in (ours.DPOTrainer, trl.DPOTrainer):
        trainer = trainer_class(
            copy.deepcopy(model), args=trl.DPOConfig(**settings(tmp_path)), train_dataset=preferences(),
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        found.append(logs_of(trainer))
    assert_agree(*found)
    assert found[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
def test_compute_metrics_sees_logits(tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction.predictions)
        return {"mean": float(prediction.predictions.mean())}

    options = {"evaluate": True, "trainer_options": {"compute_metrics": compute_metrics}}
    _, mine = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), **options)
    _, theirs = dpo(trl.DPOTrainer, tmp_path, prototype("qwen2"), **options)
    assert_agree(mine, theirs)
    assert seen[0].shape[-1] == VOCAB and mine[-1].keys() >= {"eval_mean"}


BF16_METRICS = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")


class FullPrecision:
    """Hooks that keep a module out of autocast, also in a copy of it."""

    def __init__(self, module):
        self.entered = []
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave)

    def enter(self, module, args):
        self.entered.append(torch.autocast("cpu", enabled=False))
        self.entered[-1].__enter__()

    def leave(self, module, args, output):
        self.entered.pop().__exit__(None, None, None)


def with_backbone_in_fp32(name):
    """What bf16 does to the layers below the head is the same for everybody, is more than what it does in the head of
    a model this small, and hides it."""
    model = copy.deepcopy(prototype(name))
    for module in LMHead(model)._base_models():
        FullPrecision(module)
    return model


def token_logps(model, add_head, tokens, *, bf16):
    """[S, T - 1] of a copy of the model with that head, all of it under autocast."""
    model = copy.deepcopy(model)
    add_head(unwrap(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs.double()


def rms(values):
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("lora", [None, pytest.param(LORA, marks=pytest.mark.full)], ids=["full", "LoRA"])
def test_whole_model_in_bf16_is_closer_to_fp32(lora):
    """The rms over 12,000 tokens of what autocast does to a log-probability, over that with TRL's head.

    Most of it happens in the layers below the head and to its operands, the same for both. TRL rounds the logits too:
    an error unrelated to the others, so that squares add, and little beside them. Few tokens would not show it.
    """
    tokens = torch.randint(2, VOCAB, (512, 24), generator=torch.Generator().manual_seed(0))
    ratios, expected = [], []
    for name in ARCHITECTURES:
        cap = {"final_logit_softcapping": 30.0} if name.startswith("gemma") else {}  # Gemma 2's; a low one hides logits
        model = build(name, vocab_size=VOCAB, initializer_range=0.3, **cap)
        if lora is not None:
            torch.manual_seed(0)
            model = get_peft_model(model, lora_config(model, lora)).eval()
        exact = token_logps(model, add_fused_lm_head, tokens, bf16=False)
        mine = token_logps(model, add_fused_lm_head, tokens, bf16=True)
        theirs = token_logps(model, TRLS_HEAD, tokens, bf16=True)
        ratios.append(rms(mine - exact) / rms(theirs - exact))
        expected.append(1 / math.hypot(1, rms(theirs - mine) / rms(mine - exact)))
    assert sum(ratio < 1 for ratio in ratios) >= 12, ratios
    assert max(ratios) < 1.005, ratios
    assert statistics.geometric_mean(ratios) < 0.985, ratios
    assert ratios == pytest.approx(expected, abs=0.02)


@pytest.mark.release
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
def test_in_bf16_ours_are_closer_to_fp32(tmp_path, lora):
    """The rms over steps and metrics of the deviation from the run in fp32, over that of TRL's own trainer. Both round
    hidden states and weights, and ours no logits; a single architecture may go either way."""
    ratios = []
    for name in ARCHITECTURES:
        model, off = with_backbone_in_fp32(name), []
        _, exact = of_trl(name, lora is LORA)
        for trainer_class in (ours.DPOTrainer, trl.DPOTrainer):
            _, rounded = dpo(trainer_class, tmp_path, model, lora=lora, bf16=True)
            assert not torch.is_autocast_enabled("cpu")
            logs = [(a[m], b[m]) for a, b in zip(rounded, exact, strict=True) for m in BF16_METRICS if m in b]
            off.append(math.sqrt(sum(((a - b) / max(1, abs(b))) ** 2 for a, b in logs)))
        ratios.append(off[0] / off[1])
    assert statistics.geometric_mean(ratios) < 0.9, ratios
    assert sum(ratio < 1 for ratio in ratios) > len(ratios) / 2, ratios


# What TRL refuses or gets wrong


def eager_loss(model, reference, batch):
    """DPO in fp32 from the models' own logits."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]

    def logps(of):
        logits = of(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        found = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return found.masked_fill(labels == -100, 0.0).sum(1).chunk(2)

    chosen, rejected = logps(model)
    with torch.no_grad():
        ref_chosen, ref_rejected = logps(reference)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()


class WithoutAdapter:
    def __init__(self, model):
        self.model = model

    def __call__(self, **inputs):
        with self.model.disable_adapter():
            return self.model(**inputs)


def assert_gradients_are_eager(trainer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: w.grad.clone() for name, w in trainer.model.named_parameters() if w.grad is not None}
    trainer.model.zero_grad()
    reference = trainer.ref_model or WithoutAdapter(trainer.model)
    expected = eager_loss(trainer.model, reference, batch)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}
    assert found.keys() == wanted.keys() and wanted
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * largest, name
    return found


@pytest.mark.parametrize("name", ["recurrent_gemma", "modernbert_decoder", "roberta", "bert", "electra"])
def test_heads_that_trl_gets_wrong(tmp_path, name):
    trainer, logs = dpo(ours.DPOTrainer, tmp_path, prototype(name), max_steps=1)
    assert math.isfinite(logs[0]["loss"])
    assert_gradients_are_eager(trainer)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["LoRA on lm_head", "tied trainable tokens", "lm_head saved"],
)
def test_adapters_on_the_head_are_trained(tmp_path, more):
    name = "qwen2" if "trainable_token_indices" in more else "llama"  # embeddings and head of the first are tied
    trainer, _ = dpo(ours.DPOTrainer, tmp_path, prototype(name), lora={**LORA, **more}, max_steps=1)
    found = assert_gradients_are_eager(trainer)
    assert any("lm_head" in each or "token_adapter" in each for each in found)


def test_weighting_goes_together_with_likelihood(tmp_path):
    """TRL multiplies an expanded tensor in place there."""
    options = {"loss_type": ["sigmoid", "sft"], "use_weighting": True}
    with pytest.raises(RuntimeError, match="expanded tensor|single memory location"):
        dpo(trl.DPOTrainer, tmp_path, prototype("qwen2"), **options)
    _, logs = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), **options)
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)


# What it costs


def test_head_is_formed_in_the_forward(tmp_path):
    """Path C: three products, and no logits of every position."""
    trainer, _ = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    assert "GroupedLoss" in trainer.compute_loss(trainer.model, batch).grad_fn.name()


# patch() and versions


def test_patch_reaches_what_inherits(tmp_path):
    class Frameworks(trl.DPOTrainer):
        pass

    before = dict(vars(trl.DPOTrainer))
    ours.patch()
    ours.patch("DPOTrainer")
    try:
        trainer, mine = dpo(Frameworks, tmp_path, prototype("qwen2"), max_steps=3)
        assert hasattr(trainer, "_dpo_kernels_head")
        _, same = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"))
    finally:
        ours.unpatch()
    assert {name: before[name] for name in before if name != "__doc__"} == {
        name: vars(trl.DPOTrainer)[name] for name in vars(trl.DPOTrainer) if name != "__doc__"
    }
    trainer, theirs = dpo(Frameworks, tmp_path, prototype("qwen2"))
    assert not hasattr(trainer, "_dpo_kernels_head")
    assert_agree(mine, theirs)
    assert_agree(same, theirs)
    with pytest.raises(ValueError, match="names: expected some of .*'DPOTrainer'.*got 'SFTTrainer'"):
        ours.patch("SFTTrainer")


def test_unknown_version_is_verified(tmp_path, monkeypatch):
    _, expected = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"))
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    for lora in (None, {**LORA, "init_lora_weights": True}):  # whose policy is the reference
        with pytest.warns(UserWarning, match="not with 1.99.0; on the first batch it agreed") as caught:
            _, logs = dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), lora=lora)
        assert len([each for each in caught if "1.99.0" in str(each.message)]) == 1
        if lora is None:
            assert logs == expected
    right = ours._dpo.dpo_options
    monkeypatch.setattr(ours._dpo, "dpo_options", lambda trainer: right(trainer) | {"beta": 0.2})
    with pytest.raises(RuntimeError, match="does not fit 1.99.0: on the first batch .*TRL's"):
        dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), max_steps=2)


def test_known_version_is_not(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dpo(ours.DPOTrainer, tmp_path, prototype("qwen2"), max_steps=1)
    assert not [each for each in caught if "agreed with TRL" in str(each.message)]
