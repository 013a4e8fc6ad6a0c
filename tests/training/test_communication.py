"""What processes hand to one another in a step is what `docs/scaling.md` says."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft", reason="trains adapters, and peft is not installed")

from short_runs import TINY
from two_processes import run_in_two

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

COUNTED = """
import json, os, sys
from pathlib import Path
import accelerate, torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import dpo_kernels.training.loop as loop
from dpo_kernels.training import TrainConfig, train

accelerate.Accelerator.end_training = lambda self: None
loop.plot_training_curves = lambda metrics, picture: None
counts, found, weights = {}, [], {}

def add(kind, tensor):
    counts[kind] = counts.get(kind, 0) + tensor.numel() * tensor.element_size()

def count(kind, single, into_tensor):
    name = single if hasattr(torch.distributed, single) else into_tensor
    call = getattr(torch.distributed, name)

    def counted(*args, **kwargs):  # the output and the input, one of which is whole
        add(kind, max(filter(torch.is_tensor, (*args, *kwargs.values())), key=torch.numel))
        return call(*args, **kwargs)

    setattr(torch.distributed, name, counted)

count("gathered", "all_gather_single", "all_gather_into_tensor")
count("reduced", "reduce_scatter_single", "reduce_scatter_tensor")

def of_ddp(state, bucket):
    add("all-reduced", bucket.buffer())
    return allreduce_hook(state, bucket)

set_up, add_step = loop.set_up, loop.Window.add_step

def kept(config):
    run = set_up(config)
    if not run.sharded:
        run.policy.register_comm_hook(None, of_ddp)
    weights.update({name: [each.numel(), each.requires_grad] for name, each in run.model.named_parameters()})
    counts.clear()
    return run

def of_step(self, *args):
    found.append(dict(counts))
    counts.clear()
    return add_step(self, *args)

loop.set_up, loop.Window.add_step = kept, of_step
of_runs = []
for settings in json.loads(Path(sys.argv[1]).read_text()):
    train(TrainConfig(**settings))
    of_runs.append([dict(weights), list(found)])
    weights.clear(), found.clear()
if os.environ["RANK"] == "0":
    Path(sys.argv[2]).write_text(json.dumps(of_runs))
"""

MICRO_BATCHES = 3
SETTINGS = TINY | {"per_device_batch_size": 1, "gradient_accumulation_steps": MICRO_BATCHES, "max_steps": 2}
SETTINGS |= {"eval_fraction": 0, "logging_steps": 9}
CASES = {
    "ddp": {},
    "ddp, adapters": {"lora_r": 2},
    "fsdp2": {"sharding": "fsdp2"},
    "fsdp2 in bf16": {"sharding": "fsdp2", "mixed_precision": "bf16"},
    "fsdp2, adapters": {"sharding": "fsdp2", "lora_r": 2},
}


def expected(case, weights):
    """Bytes of a step: a micro-batch gathers layers and embeddings twice and the rest once, all of them once more for
    the reference, and reduces gradients in fp32; DDP sums them once a step. The rest of a model without its adapters
    is the policy's, and there."""
    trained = 4 * sum(count for count, is_trained in weights.values() if is_trained)
    if "fsdp2" not in case:
        return {"all-reduced": trained}
    layers = sum(count for name, (count, _) in weights.items() if ".layers." in name) * (2 if "bf16" in case else 4)
    embeddings = 4 * sum(count for name, (count, _) in weights.items() if "embed_tokens" in name)
    rest = 4 * sum(count for name, (count, _) in weights.items() if ".layers." not in name and "embed" not in name)
    gathered = 3 * (layers + embeddings) + (rest if "adapters" in case else 2 * rest)
    return {"gathered": MICRO_BATCHES * gathered, "reduced": MICRO_BATCHES * trained}


def test_bytes_of_a_step(tmp_path):
    script, file, found = (tmp_path / name for name in ("script.py", "settings.json", "found.json"))
    script.write_text(COUNTED)
    runs = [SETTINGS | {"output_dir": str(tmp_path / name)} | given for name, given in CASES.items()]
    file.write_text(json.dumps(runs))
    run_in_two(script, file, found, ACCELERATE_USE_CPU="true")
    for case, (weights, steps) in zip(CASES, json.loads(found.read_text()), strict=True):
        assert steps == [expected(case, weights)] * 2, (case, steps, expected(case, weights))
