"""The training loop against a loop written out with eager logits, and against itself after interruptions."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys

import forks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from accelerate import Accelerator
from datasets import Dataset
from places import SHARED, python_path
from short_runs import TINY, assert_close_weights, assert_same_run, rows_of, run, weights_of, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_processes import run_in_two

from dpo_kernels.data.demo import demo_model
from dpo_kernels.testing import Record
from dpo_kernels.training.checkpoint import MetricsLog, list_checkpoints, read_metrics
from dpo_kernels.training.config import TrainConfig, load_config
from dpo_kernels.training.loop import train
from dpo_kernels.training.pairs import load_data
from dpo_kernels.training.policy import load_model, save_model
from dpo_kernels.training.schedule import ByExamples
from dpo_kernels.training.sizes import check_fits
from dpo_kernels.training.state import WALL_CLOCK

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")
    return (*run(directory, eval_steps=3, curves=True), directory)


def test_a_run_leaves_metrics_curves_and_models(plain):
    result, rows, directory = plain
    training, held_out = ([row for row in rows if (key in row)] for key in ("loss", "eval/loss"))
    assert [row["step"] for row in training] == list(range(1, 8))
    assert [row["step"] for row in held_out] == [0, 3, 6, 7]  # before the first step, and after the last
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    names |= {"logps/chosen", "logps/rejected"}
    assert all(names | {"step", "epoch", "grad_norm", "lr"} == row.keys() for row in training)
    assert all({f"eval/{name}" for name in names} | {"step", "epoch"} == row.keys() for row in held_out)
    assert all(row[name] > 0 for row in read_metrics(result.metrics_path) if "loss" in row for name in WALL_CLOCK)
    assert held_out[0]["eval/loss"] == pytest.approx(math.log(2)) and held_out[0]["eval/rewards/margins"] == 0
    assert training[-1]["epoch"] == 1
    assert (
        result.before["eval/loss"] == held_out[0]["eval/loss"]
        and result.after["eval/loss"] == held_out[-1]["eval/loss"]
    )
    assert result.curves_path.read_bytes().startswith(b"\x89PNG")
    assert not list_checkpoints(directory) and not list(directory.glob(".*"))
    assert load_config(directory / "config.yaml").max_rows == 30
    best = min(held_out[1:], key=lambda row: row["eval/loss"])
    summary = result.summary()
    assert f"{held_out[-1]['eval/rewards/accuracies']:.4f}" in summary and str(result.final_dir) in summary

    tokenizer = AutoTokenizer.from_pretrained(result.final_dir)
    text = "Hello!\nWhat is 7 plus 15?"
    assert tokenizer(text).input_ids == load_data(TrainConfig(**TINY))[0](text).input_ids
    model = AutoModelForCausalLM.from_pretrained(result.final_dir)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True)
    assert torch.isfinite(model(**ids).logits).all()
    assert (result.best_dir / "model.safetensors").is_file() and best["step"] in (3, 6, 7)


def test_the_best_weights_can_be_the_final_ones(tmp_path):
    # All held-out pairs are right from some step on, and the first such step stays the best.
    settings = {"eval_steps": 1, "max_steps": 6, "learning_rate": 3e-3, "eval_fraction": 0.3}
    settings |= {"metric_for_best": "rewards/accuracies"}
    result, rows = run(tmp_path / "best", load_best_model_at_end=True, **settings)
    accuracies = {row["step"]: row["eval/rewards/accuracies"] for row in rows if "eval/loss" in row and row["step"]}
    best = max(accuracies, key=accuracies.get)
    after = next(row for row in rows if row["step"] == best and "eval/loss" in row)
    assert 1 < best < 6 and result.after["eval/loss"] == after["eval/loss"]
    final, best_weights = (load_file(path / "model.safetensors") for path in (result.final_dir, result.best_dir))
    assert all(torch.equal(final[name], best_weights[name]) for name in final)
    run(tmp_path / "last", **settings)
    last = weights_of(tmp_path / "last")
    assert not any(torch.equal(final[name], last[name]) for name in final)
    for size in (0, 1000):  # of best weights that are no longer what was written no final model is made
        cut = result.best_dir / "model.safetensors"
        cut.write_bytes(cut.read_bytes()[:size])
        with pytest.raises(ValueError, match="load_best_model_at_end: .*best is not whole: model.safetensors is"):
            save_model(tmp_path / "anew", None, None, Accelerator(cpu=True), copy_of=result.best_dir)
        assert not (tmp_path / "anew").exists()


def eager_step(model, reference, batch, loss_type, beta, rpo_alpha):
    """Loss a pair and the metrics of chosen and rejected examples, from the whole logits."""

    def score(network, ids, prompt):
        tokens = torch.tensor([ids])
        logps = network(input_ids=tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        return logps[len(prompt) - 1 :].sum()

    sides = [
        [score(model, e["prompt_ids"] + e[key], e["prompt_ids"]) for e in batch]
        for key in ("chosen_ids", "rejected_ids")
    ]
    chosen, rejected = map(torch.stack, sides)
    lengths = [torch.tensor([float(len(e[key])) for e in batch]) for key in ("chosen_ids", "rejected_ids")]
    with torch.no_grad():
        ref_chosen, ref_rejected = (
            torch.stack([score(reference, e["prompt_ids"] + e[key], e["prompt_ids"]) for e in batch])
            for key in ("chosen_ids", "rejected_ids")
        )
    rewards = beta * (chosen - ref_chosen).detach(), beta * (rejected - ref_rejected).detach()
    if loss_type == "simpo":
        rewards = (beta * chosen / lengths[0]).detach(), (beta * rejected / lengths[1]).detach()
        loss = -F.logsigmoid(beta * (chosen / lengths[0] - rejected / lengths[1]) - 0.5).mean()
    elif loss_type == "cpo":
        rewards = beta * chosen.detach(), beta * rejected.detach()
        loss = -F.logsigmoid(beta * (chosen - rejected)).mean() - chosen.sum() / lengths[0].sum()
    else:
        loss = -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()
        if "sft" in loss_type:
            loss = loss - 0.5 * chosen.sum() / lengths[0].sum()
        if rpo_alpha is not None:
            loss = loss - rpo_alpha * (chosen / lengths[0]).mean()
    return loss, rewards, chosen.detach(), rejected.detach()


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "sigmoid"},
        {"loss_type": "sigmoid,sft", "loss_weights": [1.0, 0.5]},  # sft divides by the length of the whole step
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "cpo"},
        {"loss_type": "sigmoid", "rpo_alpha": 0.5},
    ],
    ids=lambda loss: "-".join(map(str, loss.values())),
)
def test_steps_equal_those_of_an_eager_loop(tmp_path, loss):
    # Micro-batches of 2 and accumulation over 2, against one batch of 4; 7 steps, the last one of 3 pairs.
    settings = {
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "eval_fraction": 0.1,
    }
    config = TrainConfig(**TINY | settings | loss)
    _, rows = run(tmp_path, **settings, **loss)
    rows = [row for row in rows if "loss" in row]

    tokenizer, pairs, _ = load_data(config)
    model = load_model(config, "demo", tokenizer).train()
    reference = load_model(config, "demo", tokenizer).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step, row in enumerate(rows):
        ((rows_of_step,),) = ByExamples(len(pairs), 4, 1, 1, config.seed).step(0, step)
        batch = [pairs[int(i)] for i in rows_of_step]
        value, rewards, chosen, rejected = eager_step(
            model, reference, batch, loss["loss_type"], config.beta, config.rpo_alpha
        )
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = 1e-3 * (0.5 if step == 0 else (7 - step) / 6)  # one step of warm-up, then linear
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        expected = {
            "loss": value,
            "rewards/chosen": rewards[0].mean(),
            "rewards/rejected": rewards[1].mean(),
            "rewards/margins": (rewards[0] - rewards[1]).mean(),
            "logps/chosen": chosen.mean(),
            "logps/rejected": rejected.mean(),
            "grad_norm": norm,
        }
        assert row["lr"] == pytest.approx(rate)
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=2e-4, abs=2e-5), (step, name)
        ties = (rewards[0] - rewards[1]).abs() < 1e-5
        accurate = (rewards[0] > rewards[1]).float()
        assert ties.any() or row["rewards/accuracies"] == accurate.mean()
    assert len(rows) == 7


def test_accumulated_gradients_do_not_depend_on_the_micro_batches(tmp_path):
    # With a large epsilon AdamW's steps are proportional to the gradient instead of to its sign.
    settings = {"learning_rate": 0.5, "adam_epsilon": 1.0, "loss_type": "ipo,sft", "eval_fraction": 0.1}
    whole, rows = run(tmp_path / "whole", **settings)
    single, rows_single = run(tmp_path / "single", per_device_batch_size=1, gradient_accumulation_steps=4, **settings)
    assert_close_weights(tmp_path / "whole", tmp_path / "single", demo_model(300, seed=TrainConfig().seed).state_dict())
    for row, row_single in zip(rows, rows_single, strict=True):
        assert row == pytest.approx(row_single, rel=1e-4, abs=1e-4)


def test_rows_are_means_over_their_window(tmp_path, plain):
    _, rows = run(tmp_path, eval_steps=3, logging_steps=5)
    singles = {row["step"]: row for row in plain[1] if "loss" in row}
    pairs = {step: 3 if step == 7 else 4 for step in singles}
    for row, steps in zip([row for row in rows if "loss" in row], ([1, 2, 3, 4, 5], [6, 7]), strict=True):
        assert row["step"] == steps[-1] and row["lr"] == singles[steps[-1]]["lr"]
        for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            mean = sum(singles[step][name] * pairs[step] for step in steps) / sum(pairs[step] for step in steps)
            assert row[name] == pytest.approx(mean, rel=1e-6, abs=1e-9)
        assert row["grad_norm"] == pytest.approx(np.mean([singles[step]["grad_norm"] for step in steps]), rel=1e-6)


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4, "lora_target_modules": "q_proj,v_proj"}], ids=["full", "lora"])
def test_all_references_of_the_same_checkpoint_agree(tmp_path, lora, caplog):
    settings = {"max_steps": 3, "eval_fraction": 0.1, "ld_alpha": 0.5, "reference": "copy"} | lora
    _, rows = run(tmp_path / "copy", **settings)
    # Policy and reference weigh the tokens alike: before the first step they agree.
    assert rows[0]["eval/rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["eval/rewards/rejected"] == pytest.approx(0, abs=1e-4)
    if lora:
        _, others = run(tmp_path / "base", **settings | {"reference": "base"})
        assert others == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in rows]
    with caplog.at_level(logging.INFO, "dpo_kernels"):
        settings |= {"reference": "precompute", "cache_dir": str(tmp_path / "cache")}
        _, others = run(tmp_path / "first", **settings)
        assert others == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in rows]
        assert caplog.text.count("computing them once for") == 2 and "read from" not in caplog.text
        caplog.clear()
        _, again = run(tmp_path / "second", **settings)
        assert caplog.text.count("read from") == 2 and "computing" not in caplog.text
        assert again == others
        caplog.clear()
        run(tmp_path / "third", **settings | {"ld_alpha": 0.25})  # other token weights, other log-probabilities
        assert caplog.text.count("computing them once for") == 2
    if not lora:
        for number, harm in enumerate(
            [lambda c: c[:100], lambda c: b"", lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: c[:9] + b"x" + c[10:]]
        ):
            for file in (tmp_path / "cache" / "reference").iterdir():
                file.write_bytes(harm(file.read_bytes() or b"0123456789"))
            with pytest.warns(UserWarning, match="is damaged, or of an earlier version.*computed again"):
                _, again = run(tmp_path / f"harmed {number}", **settings | {"max_steps": 1})
            assert again[:2] == others[:2]


def test_another_reference_is_refused_and_the_same_one_is_not(tmp_path, caplog):
    tokenizer, _, _ = load_data(TrainConfig(**TINY))
    policy, other = tmp_path / "policy", tmp_path / "other"
    demo_model(len(tokenizer), seed=1).save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    shutil.copytree(policy, tmp_path / "copy_of_policy")
    demo_model(len(tokenizer), seed=2).save_pretrained(other)
    settings = {"model": str(policy), "max_steps": 1, "eval_fraction": 0}

    run(tmp_path / "same", reference=str(tmp_path / "copy_of_policy"), **settings)
    with pytest.raises(ValueError, match="is not the checkpoint that the policy") as error:
        run(tmp_path / "refused", reference=str(other), **settings)
    assert str(other) in str(error.value) and str(policy) in str(error.value) and "lm_head.weight" in str(error.value)
    run(tmp_path / "allowed", reference=str(other), allow_different_reference=True, **settings)
    assert "is not the policy's starting checkpoint" in caplog.text


# Dropout makes the trajectory depend on the random state, and windows of 3 steps straddle checkpoints every 4.
INTERRUPTED = {
    "lora_r": 4,
    "lora_dropout": 0.2,
    "epochs": 3,
    "logging_steps": 3,
    "eval_steps": 5,
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
    "per_device_batch_size": 2,
    "save_total_limit": 2,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    run(directory, **INTERRUPTED)
    return directory


KILLED = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
from dpo_kernels.training import TrainConfig, train

settings, threads = json.loads(sys.argv[1])
metrics = Path(settings["output_dir"], "metrics.jsonl")

def kill():
    while not (metrics.exists() and '"step": 12' in metrics.read_text()):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(threads)
threading.Thread(target=kill, daemon=True).start()
train(TrainConfig(**settings))
"""


