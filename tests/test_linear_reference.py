"""A reference that is summed as the policy is: to the bit, on every path; and lengths that the caller counts."""

import math

import pytest
import torch
from grids import IMPLS, covering

from dpo_kernels import linear_dpo_loss, linear_sequence_logps
from dpo_kernels.impl import paths
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.testing import head_inputs

ON_TORCH = pytest.mark.parametrize("impl", ["torch"], indirect=True)
ROW = 123 * 4  # bytes of one row of logits in fp32
GRADIENTS = {"none": (), "hidden": ("hidden",), "head": ("hidden", "weight", "bias"), "bias": ("hidden", "bias")}
OPTIONS = {
    "plain": {},
    "ld": {"ld_alpha": 0.3, "loss_type": "ipo"},
    "batch": {"loss_type": "aot"},
    "capped": {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.3},
    "weights": {"token_weights": torch.rand(4, 20, generator=torch.Generator().manual_seed(3))},
    "shifted": {"shift": True},
}


def leaves(inputs, gradients):
    tensors = {"hidden": inputs.hidden, "weight": inputs.weight, "bias": inputs.bias}
    return {name: t.detach().clone().requires_grad_(name in gradients) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("impl", "gradients", "chunk_bytes", "options", "dtype", "tile"),
    covering(
        IMPLS,
        list(GRADIENTS),
        [None, 14 * ROW + 123 * 31 * 4, 0],  # all pairs at once; one or two at a time, beside dW; again in the backward
        list(OPTIONS),
        [torch.float32, torch.bfloat16, torch.float16, torch.float64],
        [2**18, 1536],  # numbers: whole; several tiles in rows and columns
        full=2,
    ),
    indirect=["impl"],
)
def test_rewards_of_a_model_against_itself_are_zero(
    impl, gradients, chunk_bytes, options, dtype, tile, set_tile_bytes, monkeypatch
):
    set_tile_bytes(tile * max(4, dtype.itemsize))
    monkeypatch.setattr(paths, "MIN_ROWS", 1)
    inputs, given = head_inputs(4, 20, 31, 123, dtype=dtype), dict(OPTIONS[options])
    of_forward = {name: given[name] for name in given if name != "loss_type"}
    policy = leaves(inputs, GRADIENTS[gradients])
    of_reference = of_forward | {"gradients": GRADIENTS[gradients], "chunk_bytes": chunk_bytes}
    reference = linear_reference_logps(
        policy["hidden"], policy["weight"], inputs.labels, bias=policy["bias"],
        loss_type=given.get("loss_type", "sigmoid"), **of_reference,
    )  # fmt: skip
    assert not reference.logps.requires_grad
    found = linear_dpo_loss(
        policy["hidden"], policy["weight"], inputs.labels, reference.logps, bias=policy["bias"],
        chunk_bytes=chunk_bytes, **given,
    )  # fmt: skip
    assert torch.equal(found.logps, reference.logps) and torch.equal(found.num_tokens, reference.num_tokens)
    assert (found.chosen_rewards == 0).all() and (found.rejected_rewards == 0).all()
    if "loss_type" not in given:
        assert found.loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("impl", "gradients", "share"), covering(["torch", "cpu"], list(GRADIENTS), [1, 4]), indirect=["impl"]
)
def test_where_the_order_of_sums_shows(impl, gradients, share, monkeypatch):
    """Responses of one token, so many that some would differ; a vocabulary that is folded in several parts; groups of
    some pairs; and a last tile of two rows, which libraries multiply otherwise."""
    monkeypatch.setattr(paths, "MIN_ROWS", 1)
    inputs = head_inputs(2 * (31 * 8 + 1), 1, 31, 5003, labelled=1.0, logit_std=3.0)
    policy = leaves(inputs, GRADIENTS[gradients])
    operands, options = (policy["hidden"], policy["weight"], inputs.labels), {"bias": policy["bias"]}
    options["chunk_bytes"] = inputs.labels.numel() // share * 5003 * 4
    reference = linear_reference_logps(*operands, **options, gradients=GRADIENTS[gradients])
    found = linear_dpo_loss(*operands, reference.logps, **options)
    assert torch.equal(found.logps, reference.logps)


