"""The loop with DeepSpeed's ZeRO-2 and ZeRO-3: two processes take the steps of one that has all weights."""

import gc
import json
import math
import os
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft", reason="trains adapters, and peft is not installed")
pytest.importorskip("deepspeed", reason="trains with DeepSpeed, which is not installed")

from sharded_runs import OF_TWO, RESUMED, SHORT, assert_close_runs, interrupted, settings_of, several
from short_runs import TINY, assert_same_run, run, weights_of
from transformers import AutoModelForCausalLM
from two_processes import run_in_two

from dpo_kernels.training import setup
from dpo_kernels.training.checkpoint import damage, list_checkpoints
from dpo_kernels.training.setup import Run
from dpo_kernels.training.state import RunState
from dpo_kernels.training.zero import Zero, as_before_deepspeed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

STAGES = ("zero2", "zero3")
ODD = {"model": "ODD"}
CASES = {
    "full": SHORT["full"] | {"weight_decay": 0.1, "max_grad_norm": 0},
    "adapters": SHORT["adapters"] | {"max_grad_norm": 0.1, "gradient_checkpointing": True},
    "tied": SHORT["tied"],
    "tied adapters": {"model": "TIED", "lora_r": 2, "reference": "copy"},
}
RUNS = [(case, stage) for case in CASES for stage in STAGES if (case, stage) != ("tied adapters", "zero2")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each case: the folders of one process without shards, and of two with a stage."""
    directory, of_two = tmp_path_factory.mktemp("zero"), []
    for case in CASES:
        settings = settings_of(directory, CASES[case])
        run(directory / case / "one", **settings)
        for stage in [stage for of, stage in RUNS if of == case]:
            place = {"output_dir": str(directory / case / stage), "cache_dir": str(directory / case / f"of {stage}")}
            of_two.append(settings | OF_TWO | {"sharding": stage} | place)
    several(directory, of_two)
    return directory


@pytest.mark.parametrize(("case", "stage"), RUNS)
def test_two_processes_take_the_steps_of_one(runs, case, stage):
    assert_close_runs(runs / case / "one", runs / case / stage)
    assert not list((runs / case / stage).glob(".*"))


@pytest.mark.parametrize("stage", STAGES)
def test_final_and_best_are_whole_models(runs, stage):
    for path in (runs / "full" / stage / "final", runs / "full" / stage / "best", runs / "tied" / stage / "final"):
        model, saved = AutoModelForCausalLM.from_pretrained(path), weights_of(path.parent)
        if path.name == "final":
            assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
        assert damage(path, None) == ""
    assert "lm_head.weight" not in saved  # which is the embedding matrix


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Of each stage a run of two processes that was not interrupted, and one that went on from its checkpoint at 4."""
    directory, settings = tmp_path_factory.mktemp("resumed"), []
    for stage in STAGES:
        straight, again = str(directory / stage), str(directory / f"{stage} again")
        settings += [{"sharding": stage, "output_dir": straight}]
        settings += [{"sharding": stage, "output_dir": again, "before": [straight, again]}]
    several(directory, [settings_of(directory, RESUMED | ODD) | OF_TWO | each for each in settings])
    return directory


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_processes_go_on_with_the_same_bits(resumed, stage):
    assert_same_run(resumed / f"{stage} again", resumed / stage)
    for path in list_checkpoints(resumed / f"{stage} again"):
        assert damage(path) == "" and len(list((path / "shards").glob("*.distcp"))) == 2
        assert not (path / "weights.safetensors").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_the_parts_of_two(resumed, tmp_path, stage):
    directory = interrupted(resumed / stage, tmp_path / "run")
    settings = settings_of(resumed, RESUMED | ODD) | {"sharding": stage}
    run(directory, **settings | {"per_device_batch_size": 2, "gradient_accumulation_steps": 2})
    assert_close_runs(resumed / stage, directory)


def test_a_run_in_shards_does_not_go_on_in_others(resumed, tmp_path):
    directory = interrupted(resumed / "zero3", tmp_path / "run")
    with pytest.raises(ValueError, match=r"sharding \(was 'zero3', is 'zero2'\)"):
        run(directory, **settings_of(resumed, RESUMED | ODD) | {"sharding": "zero2", "per_device_batch_size": 4})


def test_a_norm_that_is_not_finite_is_no_number():
    zero = object.__new__(Zero)
    zero.device = torch.device("cpu")
    for given, expected in ((-1.0, math.nan), (torch.tensor(-1.0), math.nan), (torch.tensor(2.5), 2.5)):
        zero.engine = SimpleNamespace(step=lambda: None, get_global_grad_norm=lambda given=given: given)
        assert zero.take_step().item() == pytest.approx(expected, nan_ok=True)


def test_a_rank_that_was_put_into_the_environment_goes_again(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with as_before_deepspeed():
        os.environ["LOCAL_RANK"] = "0"
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "1")
    with as_before_deepspeed():
        pass
    assert os.environ["LOCAL_RANK"] == "1"


ONE_STEP = {"max_steps": 1, "eval_fraction": 0}


def test_what_reduces_gradients_obeys_the_timeout(tmp_path, monkeypatch):
    found, close = [], Run.close

    def noted(self):
        group = self.sharded.engine.optimizer.dp_process_group
        found.append(group._get_backend(torch.device("cpu")).options._timeout)
        close(self)

    monkeypatch.setattr(Run, "close", noted)
    run(tmp_path, **ONE_STEP, sharding="zero2", ddp_timeout=7)
    assert found == [timedelta(seconds=7)]


def test_a_run_leaves_nothing_behind(tmp_path):
    """Neither a model with what trains it, 1.2 million numbers, nor DeepSpeed's function in the place of PyTorch's."""
    linear, live = torch.nn.functional.linear, []
    for name in ("first", "second"):
        run(tmp_path / name, **ONE_STEP, sharding="zero3", reference="copy")
        gc.collect()
        live.append(sum(each.numel() for each in gc.get_objects() if isinstance(each, torch.Tensor)))
        assert torch.nn.functional.linear is linear
    assert live[1] < live[0] + 1000


@pytest.mark.parametrize("where", ["set_up", "the steps"])
def test_a_run_that_failed_is_not_in_the_way_of_another(tmp_path, monkeypatch, where):
    def fails(*args):
        raise OSError("no good")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="^no good$"):
        patch.setattr(*((setup, "make_scheduler") if where == "set_up" else (RunState, "log")), fails)
        run(tmp_path / "failed", **ONE_STEP, sharding="zero2")
    assert where == "set_up" or not torch.distributed.is_initialized()
    for sharding in ("none", "zero2"):
        run(tmp_path / sharding, **ONE_STEP, sharding=sharding)


