"""Runs of the loop on weights in shards: their settings, several in the same processes, and how close two of them
are."""

import json
import shutil

import pytest
import torch
from short_runs import TINY, rows_of, weights_of
from two_processes import run_in_two

SCRIPT = """
import gc, json, os, sys
from pathlib import Path
import accelerate
from dpo_kernels.training import TrainConfig, train
from dpo_kernels.training import loop

accelerate.Accelerator.end_training = lambda self: None  # the processes go on knowing of each other
loop.plot_training_curves = lambda metrics, picture: None
rank = int(os.environ["RANK"])
for settings in json.loads(Path(sys.argv[1]).read_text()):
    if before := settings.pop("before", None):  # what the first process copies first
        if rank == 0:
            import shutil
            shutil.copytree(*before)
            for later in ("final", "checkpoint-6"):
                shutil.rmtree(Path(before[1]) / later)
        accelerate.PartialState().wait_for_everyone()
    gc.freeze()  # DeepSpeed looks for garbage after each evaluation and score
    train(TrainConfig(**settings))
"""

# 9 pairs to train on in steps of 4: in the last step of an epoch there is one, so that one process has none.
UNEVEN = {"max_rows": 10, "max_steps": 4}
OF_TWO = {"per_device_batch_size": 1, "gradient_accumulation_steps": 2, "sharding": "fsdp2"}
TIED = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TIED |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2}
GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
# Of norms two processes have no equal shares.
ODD = TIED | {"tie_word_embeddings": False, "hidden_size": 33, "head_dim": 32}
ODD |= {"num_attention_heads": 1, "num_key_value_heads": 1}
MODELS = {"TIED": TIED, "GPT2": GPT2, "ODD": ODD}
SHORT = {
    "full": {"eval_steps": 2, "gradient_checkpointing": True},
    "adapters": {"lora_r": 2, "loss_type": "sigmoid,sft", "lora_target_modules": "q_proj,down_proj,lm_head"},
    "tied": {"model": "TIED", "reference": "precompute", "eval_fraction": 0.3},  # 3 of 10: both parts are odd
}
# A window of 3 steps straddles the checkpoints at 2 and 4; the steps of 4 pairs are taken in ones and twos.
RESUMED = {"max_rows": 20, "max_steps": 6, "save_steps": 2, "logging_steps": 3, "eval_steps": 3, "learning_rate": 5e-4}


def settings_of(directory, case):
    """Of a run on `UNEVEN` data; the model is a file in the directory."""
    settings = UNEVEN | case
    if settings.get("model") in MODELS:
        file = directory / f"{settings['model']}.json"
        file.write_text(json.dumps(MODELS[settings["model"]]))
        settings["model"] = f"config:{file}"
        if settings.get("reference") == "LOADED":  # the same weights, by another name
            settings["reference"] = f"config:{shutil.copy(file, directory / 'same.json')}"
    return settings


def several(directory, runs, processes=2):
    """Runs one after the other, in the same processes."""
    (directory / "script.py").write_text(SCRIPT)
    (directory / "runs.json").write_text(json.dumps([TINY | settings for settings in runs]))
    arguments = directory / "script.py", directory / "runs.json"
    run_in_two(*arguments, processes=processes, ACCELERATE_USE_CPU="true")


def interrupted(whole, directory):
    shutil.copytree(whole, directory)
    for later in ("final", "checkpoint-6"):
        shutil.rmtree(directory / later)
    return directory


def assert_close_runs(one, two, **tolerance):
    rows, expected = rows_of(two), rows_of(one)
    assert len(rows) == len(expected) > 4
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, **(tolerance or {"rel": 1e-4, "abs": 1e-5})), (name, row["step"])
    ours, theirs = weights_of(two), weights_of(one)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype
        torch.testing.assert_close(ours[name], weight, atol=tolerance.get("abs", 1e-5), rtol=0, msg=name)
