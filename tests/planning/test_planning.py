"""That the plan is right: what it predicts of head and loss against what PyTorch allocates, within 10%, and its
estimate of activations against what small models keep, within 25%."""

import argparse
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from places import ROOT
from small_steps import KINDS, SMALL, adapted, measured_step, model_of

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.bench import peers
from dpo_kernels.bench.cases import HeadInputs
from dpo_kernels.cli import run_plan
from dpo_kernels.data.lengths import LENGTHS
from dpo_kernels.impl import paths
from dpo_kernels.models.shapes import ModelShape, count_shape, find_shape
from dpo_kernels.planning import command
from dpo_kernels.planning import step as planning
from dpo_kernels.planning.batches import measured_share
from dpo_kernels.planning.head_memory import (
    POSITION_BYTES,
    ROW_BYTES,
    SPLIT_BYTES,
    eager_bytes,
    ours_bytes,
    trl_bytes,
)
from dpo_kernels.testing import SavedBytes, allocated, head_inputs

WITHIN = 0.1
# [S, T, H, V] and the labelled share: every label, where tiles and logits lead; and an H above what oneDNN adds up at
# once, padded, where hidden states and gradients lead, and tiles have fewer rows than there are
SHAPES = {"wide": (8, 32, 64, 16000, 1.0), "deep": (8, 256, 512, 1500, 0.6)}
# in one tile
ONE = {"one": (4, 64, 128, 2000, 1.0)}
# few rows, where the head is what is large
FEW = {"few": (2, 32, 256, 40000, 1.0)}
TILE = 2**21
HALF = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs_of(shape, dtype):
    sequences, length, hidden, vocab, labelled = (SHAPES | FEW | ONE)[shape]
    inputs = head_inputs(sequences, length, hidden, vocab, dtype=dtype, labelled=labelled)
    sizes = {"positions": sequences * length, "hidden": hidden, "vocab": vocab, "dtype": dtype}
    return inputs, sizes | {"tokens": int((inputs.labels != -100).sum())}


def ours(path, inputs, impl, chunk_bytes=None, softcap=None):
    """A call of the path; its gradients."""
    options = {"impl": impl, "softcap": softcap}
    if path == "A":
        with torch.no_grad():
            return linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, **options).logps
    weight = inputs.weight.detach() if path == "B" else inputs.weight
    if path == "C":
        options |= {"chunk_bytes": chunk_bytes}
        loss = linear_dpo_loss(inputs.hidden, weight, inputs.labels, inputs.ref_logps, **options).loss
    else:
        loss = linear_sequence_logps(inputs.hidden, weight, inputs.labels, **options).logps.sum()
    return torch.autograd.grad(loss, [inputs.hidden] + [weight] * (path != "B"))


def check(predicted, measured):
    ratio = predicted.peak / measured.peak
    assert 1 - WITHIN <= ratio <= 1 + WITHIN, f"predicted {ratio:.3f} of what is measured, at {predicted.moment}"
    # what stays, beside a few bytes a position
    assert 0 <= measured.left - predicted.returned <= 2**16


def check_ours(path, shape, dtype, impl, groups=1, autocast=False, softcap=None):
    inputs, sizes = inputs_of(shape, dtype)
    pairs, (rows, hidden, vocab) = inputs.labels.shape[0] // 2, (sizes[k] for k in ("tokens", "hidden", "vocab"))
    # for two groups or three: half of the logits, and the sums of dW
    chunk_bytes = None if groups == 1 else rows * vocab * 4 // 2 + 4 * vocab * hidden * (dtype != torch.float32)
    predicted = ours_bytes(
        path, **sizes, compute_dtype=torch.bfloat16 if autocast else None, impl=impl, chunk_bytes=chunk_bytes,
        pairs=pairs, softcap=softcap is not None,
    )  # fmt: skip
    assert predicted.path == path

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return ours(path, inputs, impl, chunk_bytes, softcap)

    check(predicted, allocated(call))


@pytest.fixture(params=["torch", "cpu"])
def small_tiles(request, monkeypatch):
    """An implementation, with tiles that make many of them."""
    reason = dispatch.unavailable_reason(request.param, torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"impl {request.param!r}: {reason}")
    monkeypatch.setattr(dispatch.load(request.param), "tile_bytes", lambda device: TILE)
    return request.param


def test_the_instrument_sees_every_allocation():
    mib = 2**20

    def call():
        first = torch.zeros(mib, dtype=torch.uint8)
        second = torch.zeros(2 * mib, dtype=torch.uint8)
        del first
        inside = second.double().exp().sum()  # 16 MiB, and 16 more, inside operators
        return second, inside

    found = allocated(call)
    assert 34 * mib <= found.peak <= 34 * mib + 1024
    assert 2 * mib <= found.left <= 2 * mib + 1024


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
def test_ours(path, dtype, shape, small_tiles):
    check_ours(path, shape, dtype, small_tiles)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
def test_ours_in_one_tile(path, dtype):
    check_ours(path, "one", dtype, "cpu" if not dispatch.CPU_PROBLEM else "torch")


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_path_c_in_groups(shape, dtype, small_tiles):
    check_ours("C", shape, dtype, small_tiles, groups=2)