@ON_TORCH
def test_it_is_what_others_compute(impl):
    """But for rounding, wherever it takes its order from; and without a graph."""
    inputs = head_inputs(4, 20, 16, 123)
    expected = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias)
    for gradients in GRADIENTS.values():
        found = linear_reference_logps(
            inputs.hidden, inputs.weight, inputs.labels, bias=inputs.bias, gradients=gradients
        )
        torch.testing.assert_close(found.token_logps, expected.token_logps.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.logps, expected.logps.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(found.num_tokens, expected.num_tokens) and found.stats == {}


@ON_TORCH
def test_sequences_that_are_no_pairs_and_have_no_labels(impl):
    inputs = head_inputs(3, 5, 16, 123)
    inputs.labels[1] = -100
    found = linear_reference_logps(inputs.hidden, inputs.weight, inputs.labels, gradients=("hidden",))
    assert found.logps[1] == 0 and found.logps.shape == (3,)
    inputs.labels[:] = -100
    found = linear_reference_logps(inputs.hidden, inputs.weight, inputs.labels, gradients=("hidden",))
    assert (found.logps == 0).all()
    for options in ({"gradients": ("weight",)}, {"gradients": ("bias",)}, {"gradients": (), "ld_alpha": 0.5}):
        with pytest.raises(ValueError, match="hidden: expected an even number of sequences.* got 3"):
            linear_reference_logps(inputs.hidden, inputs.weight, inputs.labels, **options)
    two = inputs.hidden[:2], inputs.weight, inputs.labels[:2]
    assert (linear_reference_logps(*two, gradients=("hidden", "weight")).logps == 0).all()


@ON_TORCH
def test_weights_are_checked_as_the_policys(impl):
    inputs = head_inputs(2, 5, 16, 123)
    for weights, message in ((-torch.ones(2, 5), "got -1.0"), (torch.ones(2, 5) * math.nan, "got nan"), ([1], "list")):
        with pytest.raises(ValueError, match=f"token_weights: expected .*{message}"):
            linear_reference_logps(inputs.hidden, inputs.weight, inputs.labels, gradients=(), token_weights=weights)


@ON_TORCH
@pytest.mark.parametrize("gradients", ["hidden", ("hidden", "head"), ["Weight"]])
def test_unknown_gradients_are_named(impl, gradients):
    inputs = head_inputs(2, 3, 16, 123)
    with pytest.raises(ValueError, match=r"gradients: expected some of \['hidden', 'weight', 'bias'\], got"):
        linear_reference_logps(inputs.hidden, inputs.weight, inputs.labels, gradients=gradients)


@pytest.mark.parametrize("gradients", list(GRADIENTS.values()))
def test_hidden_states_that_are_not_finite(impl, gradients):
    inputs = head_inputs(2, 6, 16, 123)
    with torch.no_grad():
        inputs.hidden[0, torch.nonzero(inputs.labels[0] != -100)[0]] = math.nan
    arguments = inputs.hidden, inputs.weight, inputs.labels
    with pytest.raises(ValueError, match="hidden: expected finite values.*sequence 0"):
        linear_reference_logps(*arguments, gradients=gradients)
    found = linear_reference_logps(*arguments, gradients=gradients, check_hidden=False).logps
    assert found.isnan().tolist() == [True, False]
    loss = linear_dpo_loss(*arguments, inputs.ref_logps, check_hidden=False).loss
    assert loss.isnan()
    with pytest.raises(ValueError, match="hidden: expected finite values"):
        linear_dpo_loss(*arguments, inputs.ref_logps)


@ON_TORCH
@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm", "sigmoid", "sft"])
@pytest.mark.parametrize("chunk_bytes", [None, 14 * 2 * ROW, 0])
def test_lengths_are_what_losses_divide_by(impl, loss_type, chunk_bytes):
    """Of "sft" they are not: that is a mean over what is scored."""
    inputs = head_inputs(4, 20, 16, 123, dtype=torch.float64)
    counted = (inputs.labels != -100).sum(1)
    arguments = inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps
    options = {"loss_type": loss_type, "chunk_bytes": chunk_bytes}
    plain, same, more = (
        linear_dpo_loss(*arguments, **options, lengths=lengths).losses for lengths in (None, counted, counted + 1)
    )
    assert torch.equal(plain, same) and torch.equal(plain, more) == (loss_type in ("sigmoid", "sft"))
    logps = linear_sequence_logps(*arguments[:3]).logps.detach() - inputs.ref_logps
    if loss_type == "ipo":
        chosen, rejected = (logps / (counted + 1).clamp(min=1)).chunk(2)
        torch.testing.assert_close(more, (chosen - rejected - 5) ** 2)


@ON_TORCH
def test_lengths_of_the_wrong_shape_are_named(impl):
    inputs = head_inputs(4, 5, 16, 123)
    with pytest.raises(ValueError, match=r"lengths: expected shape \[4\], got \[2\]"):
        linear_dpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps, lengths=torch.ones(2))
