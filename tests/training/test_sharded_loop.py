"""The loop on weights in shards: two processes, and four, take the steps of one that has all weights."""

import importlib.util
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft", reason="trains adapters, and peft is not installed")

import sharded_runs
from safetensors.torch import load_file
from sharded_runs import OF_TWO, RESUMED, SHORT, assert_close_runs, interrupted, settings_of, several
from short_runs import TINY, assert_same_run, run, weights_of
from transformers import AutoModelForCausalLM
from two_processes import run_in_two

from dpo_kernels.data.demo import demo_model
from dpo_kernels.training.checkpoint import damage, find_checkpoint, list_checkpoints
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import load_model
from dpo_kernels.training.setup import free_of_processes

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LONG = {
    "tokens": {"max_tokens_per_batch": 700, "gradient_accumulation_steps": 2, "batching": "packed_shared_prefix"},
    # of less data Adam makes noise that is as large as the tolerance
    "padded": {"batching": "concatenated", "loss_type": "simpo", "beta": 2.0, "max_rows": 32, "max_steps": 9},
    "tied adapters": {"model": "TIED", "lora_r": 2, "reference": "copy"},
    "loaded reference": {"model": "TIED", "reference": "LOADED"},
    "bf16": {"mixed_precision": "bf16"},
    "bf16 and LayerNorm": {"mixed_precision": "bf16", "model": "GPT2"},
    "bf16 adapters": {"dtype": "bfloat16", "lora_r": 2, "reference": "precompute"},
}
BF16 = {"rel": 0.01, "abs": 0.01}


def compared(directory, cases):
    """Of each case: the folders of one process and of two."""
    runs = []
    for case in cases:
        settings = settings_of(directory, (SHORT | LONG)[case])
        run(directory / case / "one", **settings)
        settings |= OF_TWO
        if "max_tokens_per_batch" in settings:  # each of them takes one of the two
            settings |= {"per_device_batch_size": 4, "gradient_accumulation_steps": 1}
        place = {"output_dir": str(directory / case / "two"), "cache_dir": str(directory / case / "cache")}
        runs.append(settings | place)
    several(directory, runs)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sharded")
    compared(directory, SHORT)
    return directory


@pytest.mark.parametrize("case", SHORT)
def test_two_processes_take_the_steps_of_one(short, case):
    assert_close_runs(short / case / "one", short / case / "two")
    assert not list((short / case / "two").glob(".*"))


