"""`DPOTrainer(..., batching=...)`: prompts that go through the model once, and the logs of TRL's own trainer."""

from __future__ import annotations

import copy
import itertools
import json
from functools import cache
from tempfile import TemporaryDirectory

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import transformers
import trl
from grids import each_value
from heads import build
from peft import PromptTuningConfig, get_peft_model
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_runs import (
    LORA,
    LOSS_OPTIONS,
    MPO,
    PAIRS,
    VOCAB,
    assert_agree,
    assert_weights_agree,
    batch_of,
    dpo,
    logs_of,
    preferences,
    settings,
    tokenizer,
    trainer_of,
    weights_of,
)
from two_processes import run_in_two

import dpo_kernels.trl as ours
from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.segments import ATTENTION
from dpo_kernels.trl import _batching

pytestmark = [
    pytest.mark.usefixtures("process_left_as_it_was"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
WAYS = ("padding_free", "shared_prefix", "packed_shared_prefix")
WINDOW = {"sliding_window": 5}
MODELS = {
    "qwen2": {},
    "gemma2": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},  # and softcaps
    "gemma3": WINDOW | {"layer_types": ["sliding_attention", "full_attention"]},
    "mistral": WINDOW,
    "mixtral": {"router_aux_loss_coef": 0.5},
}
PACKED = {"batching": "packed_shared_prefix"}


@cache
def model_of(name):
    return build(name, vocab_size=VOCAB, initializer_range=0.3, **MODELS[name])


@cache
def of_trl(name, adapted):
    """The weights that TRL's own trainer ends with, and its logs."""
    with TemporaryDirectory() as directory:
        trainer, logs = dpo(trl.DPOTrainer, directory, model_of(name), lora=LORA if adapted else None)
    return weights_of(trainer), logs


@pytest.mark.parametrize(
    "way, name, lora",
    each_value(WAYS, [name for name in MODELS if name != "mixtral"], [None, LORA]),
    ids=lambda value: value if isinstance(value, str) else "LoRA" if value else "full",
)
def test_logs_are_those_of_trl(tmp_path, way, name, lora):
    """All of them, in fp32 to 1e-4, and the weights after three steps."""
    mine, logs = dpo(ours.DPOTrainer, tmp_path, model_of(name), lora=lora, trainer_options={"batching": way})
    weights, expected = of_trl(name, lora is LORA)
    assert mine.batching == way and isinstance(mine.data_collator, _batching.LaidOutCollator)
    assert_agree(logs, expected)
    assert_weights_agree(weights_of(mine), weights)


def test_auxiliary_loss_counts_a_prompt_as_often_as_it_is_there(tmp_path):
    _, expected = of_trl("mixtral", False)
    _, logs = dpo(ours.DPOTrainer, tmp_path, model_of("mixtral"), trainer_options={"batching": "padding_free"})
    assert_agree(logs, expected)
    assert "aux_loss" in logs[0]
    _, logs = dpo(ours.DPOTrainer, tmp_path, model_of("mixtral"), trainer_options=PACKED)
    first, right = logs[0], expected[0]
    assert first.keys() == right.keys()
    # the first step's, before it has led elsewhere
    apart = {name for name, value in right.items() if abs(first[name] - value) > 1e-4 * max(1, abs(value))}
    assert apart == {"loss", "aux_loss", "grad_norm"}
    coefficient = model_of("mixtral").config.router_aux_loss_coef
    without = [log["loss"] - coefficient * log["aux_loss"] for log in (first, right)]
    assert without[0] == pytest.approx(without[1], abs=1e-5)


SETTINGS = [
    {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 6, "eval_strategy": "steps", "eval_steps": 3},
    {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    {"precompute_ref_log_probs": True},
    {"precompute_ref_log_probs": True, "ld_alpha": 0.3},
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {"max_length": 9},
    {"max_length": 9, "truncation_mode": "keep_end"},
    {"pad_to_multiple_of": 16, "dataloader_num_workers": 1},
    {"use_weighting": True, "loss_type": ["ipo"]},
    {"loss_type": ["ipo"], "max_length": 5, "truncation_mode": "keep_end"},  # of some no prompt is left
    {**MPO, "ld_alpha": 0.3},
    {"f_divergence_type": "js_divergence"},
]
LOSSES = [{"loss_type": [name], **options} for name, options in LOSS_OPTIONS.items()]


@pytest.mark.parametrize("options", [*SETTINGS, *LOSSES], ids=str)
def test_with_every_setting(tmp_path, monkeypatch, options):
    numbers = itertools.count()  # log-probabilities that were computed before, for each trainer anew
    monkeypatch.setattr(trl.trainer.dpo_trainer, "hash_module", lambda model: f"{tmp_path} {next(numbers)}")
    _, expected = dpo(trl.DPOTrainer, tmp_path / "trl", model_of("qwen2"), evaluate=True, **options)
    more = {"evaluate": True, "trainer_options": PACKED}
    _, logs = dpo(ours.DPOTrainer, tmp_path / "ours", model_of("qwen2"), **more, **options)
    assert_agree(logs, expected)
    assert any("eval_rewards/margins" in log for log in logs)


def test_adapter_with_reference_computed_before(tmp_path, monkeypatch):
    numbers = itertools.count()
    monkeypatch.setattr(trl.trainer.dpo_trainer, "hash_module", lambda model: f"{tmp_path} {next(numbers)}")
    options = {"lora": LORA, "precompute_ref_log_probs": True, "evaluate": True}
    _, expected = dpo(trl.DPOTrainer, tmp_path, model_of("gemma3"), **options)
    _, logs = dpo(ours.DPOTrainer, tmp_path, model_of("gemma3"), trainer_options=PACKED, **options)
    assert_agree(logs, expected)


def test_in_bf16(tmp_path):
    """As far from fp32 as TRL's own trainer, which rounds the same and the logits too."""
    _, exact = of_trl("qwen2", False)
    _, rounded = dpo(trl.DPOTrainer, tmp_path, model_of("qwen2"), bf16=True)
    _, logs = dpo(ours.DPOTrainer, tmp_path, model_of("qwen2"), bf16=True, trainer_options=PACKED)

    def distance(found):
        names = ("loss", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
        both = [(a[n], b[n]) for a, b in zip(found, exact, strict=True) for n in names if n in b]
        return max(abs(a - b) / max(1, abs(b)) for a, b in both)

    assert 0 < distance(logs) < max(0.02, 1.5 * distance(rounded))


def test_policy_that_is_its_own_reference_has_no_rewards(tmp_path):
    """To the bit, with a full reference and without an adapter."""
    lora = {**LORA, "init_lora_weights": True}
    for options in ({"reference": copy.deepcopy(model_of("qwen2"))}, {"lora": lora}):
        _, logs = dpo(ours.DPOTrainer, tmp_path, model_of("qwen2"), max_steps=1, trainer_options=PACKED, **options)
        assert [logs[0][f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]


def test_a_run_goes_on_from_a_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "more": PACKED}
    straight = trainer_of(ours, tmp_path, model_of("qwen2"), **options)
    straight.train()
    resumed = trainer_of(ours, tmp_path, model_of("qwen2"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for log, right in zip(logs_of(resumed)[:4], logs_of(straight)[:4], strict=True):
        assert log | {"num_tokens": 0} == right | {"num_tokens": 0}  # which TRL counts of a process
    assert all(torch.equal(mine, weights_of(straight)[name]) for name, mine in weights_of(resumed).items())
    # others load it without this package
    assert ATTENTION not in json.loads((tmp_path / "checkpoint-2" / "config.json").read_text()).values()


def test_one_after_another(tmp_path):
    """A model that has been through such a trainer is scored by others as before, TRL's own among them, and its
    reference is loaded with the attention that it has."""
    model_of("qwen2").save_pretrained(tmp_path / "start")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    _, expected = of_trl("qwen2", False)
    arguments = {"train_dataset": preferences(), "processing_class": tokenizer()}
    for batching in ("packed_shared_prefix", "concatenated", "shared_prefix"):
        args = trl.DPOConfig(**settings(tmp_path, learning_rate=0.0))
        trainer = ours.DPOTrainer(model, args=args, batching=batching, **arguments)
        trainer.train()
        assert [log["logps/chosen"] for log in logs_of(trainer)[:3]] == pytest.approx(
            [log["logps/chosen"] for log in logs_of_trl_at_rest(tmp_path)], rel=1e-4
        )


@cache
def logs_of_trl_at_rest(directory):
    trainer = trainer_of(trl, directory, model_of("qwen2"), learning_rate=0.0)
    trainer.train()
    return logs_of(trainer)[:3]


# What a batch is


def scored(trainer, batch):
    """Loss and gradients of a batch, and what would be logged."""
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    loss.backward()
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    return loss, gradients, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_pairs_and_tokens(tmp_path, way, mode):
    """Columns of the data set, cut like their tokens, against a padded batch that carries both."""
    options = {
        "max_length": 10,
        "truncation_mode": mode,
        "remove_unused_columns": False,
        "loss_type": ["sigmoid", "sft"],
    }
    draw = torch.Generator().manual_seed(0)
    trainer = trainer_of(ours, tmp_path, model_of("qwen2"), more={"batching": way}, **options)
    padded = trainer_of(ours, tmp_path, model_of("qwen2"), **options)
    rows = [dict(trainer.train_dataset[row], weight=0.5 + row) for row in range(PAIRS)]
    batch = batch_of(padded)
    batch["pair_weights"] = torch.tensor([row["weight"] for row in rows])
    batch["token_weights"] = torch.zeros(batch["completion_mask"].shape)
    for number, (side, row) in enumerate((side, row) for side in ("chosen", "rejected") for row in rows):
        weights = torch.randint(0, 3, (len(row[f"{side}_ids"]),), generator=draw).float() / 2
        row[f"{side}_token_weights"] = weights.tolist()
        before = len(row["prompt_ids"])
        whole = torch.cat([torch.zeros(before), weights])
        whole = whole[:10] if mode == "keep_start" else whole[-10:]
        batch["token_weights"][number, : len(whole)] = whole
    loss, gradients, metrics = scored(trainer, trainer.data_collator(rows))
    right, right_gradients, right_metrics = scored(padded, batch)
    assert loss.item() == pytest.approx(right.item(), rel=1e-5)
    assert metrics.keys() == right_metrics.keys()
    assert metrics == pytest.approx(right_metrics, rel=1e-4, abs=1e-5)
    largest = max(gradient.abs().max() for gradient in right_gradients.values())
    for name, gradient in right_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * largest, name


def sequence(batch, number):
    """Tokens of a sequence by the layout: all that the slot of its last one sees."""
    ids, layout = batch["input_ids"], batch["layout"][:, 0]
    scored = batch["shift_labels"][number] != -100
    token = batch["shift_labels"][number][scored][-1]
    row, last = divmod(batch["predictors"][number][scored][-1].item() + 1, ids.shape[1])
    while ids[row, last] != token:  # behind a prompt is the other response
        last += 1
    prompt_begin, prompt_end, begin, _ = layout[row, last].tolist()
    return [*ids[row, prompt_begin:prompt_end].tolist(), *ids[row, begin : last + 1].tolist()]


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("length", [None, 100, 9, 6, 3])
def test_sequences_are_those_of_trls_collator(length, mode):
    examples = [
        {"prompt_ids": [2, 3, 4, 5], "chosen_ids": [6, 7, 8], "rejected_ids": [9]},
        {"prompt_ids": [10], "chosen_ids": [11], "rejected_ids": [*range(12, 24)]},
        {"prompt_ids": [], "chosen_ids": [30, 31], "rejected_ids": [32, 33, 34]},
    ]
    examples = [
        example | {"ref_chosen_logps": 1.0 + n, "ref_rejected_logps": -1.0 * n} for n, example in enumerate(examples)
    ]
    trls = DataCollatorForPreference(0, max_length=length, truncation_mode=mode, pad_to_multiple_of=8)
    expected = trls(examples)
    for way in WAYS:
        batch = _batching.LaidOutCollator.like(trls, way)(examples)
        assert batch["input_ids"].shape[1] % 8 == 0
        mask = expected["completion_mask"]
        assert torch.equal(batch["completion_lengths"], mask.sum(1))
        assert torch.equal(batch["sequence_lengths"], expected["attention_mask"].sum(1))
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            torch.testing.assert_close(batch[name], expected[name])
        labels = expected["input_ids"].masked_fill(mask == 0, -100)[:, 1:]
        for number, right in enumerate(labels):
            found = batch["shift_labels"][number]
            assert found[found != -100].tolist() == right[right != -100].tolist()
            if len(right[right != -100]):
                real = expected["attention_mask"][number] != 0
                assert sequence(batch, number) == expected["input_ids"][number][real].tolist()


# What is refused


def refused(tmp_path, match, model=None, *, batching="packed_shared_prefix", more=None, **options):
    with pytest.raises(ValueError, match=match):
        trainer_of(ours, tmp_path, model or model_of("qwen2"), more={"batching": batching, **(more or {})}, **options)


def test_what_is_refused(tmp_path, monkeypatch):
    collator = {"data_collator": DataCollatorForPreference(0)}
    named = "batching: expected concatenated, got 'packed_shared_prefix': "
    refused(tmp_path, "batching: expected one of .*, got 'packed'", batching="packed")
    for batching in ("auto", "shared_prefix"):
        match = f"data_collator: expected None beside batching '{batching}'.*, got DataCollatorForPreference"
        refused(tmp_path, match, batching=batching, more=collator)
    refused(tmp_path, named + "compute_metrics: expected None", more={"compute_metrics": lambda prediction: {}})
    refused(tmp_path, named + "neftune_noise_alpha: expected none", neftune_noise_alpha=5.0)
    options = {"model_init_kwargs": {"attn_implementation": "sdpa"}}
    refused(tmp_path, named + "attn_implementation: expected none, .*, got 'sdpa'", **options)
    model = copy.deepcopy(model_of("qwen2"))
    model.set_attn_implementation("flex_attention")
    refused(tmp_path, named + "attn_implementation: expected none, .*, got 'flex_attention'", model)
    refused(tmp_path, named + "beta must be a positive", beta=-0.1)
    virtual = get_peft_model(copy.deepcopy(model_of("qwen2")), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3))
    refused(tmp_path, named + ".*prompt-learning adapters are not supported", virtual, reference=model_of("qwen2"))
    with monkeypatch.context() as patch:
        patch.setattr(trl, "__version__", "1.99.0")
        refused(tmp_path, named + "it is for TRL 1.15 and 1.16")


@pytest.mark.parametrize(
    ("place", "values", "reason"),
    [
        ("", {"_is_vision_dataset": True}, "the dataset has images"),
        ("", {"is_fsdp_enabled": True}, "it has not been tried with FSDP"),
        ("", {"is_deepspeed_enabled": True}, "it has not been tried with DeepSpeed"),
        ("args", {"torch_compile": True}, "it has not been tried with torch_compile"),
        ("model", {"_tp_size": 2}, "it has not been tried with parallelism of tensors or sequences"),
    ],
)
def test_what_takes_more_than_a_trainer_here_is_refused(tmp_path, place, values, reason):
    """As a trainer says of itself when it has images, or a model in pieces."""
    trainer = trainer_of(ours, tmp_path, model_of("qwen2"))
    for name, value in values.items():
        setattr(getattr(trainer, place) if place else trainer, name, value)
    trainer.batching = "shared_prefix"
    with pytest.raises(ValueError, match=f"got 'shared_prefix': {reason}"):
        _batching.set_up(trainer)
    assert trainer.model.config._attn_implementation != ATTENTION


def mamba():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=VOCAB, **sizes))


def test_a_model_that_does_not_allow_it(tmp_path, caplog):
    """ "auto" says so once and goes on, on models as they were; what was asked for by name is an error."""
    refused(tmp_path, "got 'shared_prefix': MambaForCausalLM has layers of linear", mamba(), batching="shared_prefix")
    model, reference = model_of("qwen2"), build("llama", vocab_size=VOCAB)
    reference.config.sliding_window = 4096  # of which its attention does not know
    with caplog.at_level("WARNING", "dpo_kernels"):
        trainer = trainer_of(ours, tmp_path, model, reference=reference, more={"batching": "auto"})
    assert caplog.text.count("batching: concatenated, since LlamaForCausalLM has 2 layers with a window") == 1
    assert trainer.batching == "concatenated" and type(trainer.data_collator) is DataCollatorForPreference
    assert trainer.model.config._attn_implementation == model.config._attn_implementation != ATTENTION
    trainer.train()
    assert trainer_of(ours, tmp_path, model, more={"batching": "auto"}).batching == "packed_shared_prefix"


def test_what_a_layout_cannot_do_later(tmp_path):
    trainer = trainer_of(ours, tmp_path, model_of("qwen2"), more=PACKED)
    with pytest.raises(ValueError, match="batching: expected concatenated for logits"):
        trainer.predict(trainer.train_dataset.select(range(2)))
    trainer.beta = 0.0
    with pytest.raises(ValueError, match="batching: expected concatenated for TRL's own loss"):
        trainer.train()


def test_patched(tmp_path):
    _, expected = of_trl("qwen2", False)
    ours.patch()
    try:
        trainer, logs = dpo(trl.DPOTrainer, tmp_path, model_of("qwen2"), trainer_options=PACKED)
    finally:
        ours.unpatch()
    assert trainer.batching == "packed_shared_prefix"
    assert_agree(logs, expected)
    with pytest.raises(TypeError, match="batching"):
        trainer_of(trl, tmp_path, model_of("qwen2"), more=PACKED)


# The forward


def test_predictors_of_the_forward(tmp_path):
    model = copy.deepcopy(model_of("qwen2"))
    add_fused_lm_head(model)
    ids = torch.randint(2, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "fused_lm_head": True}
    plain = model(**inputs, labels=ids).log_probs
    predictors = torch.tensor([[0, 4], [7, 6]])
    found = model(**inputs, shift_labels=ids.flatten()[predictors + 1], predictors=predictors).log_probs
    torch.testing.assert_close(found, torch.stack([plain[0, [0, 4]], plain[1, [1, 0]]]))
    with pytest.raises(ValueError, match="predictors: expected None without shift_labels, got Tensor"):
        model(**inputs, labels=ids, predictors=ids)
    for wrong in (predictors, ids.float(), ids + 12, 3):
        with pytest.raises(ValueError, match="predictors: expected"):
            model(**inputs, shift_labels=ids, predictors=wrong)


EVERY_PROCESS = """
import copy, json, os, sys
import torch
import dpo_kernels.trl as ours
import trl
from trl_runs import LORA, preferences, prototype, settings, trained

torch.set_num_threads(1)
found = []
for lora in (None, LORA):
    for batching in (None, "packed_shared_prefix", "shared_prefix"):
        options = settings(
            sys.argv[1], per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
            max_steps=4, ddp_backend="gloo",
        )
        more = {} if lora else {"ref_model": copy.deepcopy(prototype("mistral"))}
        trainer_class = ours.DPOTrainer if batching else trl.DPOTrainer
        more |= {"batching": batching} if batching else {}
        config = trl.DPOConfig(**options)
        data = preferences().select(range(9))
        trainer, logs = trained(trainer_class, config, prototype("llama"), data, lora=lora, **more)
        assert trainer.accelerator.num_processes == 2
        found.append(logs)
if os.environ["RANK"] == "0":
    with open(sys.argv[1] + "/logs.json", "w") as file:
        json.dump(found, file)
"""


@pytest.mark.full
def test_two_processes(tmp_path):
    """Of the last batch, in training and in evaluation, one row is left."""
    script = tmp_path / "script.py"
    script.write_text(EVERY_PROCESS)
    run_in_two(script, tmp_path)
    found = json.loads((tmp_path / "logs.json").read_text())
    assert len(found) == 6
    for theirs, *mine in (found[:3], found[3:]):
        for logs in mine:
            assert_agree(logs, theirs)


def test_auto_goes_back_for_the_loss_of_a_router(tmp_path, caplog):
    """Which would count each prompt once."""
    trainer = trainer_of(ours, tmp_path, model_of("mixtral"), reference=model_of("mixtral"), more={"batching": "auto"})
    assert trainer.aux_loss_enabled and trainer.batching == "concatenated"
    assert "batching: concatenated, since MixtralForCausalLM has a loss of its router" in caplog.text