@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
def test_ours_under_autocast(path, small_tiles):
    check_ours(path, "deep", torch.float32, small_tiles, autocast=True)


@pytest.mark.parametrize("path", ["B", "C", "D"])
def test_ours_with_softcap(path, small_tiles):
    check_ours(path, "wide", torch.float32, small_tiles, softcap=30.0)


@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
def test_ours_with_the_other_library(path, monkeypatch):
    """Which library multiplies on this machine decides what is allocated."""
    native = pytest.importorskip("dpo_kernels.impl.native")
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has one library alone")
    monkeypatch.setattr(native, "ONEDNN_IS_FASTER", not native.ONEDNN_IS_FASTER)
    monkeypatch.setattr(native, "tile_bytes", lambda device: TILE)
    check_ours(path, "deep", torch.float32, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize(("path", "groups"), [("A", 1), ("B", 1), ("C", 1), ("C", 2), ("D", 1)])
def test_ours_as_on_a_gpu(path, groups, dtype, shape, monkeypatch):
    """Where operands are read in place and products are written in place: what they hold does not matter here."""
    module = dispatch.load("torch")
    monkeypatch.setattr(module, "tile_bytes", lambda device: TILE)
    monkeypatch.setattr(module, "operand", lambda t, dtype: t.to(dtype))
    monkeypatch.setattr(module, "product", lambda a, b, out, accumulate=False: out if accumulate else out.zero_())
    monkeypatch.setattr(paths, "_reads_in_place", lambda t, compute_dtype: t.dtype == compute_dtype)
    # on the CPU, scatter makes an fp32 copy of a tile in half precision
    monkeypatch.setattr(module, "put_labels_", lambda a, y, start, value: None)
    check_ours(path, shape, dtype, "torch", groups=groups)


def peer_inputs(shape, dtype, frozen=False):
    inputs, sizes = inputs_of(shape, dtype)
    hidden, weight = (t.detach() for t in inputs[:2])
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    return HeadInputs(*leaves, inputs.labels, inputs.ref_logps, sizes["tokens"]), sizes


@pytest.mark.parametrize("shape", SHAPES | FEW)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("forward", torch.float32),
        ("frozen", torch.bfloat16),
        ("train", torch.float32),
        ("train", torch.bfloat16),
        ("autocast", torch.float32),
    ],
)
@pytest.mark.parametrize("way", ["eager", "trl"])
def test_peers(way, mode, dtype, shape):
    if way == "trl":
        pytest.importorskip("trl")
        tiny = head_inputs(2, 2, 8, 16)
        peers.trl(HeadInputs(tiny.hidden, tiny.weight, tiny.labels, tiny.ref_logps, 2))  # loads what it needs
    inputs, sizes = peer_inputs(shape, dtype, frozen=mode == "frozen")
    options = {"train_head": mode != "frozen", "backward": mode != "forward"}
    options |= {"compute_dtype": torch.bfloat16 if mode == "autocast" else None}
    if way == "eager":
        del sizes["tokens"]
    predicted = (eager_bytes if way == "eager" else trl_bytes)(**sizes, **options)

    def call():
        with torch.set_grad_enabled(mode != "forward"), torch.autocast("cpu", enabled=mode == "autocast"):
            return getattr(peers, way)(inputs)

    check(predicted, allocated(call))
    if way == "trl":  # its backward computes the logits again, then dX, and dW where that is wanted
        assert predicted.products == {"forward": 1, "frozen": 3}.get(mode, 4)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("shape", ["deep", "few"])
def test_trl_as_on_a_gpu(shape, dtype, monkeypatch):
    """Where labelled rows alone are scored, kernels fold tiles in place, and products are added in place."""
    chunked = pytest.importorskip("trl.kernels.chunked_logprob")
    inputs, sizes = peer_inputs(shape, dtype)
    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked, name, lambda *args, **options: None)
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device: True)
    predicted = trl_bytes(**sizes, device="cuda")
    assert predicted.rows == sizes["tokens"]
    check(predicted, allocated(lambda: peers.trl(inputs)))


def test_the_decision_is_that_of_the_loss():
    """Which path, and how much chunk_bytes would change it."""
    sizes = {"positions": 8192, "hidden": 64, "vocab": 50000, "device": "cpu", "impl": "torch"}
    of = {"pairs": 4, "tokens": 2000, "dtype": torch.bfloat16}
    assert ours_bytes("C", **sizes, **of).path == "C"
    small = ours_bytes("C", **sizes, **of, chunk_bytes=2**20)
    assert (small.path, small.products) == ("D", 4) and "exceed chunk_bytes" in small.why
    needed = int(small.why.split("needs ")[1].split(" MiB")[0]) * 2**20
    assert ours_bytes("C", **sizes, **of, chunk_bytes=needed).path == "C"
    assert ours_bytes("C", **sizes, **of, chunk_bytes=needed - 2**20).path == "D"
    assert ours_bytes("C", **sizes, **of | {"dtype": torch.float16}).path == "D"
    with pytest.raises(ValueError, match="path"):
        ours_bytes("E", **sizes, **of)