@pytest.mark.full
@pytest.mark.parametrize("case", LONG)
def test_with_everything_else(tmp_path, case):
    compared(tmp_path, [case])
    assert_close_runs(tmp_path / case / "one", tmp_path / case / "two", **(BF16 if "bf16" in case else {}))


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run of two processes that was not interrupted, and one that went on from its checkpoint at step 4."""
    directory = tmp_path_factory.mktemp("resumed")
    straight, again = str(directory / "straight"), str(directory / "again")
    runs = [{"output_dir": straight}, {"output_dir": again, "before": [straight, again]}]
    runs.append({"output_dir": str(directory / "adapters"), "lora_r": 2})
    runs = [RESUMED | OF_TWO | settings for settings in runs]
    several(directory, runs)
    return directory


def test_the_same_processes_go_on_with_the_same_bits(resumed):
    assert_same_run(resumed / "again", resumed / "straight")
    assert [path.name for path in list_checkpoints(resumed / "again")] == ["checkpoint-4", "checkpoint-6"]
    for path in list_checkpoints(resumed / "again"):
        assert damage(path) == "" and len(list((path / "shards").glob("*.distcp"))) == 2
        assert not (path / "weights.safetensors").exists()
    assert not list((resumed / "again").glob(".*"))


@pytest.mark.parametrize("which", ["straight", "adapters"])
def test_one_process_goes_on_from_the_shards_of_two(resumed, tmp_path, which):
    lora = {"lora_r": 2} if which == "adapters" else {}
    directory = interrupted(resumed / which, tmp_path / "run")
    settings = RESUMED | lora | {"sharding": "fsdp2", "per_device_batch_size": 2, "gradient_accumulation_steps": 2}
    run(directory, **settings)
    assert_close_runs(resumed / which, directory)
    before = weights_of(directory)
    run(directory, **settings)  # which finds it finished
    assert_close_runs(resumed / which, directory)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(directory).items())


@pytest.mark.full
def test_four_processes_go_on_from_the_shards_of_two(resumed, tmp_path):
    directory = interrupted(resumed / "straight", tmp_path / "run")
    settings = RESUMED | {"sharding": "fsdp2", "per_device_batch_size": 1, "output_dir": str(directory)}
    several(tmp_path, [settings], processes=4)
    assert_close_runs(resumed / "straight", directory)


def test_what_does_not_go_on_along_the_trajectory_is_refused(resumed, tmp_path):
    directory = interrupted(resumed / "straight", tmp_path / "run")
    with pytest.raises(ValueError, match=r"the pairs of a step \(was 4, is 2\)"):
        run(directory, **RESUMED | {"sharding": "fsdp2", "per_device_batch_size": 2})
    with pytest.raises(ValueError, match=r"sharding \(was 'fsdp2', is 'none'\)"):
        run(directory, **RESUMED)
    with pytest.raises(ValueError, match=r"learning_rate \(was 0.0005, is 0.001\)"):
        run(directory, **RESUMED | {"sharding": "fsdp2", "learning_rate": 1e-3})


@pytest.mark.parametrize(
    "bound", [{"lora_r": 2, "lora_dropout": 0.1}, {"disable_dropout": False}, {"loss_type": "aot"}]
)
def test_what_depends_on_processes_is_bound_to_them(bound):
    identity = {"per_device_batch_size": 2, "gradient_accumulation_steps": 3, "the number of processes": 4}
    model = demo_model(300)
    assert free_of_processes(identity, TrainConfig(**bound), model) == identity
    assert free_of_processes(identity, TrainConfig(per_device_batch_size=2, gradient_accumulation_steps=3), model) == {
        "the pairs of a step": 24
    }
    by_tokens = TrainConfig(max_tokens_per_batch=512, gradient_accumulation_steps=3)
    assert free_of_processes(identity, by_tokens, model) == {
        "per_device_batch_size": 2,
        "the micro-batches of a step": 12,
    }


def test_the_loss_of_a_router_is_bound_to_its_batches(tmp_path):
    settings = {"model_type": "mixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "model.json").write_text(json.dumps(settings | {"vocab_size": 300, "num_key_value_heads": 2}))
    model = load_model(
        TrainConfig(), f"config:{tmp_path / 'model.json'}", SimpleNamespace(eos_token_id=0, bos_token_id=0)
    )
    identity = {"the number of processes": 4}
    assert free_of_processes(identity, TrainConfig(), model) == identity


@pytest.mark.parametrize("harmed", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_the_checkpoint_before_one_with_damaged_shards_is_taken(resumed, tmp_path, harmed):
    directory = tmp_path / "run"
    shutil.copytree(resumed / "straight", directory)
    file = directory / "checkpoint-6" / "shards" / harmed
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=f"checkpoint-6 is not whole: shards/{harmed} is damaged"):
        assert find_checkpoint(directory, "auto") == directory / "checkpoint-4"
    file.unlink()
    with pytest.warns(UserWarning, match=f"checkpoint-6 is not whole: shards/{harmed} is missing"):
        assert find_checkpoint(directory, "auto") == directory / "checkpoint-4"


KILLED = """
import os, signal
import dpo_kernels.training.state as state
save_shards, calls = state.save_shards, []

