"""Checkpoints that are written while training goes on are those of the step at which they were begun."""

import json
import threading
import time
from datetime import timedelta

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from short_runs import TINY, assert_same_run, run
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._pytree import tree_leaves
from two_processes import run_in_two

from dpo_kernels.training import state
from dpo_kernels.training.checkpoint import STATE, damage, list_checkpoints, read_progress
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.saving import Saving
from dpo_kernels.training.sharding import group_for_saving

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# A window of 3 steps straddles the checkpoints at 2 and 4.
SETTINGS = TINY | {"max_rows": 27, "max_steps": 6, "save_steps": 2, "logging_steps": 3, "eval_steps": 3}
SETTINGS |= {"sharding": "fsdp2", "learning_rate": 5e-4}
OF_TWO = {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}

WRITTEN_LATE = """
import json, os, signal, shutil, sys, threading, time
from pathlib import Path
import accelerate
from torch.distributed.checkpoint import FileSystemWriter
from dpo_kernels.training import TrainConfig, loop, train

accelerate.Accelerator.end_training = lambda self: None
loop.plot_training_curves = lambda metrics, picture: None
add_step, write_data, steps, overtaken = loop.Window.add_step, FileSystemWriter.write_data, [], []
killed_in = int(sys.argv[2])

def counted(self, *args):
    steps.append(1)
    if len(steps) == killed_in and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    add_step(self, *args)

def late(self, *args):
    if threading.current_thread() is not threading.main_thread():
        now = len(steps)
        if now in (12, 14):  # the last of a run
            time.sleep(1)
        else:
            while len(steps) == now or killed_in - 3 < now < killed_in:
                time.sleep(0.01)
        overtaken.append(len(steps) > now)
    return write_data(self, *args)

loop.Window.add_step, FileSystemWriter.write_data = counted, late
*runs, last = json.loads(Path(sys.argv[1]).read_text())
for settings in runs:
    train(TrainConfig(**settings))
if os.environ["RANK"] == "0":
    whole, again = Path(runs[-1]["output_dir"]), Path(last["output_dir"])
    shutil.copytree(whole, again)
    for later in ("final", "checkpoint-6"):
        shutil.rmtree(again / later)
accelerate.PartialState().wait_for_everyone()
train(TrainConfig(**last))
assert overtaken == [True, True, False, False], overtaken  # the last checkpoint of a run is waited for
"""


def two(directory, killed_in, runs):
    (directory / "script.py").write_text(WRITTEN_LATE)
    (directory / "runs.json").write_text(json.dumps([SETTINGS | OF_TWO | settings for settings in runs]))
    run_in_two(directory / "script.py", directory / "runs.json", killed_in, ACCELERATE_USE_CPU="true")


def test_two_processes_go_on_from_them_with_the_same_bits(tmp_path):
    names = ("waiting", "meanwhile", "again")
    runs = [{"output_dir": str(tmp_path / name), "async_checkpoints": name != "waiting"} for name in names]
    two(tmp_path, 0, runs)
    for name in names[1:]:
        assert_same_run(tmp_path / name, tmp_path / "waiting")
        assert [path.name for path in list_checkpoints(tmp_path / name)] == ["checkpoint-4", "checkpoint-6"]
        assert [damage(path) for path in list_checkpoints(tmp_path / name)] == ["", ""]
        assert not list((tmp_path / name).glob(".*"))


def test_a_process_killed_meanwhile_leaves_the_checkpoint_before(tmp_path):
    """Which is complete, though the third step had begun when it was."""
    directory = tmp_path / "run"
    with pytest.raises(AssertionError, match="exit status"):
        two(tmp_path, 6, [{"output_dir": str(directory), "async_checkpoints": True}, {}])
    (checkpoint,) = list_checkpoints(directory)
    assert checkpoint.name == "checkpoint-2" and damage(checkpoint) == ""
    assert (directory / ".checkpoint-4.shards.tmp").is_dir()
    run(directory, **SETTINGS)
    assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-4", "checkpoint-6"]
    assert not list(directory.glob(".*"))


def contents(checkpoint, scratch):
    dcp_to_torch_save(checkpoint / "shards", scratch)
    progress = read_progress(checkpoint)
    del progress["window"]["seconds"]
    return tree_leaves([torch.load(scratch), torch.load(checkpoint / STATE), progress])