def test_a_device_that_is_not_there():
    """On a GPU the labelled rows alone go through TRL's head, and our tiles are larger."""
    sizes = {"tokens": 1000, "positions": 4000, "hidden": 512, "vocab": 50000, "dtype": torch.bfloat16}
    assert trl_bytes(**sizes, device="cuda").rows == 1000 and trl_bytes(**sizes).rows == 4000
    there, here = (ours_bytes("D", **sizes, device=device, impl="torch") for device in ("cuda", "cpu"))
    assert there.temporary > here.temporary


@pytest.mark.parametrize("path", ["A", "B", "C", "D"])
@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_kernels_of_a_device_that_is_not_there(monkeypatch, impl, path):
    """Those that store no logits: a plan without a GPU is one for an H200."""
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    sizes = {"tokens": 1000, "positions": 4000, "hidden": 512, "vocab": 50000, "dtype": torch.bfloat16}
    try:
        kernels = dispatch.load(impl)
    except ImportError as error:
        pytest.skip(f"{error}")
    assert kernels.exponential_rows(1000, 50000, 512, torch.device("cuda")) > 100
    found = ours_bytes(path, **sizes, device="cuda", impl=impl)
    assert found.path == path and found.temporary > 0


@pytest.mark.parametrize("impl", ["triton", "cuda"])
def test_exponentials_that_do_not_all_fit(monkeypatch, impl):
    """Products of some vocabulary entries are computed again, and `chunk_bytes` is kept to."""
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    of = {"tokens": 8192, "positions": 8192, "hidden": 2048, "vocab": 151936, "dtype": torch.bfloat16, "pairs": 8}
    try:
        some, none = (ours_bytes("C", **of, device="cuda", impl=impl, chunk_bytes=size) for size in (2**30, 0))
    except ImportError as error:
        pytest.skip(f"{error}")
    stored, vocab = map(int, re.search(r"exponentials of (\d+) of (\d+) vocabulary entries fit", some.why).groups())
    assert some.path == "C" and 3.2 < some.products < 3.4 and vocab == 151936
    assert some.products == pytest.approx(4 - stored / vocab, abs=0.006)
    assert (none.path, none.products) == ("D", 4)
    beside = 8192 * (6 * 2048 + ROW_BYTES + SPLIT_BYTES + POSITION_BYTES)  # sums of dX, which is in bf16 too
    assert 0.99 * 2**30 < some.temporary - beside <= 2**30
    needed = int(some.why.split("needs ")[1].split(" MiB")[0]) * 2**20
    whole = ours_bytes("C", **of, device="cuda", impl=impl, chunk_bytes=needed)
    assert whole.products == 3 and "exponentials of all pairs" in whole.why


# The whole step


def padded_batch(step):
    ids = torch.randint(3, step.vocab, (2 * step.pairs, step.seq))
    mask = torch.ones_like(ids)
    mask[0, step.seq // 2 :] = 0
    return ids, mask


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "mixed", "train"),
    [
        ("llama", "bfloat16", "no", "full"),
        ("qwen2", "float32", "no", "full"),
        ("llama", "float32", "bf16", "full"),
        ("qwen3", "bfloat16", "no", "full"),
        ("gemma2", "bfloat16", "no", "full"),
        ("gemma3", "bfloat16", "no", "full"),
        ("experts", "bfloat16", "no", "full"),
        ("experts", "float32", "no", "full"),
        ("llama", "bfloat16", "no", "lora"),
        ("llama", "float32", "no", "lora"),
        ("llama", "float32", "bf16", "lora"),
    ],
)
def test_activations(kind, dtype, mixed, train, checkpointing):
    shape = replace(SMALL, **KINDS[kind][2])
    pairs, seq = 2, 48
    step = planning.Step(
        shape.hidden, shape.vocab, pairs, seq, 1.0, shape, getattr(torch, dtype), command.AUTOCAST[mixed], train,
        lora_r=4, checkpointing=checkpointing,
    )  # fmt: skip
    model = model_of(kind, shape, step.dtype)
    backbone = model.model
    model = adapted(model, step)
    ids, mask = padded_batch(step)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast is not None):
            return backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    forward()
    kept, again = planning.activation_bytes(step, shape)
    measured = allocated(forward).left
    assert kept == pytest.approx(measured, rel=0.25)
    if not checkpointing:
        assert again == 0
        with SavedBytes(*model.parameters()) as saved:
            forward()
        assert kept == pytest.approx(saved.total, rel=0.25)
    else:
        whole, _ = planning.activation_bytes(replace(step, checkpointing=False), shape)
        assert kept + shape.layers * again == pytest.approx(whole, rel=0.25)