def test_a_killed_process_is_resumed_to_the_last_bit(tmp_path, uninterrupted):
    directory, script = tmp_path / "run", tmp_path / "script.py"
    settings = TINY | INTERRUPTED | {"output_dir": str(directory), "cache_dir": str(tmp_path / "cache")}
    script.write_text(KILLED)
    done = forks.python(script, json.dumps([settings, torch.get_num_threads()]))
    assert done.returncode == -signal.SIGKILL, f"the run ended before it was killed\n{done.stderr[-4000:]}"
    assert not (directory / "final").exists() and list_checkpoints(directory)
    # What else a kill can leave: half a line, and a directory that was still being written.
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    (directory / ".checkpoint-16.tmp").mkdir(exist_ok=True)
    (directory / ".checkpoint-16.tmp" / "weights.safetensors").write_bytes(b"half")

    run(directory, **INTERRUPTED, curves=True)
    assert_same_run(directory, uninterrupted)
    assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-16", "checkpoint-20"]
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("row", [1, 4])
def test_any_row_can_be_the_last_one(tmp_path, uninterrupted, monkeypatch, row):
    # Row 1 is the evaluation before the first step, row 4 comes before a checkpoint in the middle of a window.
    written = []

    def stop(self, values):
        written.append(values)
        if len(written) == row:
            raise KeyboardInterrupt
        write(self, values)

    write = MetricsLog.write
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **INTERRUPTED)
    run(tmp_path, **INTERRUPTED)
    assert_same_run(tmp_path, uninterrupted)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, uninterrupted, caplog):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    shutil.rmtree(directory / "final")
    file = directory / "checkpoint-20" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(UserWarning) as caught, caplog.at_level(logging.INFO, "dpo_kernels"):
        run(directory, **INTERRUPTED)
    (message,) = (str(warning.message) for warning in caught if "not whole" in str(warning.message))
    assert message.startswith(f"{directory}/checkpoint-20 is not whole: weights.safetensors is damaged. Going on from ")
    assert "going on from" in caplog.text and "one of the training pairs" not in caplog.text  # which was shown before
    assert_same_run(directory, uninterrupted)
    assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-16", "checkpoint-20"]
    for name in ("checkpoint-16", "checkpoint-20"):
        (directory / name / "state.pt").unlink()
    with pytest.raises(ValueError, match="(?s)no checkpoint to go on from.*20 is not whole: state.pt.*16 is not whole"):
        run(directory, **INTERRUPTED)


