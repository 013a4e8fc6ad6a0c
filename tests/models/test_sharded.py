"""Models that are sharded over two processes: the fused head's gradients against those of the model's own logits, in
the same shards, and TRL's trainer with its head and with ours."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("peft", reason="trains adapters, and peft is not installed")

from two_processes import run_in_two

COMMON = """
import copy, json, os, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from heads import build
from dpo_kernels.models.fused_forward import Preference, Reference, add_fused_lm_head
from dpo_kernels.models.head import LMHead, unwrap

torch.set_num_threads(1)
ADAPTERS = {
    "full": None,
    "attention": {"target_modules": ["q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [1, 8, 40]}},
}

def made(name, adapter, **config):
    model = build(name, **config)
    if ADAPTERS[adapter] is not None:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[adapter]))
    return model

def loss_of(model, kind, labels, ref_logps):
    if kind == "fused loss":
        preference = Preference(ref_logps, beta=0.1)
        return model(input_ids=labels, labels=labels, fused_lm_head=True, preference=preference).preference.loss
    if kind == "fused log-probabilities":
        logps = model(input_ids=labels, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    else:
        logits = model(input_ids=labels).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1).sum(-1)
    chosen, rejected = (logps - ref_logps).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

def expected_of(model):
    # the same of a model without shards, of which all processes have the mean
    loss = loss_of(model, "eager", labels, ref_logps)
    loss.backward()
    gradients = {name: w.grad for name, w in model.named_parameters() if w.grad is not None}
    for gradient in gradients.values():
        dist.all_reduce(gradient.div_(dist.get_world_size()))
    return loss.item(), gradients

def assert_same(found, expected, case):
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    assert abs(loss - expected_loss) <= 1e-5 * abs(expected_loss), (case, loss, expected_loss)
    assert gradients.keys() == expected_gradients.keys() and gradients, (case, gradients.keys())
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        assert float((gradients[name] - gradient).abs().max()) <= 2e-5 * largest, (case, name)
"""

FSDP2 = """
from peft.tuners.lora import layer as lora
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from dpo_kernels.models.operands import class_of

dist.init_process_group("gloo")
labels = torch.randint(3, 95, (4, 6), generator=torch.Generator().manual_seed(dist.get_rank()))
ref_logps = torch.tensor([-20.3, -17.1, -22.2, -19.4])

def sharded(model, group, **options):
    causal = unwrap(model)
    for block in causal.model.layers:
        fully_shard(block, **options)
    tied = causal.lm_head.weight is causal.model.embed_tokens.weight
    tail = [causal.model.norm, *([causal.model.embed_tokens] if tied else []), causal.lm_head]
    if group == "tail":  # as accelerate does
        fully_shard(tail, reshard_after_forward=False, **options)
    elif group == "head":
        fully_shard(tail[1:] if tied else causal.lm_head, **options)
    return fully_shard(model, **options)

def step(model, kind):
    for number in range(2):
        loss = loss_of(model, kind, labels, ref_logps)
        loss.backward()
        if number == 0:
            model.zero_grad()
            with torch.no_grad():
                loss_of(model, kind, labels, ref_logps)
    return loss.item(), {name: w.grad.full_tensor() for name, w in model.named_parameters() if w.grad is not None}

KINDS = ("fused loss", "fused log-probabilities")
for number, (name, adapter) in enumerate((("gemma2", "full"), *(("llama", each) for each in ADAPTERS))):
    expected = expected_of(made(name, adapter))
    for at, group in enumerate(("tail", "head", "root")):
        for kind in KINDS if adapter == "full" else [KINDS[(number + at) % 2]]:
            model = made(name, adapter)
            add_fused_lm_head(unwrap(model))
            assert_same(step(sharded(model, group), kind), expected, (name, adapter, group, kind))
            if adapter == "head":  # and is not taken for an adapter of another kind
                assert class_of(unwrap(model).lm_head) is lora.Linear