# where activations and the head lead, and where the parameters do, with a tied matrix and without
STEPS = {"many tokens": (2, 64, False), "few tokens": (1, 8, False), "few tokens, tied": (1, 16, True)}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype", "mixed", "train"),
    [
        ("many tokens", "bfloat16", "no", "full"),
        ("many tokens", "float32", "bf16", "full"),
        ("many tokens", "float32", "no", "full"),
        ("many tokens", "float32", "no", "frozen-head"),
        ("many tokens", "float32", "no", "lora"),
        ("few tokens", "float32", "no", "full"),
        ("few tokens", "float32", "bf16", "frozen-head"),
        ("few tokens, tied", "float32", "no", "full"),
        ("few tokens, tied", "bfloat16", "no", "full"),
        ("few tokens, tied", "float32", "bf16", "full"),
    ],
)
def test_a_whole_step(size, dtype, mixed, train, checkpointing, accumulation):
    pairs, seq, tied = STEPS[size]
    shape = ModelShape(128, 2000, 6, 384, 4, 2, 32, tied)
    step = planning.Step(
        shape.hidden, shape.vocab, pairs, seq, 1.0, shape, getattr(torch, dtype), command.AUTOCAST[mixed], train,
        lora_r=4, checkpointing=checkpointing, accumulation=accumulation,
    )  # fmt: skip
    model = model_of("llama", shape, step.dtype)
    backbone, head = model.model, model.get_output_embeddings().weight
    ids, mask = padded_batch(step)

    def loss():
        hidden = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return linear_dpo_loss(hidden, head, ids, torch.zeros(2 * step.pairs)).loss

    total, backward, updating = measured_step(step, adapted(model, step), loss)
    predicted = planning.footprint(step, "dpo_kernels")
    assert predicted["total"] == pytest.approx(total, rel=WITHIN)
    if train == "lora" or dtype != "float32" or mixed != "no":  # where what is small beside the rest counts
        return
    later = planning.later_bytes(step, shape, planning.head_memory(step, "dpo_kernels"))
    assert later.pop("optimizer") - planning.state_bytes(step, shape)["gradients"] == pytest.approx(updating, rel=0.01)
    moments = {name: size - predicted["gradients"] for name, size in later.items()}
    moments["head"] = predicted["activations"] + predicted["head and loss"]
    within = WITHIN if size != "many tokens" else 0.15  # where activations are most of it
    assert max(moments.values()) == pytest.approx(backward, rel=within), moments


def test_gradients_of_earlier_micro_batches_are_there_under_accumulation_alone():
    once = planning.Step(4096, 128256, 4, 2048, 0.5, find_shape("llama-3-8b"), device=torch.device("cuda"))
    state = planning.state_bytes(once, once.shape)
    alone, again = (planning.footprint(replace(once, accumulation=n), "dpo_kernels") for n in (1, 8))
    assert (alone["gradients"], again["gradients"]) == (0, state["gradients"])
    assert again["total"] - alone["total"] == state["gradients"], "the forward is where most is alive in either"
    early = [
        planning.later_bytes(step, step.shape, planning.head_memory(step, "dpo_kernels"))["first layer"]
        for step in (once, replace(once, accumulation=8))
    ]
    assert early[1] - early[0] == state["gradients"]
    few = replace(once, pairs=1, seq=16)  # where the optimizer's step is: all gradients, with and without
    alone, again = (planning.footprint(replace(few, accumulation=n), "dpo_kernels") for n in (1, 8))
    assert alone["total"] >= sum(state.values()) and alone["later"] > 0
    assert again["total"] >= alone["total"]


def test_sharding_divides_what_the_parameters_take():
    whole = planning.Step(8192, 128256, 1, 512, 0.5, find_shape("llama-3.1-70b"), reference="model")
    sharded = replace(whole, sharding="fsdp2", processes=8)
    all_of_it, an_eighth = (planning.state_bytes(step, step.shape) for step in (whole, sharded))
    assert {name: math.ceil(size / 8) for name, size in all_of_it.items()} == an_eighth
    assert planning.state_bytes(replace(whole, processes=8), whole.shape) == all_of_it, "each has all of it"
    # embeddings, head and last norm are the largest unit; of the 405B a layer is
    assert planning.gathered_bytes(sharded, sharded.shape) == 2 * (2 * 128256 * 8192 + 8192)
    largest = find_shape("llama-3.1-405b")
    step = replace(sharded, hidden=16384, shape=largest)
    layer = (largest.parameters - 2 * largest.head_parameters - largest.hidden) // largest.layers
    assert planning.gathered_bytes(step, largest) == 2 * max(layer, 2 * largest.head_parameters + largest.hidden)
    assert planning.gathered_bytes(whole, whole.shape) == 0
    # what is computed in is gathered
    mixed = replace(sharded, dtype=torch.float32, autocast=torch.bfloat16)
    assert planning.gathered_bytes(mixed, mixed.shape) == planning.gathered_bytes(sharded, sharded.shape)
    footprint = planning.footprint(sharded, "dpo_kernels")
    assert footprint["total"] == sum(size for name, size in footprint.items() if name != "total")
    assert footprint["gathered"] + an_eighth["weights"] < footprint["total"] < planning.footprint(whole, "TRL")["total"]


def test_sharding_has_the_gradients_of_a_unit_whole_where_it_has_any():
    whole = planning.Step(8192, 128256, 1, 512, 0.5, find_shape("llama-3.1-70b"))
    matrix, unit = 2 * whole.shape.head_parameters, 2 * whole.shape.layer_parameters

    def later(**changes):
        step = replace(whole, **changes)
        found = planning.later_bytes(step, step.shape, planning.head_memory(step, "dpo_kernels"))
        return found | {"gradients": planning.state_bytes(step, step.shape)["gradients"]}

    alone, sharded = later(), later(sharding="fsdp2", processes=8)
    assert sharded["first layer"] - alone["first layer"] == unit
    # head and embedding, which are not tied: the one's is there whole from the first, the other's at the last
    expected = (sharded["gradients"] + matrix + unit) - (alone["gradients"] - matrix)
    assert sharded["last layer"] - alone["last layer"] == expected
    assert sharded["embedding"] - alone["embedding"] == sharded["gradients"] + 2 * matrix - alone["gradients"]
    alone, sharded = (later(train="lora", **changes) for changes in ({}, {"sharding": "fsdp2", "processes": 8}))
    assert sharded["first layer"] == alone["first layer"], "units have no gradients, adapters have"