GATHERED = """
import json, os, sys
from collections import Counter
from pathlib import Path
import dpo_kernels.training.loop as loop
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator
from dpo_kernels.data.demo import demo_model
from dpo_kernels.training import TrainConfig, train
from dpo_kernels.training.sharding import from_all, local
from dpo_kernels.training.zero import Zero

gathered, steps, runs = Counter(), [], []

def counted(gather):  # of each weight how often it was gathered
    def gather_and_count(self, weights, *args, **kwargs):
        gathered.update(each.ds_id for each in weights if each.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        return gather(self, weights, *args, **kwargs)
    return gather_and_count

for where, name in ((Coordinator, "_PartitionedParameterCoordinator__all_gather_params_"), (Init, "_all_gather")):
    setattr(where, name, counted(getattr(where, name)))
add_step, set_up = loop.Window.add_step, loop.set_up

def after_step(self, *args):  # what it has gathered, and what it leaves
    policy, reference = runs[0].model, runs[0].reference.head.model
    for model in (policy, reference):
        for weight in model.parameters():
            assert weight.numel() == 0 and weight.grad is None and weight.ds_tensor.numel() <= weight.ds_numel // 2 + 1
    shards = [sum(sizes) for sizes in zip(*from_all([local(weight).numel() for weight in policy.parameters()]))]
    assert shards == [weight.ds_numel for weight in policy.parameters()]  # without padding
    found = []
    for model in (policy, reference):
        layer = model.model.layers[0].mlp.up_proj.weight
        found += [gathered[weight.ds_id] for weight in (model.lm_head.weight, layer)]
    if not steps:  # weights that differ between processes
        try:
            Zero(demo_model(300, seed=runs[0].accelerator.process_index), runs[0].accelerator, runs[0].config)
        except ValueError as error:
            assert "that differ, the first is model.embed_tokens.weight" in str(error), error
        else:
            raise AssertionError("not refused")
    steps.append(found)
    gathered.clear()
    return add_step(self, *args)

def kept(*args):
    runs.append(set_up(*args))
    gathered.clear()
    return runs[0]

loop.set_up, loop.Window.add_step = kept, after_step
loop.plot_training_curves = lambda metrics, picture: None
train(TrainConfig(**json.loads(Path(sys.argv[1]).read_text())))
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(steps))
"""


def test_the_head_is_gathered_once_for_forward_and_backward(tmp_path):
    """A layer once for each of both, and everything once for the reference. The run is started as `accelerate launch`
    starts what it is set up to shard."""
    settings = TINY | settings_of(tmp_path, ODD) | OF_TWO | {"max_steps": 2, "eval_fraction": 0}
    settings |= {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache"), "sharding": "none"}
    script, file, found = (tmp_path / name for name in ("script.py", "settings.json", "found.json"))
    script.write_text(GATHERED)
    file.write_text(json.dumps(settings))
    asked = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    run_in_two(script, file, found, ACCELERATE_USE_CPU="true", **asked)
    assert json.loads(found.read_text())[1:] == [[2 * 1, 2 * 2, 2 * 1, 2 * 1]]  # of two micro-batches