def test_a_mixture_with_weights_goes_on_to_the_last_bit(tmp_path):
    """Windows of 3 steps straddle the checkpoints; with other weights there is no going on."""
    rows = [{"prompt": f"{n} is ", "chosen": f"{n}! " * (1 + n % 3), "rejected": f"{n}?"} for n in range(20)]
    settings = {"dataset": [write_rows(tmp_path / "a.jsonl", rows[:12]), write_rows(tmp_path / "b.jsonl", rows[12:])]}
    weighted = [row | {"weight": 1 + n % 4} for n, row in enumerate(rows[12:])]
    settings["dataset"][1] = write_rows(tmp_path / "b.jsonl", weighted)
    settings |= {"dataset_weights": [0.5, 1.5], "max_rows": None, "logging_steps": 3, "save_steps": 2, "epochs": 2}
    run(tmp_path / "whole", **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "final")
    for checkpoint in list_checkpoints(tmp_path / "again")[1:]:
        shutil.rmtree(checkpoint)
    other = settings | {"dataset_weights": [0.5, 1.0]}
    with pytest.raises(ValueError, match=r"dataset_weights \(was \[0.5, 1.5\], is \[0.5, 1.0\]\); the training data"):
        run(tmp_path / "again", **other)
    run(tmp_path / "again", **settings)
    assert_same_run(tmp_path / "again", tmp_path / "whole")


