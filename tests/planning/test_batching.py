"""That the plan is right of batches in which a prompt is there once, or which are not padded: what is computed of them
is what the collator makes, and what they take is within the tolerances of test_planning.py."""

import argparse
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from small_steps import KINDS, SMALL, adapted, measured_step, model_of

from dpo_kernels import linear_dpo_loss
from dpo_kernels.cli import run_plan
from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.packing import PackedCollator
from dpo_kernels.models import layouts, segments
from dpo_kernels.models.head import LMHead
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.models.segments import sees
from dpo_kernels.models.shapes import ModelShape, find_shape
from dpo_kernels.planning import batches, command
from dpo_kernels.planning import step as planning
from dpo_kernels.planning.batches import BATCHING, PADDED, batching_of, measured_batching, measured_share
from dpo_kernels.testing import allocated
from dpo_kernels.training.policy import hidden_of

IN_BLOCKS = BATCHING[2:]
# tokens of prompt, chosen and rejected: long prompts and short ones, as real pairs have them
LENGTHS = ((40, 9, 22), (5, 43, 12), (21, 17, 19))
LONGEST = 62


def pairs_of(lengths, vocab):
    draw = torch.Generator().manual_seed(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(3, vocab, (size,), generator=draw) for name, size in zip(names, sizes, strict=True)}
        for sizes in lengths
    ]


def batch_of(name, lengths=LENGTHS, vocab=100):
    collate = PackedCollator(0, packed=name != "shared_prefix", shared_prefix=name != "padding_free")
    return collate(pairs_of(lengths, vocab))


def step_of(name, shape, dtype, lengths=LENGTHS, **options):
    """As its batch is: T is that of its longest sequence."""
    longest = max(prompt + max(responses) for prompt, *responses in lengths)
    labelled = sum(chosen + rejected for _, chosen, rejected in lengths) / (2 * len(lengths) * longest)
    batching = batching_of(name, lengths, longest)
    return planning.Step(
        shape.hidden, shape.vocab, len(lengths), longest, labelled, shape, dtype, batching=batching, lora_r=4, **options
    )


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_what_is_computed_is_what_the_collator_makes(name):
    step, batch = step_of(name, SMALL, torch.float32), batch_of(name)
    padded = PairCollator(0)(pairs_of(LENGTHS, 100))
    assert step.positions == padded["input_ids"].numel() and step.seq == LONGEST
    assert step.computed == batch["input_ids"].numel()
    assert step.tokens == batch["num_labelled"] == padded["num_labelled"]
    # of a block all scores are computed, those above the diagonal too, and the triangle is what `sees` has
    layout = batch["layout"]
    real = batch["attention_mask"].sum().item()
    seen = sees(layout).sum().item() - (layout[..., 0].numel() - real)
    own = [size for sizes in LENGTHS for size in sizes]
    if name == "padding_free":
        own = [prompt + response for prompt, *responses in LENGTHS for response in responses]
    triangles = sum(size * (size - 1) // 2 for size in own)
    assert step.batching.attended * step.positions * step.seq == pytest.approx(seen + triangles)
    assert (step.batching.copied == step.batching.masked == 0) == (name == "padding_free")


def test_shares_of_real_pairs_are_the_most_of_any_batch():
    pairs, seq = 4, 1024
    found = {name: measured_batching(name, pairs, seq) for name in BATCHING[1:]}
    assert found["concatenated"] == PADDED
    assert found["packed_shared_prefix"].computed < found["shared_prefix"].computed <= 1
    assert found["packed_shared_prefix"].computed < found["padding_free"].computed <= 1
    every = batches.measured_batches(pairs, seq)
    sizes = [sum(prompt + chosen + rejected for prompt, chosen, rejected in lengths) for lengths in every]
    assert found["packed_shared_prefix"].computed == pytest.approx(max(sizes) / (2 * pairs * seq))
    # where no pair is as long as may be, its length is that of the longest pair
    assert measured_batching("padding_free", pairs, 100_000) == measured_batching("padding_free", pairs, 99_999)
    for name in BATCHING[1:]:
        for size in (2, 3, 64):
            assert measured_share(2, size) * (size - 1) <= measured_batching(name, 2, size).computed * size


# seldom a surprise where the others have none
FEW = [pytest.param(name, marks=[pytest.mark.full] * (name == "padding_free")) for name in IN_BLOCKS]


def measured_activations(kind, step):
    """Bytes that a forward leaves, with masks that are not known yet."""
    model = model_of(kind, step.shape, step.dtype)
    use_layouts(model)
    model = adapted(model, step)
    head, batch = LMHead.from_model(model), batch_of(step.batching.name)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast is not None):
            return hidden_of(head, batch | {"layout": batch["layout"].clone()})[0]

    forward()
    return allocated(forward).left


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of adapters
@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize(
    ("kind", "dtype", "mixed", "train"),
    [
        ("llama", "bfloat16", "no", "full"),
        ("qwen2", "float32", "no", "full"),
        ("llama", "float32", "bf16", "full"),
        ("gemma2", "bfloat16", "no", "full"),
        ("gemma2", "float32", "no", "full"),
        ("experts", "float32", "no", "full"),
        ("llama", "bfloat16", "no", "lora"),
        ("llama", "float32", "no", "lora"),
        ("llama", "float32", "bf16", "lora"),
    ],
)
def test_activations(kind, dtype, mixed, train, name):
    shape = replace(SMALL, **KINDS[kind][2])
    step = step_of(name, shape, getattr(torch, dtype), autocast=command.AUTOCAST[mixed], train=train)
    kept, _ = planning.activation_bytes(step, shape)
    assert kept == pytest.approx(measured_activations(kind, step), rel=0.05)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_activations_with_checkpointing(kind, name):
    shape = replace(SMALL, **KINDS[kind][2])
    step = step_of(name, shape, torch.bfloat16, checkpointing=True)
    kept, again = planning.activation_bytes(step, shape)
    assert kept == pytest.approx(measured_activations(kind, step), rel=0.25)
    whole, _ = planning.activation_bytes(replace(step, checkpointing=False), shape)
    assert kept + shape.layers * again == pytest.approx(whole, rel=0.25)


