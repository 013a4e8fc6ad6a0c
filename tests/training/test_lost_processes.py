"""A process that hangs or dies: the others end in time, name it, and leave a checkpoint to go on from."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from short_runs import TINY, run
from two_processes import run_in_two

from dpo_kernels.training import heartbeat, loop
from dpo_kernels.training.checkpoint import damage, list_checkpoints
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.heartbeat import WAITS, Heartbeat, described, of_group

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

settings, report = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
if os.environ["RANK"] == "1" and (process := os.fork()):  # what has started this one sees nothing of the other's end
    while not report.exists():
        time.sleep(0.1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
else:
    signal.alarm(100)
    from dpo_kernels.training import TrainConfig, heartbeat, loop, train

    heartbeat.GRACE = 1.0
    add_step, steps = loop.Window.add_step, []

    def in_the_third(self, *args):
        steps.append(time.monotonic())
        if len(steps) == 3 and os.environ["RANK"] == "1":
            time.sleep(1000) if sys.argv[3] == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        add_step(self, *args)

    loop.Window.add_step = in_the_third
    try:
        train(TrainConfig(**settings))
    except ConnectionError as error:
        assert type(error.__cause__) is not ConnectionError
        partial = report.with_suffix(".tmp")
        partial.write_text(json.dumps([str(error), time.monotonic() - steps[2]]))
        partial.rename(report)
"""

TIMEOUT = 4
STEPS = {"max_steps": 6, "save_steps": 2, "logging_steps": 6, "eval_fraction": 0, "ddp_timeout": TIMEOUT}
OF_TWO = {"per_device_batch_size": 2}


@pytest.mark.parametrize(("how", "sharding"), [("hangs", "fsdp2"), ("is killed", "none")])
def test_the_other_one_ends_and_names_it(tmp_path, how, sharding):
    script, file, report, directory = (tmp_path / name for name in ("script.py", "settings.json", "report.json", "run"))
    script.write_text(SCRIPT)
    settings = STEPS | {"sharding": sharding}
    file.write_text(json.dumps(TINY | settings | OF_TWO | {"output_dir": str(directory)}))
    run_in_two(script, file, report, how, ACCELERATE_USE_CPU="true")
    said, seconds = json.loads(report.read_text())
    assert said.startswith(
        "training stopped in step 4: process 1 of 2 was last seen in step 3, the others wait in step 4. The same "
        f"command goes on from {directory / 'checkpoint-2'}. ("
    )
    assert "gloo" in said
    if how == "hangs":
        assert "Timed out" in said and TIMEOUT - 0.5 < seconds < TIMEOUT + 8
    else:
        assert "Timed out" not in said  # it is seen at once
    (checkpoint,) = list_checkpoints(directory)
    assert checkpoint.name == "checkpoint-2" and damage(checkpoint) == ""
    if sharding == "fsdp2":  # in which one process goes on as well
        run(directory, **settings)
        assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-4", "checkpoint-6"]


def test_who_is_named():
    waits = (6, WAITS)
    assert described([waits, (5, "")]) == "process 1 of 2 was last seen in step 5, the others wait in step 6"
    found = [(6, ""), waits, (6, ""), (5, WAITS)]
    assert described(found) == (
        "process 0 of 4 was last seen in step 6, process 2 of 4 was last seen in step 6, "
        "the others wait in step 5 and 6"
    )
    assert described([waits, waits]) == "all processes wait for one another in step 6"
    assert described([waits, (5, WAITS)]) == "process 1 of 2 was last seen in step 5, the others wait in step 6"
    assert described([(0, WAITS), (1, WAITS), (0, "")]) == (
        "process 2 of 3 was last seen before the first step, the others wait before the first step and in step 1"
    )
    found = [waits, (6, "OutOfMemoryError: 8 GiB"), waits]
    assert described(found) == "process 1 of 3 failed in step 6: OutOfMemoryError: 8 GiB, the others wait in step 6"


def test_errors_of_collectives_are_told_from_others():
    assert of_group(RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out"))
    assert of_group(torch.distributed.DistBackendError("NCCL error")) and of_group(torch.distributed.DistNetworkError())
    assert not of_group(RuntimeError("shapes cannot be multiplied")) and not of_group(ValueError("gloo"))
    assert not of_group(torch.OutOfMemoryError("CUDA out of memory")) and not of_group(RuntimeError("gloomy"))


@pytest.fixture
def two(monkeypatch):
    """Heartbeats of two processes."""
    monkeypatch.setattr(heartbeat, "GRACE", 0.3)
    store = torch.distributed.HashStore()
    monkeypatch.setattr("torch.distributed.distributed_c10d._get_default_store", lambda: store)
    return [Heartbeat(SimpleNamespace(process_index=rank, num_processes=2)) for rank in range(2)]


def test_an_error_of_its_own_is_told_to_those_who_wait(two, tmp_path):
    for each in two:
        each.beat(3)
    with pytest.raises(ValueError, match="^no good$"), two[1].lost_ones_named(tmp_path):
        raise ValueError("no good")
    with pytest.raises(ConnectionError) as error, two[0].lost_ones_named(tmp_path):
        raise torch.distributed.DistBackendError("timed out")
    assert str(error.value) == (
        "training stopped in step 3: process 1 of 2 failed in step 3: ValueError: no good, the others wait in step 3. "
        "The same command starts afresh: there is no checkpoint yet. (DistBackendError: timed out)"
    )
    assert isinstance(error.value.__cause__, torch.distributed.DistBackendError)


@pytest.mark.parametrize(
    ("where", "when"),
    [("set_up", "before the first step"), ("RunState", "before the first step"), ("finish", "in step 1")],
)
def test_it_is_named_before_the_steps_and_after_them(two, tmp_path, monkeypatch, where, when):
    def in_vain(*args):
        raise torch.distributed.DistBackendError("timed out")

    monkeypatch.setattr(loop, "Heartbeat", lambda accelerator: two[0])
    monkeypatch.setattr(loop, where, in_vain)
    words = f"^training stopped {when}: process 1 of 2 was last seen before the first step, the others wait {when}. The"
    with pytest.raises(ConnectionError, match=words):
        run(tmp_path, max_steps=1, eval_fraction=0)


def test_without_the_store_it_says_so(two, tmp_path, monkeypatch):
    def lost(self, *args):
        raise torch.distributed.DistNetworkError("broken")

    monkeypatch.setattr(two[0], "store", SimpleNamespace(set=lambda *args: lost(*args)))
    words = r"process 0 of 2 is cut off from all others \(DistNetworkError: broken\)"
    with pytest.raises(ConnectionError, match=words), two[0].lost_ones_named(tmp_path):
        raise torch.distributed.DistBackendError("timed out")
    with pytest.raises(ValueError, match="^no good$"), two[0].lost_ones_named(tmp_path):
        raise ValueError("no good")


@pytest.mark.parametrize("seconds", [7, 600, 1800])
def test_the_timeout_is_that_of_the_process_group(tmp_path, seconds):
    """Those that are accelerate's own defaults, too."""
    from accelerate.utils import InitProcessGroupKwargs

    timeout = TrainConfig(ddp_timeout=seconds).timeout
    assert round(timeout.total_seconds(), 3) == seconds
    assert InitProcessGroupKwargs(timeout=timeout).to_kwargs() == {"timeout": timeout}


def test_settings():
    with pytest.raises(ValueError, match="ddp_timeout: expected at least 1, got 0"):
        TrainConfig(ddp_timeout=0)