# What is not cast: the reference on its way in, and the results on their way out.
model = made("llama", "full")
add_fused_lm_head(model)
sharded(model, "tail", mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16))
def given(ref_logps):
    preference = Preference(ref_logps, beta=1.0, loss_type="ipo")
    return model(input_ids=labels, labels=labels, fused_lm_head=True, preference=preference).preference
moved = given(ref_logps).chosen_rewards - given(torch.zeros(4)).chosen_rewards
torch.testing.assert_close(moved, -ref_logps[:2], atol=1e-5, rtol=0)
found = given(ref_logps)
assert found.loss == found.losses.mean() and found.loss != found.loss.bfloat16(), found.loss
found.loss.backward()
assert model.lm_head.weight.grad is not None
"""

ZERO3 = """
os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
from deepspeed.utils import safe_get_full_grad

deepspeed.init_distributed("gloo")
labels = torch.randint(3, 95, (4, 6), generator=torch.Generator().manual_seed(dist.get_rank()))
ref_logps = torch.tensor([-20.3, -17.1, -22.2, -19.4])
# Nothing is kept gathered because it is small, as nothing would be in a model of a real size.
zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}

def step(model, kind):
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config={**config, "zero_force_ds_cpu_optimizer": False}
    )
    for number in range(2):
        loss = loss_of(engine, kind, labels, ref_logps)
        engine.backward(loss)
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        gradients = {name: safe_get_full_grad(weight) for name, weight in trained}
        engine.step()
        with torch.no_grad():
            loss_of(engine, kind, labels, ref_logps)
    return loss.item(), gradients

for name, adapter, kind in (
    ("llama", "full", "fused loss"), ("llama", "full", "fused log-probabilities"), ("gemma2", "full", "fused loss"),
    ("llama", "attention", "fused loss"), ("llama", "head", "fused log-probabilities"),
):
    expected = expected_of(made(name, adapter, num_hidden_layers=1))
    model = made(name, adapter, num_hidden_layers=1)
    add_fused_lm_head(unwrap(model))
    assert_same(step(model, kind), expected, (name, adapter, kind))
"""

TENSOR_PARALLEL = """
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

directory = sys.argv[1] + "/model"
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    build("phi", vocab_size=128, num_key_value_heads=4).save_pretrained(directory)
dist.barrier()
labels = torch.randint(3, 95, (4, 6), generator=torch.Generator().manual_seed(0))  # the same in all processes
ref_logps = torch.tensor([-20.3, -17.1, -22.2, -19.4])

gathered = []
full_tensor = DTensor.full_tensor
DTensor.full_tensor = lambda self, **options: gathered.append(self.shape) or full_tensor(self, **options)

def step(kind):
    model = AutoModelForCausalLM.from_pretrained(directory, distributed_config=DistributedConfig(tp_plan="auto"))
    assert isinstance(model.lm_head.weight, DTensor), "it is not sharded"
    if kind != "eager":
        add_fused_lm_head(model)
        with torch.no_grad():
            asked = {"input_ids": labels, "labels": labels, "fused_lm_head": True}
            found = model(**asked, all_mean_logits=True)  # and the head is checked, for which it is gathered
            logits = model(input_ids=labels).logits
            gathered.clear()
            reference = model(**asked, reference=Reference(("hidden", "weight", "bias"), {}))
            itself = model(**asked, preference=Preference(reference.logps)).preference
        assert torch.allclose(found.all_mean_logits, logits.mean(-1), atol=1e-5), "means over the vocabulary"
        assert torch.allclose(itself.chosen_rewards, torch.zeros(2), atol=1e-5), itself.chosen_rewards
    gathered.clear()
    loss = loss_of(model, kind, labels, ref_logps)
    loss.backward()
    assert not gathered, gathered
    whole = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return loss.item(), {name: whole(w.grad) for name, w in model.named_parameters() if w.grad is not None}

expected = step("eager")
for kind in ("fused loss", "fused log-probabilities"):
    assert_same(step(kind), expected, kind)