def test_what_changes_while_they_are_written_is_as_it_was(tmp_path, monkeypatch):
    write_data, add_step, steps = FileSystemWriter.write_data, state.Window.add_step, []

    def counted(self, *args):
        steps.append(1)
        add_step(self, *args)

    def late(self, *args):
        if threading.current_thread() is not threading.main_thread() and len(steps) < 12:
            now, until = len(steps), time.monotonic() + 30
            while len(steps) == now and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.05)  # the optimizer's step, and the scheduler's
        return write_data(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", late)
    monkeypatch.setattr(state.Window, "add_step", counted)
    for name in ("waiting", "meanwhile"):
        run(tmp_path / name, **SETTINGS | {"async_checkpoints": name == "meanwhile", "save_total_limit": None})
    assert_same_run(tmp_path / "meanwhile", tmp_path / "waiting")
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        waiting, meanwhile = (contents(tmp_path / each / name, tmp_path / "file") for each in ("waiting", "meanwhile"))
        assert len(waiting) == len(meanwhile) > 100
        for ours, expected in zip(meanwhile, waiting, strict=True):
            assert torch.equal(ours, expected) if isinstance(ours, torch.Tensor) else ours == expected


@pytest.mark.parametrize("what", ["shards", "the rest"])
def test_one_that_could_not_be_written_is_an_error(tmp_path, monkeypatch, what):
    """At the first step after it was known."""
    write_data, save_checkpoint, add_step = FileSystemWriter.write_data, state.save_checkpoint, state.Window.add_step
    steps = []

    def slow(self, *args):
        steps.append(1)
        time.sleep(len(steps) == 5)
        add_step(self, *args)

    def full(self, *args):
        if "checkpoint-4" in str(self.path):
            raise OSError("no space left")
        return write_data(self, *args)

    def full_later(*args):
        if (tmp_path / ".checkpoint-4.shards.tmp").exists():
            raise OSError("no space left")
        return save_checkpoint(*args)

    if what == "shards":
        monkeypatch.setattr(FileSystemWriter, "write_data", full)
    else:
        monkeypatch.setattr(state, "save_checkpoint", full_later)
    monkeypatch.setattr(state.Window, "add_step", slow)
    words = f"the checkpoint of step 4 was not written: {'process 0: ' * (what == 'shards')}OSError: no space left"
    with pytest.raises(OSError, match=words):
        run(tmp_path, **SETTINGS | {"async_checkpoints": True})
    assert len(steps) == 5
    (checkpoint,) = list_checkpoints(tmp_path)
    assert checkpoint.name == "checkpoint-2" and damage(checkpoint) == ""


def full(self, *args):
    raise OSError("no space left")


def test_an_error_of_training_does_not_hide_it(tmp_path, monkeypatch, caplog):
    begun = []

    def kept(*args):
        begun.append(Saving(*args))
        return begun[-1]

    def fails(self, *args):
        if begun:
            assert begun[0].done.exception()
            raise ValueError("of its own")

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    monkeypatch.setattr(state, "Saving", kept)
    monkeypatch.setattr(state.Window, "add_step", fails)
    with pytest.raises(ValueError, match="^of its own$"):
        run(tmp_path, **SETTINGS | {"async_checkpoints": True, "logging_steps": 6, "eval_fraction": 0})
    assert "the checkpoint of step 2 was not written: process 0: OSError: no space left" in caplog.text
    assert not torch.distributed.is_initialized()


def test_one_that_is_waited_for_fails_alike(tmp_path, monkeypatch):
    """PyTorch's own error is no Exception, which nothing that handles errors would see."""
    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        words = "^the checkpoint of step 2 was not written: process 0: OSError: no space left$"
        with pytest.raises(OSError, match=words):
            run(tmp_path / "full", **SETTINGS | {"eval_fraction": 0})
    run(tmp_path / "run", **SETTINGS | {"eval_fraction": 0, "max_steps": 2})
    monkeypatch.setattr(FileSystemReader, "read_data", full)
    words = f"^{tmp_path / 'run' / 'checkpoint-2'} could not be read: process 0: OSError: no space left$"
    with pytest.raises(OSError, match=words):
        run(tmp_path / "run", **SETTINGS | {"eval_fraction": 0, "max_steps": 2})


def test_without_gloo_they_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(ValueError, match="async_checkpoints: expected a PyTorch with gloo"):
        group_for_saving(timedelta(seconds=1))


def test_without_shards_there_are_none():
    with pytest.raises(
        ValueError, match="async_checkpoints: has an effect only with sharding fsdp2 .*, got True without"
    ):
        TrainConfig(async_checkpoints=True)