def test_evaluation_does_not_disturb_training(tmp_path, uninterrupted):
    run(tmp_path, **INTERRUPTED | {"eval_steps": 1000, "logging_steps": 3})
    rows, others = ([row for row in rows_of(path) if "loss" in row] for path in (tmp_path, uninterrupted))
    assert rows == others


def test_a_finished_run_is_found_finished(uninterrupted, tmp_path):
    directory = tmp_path / "again"
    shutil.copytree(uninterrupted, directory)
    before = rows_of(directory)
    run(directory, **INTERRUPTED)
    assert_same_run(directory, uninterrupted) and rows_of(directory) == before


def test_resuming_under_other_conditions_is_refused(tmp_path, uninterrupted):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    with pytest.raises(ValueError, match=r"learning_rate \(was 0.001, is 0.002\)") as error:
        run(directory, **INTERRUPTED | {"learning_rate": 2e-3, "lora_dropout": 0.1, "save_steps": 10})
    assert "lora_dropout (was 0.2, is 0.1)" in str(error.value) and "save_steps" not in str(error.value)
    with pytest.raises(ValueError, match=r"max_rows .*; the training data \(was"):
        run(directory, **INTERRUPTED | {"max_rows": 29})
    with pytest.raises(ValueError, match="holds checkpoint-20 of another run"):
        run(directory, **INTERRUPTED | {"resume": "never"})
    with pytest.raises(ValueError, match="expected 'auto', 'never' or the path"):
        run(directory, **INTERRUPTED | {"resume": str(tmp_path)})
    with pytest.raises(ValueError, match="also holds checkpoint-20"):
        run(directory, **INTERRUPTED | {"resume": str(directory / "checkpoint-16")})
    shutil.rmtree(directory / "checkpoint-20")
    run(directory, **INTERRUPTED | {"resume": str(directory / "checkpoint-16")})
    assert_same_run(directory, uninterrupted)


