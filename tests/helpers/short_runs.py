"""Training runs of a few seconds on the embedded demo, and what they leave behind."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dpo_kernels.training import loop
from dpo_kernels.training.checkpoint import read_metrics
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.loop import train
from dpo_kernels.training.state import WALL_CLOCK

# 27 pairs to train on and 3 held out; 4 pairs a step, so that the last of the 7 steps of an epoch has only 3.
TINY = {
    "model": "demo",
    "dataset": "demo",
    "max_rows": 30,
    "tokenizer": "train:300",
    "max_length": 256,
    "learning_rate": 1e-3,
    "per_device_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 0,
    "progress_bar": False,
}


def run(directory, *, curves=False, **settings):
    """Trains in `directory` and returns the result and the rows of metrics without what the clock says. Drawing the
    curves takes as long as the training."""
    config = TrainConfig(**TINY | {"output_dir": str(directory), "cache_dir": str(directory / "cache")} | settings)
    with pytest.MonkeyPatch.context() as patch:
        if not curves:
            patch.setattr(loop, "plot_training_curves", lambda metrics, picture: None)
        result = train(config)
    return result, rows_of(directory)


def rows_of(directory):
    rows = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in WALL_CLOCK} for row in rows]


def weights_of(directory):
    return load_file(next(directory.glob("final/*.safetensors")))


def assert_same_run(left, right):
    """To the last bit: weights, and the text of the metrics."""
    assert json.dumps(rows_of(left)) == json.dumps(rows_of(right))
    ours, theirs = weights_of(left), weights_of(right)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_close_weights(left, right, start, share=1e-4):
    """The weights of two runs, apart by less than that share of what the largest of them moved from `start`."""
    ours, theirs = weights_of(left), weights_of(right)
    moved = max((ours[name] - start[name]).abs().max() for name in ours)
    apart = max((ours[name] - theirs[name]).abs().max() for name in ours)
    assert apart < share * moved, (apart, moved)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