@pytest.mark.parametrize("name", IN_BLOCKS)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_masks(kind, name):
    """To the byte. Rows as short as these have small ones, beside activations."""
    shape = replace(SMALL, **KINDS[kind][2])
    step, batch = step_of(name, shape, torch.bfloat16), batch_of(name)
    model = model_of(kind, shape, step.dtype)
    use_layouts(model)
    hidden_of(LMHead.from_model(model), batch)
    padding = (1 - batch["attention_mask"]).sum().item() * step.dtype.itemsize
    made = sum(mask.nbytes for mask in segments._known(batch["layout"])._masks.values())
    assert planning.mask_bytes(step, shape) == made - padding * (kind == "gemma2")
    on_a_gpu = planning.mask_bytes(replace(step, device=torch.device("cuda")), shape)
    assert on_a_gpu == (0 if kind == "llama" else made - padding)


class LikeFlexAttention(torch.autograd.Function):
    """Keeps what that keeps; what comes out of it does not matter here."""

    @staticmethod
    def forward(ctx, query, key, value):
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out.clone()  # else it is this very tensor that is given on

    @staticmethod
    def backward(ctx, dout):
        return tuple(torch.zeros_like(t) for t in ctx.saved_tensors[:3])


def test_activations_as_on_a_gpu(monkeypatch):
    """Where no mask is added, nothing is copied, and keys and values are not repeated."""
    monkeypatch.setattr(segments.Tensor, "repeat_interleave", lambda t, groups, dim: t)
    monkeypatch.setattr(
        segments, "_in_blocks", lambda q, k, v, *rest, **options: LikeFlexAttention.apply(q, k, v).transpose(1, 2)
    )
    monkeypatch.setattr(layouts, "_difference", lambda *arguments: "")
    step = step_of("packed_shared_prefix", SMALL, torch.bfloat16, device=torch.device("cuda"))
    kept, _ = planning.activation_bytes(step, SMALL)
    assert kept == pytest.approx(measured_activations("llama", step), rel=0.02)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("dtype", "mixed", "train", "accumulation"),
    [
        ("bfloat16", "no", "full", 1),
        ("float32", "no", "full", 2),
        ("float32", "bf16", "full", 1),
        ("float32", "no", "lora", 2),
    ],
)
def test_a_whole_step(dtype, mixed, train, accumulation, checkpointing, name):
    shape = ModelShape(128, 2000, 6, 384, 4, 2, 32)
    options = {"train": train, "checkpointing": checkpointing, "accumulation": accumulation}
    step = step_of(name, shape, getattr(torch, dtype), autocast=command.AUTOCAST[mixed], **options)
    model = model_of("llama", shape, step.dtype)
    use_layouts(model)
    weight = model.get_output_embeddings().weight
    model = adapted(model, step)
    head, batch = LMHead.from_model(model), batch_of(name, vocab=shape.vocab)

    def loss():
        hidden, _ = hidden_of(head, batch | {"layout": batch["layout"].clone()})
        return linear_dpo_loss(
            hidden, weight, batch["labels"], torch.zeros(2 * step.pairs), predictors=batch["predictors"]
        ).loss

    total, _, _ = measured_step(step, model, loss)
    assert planning.footprint(step, "dpo_kernels")["total"] == pytest.approx(total, rel=0.1)