def test_zero_divides_what_it_does():
    shape = find_shape("llama-3.1-70b")
    whole = planning.Step(8192, 128256, 1, 512, 0.5, shape, reference="model", dtype=torch.float32)
    steps = [replace(whole, sharding=name, processes=8) for name in ("zero2", "zero3")]
    all_of_it, zero2, zero3 = (planning.state_bytes(step, shape) for step in (whole, *steps))
    # numbers of fp32 that were alive between steps, over those of a model in one process: 4.2 and 5.1
    n = shape.parameters
    assert zero3 == {name: math.ceil(4 * k * n / 8) for name, k in {**dict.fromkeys(zero3, 1), "optimizer": 3}.items()}
    assert zero2 == zero3 | {name: all_of_it[name] for name in ("weights", "reference")}
    assert [planning.footprint(step, "dpo_kernels")["gradients"] for step in steps] == [0, zero3["gradients"]]
    # the head, and beside it the embedding, which is larger than a layer's matrices
    assert [planning.gathered_bytes(step, shape) for step in steps] == [0, 4 * 2 * shape.head_parameters]
    tied = replace(steps[1], hidden=2048, vocab=151936, shape=find_shape("qwen3-1.7b"))
    assert planning.gathered_bytes(tied, tied.shape) == 4 * 2048 * (151936 + 6144)
    found = [planning.later_bytes(each, shape, planning.head_memory(each, "dpo_kernels")) for each in (whole, *steps)]
    reduced = 4 * (shape.head_parameters + 8192**2)
    more = [each["first layer"] - found[0]["first layer"] for each in found]
    assert more == [0, reduced, reduced + zero3["gradients"]]
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(
            ValueError, match="dtype: expected float32 beside sharding 'zero3' without LoRA, got .*float16"
        ):
            replace(steps[1], dtype=dtype)
    assert replace(steps[1], dtype=torch.bfloat16, train="lora").by_deepspeed


def test_no_step_of_nothing():
    for name in ("accumulation", "processes", "lora_r"):
        with pytest.raises(ValueError, match=f"{name}: expected a whole number above 0, got 0"):
            planning.Step(64, 100, 1, 8, 0.5, **{name: 0})


def test_a_mixture_of_experts_keeps_all_weights_and_the_activations_of_some():
    shape = find_shape("qwen3-30b-a3b")
    dense = find_shape("qwen3-32b")
    step = planning.Step(shape.hidden, shape.vocab, 1, 512, 0.5, shape)
    assert planning.state_bytes(step, shape)["weights"] == 2 * shape.parameters > 60e9
    assert planning.layer_bytes(step, shape) < planning.layer_bytes(step, dense)
    lora = replace(step, train="lora", lora_r=8)
    # 8 (in + out) of the queries', keys', values' and output's matrices of 48 layers, in fp32: experts have none
    attention = 2 * (2048 + 4096) + 2 * (2048 + 512)
    assert planning.state_bytes(lora, shape)["gradients"] == 4 * 8 * 48 * attention


# Kinds that the estimate is rough for: attention with sinks, AltUp, an MLP beside experts and heads that differ from
# layer to layer, experts that are not measured otherwise, latent attention, every token to every expert
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
ROUGH = {
    "GptOssConfig": GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 3},
    "Gemma3nTextConfig": GROUPED
    | {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 3, "hidden_size_per_layer_input": 16,
        "laurel_rank": 8, "vocab_size_per_layer_input": 128, "layer_types": ["full_attention"] * 3,
    },
    "Gemma4TextConfig": GROUPED
    | {
        "global_head_dim": 32, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 48,
        "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128,
    },
    "GraniteMoeConfig": {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    "DeepseekV3Config": {
        "moe_intermediate_size": 80, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 48, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    },
    "Llama4TextConfig": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 320},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROUGH)
