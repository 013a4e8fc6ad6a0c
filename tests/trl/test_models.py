"""TRL's trainer with its head and with ours, on models that are more than a language model by itself: virtual tokens
before the text, a model of vision and language, several processes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains adapters, and peft is not installed")

import trl
from datasets import Dataset
from peft import PrefixTuningConfig, PromptTuningConfig
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from trl_runs import assert_agree, logs_of, preferences, prototype, settings, tokenizer, unpaired
from two_processes import run_in_two

import dpo_kernels.trl as ours

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")


def trained(trainer_class, directory, model, processing_class, **more):
    trainer = trainer_class(
        copy.deepcopy(model),
        args=trl.DPOConfig(**settings(directory, **more.pop("options", {}))),
        train_dataset=preferences(),
        processing_class=processing_class,
        **more,
    )
    trainer.train()
    return logs_of(trainer)


# Cut to that length, some rows have no prompt: their first token would be scored by the last virtual one.
CUT = {"max_length": 6, "truncation_mode": "keep_end"}


@pytest.mark.parametrize("options", [{}, CUT], ids=["whole", "cut"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens(tmp_path, kind, options):
    found = []
    for trainer_class in (ours.DPOTrainer, trl.DPOTrainer):
        config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
        more = {"peft_config": config, "options": options}
        found.append(trained(trainer_class, tmp_path, prototype("llama"), tokenizer(), **more))
    assert_agree(*found)


def test_virtual_tokens_of_kto(tmp_path):
    """Where the prompts are empty."""
    data = Dataset.from_list([{**row, "prompt": ""} for row in unpaired()])
    found = []
    for trainer_class in (ours.KTOTrainer, trl.KTOTrainer):
        trainer = trainer_class(
            copy.deepcopy(prototype("llama")),
            args=trl.KTOConfig(**settings(tmp_path)),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )
        trainer.train()
        found.append(logs_of(trainer))
    assert_agree(*found)


def test_text_of_a_vision_language_model(tmp_path):
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=127))
    found = []
    for trainer_class in (ours.DPOTrainer, trl.DPOTrainer):
        reference = copy.deepcopy(model)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.3)
        found.append(trained(trainer_class, tmp_path, model, tokenizer(), ref_model=reference))
    assert_agree(*found)
    assert abs(found[0][0]["rewards/chosen"]) > 1e-3


EVERY_PROCESS = """
import copy, json, os, sys
import torch
import dpo_kernels.trl as ours
import trl
from trl_runs import prototype, settings
from trl_runs import trained, unpaired
from trl_runs import preferences

torch.set_num_threads(1)
found = {}
for algorithm in ("DPO", "KTO", "CPO", "ORPO"):
    module, more = trl, {"ref_model": copy.deepcopy(prototype("mistral"))}
    if not hasattr(trl, algorithm + "Trainer"):
        module, more = __import__("trl.experimental." + algorithm.lower(), fromlist=["x"]), {}
    data = (unpaired() if algorithm == "KTO" else preferences()).select(range(9))
    for library in (ours, module):
        options = settings(
            sys.argv[1], per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2,
            max_steps=4, ddp_backend="gloo",
        )
        config = getattr(module, algorithm + "Config")(**options)
        trainer, logs = trained(getattr(library, algorithm + "Trainer"), config, prototype("llama"), data, **more)
        assert trainer.accelerator.num_processes == 2
        found.setdefault(algorithm, []).append(logs)
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
    assert found.keys() == {"DPO", "KTO", "CPO", "ORPO"}
    for logs in found.values():
        assert_agree(*logs)