def test_adapters_load_into_peft(uninterrupted):
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(uninterrupted / "final")
    saved = load_file(uninterrupted / "final" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): weight for name, weight in model.named_parameters()}
    assert saved and all(torch.equal(loaded[name], weight) for name, weight in saved.items())
    assert any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)


def test_divergence_stops_the_run_and_says_when_and_why(tmp_path):
    with pytest.raises(FloatingPointError, match=r"stopped at step \d.*learning rate \(1e\+30\).*not clipped"):
        run(tmp_path, learning_rate=1e30, max_grad_norm=0, warmup_ratio=0, eval_fraction=0)


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"dtype": "bfloat16"}],
    ids=["checkpointing", "autocast", "bfloat16"],
)
def test_memory_savers_keep_the_trajectory(tmp_path, plain, settings):
    _, rows = run(tmp_path, eval_steps=3, **settings)
    tolerance = 1e-5 if "gradient_checkpointing" in settings else 0.05  # bf16 has 8 bits
    for row, expected in zip(rows, plain[1], strict=True):
        for name in ("loss", "eval/loss"):
            if name in row:
                assert row[name] == pytest.approx(expected[name], rel=tolerance)
    saved = weights_of(tmp_path)["lm_head.weight"].dtype
    assert saved == (torch.bfloat16 if "dtype" in settings else torch.float32)