def test_activations_of_other_kinds_are_from_half_to_twice_the_estimate(kind):
    transformers = pytest.importorskip("transformers")
    seq, dtype = 64, torch.bfloat16
    config = getattr(transformers, kind)(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **ROUGH[kind],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    shape = count_shape(model, config)
    step = planning.Step(64, 128, 2, seq, 1.0, shape, dtype)
    ids, mask = padded_batch(step)

    def forward():
        return model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    forward()
    measured = allocated(forward).left
    assert shape.rough and 0.5 <= measured / planning.activation_bytes(step, shape)[0] <= 2


def test_state_follows_from_the_parameters():
    step = planning.Step(4096, 128256, 1, 8, 1.0, find_shape("llama-3-8b"))
    weights = 2 * step.shape.parameters
    full = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "reference": 0}
    assert planning.state_bytes(step, step.shape) == full
    assert planning.state_bytes(replace(step, reference="model"), step.shape)["reference"] == weights
    frozen = planning.state_bytes(replace(step, train="frozen-head"), step.shape)
    assert weights - frozen["gradients"] == 2 * 128256 * 4096
    adapted = planning.state_bytes(replace(step, train="lora", lora_r=8, reference="model"), step.shape)
    # 8 (in + out) of seven matrices in 32 layers, in fp32
    assert adapted["gradients"] == 4 * 8 * 32 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert (adapted["optimizer"], adapted["reference"]) == (2 * adapted["gradients"], 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_batch_is_the_largest(checkpointing):
    step = planning.Step(
        2304, 256000, 1, 256, 0.3, find_shape("gemma-2-2b"), checkpointing=checkpointing, device=torch.device("cuda")
    )
    most = {}
    for way in planning.WAYS:
        memory = 60 * 2**30
        most[way] = planning.largest_batch(step, way, memory)
        fits = [planning.footprint(replace(step, pairs=most[way] + more), way)["total"] <= memory for more in (0, 1)]
        assert fits == [True, False]
        assert planning.largest_batch(step, way, 2**30) == 0
    assert most["eager"] < most["TRL"] <= most["dpo_kernels"]


def test_the_share_of_labels_is_that_of_the_measured_pairs():
    lengths = json.loads(LENGTHS.read_text())["lengths"]
    responses = sum(chosen + rejected for _, chosen, rejected in lengths)
    alone = responses / sum(2 * (prompt + max(rest) - 1) for prompt, *rest in lengths)
    assert measured_share(1, 100_000) == pytest.approx(alone, rel=0.05)
    assert measured_share(8, 100_000) < 0.8 * alone, "padding"
    assert measured_share(4, 2) == 1.0


# The command


def plan(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return run_plan(parser.parse_args([*map(str, arguments)]))


def test_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    where = ("--device", "cuda", "--memory", 80, "--json", out)
    assert plan("--model", "gemma-2-2b", "--batch", 4, "--seq", 512, *where) == 0
    text, found = capsys.readouterr().out, json.loads(out.read_text())
    for said in ("2.61 billion parameters", "softcap 30", "measured on real pairs", "(estimated)", "largest batch"):
        assert said in text
    assert "micro-batches in a step" not in text and "the largest unit" not in text
    ours = found["head"]["dpo_kernels"]
    assert f"path {ours['path']}, {ours['products']} products" in text
    assert f"{ours['peak'] / 2**20:,.0f}" in text and f"{found['total']['eager']['total'] / 2**30:.2f}" in text
    assert found["fits"]["dpo_kernels"] and found["step"]["dtype"] == "bfloat16"
    assert found["labelled_positions"] < found["positions"] == 4096

    assert plan("--hidden", 64, "--vocab", 1000, "--batch", 2, "--seq", 16, "--labelled", 0.5) == 0
    assert "whole step" not in capsys.readouterr().out
    assert plan("--model", "llama-3.2-1b", "--batch", 2, "--seq", 64, "--gradient-checkpointing") == 0
    assert "backward and optimizer, beyond that" in capsys.readouterr().out


def test_command_with_accumulation_and_sharding(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ("--batch", 2, "--seq", 512, "--device", "cuda", "--memory", 80, "--json", out)

    def found(*more):
        assert plan(*arguments, *more) == 0
        return json.loads(out.read_text())["total"]["dpo_kernels"], capsys.readouterr().out

    model = ("--model", "Qwen/Qwen3-30B-A3B-Instruct-2507")
    alone, _ = found(*model)
    accumulated, text = found(*model, "--gradient-accumulation", 8)
    assert "8 micro-batches in a step: 16 pairs" in text
    assert "30.5 billion parameters, 3.35 of them active for a token" in text and "those of all experts" in text
    assert alone["gradients"] == 0 < accumulated["gradients"] == 2 * find_shape("qwen3-30b-a3b").parameters
    sharded, text = found(*model, "--sharding", "fsdp2", "--processes", 8)
    assert "sharded by FSDP2 over 8 processes" in text and "gathered at a time" in text
    assert sharded["gathered"] > 0 and sharded["total"] < alone["total"] / 4
    zero, text = found(*model, "--sharding", "zero2", "--processes", 8, "--dtype", "float32")
    assert (
        "sharded by ZeRO-2 over 8 processes" in text
        and zero["gathered"] == 0
        and zero["weights"] == 2 * alone["weights"]
    )
    assert "from half to twice" not in text
    _, text = found("--model", "gpt-oss-20b")
    assert "from half to twice" in text and "eager attention" in text


def test_accumulation_comes_from_a_training_configuration_or_a_flag(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("")
    settings = {"model": "llama-3.2-1b", "batch": 1, "seq": 64, "gradient_accumulation": 4}

    def lines(*arguments):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        options = parser.parse_args([str(tmp_path / "run.yaml"), *map(str, arguments)])
        command.run(options, lambda path: dict(settings))
        return capsys.readouterr().out

    assert "4 micro-batches in a step" in lines()
    assert "2 micro-batches in a step" in lines("--gradient-accumulation", 2)
    assert "micro-batches in a step" not in lines("--gradient-accumulation", 1)


TINY_GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}


def test_command_with_any_config_of_transformers(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(TINY_GPT2))
    assert plan("--model", tmp_path, "--batch", 1, "--seq", 64) == 0
    text = capsys.readouterr().out
    assert "head [100, 64]" in text and "from half to twice" in text


TRAINING = {
    "model": "meta-llama/Llama-3.2-1B",
    "dataset": "pairs.jsonl",
    "per_device_batch_size": 3,
    "max_length": 96,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}


QWEN2 = {"model_type": "qwen2", "hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2, "intermediate_size": 64}
QWEN2 |= {"num_attention_heads": 4, "num_key_value_heads": 2}
WHOLE = "expected a whole number above 0 as"


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hidden_size": "64"}, f"{WHOLE} hidden_size, got '64'"),
        ({"hidden_size": -64}, f"{WHOLE} hidden_size, got -64"),
        ({"hidden_size": math.inf}, f"{WHOLE} hidden_size, got inf"),
        ({"num_attention_heads": 0}, f"{WHOLE} num_attention_heads, got 0"),
        ({"num_attention_heads": True}, f"{WHOLE} num_attention_heads, got True"),
        ({"num_key_value_heads": 3}, "expected a divisor of 4 heads as num_key_value_heads, got 3"),
        ({"num_hidden_layers": 2.5}, f"{WHOLE} num_hidden_layers, got 2.5"),
        ({"vocab_size": [1]}, f"{WHOLE} vocab_size, got [1]"),
        ({"vocab_size": 10**20}, f"{WHOLE} vocab_size, got 1{'0' * 20}"),
        ({"head_dim": "x"}, f"{WHOLE} head_dim, got 'x'"),
        ({"model_type": ["qwen2"]}, 'must be an object with a model_type, such as "qwen2"'),
        ({"model_type": None}, 'must be an object with a model_type, such as "qwen2"'),
        ({"model_type": "llava", "text_config": {"model_type": {}}}, "expected a model_type of"),
        ({"tie_word_embeddings": "no"}, "expected true or false as tie_word_embeddings, got 'no'"),
        ({"model_type": "gemma2", "final_logit_softcapping": "x"}, "number above 0 or null as final_logit_softcapping"),
        ("[1, 2]", 'must be an object with a model_type, such as "qwen2"'),
        ("", "is no valid JSON"),
        ("[" * 100_000, "is no valid JSON"),
    ],
    ids=lambda each: str(each)[:50],
)
def test_a_config_that_is_wrongly_formed_is_named(tmp_path, change, says):
    file = tmp_path / "odd.json"
    file.write_text(change if isinstance(change, str) else json.dumps(QWEN2 | {"head_dim": 16} | change))
    for form in ("--model=config:{}", "--model={}", "config:{}", "{}"):
        with pytest.raises(ValueError, match=re.escape(says)) as caught:
            plan(form.format(file), "--batch", 2, "--seq", 64)
        assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def training(tmp_path):
    """A function that writes a configuration of `dpo-kernels train`."""

    def write(name="run.yaml", **settings):
        lines = [f"{key}: {json.dumps(value)}" for key, value in (TRAINING | settings).items() if value != "leave out"]
        (tmp_path / name).write_text("\n".join(lines))
        return tmp_path / name

    return write


def test_a_training_configuration_says_what_the_flags_do_not(training, tmp_path, capsys):
    forms = itertools.cycle(["{}", "config:{}", "--model=config:{}", "--model={}"])

    def found(*arguments, **settings):
        file = training(**settings)
        assert plan(next(forms).format(file), *arguments, "--memory", 24, "--json", tmp_path / "plan.json") == 0
        text = capsys.readouterr().out
        return json.loads((tmp_path / "plan.json").read_text()), text

    step, text = found()
    expected = {
        "pairs": 3,
        "seq": 96,
        "dtype": "float32",
        "autocast": "bfloat16",
        "train": "full",
        "reference": "model",
    }
    assert step["step"].items() >= (expected | {"checkpointing": True, "impl": "auto", "chunk_bytes": None}).items()
    assert text.startswith("meta-llama/Llama-3.2-1B: 1.24 billion parameters")
    step, _ = found(lora_r=8, dtype="bfloat16", mixed_precision="no", chunk_bytes=2**20, impl="torch")
    expected = {"train": "lora", "lora_r": 8, "dtype": "bfloat16", "autocast": None, "chunk_bytes": 2**20}
    assert step["step"].items() >= (expected | {"impl": "torch", "reference": "model"}).items()
    assert found(reference="precompute")[0]["step"]["reference"] == "precomputed"
    assert found(loss_type="simpo", beta=2.0)[0]["step"]["reference"] == "none"
    assert found(reference="Qwen/Qwen2-0.5B", allow_different_reference=True)[0]["step"]["reference"] == "model"
    assert found(dataset="leave out")[0]["step"]["pairs"] == 3
    step, _ = found(
        "--batch", 5, "--seq", 32, "--dtype", "float16", "--no-gradient-checkpointing", "--reference", "none"
    )
    expected = {"pairs": 5, "seq": 32, "dtype": "float16", "checkpointing": False, "reference": "none"}
    assert step["step"].items() >= expected.items()


def test_a_training_configuration_and_another_model(training, tmp_path, capsys):
    shape = {"model_type": "llama", "hidden_size": 64, "vocab_size": 1000, "num_hidden_layers": 2}
    shape |= {"intermediate_size": 96, "num_attention_heads": 4}
    (tmp_path / "tiny.json").write_text(json.dumps(shape))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    for arguments in (
        (training("beside.yaml", model="config:tiny.json"),),  # beside the file that names it
        (training(), "--model", tmp_path / "tiny.json"),
        (training(), "--model", f"config:{tmp_path / 'tiny.json'}"),
        (training("folder.yaml", model=str(tmp_path / "model")),),
        ("--model", f"config:{tmp_path / 'tiny.json'}", "--batch", 3, "--seq", 96),
        (tmp_path / "tiny.json", "--batch", 3, "--seq", 96),
        (training(), "--hidden", 64, "--vocab", 1000),
    ):
        assert plan(*arguments, "--memory", 0.01) == 0
        text = capsys.readouterr().out
        assert "head [1000, 64]" in text and "3 pairs, 6 sequences of 96 tokens" in text, arguments


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"max_lenght": 3}, (), "unknown key 'max_lenght' in .*run.yaml; did you mean 'max_length'"),
        ({"per_device_batch_size": 0}, (), "run.yaml: per_device_batch_size: expected at least 1"),
        ({"max_length": None}, (), "seq: expected --seq, since .*run.yaml has no max_length"),
        (
            {"per_device_batch_size": 4, "max_tokens_per_batch": 4096},
            (),
            "batch: expected --batch, since .*run.yaml has no per_device_batch_size",
        ),
        ({"model": "leave out"}, (), "model is missing: put it into .*run.yaml"),
        ({"model": "demo"}, (), "run.yaml: model: expected a known name, a config.json or its folder, .*got 'demo'"),
        ({"model": "llama-9-8b"}, (), "run.yaml: model: expected a known name.*near it"),
        ({"model": "config:gone.json"}, (), "run.yaml: model: expected a config.json, found no file gone.json"),
        ({}, ("--model", "config:gone.json"), "model: there is no file 'gone.json', which 'config:gone.json' names"),
        ({}, ("--batch", 0), "batch: expected at least 1, got 0"),
        (
            {},
            ("--model", ROOT / "examples" / "lora.yaml"),
            "model: expected a model beside the configuration .*run.yaml",
        ),
    ],
    ids=str,
)
def test_errors_name_the_training_configuration(training, settings, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(training(**settings), *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "run.yaml is not UTF-8 text"),
        (b"- a", "run.yaml must hold 'key: value' lines, got a list"),
        (b"a: [", "run.yaml is not valid YAML"),
        (None, "config: there is no file '.*run.yaml'"),
    ],
)
def test_what_is_no_training_configuration_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        plan(tmp_path / "run.yaml")