"""

TWO_DIMENSIONS = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
labels = torch.randint(3, 95, (4, 6), generator=torch.Generator().manual_seed(mesh.get_local_rank("data")))
ref_logps = torch.tensor([-20.3, -17.1, -22.2, -19.4])

gathered = []
full_tensor = DTensor.full_tensor
DTensor.full_tensor = lambda self, **options: gathered.append(self.shape) or full_tensor(self, **options)

def step(kind):
    model = build("llama")
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    if kind != "eager":
        add_fused_lm_head(model)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    weight = model.lm_head.weight
    assert weight.device_mesh.ndim == 2 and 3 * len(weight.to_local()) < len(weight), weight.placements
    if kind != "eager":
        with torch.no_grad():  # the head is checked, for which it is gathered from those that share its vocabulary
            model(input_ids=labels, labels=labels, fused_lm_head=True)
    gathered.clear()
    loss = loss_of(model, kind, labels, ref_logps)
    loss.backward()
    assert not gathered, gathered
    return loss.item(), {name: w.grad.full_tensor() for name, w in model.named_parameters()}

expected = step("eager")
for kind in ("fused loss", "fused log-probabilities"):
    assert_same(step(kind), expected, kind)

# Without FSDP2, and by the head's own functions.
def by_the_head(parallel):
    model = build("llama")
    if parallel:
        parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    head = LMHead.from_model(model)  # and is checked
    hidden, _ = head.hidden_states(input_ids=labels)
    gathered.clear()
    loss = head.dpo_loss(hidden, labels, ref_logps).loss
    loss.backward()
    assert not gathered, gathered
    whole = lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return loss.item(), {name: whole(w.grad) for name, w in model.named_parameters()}

assert_same(by_the_head(True), by_the_head(False), "the head's functions")
"""

TRAINER = """
import accelerate.state
import dpo_kernels.trl as ours
import trl
from accelerate.utils import DistributedType
from trl_runs import LORA, dpo, prototype

original = accelerate.state.AcceleratorState.__init__
def on_the_cpu_too(self, *args, fsdp_plugin=None, **kwargs):  # accelerate shards on accelerators alone
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
accelerate.state.AcceleratorState.__init__ = on_the_cpu_too

fsdp = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
found = []
for name, lora in (("llama", None), ("gemma2", None), ("llama", LORA)):
    for library in (ours, trl):
        trainer, logs = dpo(
            library.DPOTrainer, sys.argv[1], prototype(name), lora=lora, per_device_train_batch_size=2,
            ddp_backend="gloo", **fsdp,
        )
        assert "DTensor" in type(next(trainer.model.parameters())).__name__, "it is not sharded"
        found.append(logs)
if os.environ["RANK"] == "0":
    with open(sys.argv[1] + "/logs.json", "w") as file:
        json.dump(found, file)
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script in two processes, with this test's folder as argument."""

    def run(script, **options):
        (tmp_path / "script.py").write_text(COMMON + script)
        run_in_two(tmp_path / "script.py", tmp_path, **options)

    return run


@pytest.mark.full
def test_fsdp2(run):
    run(FSDP2)


def test_zero3(run):
    pytest.importorskip("deepspeed", reason="tests ZeRO-3, and deepspeed is not installed")
    run(ZERO3)


@pytest.mark.full
def test_tensor_parallel(run):
    run(TENSOR_PARALLEL)


@pytest.mark.full
def test_a_head_in_shards_of_the_vocabulary_within_fsdp2(run):
    """A mesh of two dimensions: each quarter of the head has one process, and is gathered over one dimension alone."""
    run(TWO_DIMENSIONS, processes=4)


@pytest.mark.full
def test_trainer_with_fsdp2(run, tmp_path):
    pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
    from trl_runs import assert_agree

    run(TRAINER)
    logs = json.loads((tmp_path / "logs.json").read_text())
    for mine, theirs in zip(logs[::2], logs[1::2], strict=True):
        assert_agree(mine, theirs)
