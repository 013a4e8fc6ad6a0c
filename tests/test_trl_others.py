"""TRL's trainers of KTO, CPO, SimPO and ORPO with this package's head, beside TRL's own."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import trl
from datasets import Dataset
from peft import LoraConfig
from test_trl import (
    LORA,
    PAIRS,
    assert_agree,
    assert_weights_agree,
    logs_of,
    prototype,
    settings,
)
from test_trl_parity import preferences, tokenizer

import dpo_kernels.trl as ours

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")
EXPERIMENTAL = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def unpaired():
    rows = []
    for number, row in enumerate(preferences()):
        side = "rejected" if number % 3 == 2 else "chosen"
        rows.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return Dataset.from_list(rows)


def trained(trainer_class, config, model, data, lora=None, **more):
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config,
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=tokenizer(),
        peft_config=None if lora is None else LoraConfig(**lora),
        **more,
    )
    trainer.train()
    trainer.evaluate()
    return trainer, logs_of(trainer)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "kto"},
        {"loss_type": "apo_zero_unpaired"},
        {"loss_type": "kto", "precompute_ref_log_probs": True},
        {"loss_type": "kto", "undesirable_weight": 1.5, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_kto(tmp_path, options, lora):
    found = []
    for trainer_class in (ours.KTOTrainer, trl.KTOTrainer):
        reference = None
        if lora is None and "precompute_ref_log_probs" not in options:
            reference = copy.deepcopy(prototype("mistral"))
        config = trl.KTOConfig(**settings(tmp_path / trainer_class.__module__, **options))
        found.append(trained(trainer_class, config, prototype("mistral"), unpaired(), lora, ref_model=reference))
    (mine, my_logs), (theirs, their_logs) = found
    assert_agree(my_logs, their_logs)
    assert_weights_agree(mine, theirs)
    assert {"kl", "rewards/chosen", "logits/chosen"} <= my_logs[0].keys()


def test_kto_trains_an_adapter_on_the_head(tmp_path):
    config = trl.KTOConfig(**settings(tmp_path, max_steps=2))
    lora = {**LORA, "target_modules": ["lm_head"]}
    with pytest.raises(ValueError, match="lm_head"):
        trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    once, _ = trained(ours.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    config = trl.KTOConfig(**settings(tmp_path, max_steps=4))
    twice, _ = trained(ours.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    weights = dict(once.model.named_parameters())
    moved = {name: w for name, w in twice.model.named_parameters() if "lm_head" in name and "lora" in name}
    assert len(moved) == 2 and not any(torch.equal(w, weights[name]) for name, w in moved.items())


def test_kto_patched_and_verified(tmp_path, monkeypatch):
    config = trl.KTOConfig(**settings(tmp_path))
    _, expected = trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), LORA)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    ours.patch()
    try:
        config = trl.KTOConfig(**settings(tmp_path))
        with pytest.warns(UserWarning, match="not with 1.99.0; on the first batch it agreed"):
            trainer, found = trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), LORA)
        assert hasattr(trainer.model.get_base_model(), "_fused_lm_head")
    finally:
        ours.unpatch()
    assert_agree(found, expected)


@EXPERIMENTAL
@pytest.mark.parametrize("algorithm", ["ORPO", "CPO"])
def test_reference_free_is_verified(tmp_path, monkeypatch, algorithm):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    config = getattr(module, f"{algorithm}Config")(**settings(tmp_path))
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.warns(UserWarning, match="not with 1.99.0; on the first batch it agreed"):
        trained(getattr(ours, f"{algorithm}Trainer"), config, prototype("llama"), preferences())
    right = ours._concatenated_forward
    wrong = lambda *args: (1.1 * right(*args)[0], *right(*args)[1:])  # noqa: E731
    monkeypatch.setattr(ours, "_concatenated_forward", wrong)
    with pytest.raises(RuntimeError, match="does not fit 1.99.0: on the first batch logps/chosen"):
        trained(getattr(ours, f"{algorithm}Trainer"), config, prototype("llama"), preferences())


@EXPERIMENTAL
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi", "mixtral", "roberta"])
@pytest.mark.parametrize(
    "algorithm, options",
    [
        ("ORPO", {}),
        ("CPO", {"loss_type": "sigmoid"}),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.5}),
        ("CPO", {"loss_type": "ipo"}),
        ("CPO", {"loss_type": "hinge"}),
    ],
    ids=str,
)
def test_reference_free(tmp_path, name, algorithm, options):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    theirs = getattr(module, f"{algorithm}Trainer")
    config_class = getattr(module, f"{algorithm}Config")
    found = []
    for trainer_class in (getattr(ours, f"{algorithm}Trainer"), theirs):
        config = config_class(**settings(tmp_path, **options))
        model = copy.deepcopy(prototype(name))
        if name == "mixtral":
            model.config.output_router_logits = True
        found.append(trained(trainer_class, config, model, preferences()))
    assert issubclass(getattr(ours, f"{algorithm}Trainer"), theirs)
    (mine, my_logs), (of_trl, their_logs) = found
    assert_agree(my_logs, their_logs)
    assert_weights_agree(mine, of_trl)
    assert {"nll_loss", "logits/chosen", "logps/rejected"} <= my_logs[0].keys()


@EXPERIMENTAL
@pytest.mark.parametrize("algorithm", ["ORPO", "CPO"])
def test_reference_free_lora_and_patch(tmp_path, algorithm):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    trainer_class, config_class = (getattr(module, algorithm + kind) for kind in ("Trainer", "Config"))
    config = config_class(**settings(tmp_path))
    _, expected = trained(trainer_class, config, prototype("llama"), preferences(), LORA)
    ours.patch(f"{algorithm}Trainer")
    try:
        trainer, found = trained(trainer_class, config, prototype("llama"), preferences(), LORA)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
        assert trainer.concatenated_forward(trainer.model, batch)[2].dim() == 0  # no logits
    finally:
        ours.unpatch()
    assert_agree(found, expected)


def test_name_that_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainer'"):
        _ = ours.GRPOTrainer