def test_the_router_loss_of_a_mixture_of_experts_is_added_with_its_weight(tmp_path):
    settings = {"model_type": "mixtral", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 32}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    losses = {}
    for weight in (0.0, 0.1, 0.2):
        file = tmp_path / f"mixtral-{weight}.json"
        file.write_text(json.dumps(settings | {"router_aux_loss_coef": weight}))
        _, rows = run(tmp_path / file.stem, model=f"config:{file}", max_steps=1, eval_fraction=0)
        losses[weight] = rows[0]["loss"]
    assert losses[0.0] == pytest.approx(math.log(2), rel=1e-5)
    router = (losses[0.1] - losses[0.0]) / 0.1
    assert router > 0.9  # 4 experts, of which each token takes 2: 2 where all are used alike, by transformers' count
    assert losses[0.2] - losses[0.0] == pytest.approx(0.2 * router, rel=1e-3)


def test_no_tensor_of_a_run_exceeds_the_bound(tmp_path):
    vocabulary, bound = 32768, 40 * 2**20
    settings = {"model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 32}
    settings |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    (tmp_path / "model.json").write_text(json.dumps(settings))
    with Record() as record:  # which sees inside the custom operators
        run(
            tmp_path, model=f"config:{tmp_path / 'model.json'}", max_length=96, max_steps=2, per_device_batch_size=16,
            eval_fraction=0, chunk_bytes=bound,
        )  # fmt: skip
    config = TrainConfig(**TINY | {"max_length": 96})
    _, pairs, _ = load_data(config)
    labelled = sorted(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs)[:16]
    assert sum(labelled) * vocabulary * 4 > 1.5 * bound  # the logits of the labelled positions alone would be larger
    assert vocabulary * 16 * 4 <= record.largest[0] <= bound


def test_trackers_get_every_row(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append({"step": step} | values))
    _, rows = run(tmp_path, max_steps=2, eval_fraction=0.1)
    assert [row["step"] for row in logged] == [row["step"] for row in rows] == [0, 1, 2, 2]
    assert all(
        tracked.items() >= (row.items() - {("epoch", row["epoch"])}) for tracked, row in zip(logged, rows, strict=True)
    )


def test_warnings_reach_the_caller(tmp_path):
    with pytest.warns(UserWarning, match="beta 0.9 is outside"):
        run(tmp_path, beta=0.9, max_steps=1, eval_fraction=0, curves=True)  # of which none is held out


def pairs_with(prompts):
    rows = [{"prompt_ids": [prompt], "chosen_ids": [1, row], "rejected_ids": [2]} for row, prompt in enumerate(prompts)]
    return Dataset.from_list(rows)


def test_every_epoch_takes_every_pair_once_in_an_order_of_its_own():
    order = ByExamples(10, size=4, accumulation=1, processes=1, seed=5)
    epochs = [[order.step(epoch, position) for position in range(order.steps(epoch))] for epoch in range(3)]
    assert [[len(rows) for ((rows,),) in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    flat = [np.concatenate([rows for ((rows,),) in epoch]).tolist() for epoch in epochs]
    assert all(sorted(epoch) == list(range(10)) for epoch in flat)
    assert len({tuple(epoch) for epoch in flat}) == 3


def test_token_ids_outside_the_vocabulary_are_named():
    model = demo_model(300)
    check_fits(pairs_with([299]), model, "m")
    with pytest.raises(ValueError, match="token id 300 is outside the vocabulary of the model 'm', which has 300"):
        check_fits(pairs_with([5, 300]), model, "m")


def test_pairs_longer_than_the_model_are_named():
    with pytest.raises(ValueError, match="max_length: a pair has 3 tokens, but the model 'm' has 2 positions"):
        check_fits(pairs_with([5]), demo_model(300, max_positions=2), "m")


def test_cut_prompts_are_held_out_together(tmp_path):
    """Four pairs a prompt, each cut by its own response's length: the same prompt with other token ids."""
    prompts = [f"{n} " + "long " * 40 for n in range(10)]
    rows = [{"prompt": prompt, "chosen": "yes " * (i + 1), "rejected": "no"} for prompt in prompts for i in range(4)]
    settings = TINY | {
        "dataset": write_rows(tmp_path / "pairs.jsonl", rows),
        "max_rows": None,
        "max_length": 1000,
        "eval_fraction": 0.2,
    }
    _, kept, held_out = load_data(TrainConfig(**settings))
    whole = {tuple(ids) for ids in held_out["prompt_ids"]}
    assert len(held_out) == 8 and not whole & {tuple(ids) for ids in kept["prompt_ids"]}
    _, cut_kept, cut_held_out = load_data(TrainConfig(**settings | {"max_length": 35}))
    assert cut_kept["chosen_ids"] == kept["chosen_ids"] and cut_held_out["chosen_ids"] == held_out["chosen_ids"]
    assert len({tuple(ids) for ids in cut_held_out["prompt_ids"]}) > len(whole)  # the cut did make them differ


def test_a_finished_run_is_not_overwritten_unless_told(tmp_path):
    run(tmp_path, max_steps=1, eval_fraction=0)
    before = weights_of(tmp_path)
    with pytest.raises(ValueError, match="output_dir: .* holds a finished run"):
        run(tmp_path, max_steps=2, eval_fraction=0)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(tmp_path).items())
    result, _ = run(tmp_path, max_steps=2, eval_fraction=0, overwrite=True, save_steps=1)
    assert result.steps == 2
    with pytest.raises(ValueError, match="overwrite: .* holds checkpoint-2"):
        run(tmp_path, max_steps=2, eval_fraction=0, overwrite=True)


def test_an_evaluation_no_better_than_the_start_is_not_the_best(tmp_path):
    result, rows = run(tmp_path, max_steps=2, eval_steps=1, learning_rate=1e-20)  # no weight changes
    assert rows[-1]["eval/loss"] == rows[0]["eval/loss"]
    assert result.best_dir is None and not (tmp_path / "best").exists()
    assert "no evaluation was better" in result.summary()


def test_missing_trackers_are_named(tmp_path):
    with pytest.raises(ImportError, match="trackers: 'comet_ml' is not installed"):
        run(tmp_path, trackers="comet_ml")


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else name)
    with pytest.raises(ImportError, match=r"training needs matplotlib: pip install 'dpo_kernels\[train\]'"):
        train(TrainConfig())


def test_what_is_no_policy_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a PEFT adapter"):
        load_model(TrainConfig(), str(tmp_path), None)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(ValueError, match="model_type"):
        load_model(TrainConfig(), f"config:{tmp_path / 'model.json'}", None)
    with pytest.raises(ValueError, match="has none of its own"):
        load_data(TrainConfig(**TINY | {"tokenizer": None, "model": "config:x.json"}))


def test_real_preferences_are_learned(tmp_path):
    data = SHARED / "data" / "preferences_en.jsonl"
    if not data.is_file():
        pytest.skip(f"there is no {data}")
    _, rows = run(
        tmp_path, dataset=str(data), max_length=64, max_rows=24, max_steps=30, eval_fraction=0, logging_steps=6
    )
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"] and rows[-1]["rewards/accuracies"] >= 0.9


def torchrun(script, **environment):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path()}
    subprocess.run(start, env=os.environ | environment, check=True, timeout=300)


@pytest.mark.parametrize("start", [run_in_two, pytest.param(torchrun, marks=pytest.mark.release)])
def test_two_processes_take_the_steps_of_one(tmp_path, start):
    # 29 pairs in steps of 4: in the last step of an epoch there is one pair, so that one process has none.
    settings = {"max_rows": 32, "epochs": 2, "lora_r": 2, "reference": "precompute", "loss_type": "sigmoid,sft"}
    _, rows = run(tmp_path / "one", **settings)
    settings |= {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}
    settings |= {"output_dir": str(tmp_path / "two"), "cache_dir": str(tmp_path / "cache")}
    script = tmp_path / "two.py"
    script.write_text(f"from dpo_kernels.training import *\ntrain(TrainConfig(**{TINY | settings!r}))\n")
    start(script, ACCELERATE_USE_CPU="true")
    two = rows_of(tmp_path / "two")
    assert len(two) == len(rows) == 16 + 3
    for row, expected in zip(two, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_processes_that_do_not_know_of_each_other_are_stopped(tmp_path, monkeypatch):
    # As under torchrun on CPUs, where accelerate has to be told: all would write to the same files.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, and accelerate sees 1.*ACCELERATE_USE_CPU=true"):
        run(tmp_path)
