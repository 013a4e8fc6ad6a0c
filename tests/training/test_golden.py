"""Short training runs give the losses that they gave before: `golden.txt` beside this file.

    PYTHONPATH=tests/helpers python tests/training/test_golden.py > tests/training/golden.txt

writes them anew, which only a change that is meant to change numbers may do. A refactoring reproduces them to the last
digit on the machine that wrote them; another processor adds up in another order, hence the tolerance.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from two_processes import run_in_two

from dpo_kernels.training import loop
from dpo_kernels.training.checkpoint import read_metrics
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HERE = Path(__file__).resolve()
COLUMNS = ("loss", "grad_norm", "rewards/margins")
# 27 pairs to train on and 3 held out. A step takes 4 pairs, in micro-batches where that is said, and the last of the 7
# steps of an epoch 3.
COMMON = {
    "model": "demo",
    "dataset": "demo",
    "tokenizer": "train:300",
    "max_rows": 30,
    "max_length": 256,
    "max_steps": 8,
    "learning_rate": 1e-3,
    "per_device_batch_size": 4,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 0,
    "progress_bar": False,
}
HALVED = {"per_device_batch_size": 2, "gradient_accumulation_steps": 2}
RUNS = {
    "full": HALVED,
    # dropout draws by the shape of a batch
    "lora": {"lora_r": 4, "lora_dropout": 0.1, "learning_rate": 1e-2, "batching": "concatenated"},
    "precompute": {"reference": "precompute", "loss_type": "sigmoid,sft", "ld_alpha": 0.5} | HALVED,
    "simpo": {"loss_type": "simpo", "beta": 2.0, "schedule": "cosine"},
    # 30 pairs: in the eighth step there are two, one for each process; evaluation shares out 3 pairs unevenly.
    "two processes": {"per_device_batch_size": 1, "gradient_accumulation_steps": 2, "loss_type": "ipo"},
}


def run(name, directory):
    """What a run of the loop logs: rows of `COLUMNS`, and the held-out losses."""
    settings = {"output_dir": str(directory), "cache_dir": str(directory / "cache")}
    if name == "two processes" and "WORLD_SIZE" not in os.environ:
        run_in_two(HERE, name, directory, ACCELERATE_USE_CPU="true")
    else:
        train(TrainConfig(**COMMON | RUNS[name] | settings))
    return read_metrics(directory / "metrics.jsonl")


def run_trl(directory):
    """What TRL's trainer logs with this package's head, and a reference that is not the policy."""
    from trl_runs import dpo, prototype

    import dpo_kernels.trl

    _, logs = dpo(dpo_kernels.trl.DPOTrainer, directory, prototype("qwen2"), evaluate=True, max_steps=4)
    logs = [{name.replace("eval_", "eval/"): value for name, value in log.items()} for log in logs]
    rows = [log for log in logs if "loss" in log or "eval/loss" in log]
    return [row | {"step": min(number, 4)} for number, row in enumerate(rows, 1)]


def lines(name, rows):
    for row in rows:
        prefix = "eval/" if "eval/loss" in row else ""
        values = [f"{column}={row[prefix + column]!r}" for column in COLUMNS if prefix + column in row]
        yield f"{name}, step {row['step']}{', held out' * bool(prefix)}: {' '.join(values)}"


def check(name, rows):
    golden = [line for line in HERE.with_name("golden.txt").read_text().splitlines() if line.startswith(f"{name}, ")]
    mine = list(lines(name, rows))
    assert len(golden) == len(mine) > 4
    for expected, line in zip(golden, mine, strict=True):
        assert parsed(line) == parsed(expected), f"{line}, expected {expected}"


def parsed(line):
    label, _, values = line.partition(": ")
    numbers = dict(value.split("=") for value in values.split())
    return label, {column: pytest.approx(float(value), rel=2e-4, abs=2e-6) for column, value in numbers.items()}


@pytest.mark.parametrize("name", RUNS)
def test_losses_of_the_loop(tmp_path, name, monkeypatch):
    monkeypatch.setattr(loop, "plot_training_curves", lambda metrics, picture: None)  # takes as long as the rest
    check(name, run(name, tmp_path))


@pytest.mark.usefixtures("process_left_as_it_was")
def test_losses_of_trl_with_our_head(tmp_path):
    pytest.importorskip("trl", reason="trains with TRL, which is not installed")
    check("trl", run_trl(tmp_path))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1], Path(sys.argv[2]))
    else:
        for case in [*RUNS, "trl"]:
            with tempfile.TemporaryDirectory() as folder:
                with contextlib.redirect_stdout(sys.stderr):
                    rows = run_trl(Path(folder)) if case == "trl" else run(case, Path(folder))
                print(*lines(case, rows), sep="\n")