def test_others_are_padded_and_more_pairs_fit():
    step = planning.Step(2048, 128256, 4, 1024, 0.3, find_shape("llama-3.2-1b"), device=torch.device("cuda"))
    packed = replace(step, batching=measured_batching("packed_shared_prefix", 4, 1024))
    memory = 60 * 2**30
    for way in ("eager", "TRL"):
        assert planning.footprint(packed, way) == planning.footprint(step, way)
        assert planning.largest_batch(packed, way, memory) == planning.largest_batch(step, way, memory)
    most = planning.largest_batch(packed, "dpo_kernels", memory)
    assert most > planning.largest_batch(step, "dpo_kernels", memory)
    totals = [planning.footprint(replace(packed, pairs=most + more), "dpo_kernels")["total"] for more in (0, 1)]
    assert totals[0] <= memory < totals[1]


@pytest.mark.parametrize(
    ("batching", "message"),
    [
        (
            "packed_shared_prefix",
            "batching: expected a Batching, as measured_batching gives, got 'packed_shared_prefix'",
        ),
        (PADDED._replace(computed=1.5), "batching: expected shares in .0, 1., got Batching"),
        (
            PADDED._replace(computed=0.4),
            "labelled: expected at most 0.4, the share of positions that are computed with",
        ),
    ],
    ids=str,
)
def test_batching_that_cannot_be(batching, message):
    with pytest.raises(ValueError, match=message):
        planning.Step(64, 100, 1, 8, 0.5, batching=batching)
    for name in ("auto", "packed"):
        with pytest.raises(ValueError, match=f"batching: expected one of .*, got '{name}'"):
            measured_batching(name, 4, 64)


# The command


def plan(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return run_plan(parser.parse_args([*map(str, arguments)]))


@pytest.fixture
def planned(tmp_path, capsys):
    """A function: what the command writes and prints."""

    def run(*arguments):
        out = tmp_path / "plan.json"
        sizes = ("--memory", 80, "--json", out, "--batch", 4, "--seq", 512)
        assert plan(*arguments, *sizes) == 0
        return json.loads(out.read_text()), capsys.readouterr().out

    return run


def test_command(planned):
    model = ("--model", "qwen2.5-0.5b", "--device", "cuda")
    padded, text = planned(*model)
    assert padded["step"]["batching"] == PADDED._asdict() and "of these positions" not in text
    assert set(padded["computed_positions"].values()) == {padded["positions"]} == {4096}
    found, text = planned(*model, "--batching", "packed_shared_prefix")
    ours = found["computed_positions"].pop("dpo_kernels")
    assert set(found["computed_positions"].values()) == {4096} and found["positions"] == 4096
    assert f"packed_shared_prefix: {ours} ({ours / 4096:.0%}) of these positions are" in text
    assert "FlexAttention" in text and "eager and TRL compute all" in text and "batching auto" not in text
    assert found["labelled_positions"] == padded["labelled_positions"]
    assert ours == round(found["step"]["batching"]["computed"] * 4096)
    assert found["total"]["TRL"] == padded["total"]["TRL"]
    assert found["total"]["dpo_kernels"]["activations"] < padded["total"]["dpo_kernels"]["activations"]
    assert found["largest_batch"]["dpo_kernels"] > padded["largest_batch"]["dpo_kernels"]
    assert "that of blocks" in planned("--model", "gemma-2-2b", "--batching", "shared_prefix", "--device", "cuda")[1]
    assert "that of blocks" in planned(*model[:2], "--batching", "padding_free", "--device", "cpu")[1]
    _, text = planned("--hidden", 64, "--vocab", 1000, "--batching", "shared_prefix")
    assert "shared_prefix: " in text and "whole step" not in text


def test_auto_is_the_last_where_layers_were_measured(planned):
    found, text = planned("--model", "qwen2.5-0.5b", "--batching", "auto")
    assert found["step"]["batching"]["name"] == "packed_shared_prefix"
    assert "batching auto: packed_shared_prefix, and what the model allows is asked when it is trained" in text
    found, text = planned("--model", "gpt-oss-20b", "--batching", "auto")
    assert found["step"]["batching"]["name"] == "concatenated" and "batching auto: concatenated" in text


def test_a_training_configuration_says_it_too(tmp_path, planned):
    (tmp_path / "run.yaml").write_text("model: llama-3.2-1b\nbatching: shared_prefix\n")
    assert planned(tmp_path / "run.yaml")[0]["step"]["batching"]["name"] == "shared_prefix"
    found, _ = planned(tmp_path / "run.yaml", "--batching", "concatenated")
    assert found["step"]["batching"]["name"] == "concatenated"


def test_wrong_arguments(capsys):
    sizes = ("--hidden", 64, "--vocab", 100, "--batch", 2, "--seq", 8192)
    with pytest.raises(ValueError, match="labelled: expected at most 0..*with shared_prefix, got 0.99"):
        plan(*sizes, "--batching", "shared_prefix", "--labelled", 0.99)
    with pytest.raises(SystemExit):
        plan(*sizes, "--batching", "packed")
    assert "choose from" in capsys.readouterr().err