def test_without_a_training_configuration_the_batch_is_asked_for():
    for arguments, name in (((), "batch"), (("--batch", 2), "seq")):
        with pytest.raises(ValueError, match=f"{name}: expected --{name}, or a configuration"):
            plan("--model", "llama-3-8b", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "model: expected --model"),
        (("--hidden", 64), "both --hidden and --vocab"),
        (("--model", "llama-3-8b", "--hidden", 64, "--vocab", 100), "model: expected"),
        (("--model", "llama-9-8b"), "near it are .*llama-3-8b"),
        (("--hidden", 64, "--vocab", 100, "--batch", 0), "batch: expected at least 1, got 0"),
        (("--hidden", 64, "--vocab", 100, "--labelled", 1.5), "labelled: .*1.5"),
        (("--hidden", 64, "--vocab", 100, "--memory", 0), "memory: .*0"),
        (("--model", "llama-3-8b", "--gradient-accumulation", 0), "gradient_accumulation: expected at least 1, got 0"),
        (("--model", "llama-3-8b", "--processes", 0), "processes: expected at least 1, got 0"),
        (("--model", "llama-3-8b", "--processes", 4), "processes: expected --sharding beside --processes 4"),
        (("--model", "llama-3-8b", "--sharding", "fsdp2"), "--processes of at least 2 beside --sharding fsdp2, got 1"),
        (("--hidden", 64, "--vocab", 100, "--sharding", "fsdp2", "--processes", 2), "sharding: expected --model"),
        (("--model", "my-own"), "a config.json or its folder, or --hidden and --vocab instead"),
        (("--hidden", 64, "--vocab", 100, "--device", "xpu"), "memory: .*'xpu'.*--memory"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan("--batch", 2, "--seq", 16, *arguments)


def test_torch_alone_is_needed(run_python):
    run_python(
        "-c",
        "import sys\n"
        "for name in ('numpy', 'transformers', 'trl', 'tqdm', 'matplotlib'): sys.modules[name] = None\n"
        "from dpo_kernels.planning import command\n"
        "import argparse; parser = argparse.ArgumentParser(); command.add_arguments(parser)\n"
        "for name in ('qwen2.5-0.5b', 'gpt-oss-20b'):\n"
        "    command.run(parser.parse_args(['--model', name, '--batch', '2', '--seq', '64']))",
    )