def killed_in_the_second(folder, *args):
    calls.append(folder)
    if len(calls) == 2 and os.environ["RANK"] == "1":
        (folder / "__1_0.distcp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save_shards(folder, *args)

state.save_shards = killed_in_the_second
"""


def test_a_process_killed_in_a_checkpoint_leaves_the_one_before(resumed, tmp_path, monkeypatch):
    settings = RESUMED | OF_TWO | {"output_dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="exit status"):
        patch.setattr(sharded_runs, "SCRIPT", KILLED + sharded_runs.SCRIPT)
        several(tmp_path, [settings])
    assert (tmp_path / "run" / ".checkpoint-4.shards.tmp" / "__1_0.distcp").read_bytes() == b"half"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    several(tmp_path, [settings])
    assert_same_run(tmp_path / "run", resumed / "straight")
    assert not list((tmp_path / "run").glob(".*"))


DIFFERENT = """
import os
from accelerate import Accelerator
from dpo_kernels.data.demo import demo_model
from dpo_kernels.training.sharding import Sharded

accelerator = Accelerator()
try:
    Sharded(demo_model(300, seed=accelerator.process_index), accelerator)
except ValueError as error:
    assert "that differ, the first is model.embed_tokens.weight" in str(error), error
else:
    raise AssertionError("not refused")
"""


def test_weights_that_differ_between_processes_are_refused(tmp_path):
    (tmp_path / "script.py").write_text(DIFFERENT)
    run_in_two(tmp_path / "script.py", ACCELERATE_USE_CPU="true")


def test_final_and_best_are_whole_models(short, resumed):
    for path in (short / "full" / "two" / "final", short / "full" / "two" / "best", short / "tied" / "two" / "final"):
        model = AutoModelForCausalLM.from_pretrained(path)
        saved = load_file(path / "model.safetensors")
        assert saved and all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
        assert damage(path, None) == ""
    assert "lm_head.weight" not in saved  # which is the embedding matrix

    from peft import AutoPeftModelForCausalLM

    path = resumed / "adapters" / "final"
    loaded = dict(AutoPeftModelForCausalLM.from_pretrained(path).named_parameters())
    saved = load_file(path / "adapter_model.safetensors")
    assert saved and any(weight.abs().max() > 0 for name, weight in saved.items() if "lora_B" in name)
    names = {name.replace(".weight", ".default.weight"): weight for name, weight in saved.items()}
    assert all(torch.equal(loaded[name], weight) for name, weight in names.items())


def test_settings_that_do_not_go_with_it():
    with pytest.raises(ValueError, match="mixed_precision: expected bf16 or no beside sharding 'fsdp2', got 'fp16'"):
        TrainConfig(sharding="fsdp2", mixed_precision="fp16")
    with pytest.raises(ValueError, match="sharding: expected one of .*fsdp2"):
        TrainConfig(sharding="zero1")
    with pytest.raises(
        ValueError, match="dtype: expected float32 beside sharding 'zero3' without LoRA, got 'bfloat16'"
    ):
        TrainConfig(sharding="zero3", dtype="bfloat16")


def test_deepspeed_is_asked_for_where_it_is_not(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "deepspeed" else find(name))
    with pytest.raises(ImportError, match="sharding: 'zero2' needs DeepSpeed, which is missing: pip install d"):
        run(tmp_path, sharding="zero2")


def test_a_model_without_layers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.models.qwen2.modeling_qwen2.Qwen2PreTrainedModel._no_split_modules", None)
    with pytest.raises(ValueError, match="sharding: fsdp2 gathers a model layer by layer, and Qwen2ForCausalLM names"):
        run(tmp_path, sharding="fsdp2", max_steps=1)


GATHERED = """
import json, os, sys
from pathlib import Path
import accelerate, torch
import dpo_kernels.training.loop as loop
from torch.distributed.tensor import DTensor
from dpo_kernels.training import TrainConfig, train

sizes, steps = [], []
name = "all_gather_single" if hasattr(torch.distributed, "all_gather_single") else "all_gather_into_tensor"
gather = getattr(torch.distributed, name)

def counted(output, *args, **kwargs):
    sizes.append(output.numel() * output.element_size())
    return gather(output, *args, **kwargs)

setattr(torch.distributed, name, counted)
take_step = loop.Run.take_step

def noted(self):  # what a step has gathered, and what it leaves
    steps.append(list(sizes))
    sizes.clear()
    weights = list(runs[0].model.parameters())
    assert all(isinstance(weight, DTensor) and isinstance(weight.grad, DTensor) for weight in weights)
    held = sum(weight.to_local().numel() + weight.grad.to_local().numel() for weight in weights)
    assert held <= 1.01 * sum(weight.numel() for weight in weights), held
    return take_step(self)

def kept(*args):
    runs.append(set_up(*args))
    return runs[0]

runs, set_up, loop.set_up, loop.Run.take_step = [], loop.set_up, kept, noted
loop.plot_training_curves = lambda metrics, picture: None
train(TrainConfig(**json.loads(Path(sys.argv[1]).read_text())))
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(steps))
"""


@pytest.mark.parametrize(
    "given",
    [{}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}],
    ids=["as accelerate is set up", "checkpointing", "bf16"],
)
def test_the_head_is_gathered_once_for_forward_and_backward(tmp_path, given):
    """Layers and embeddings once for each of both, and everything once for the reference; layers in bf16 where they are
    computed in that."""
    settings = TINY | OF_TWO | {"max_steps": 2, "eval_fraction": 0, "gradient_accumulation_steps": 1}
    settings |= {"output_dir": str(tmp_path / "run"), **given}
    environment = {"ACCELERATE_USE_CPU": "true"}
    if not given:  # as `accelerate launch` starts what it is set up to shard
        del settings["sharding"]
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    script, file, found = (tmp_path / name for name in ("script.py", "settings.json", "found.json"))
    script.write_text(GATHERED)
    file.write_text(json.dumps(settings))
    run_in_two(script, file, found, **environment)
    weights = weights_of(tmp_path / "run")
    parts = {"layer": 0, "embeddings": 4 * weights["model.embed_tokens.weight"].numel(), "root": 0}  # bytes
    of_layers = 2 if given.get("mixed_precision") == "bf16" else 4
    for name, weight in weights.items():
        if "layers.0." in name:
            parts["layer"] += of_layers * weight.numel()
        elif "layers" not in name and "embed" not in name:
            parts["root"] += 4 * weight.numel()
    for step in json.loads(found.read_text()):
        counts = {name: step.count(size) for name, size in parts.items()}
        assert counts == {"layer": 2 * 2 + 2, "embeddings": 2 + 1, "root": 1 + 1}, (step, parts)
