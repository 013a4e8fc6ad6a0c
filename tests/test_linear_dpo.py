"""The fused op equals the functions it is composed of, on every path and for every loss."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from grids import IMPLS, covering
from torch.utils._pytree import tree_leaves

from dpo_kernels import dispatch, dpo_loss, linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.grouped_loss import LossSettings
from dpo_kernels.impl import paths
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.losses import BATCH_LOSSES, LOSSES, length_desensitized_weights, wpo_weights
from dpo_kernels.testing import assert_within_budget, head_inputs

pytestmark = pytest.mark.usefixtures("impl")
SMOOTHED = {"cdpo": 0.1, "robust": 0.1, "exo_pair": 0.1}
ROW = 123 * 8  # bytes of one row of fp64 logits
# all pairs at once; one pair or two at a time; none fits, so the logits are computed again
CHUNKS = {"one group": None, "groups": 14 * ROW, "recompute": 0}


def eager(
    inputs, *, loss_type="sigmoid", ld_alpha=None, use_weighting=False, shift=False, token_weights=None, **options
):
    """The losses of the pairs from whole logits, the pieces put together by hand."""
    transform = {k: options.pop(k) for k in ("logit_scale", "softcap", "temperature") if k in options}
    logits = eager_logits(inputs.hidden, inputs.weight, bias=inputs.bias, **transform)
    labels = inputs.labels
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    token_logps = eager_token_logps(logits, labels)
    weighted = token_logps if token_weights is None else token_logps * token_weights
    plain = weighted.sum(1)
    logps, pair_weights = plain, None
    if ld_alpha is not None:
        logps = (weighted * length_desensitized_weights(labels, ld_alpha)).sum(1)
    if use_weighting:
        pair_weights = wpo_weights(token_logps, (2 * logits.log_softmax(-1)).logsumexp(-1), labels)
    chosen_lengths, rejected_lengths = (labels != -100).sum(1).chunk(2)
    return dpo_loss(
        *logps.chunk(2),
        *inputs.ref_logps.to(logps.dtype).chunk(2),
        loss_type=loss_type,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        sft_chosen_logps=plain.chunk(2)[0],
        pair_weights=pair_weights,
        **options,
    ), logps


@pytest.mark.parametrize(
    ("dtype", "hidden_size", "tile"),
    covering(
        [torch.float64, torch.float32, torch.bfloat16],
        [16, 31],  # an odd size leaves blocks of bf16 dW unaligned for fp32
        [2**18, 1536],  # numbers: whole; several tiles in rows and columns
    ),
)
def test_logits_kept_in_the_memory_of_dw(dtype, hidden_size, tile, set_tile_bytes, monkeypatch):
    """Some rows there and the others in the buffer: the same loss and gradients as with the logits computed again."""
    set_tile_bytes(tile * max(4, dtype.itemsize))
    monkeypatch.setattr(paths, "MIN_ROWS", 1)
    inputs = head_inputs(4, 20, hidden_size, 123, dtype=dtype)
    assert hidden_size < (inputs.labels != -100).sum()
    wanted = (inputs.hidden, inputs.weight, inputs.bias)
    once, again = fused(inputs), fused(inputs, chunk_bytes=0)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(once.logps, again.logps, rtol=tolerance, atol=0)
    for mine, other in zip(
        torch.autograd.grad(once.loss, wanted), torch.autograd.grad(again.loss, wanted), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@pytest.mark.parametrize(
    "device, n, kept, rows",
    [
        ("cpu", 2000, 2000, 1024),
        ("cpu", 8192, 1024, 1024),
        ("cuda", 2000, 2000, 2000),
        ("cuda", 2048, 0, 2048),  # one more than there is room for
        ("cuda", 8192, 0, 8192),
    ],
)
def test_which_logits_are_kept_in_the_memory_of_dw(device, n, kept, rows):
    """On a GPU all or none: in slices of rows, dW would be summed in memory."""
    weight = SimpleNamespace(shape=(128256, 4096), dtype=torch.bfloat16, device=torch.device(device))
    found = paths._grouped_blocks(dispatch.load("torch"), n, weight, torch.float32, alone=True)
    assert (found[0], found[2]) == (rows, kept)


def fused(inputs, **options):
    return linear_dpo_loss(inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps, bias=inputs.bias, **options)


def check(inputs, chunk_bytes, pair_weights=None, **options):
    out = fused(inputs, chunk_bytes=chunk_bytes, pair_weights=pair_weights, **options)
    if pair_weights is not None:
        lengths = (inputs.labels != -100).sum(1).chunk(2)[0]
        options = {"mean_chosen_length": (lengths * pair_weights).sum() / pair_weights.sum()} | options
    expected, logps = eager(inputs, **options)
    mean = (
        expected.losses.mean() if pair_weights is None else (expected.losses * pair_weights).sum() / pair_weights.sum()
    )
    torch.testing.assert_close(out.loss, mean)
    torch.testing.assert_close(out.losses, expected.losses.detach())
    torch.testing.assert_close(out.logps, logps.detach())
    torch.testing.assert_close(out.chosen_rewards, expected.chosen_rewards)
    torch.testing.assert_close(out.rejected_rewards, expected.rejected_rewards)
    labels = inputs.labels[:, 1:] if options.get("shift") else inputs.labels
    assert torch.equal(out.num_tokens, (labels != -100).sum(1))
    *tensors, stats = out
    assert [t.requires_grad for t in tensors] == [True, True, True, False, False, False] and stats == {}
    wanted = [t for t in (inputs.hidden, inputs.weight, inputs.bias) if t.requires_grad]
    ours = torch.autograd.grad(out.loss * 3, wanted)
    for mine, other in zip(ours, torch.autograd.grad(mean * 3, wanted), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("impl", "loss_type", "chunks"),
    covering(IMPLS, [*LOSSES, ("sigmoid", "sft", "bco_pair")], list(CHUNKS), full=2),
    indirect=["impl"],
)
def test_every_loss(loss_type, chunks):
    inputs, chunk_bytes = head_inputs(6, 9, dtype=torch.float64), CHUNKS[chunks]
    options = {"label_smoothing": SMOOTHED[loss_type]} if loss_type in SMOOTHED else {}
    if isinstance(loss_type, tuple):
        options["loss_weights"] = (0.8, 1.0, 0.2)
    check(inputs, chunk_bytes, loss_type=loss_type, beta=0.3, **options)


OPTIONS = [
    {"ld_alpha": 0.3},
    {"use_weighting": True},
    {"ld_alpha": 0.0, "use_weighting": True, "loss_type": ("sigmoid", "sft")},
    {"loss_type": ("sigmoid", "sft"), "mean_chosen_length": 7.5},
    {"rpo_alpha": 0.7},
    {"rpo_alpha": 1.0, "ld_alpha": 0.4, "use_weighting": True, "loss_type": "hinge"},
    {"shift": True},
    {"logit_scale": 0.5, "softcap": 3.0, "temperature": 1.5},
    *({"f_divergence": name} for name in ("forward_kl", "js", "alpha")),
]


@pytest.mark.parametrize(
    ("impl", "options", "chunks", "frozen"),
    covering(IMPLS, OPTIONS, list(CHUNKS), [False, True]),
    indirect=["impl"],
)
def test_options(options, chunks, frozen):
    inputs, chunk_bytes = head_inputs(6, 9, dtype=torch.float64), CHUNKS[chunks]
    inputs.weight.requires_grad_(not frozen)
    inputs.bias.requires_grad_(not frozen)
    check(inputs, chunk_bytes, **options)


MEANS_OVER_PAIRS = [name for name in LOSSES if name not in BATCH_LOSSES]
WEIGHTS = {
    "pairs": {"pair_weights": torch.tensor([0.3, 2.5, 1.0], dtype=torch.float64)},
    "tokens": {"token_weights": torch.linspace(0, 3, 6 * 9, dtype=torch.float64).view(6, 9)},
}


@pytest.mark.parametrize(
    ("impl", "loss_type", "chunks", "weights", "frozen"),
    covering(
        IMPLS,
        [*MEANS_OVER_PAIRS, ("sigmoid", "sft", "ipo")],
        list(CHUNKS),
        [*WEIGHTS, "both"],
        [False, True],
        full=2,
    ),
    indirect=["impl"],
)
def test_weights_of_pairs_and_tokens(loss_type, chunks, weights, frozen):
    inputs = head_inputs(6, 9, dtype=torch.float64)
    inputs.weight.requires_grad_(not frozen)
    inputs.bias.requires_grad_(not frozen)
    given = WEIGHTS[weights] if weights in WEIGHTS else WEIGHTS["pairs"] | WEIGHTS["tokens"]
    given = {name: value.to(inputs.hidden.device) for name, value in given.items()}
    smoothing = {"label_smoothing": SMOOTHED[loss_type]} if loss_type in SMOOTHED else {}
    check(inputs, CHUNKS[chunks], loss_type=loss_type, beta=0.3, **given, **smoothing)


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "options",
    [
        {"ld_alpha": 0.3},
        {"use_weighting": True},
        {"shift": True},
        {"loss_type": ("sigmoid", "sft"), "mean_chosen_length": 7.5},
        {"rpo_alpha": 0.7},
        {"rpo_alpha": 1.0, "ld_alpha": 0.4, "use_weighting": True, "loss_type": "hinge"},
        {"ld_alpha": 0.5, "use_weighting": True, "loss_type": ("sigmoid", "sft")},
    ],
    ids=str,
)
def test_weights_beside_other_options(chunk_bytes, options):
    weights = {name: value.to(torch.get_default_device()) for each in WEIGHTS.values() for name, value in each.items()}
    check(head_inputs(6, 9, dtype=torch.float64), chunk_bytes, **weights, **options)


def gradients(inputs, **options):
    out = fused(inputs, **options)
    return out, torch.autograd.grad(out.loss, (inputs.hidden, inputs.weight, inputs.bias))


@pytest.mark.parametrize(
    ("impl", "loss_type", "chunk_bytes"),
    covering(IMPLS, [*MEANS_OVER_PAIRS, ("sigmoid", "sft")], list(CHUNKS.values()), full=2),
    indirect=["impl"],
)
def test_weights_say_how_often_a_pair_is_there(loss_type, chunk_bytes):
    """Weights 1, 2 and 0: the same loss and gradients as of the first pair, and twice the second."""
    inputs = head_inputs(6, 9, dtype=torch.float64)
    options = {"loss_type": loss_type, "chunk_bytes": chunk_bytes}
    options |= {"label_smoothing": SMOOTHED[loss_type]} if loss_type in SMOOTHED else {}
    weighted, ours = gradients(inputs, pair_weights=torch.tensor([1, 2, 0]), **options)
    rows = torch.tensor([0, 1, 1, 3, 4, 4])
    hidden, labels, ref_logps = (t[rows] for t in (inputs.hidden, inputs.labels, inputs.ref_logps))
    repeated = fused(inputs._replace(hidden=hidden, labels=labels, ref_logps=ref_logps), **options)
    torch.testing.assert_close(weighted.loss, repeated.loss)
    theirs = torch.autograd.grad(repeated.loss, (inputs.hidden, inputs.weight, inputs.bias))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    unweighted = fused(inputs, **options | {"mean_chosen_length": float((labels[:3] != -100).sum()) / 3})
    for name in ("losses", "logps", "num_tokens", "chosen_rewards", "rejected_rewards"):  # these are each pair's own
        torch.testing.assert_close(getattr(weighted, name), getattr(unweighted, name))


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_a_pair_without_weight_is_as_good_as_absent(chunk_bytes):
    """Even where its reference is not a number; and where no pair has any, there is no loss and no gradient."""
    inputs = head_inputs(6, 9, dtype=torch.float64)
    for broken in (float("nan"), -float("inf")):
        inputs.ref_logps[[1, 4]] = broken
        out, grads = gradients(inputs, pair_weights=torch.tensor([1.0, 0.0, 3.0]), chunk_bytes=chunk_bytes)
        assert out.loss.isfinite() and not out.chosen_rewards[1].isfinite()
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
        assert not grads[0][[1, 4]].any()
        out, grads = gradients(inputs, pair_weights=torch.zeros(3), loss_type="sft", chunk_bytes=chunk_bytes)
        assert out.loss == 0 and not any(grad.any() for grad in grads)
    lengths = (inputs.labels[:3] != -100).sum(1).double()
    torch.testing.assert_close(out.losses, -out.logps[:3] / lengths.mean())  # as without weights


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1, 3, 2]),
        torch.tensor([1, 3, 2], dtype=torch.int8),
        torch.tensor([0.5, 1.5, 1.0], dtype=torch.bfloat16),
        torch.tensor([1e4, 3e4, 2e4], dtype=torch.float16),
        torch.tensor([0.5e308, 1.5e308, 1e308], dtype=torch.float64),  # whose sum is infinite
        torch.tensor([1e-300, 3e-300, 2e-300], dtype=torch.float64),  # 0 in fp32
        torch.tensor([1.0, 9, 3, 9, 2, 9])[::2],
    ],
    ids=lambda weights: str(weights.tolist()),
)
def test_only_the_ratios_of_weights_matter(chunk_bytes, weights):
    inputs = head_inputs(6, 9)
    expected = fused(inputs, pair_weights=torch.tensor([1.0, 3.0, 2.0]), chunk_bytes=chunk_bytes).loss
    torch.testing.assert_close(fused(inputs, pair_weights=weights, chunk_bytes=chunk_bytes).loss, expected)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_token_weights_need_no_care_where_nothing_is_labelled(chunk_bytes):
    inputs = head_inputs(6, 9)
    unlabelled = inputs.labels == -100
    plain, ours = gradients(inputs, chunk_bytes=chunk_bytes)
    for weights in (
        torch.ones(6, 9, dtype=torch.int64),
        ~unlabelled,
        torch.ones(6, 9).masked_fill(unlabelled, torch.nan),
    ):
        weighted, theirs = gradients(inputs, token_weights=weights, chunk_bytes=chunk_bytes)
        torch.testing.assert_close(weighted.loss, plain.loss)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_weights_compile():
    inputs, pairs, tokens = head_inputs(6, 9), torch.tensor([1.0, 0.0, 2.0]), torch.rand(6, 9)

    def loss(hidden, weight, pairs, tokens):
        return linear_dpo_loss(
            hidden, weight, inputs.labels, inputs.ref_logps, pair_weights=pairs, token_weights=tokens, loss_type="ipo"
        ).loss

    arguments = (inputs.hidden, inputs.weight, pairs, tokens)
    compiled, eagerly = torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments), loss(*arguments)
    torch.testing.assert_close(compiled, eagerly)
    wanted = (inputs.hidden, inputs.weight)
    for mine, other in zip(torch.autograd.grad(compiled, wanted), torch.autograd.grad(eagerly, wanted), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_weights_are_checked_in_compiled_calls():
    inputs = head_inputs(6, 9)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="pair_weights: expected finite numbers of at least 0"):
        compiled(inputs, pair_weights=torch.tensor([1.0, -1.0, 1.0]))


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_weights_are_checked():
    inputs, ones, one = head_inputs(6, 9), torch.ones(3), torch.ones(6, 9)
    labelled = torch.nonzero(inputs.labels != -100)[3].tolist()
    odd = one.clone()
    odd[tuple(labelled)] = -0.5
    where = f"sequence {labelled[0]}, position {labelled[1]}"
    cases = [
        ({"pair_weights": torch.ones(6)}, r"pair_weights: expected shape \[3\], got \[6\]"),
        ({"pair_weights": torch.ones(3, 1)}, r"pair_weights: expected shape \[3\], got \[3, 1\]"),
        ({"pair_weights": torch.ones(())}, r"pair_weights: expected shape \[3\], got \[\]"),
        ({"pair_weights": [1.0, 1.0, 1.0]}, "pair_weights: expected a tensor or None, got list"),
        ({"pair_weights": 1.0}, "pair_weights: expected a tensor or None, got float"),
        (
            {"pair_weights": torch.tensor([1.0, -1.0, 1.0])},
            r"finite numbers of at least 0, got -1.0 for pair 1 \(1 such",
        ),
        ({"pair_weights": torch.tensor([1, -1, -1])}, r"finite numbers of at least 0, got -1 for pair 1 \(2 such"),
        ({"pair_weights": torch.tensor([1.0, 1.0, torch.nan])}, "pair_weights: expected finite.*got nan for pair 2"),
        ({"pair_weights": torch.tensor([torch.inf, 1.0, 1.0])}, "pair_weights: expected finite.*got inf for pair 0"),
        ({"pair_weights": ones.to(torch.complex64)}, "pair_weights: expected floating-point .* got torch.complex64"),
        ({"pair_weights": ones.to(torch.uint16)}, "pair_weights: expected floating-point .* got torch.uint16"),
        ({"pair_weights": ones.to_sparse()}, "pair_weights: expected .* dense, got torch.sparse_coo"),
        ({"lengths": -torch.ones(6)}, "lengths: expected finite numbers of at least 0, got -1.0 for sequence 0"),
        ({"lengths": ones.repeat(2) * torch.nan}, "lengths: expected finite numbers of at least 0, got nan"),
        ({"pair_weights": ones.to("meta")}, "pair_weights: expected device .*that of the others, got meta"),
        ({"pair_weights": ones.clone().requires_grad_()}, "pair_weights: expected weights that need no gradient"),
        ({"pair_weights": ones, "loss_type": "aot"}, "pair_weights: expected None for loss_type 'aot', which sorts"),
        (
            {"pair_weights": ones, "loss_type": ("sigmoid", "aot_unpaired")},
            "pair_weights: expected None .*aot_unpaired",
        ),
        ({"token_weights": one[:, 1:]}, r"token_weights: expected shape \[6, 9\], got \[6, 8\]"),
        ({"token_weights": one[:3]}, r"token_weights: expected shape \[6, 9\], got \[3, 9\]"),
        ({"token_weights": odd}, f"token_weights: expected finite numbers of at least 0, got -0.5 for {where}"),
        ({"token_weights": one * torch.inf}, "token_weights: expected finite numbers of at least 0, got inf"),
        ({"token_weights": one.clone().requires_grad_()}, "token_weights: expected weights that need no gradient"),
    ]
    for options, message in cases:
        for num_labelled in (None, int((inputs.labels != -100).sum())):
            with pytest.raises(ValueError, match=message):
                fused(inputs, num_labelled=num_labelled, **options)
    with torch.no_grad():  # where none goes through anything
        assert fused(inputs, pair_weights=ones.clone().requires_grad_()).loss.isfinite()


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("use_weighting", [False, True])  # which needs one of them for itself
def test_stats(chunk_bytes, use_weighting):
    inputs = head_inputs(6, 9, dtype=torch.float64)
    shared = {"bias": inputs.bias, "softcap": 3.0, "shift": True}
    options = {"chunk_bytes": chunk_bytes, "use_weighting": use_weighting, "softcap": 3.0, "shift": True}
    loss = fused(inputs, **options).loss
    for stats in (("entropy", "is_top1", "mean_logit"), ("log_sum_sq_probs", "entropy"), ("is_top1",) * 2, ()):
        expected = linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, stats=stats, **shared).stats
        out = fused(inputs, stats=stats, **options)
        assert ("GroupedLoss" in out.loss.grad_fn.name()) == (chunk_bytes != 0)
        assert list(out.stats) == list(dict.fromkeys(stats))
        for name in stats:
            assert not out.stats[name].requires_grad
            torch.testing.assert_close(out.stats[name], expected[name])
        torch.testing.assert_close(out.loss, loss)
    with pytest.raises(ValueError, match="stats: expected a sequence of names"):
        fused(inputs, stats=("entropy", "variance"))


# of all, and of parts
@pytest.mark.parametrize("chunk_bytes", [None, 14 * ROW])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pairs": [(0, 1), (2, 1), (0, 3), (4, 5)]},  # some in two pairs, on either side
        {"ld_alpha": 0.3},
        {"token_weights": torch.arange(54.0).view(6, 9) % 7},
    ],
    ids=["plain", "pairs", "ld_alpha", "token_weights"],
)
def test_what_is_compared_without_a_graph_is_what_one_does(impl, chunk_bytes, options, monkeypatch):
    """To the bit, but for the kernels of halves."""
    given = {"loss_type": "sigmoid", "chunk_bytes": chunk_bytes, **options}
    found = []
    for _ in range(2):
        inputs = head_inputs(6, 9)
        out = fused(inputs, **given)
        out.loss.backward()
        rewards = (out.chosen_rewards, out.rejected_rewards)
        found.append([out.loss, out.losses, out.logps, *rewards, inputs.hidden.grad, inputs.weight.grad])
        monkeypatch.setattr(LossSettings, "is_logistic", False)
    has_kernel = not options.keys() & {"pairs", "ld_alpha"} and impl is not dispatch.load("torch")
    exact = {"rtol": 1e-6, "atol": 1e-7} if has_kernel else {"rtol": 0, "atol": 0}
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, **exact)


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_pairs_without_labels(chunk_bytes):
    inputs = head_inputs(8, 9, 15, dtype=torch.float64)  # more rows than dW has a place for: in groups where asked
    # first and last pair empty; in the second only the rejected response
    inputs.labels[[0, 4, 3, 7, 5]] = -100
    check(inputs, chunk_bytes)


def test_nothing_labelled():
    inputs = head_inputs(labelled=0.0)
    out = fused(inputs)
    assert out.logps.tolist() == [0.0] * 4
    for grad in torch.autograd.grad(out.loss, (inputs.hidden, inputs.weight, inputs.bias)):
        assert not grad.any()


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_input_trained(trained):
    inputs = head_inputs(6, 9, dtype=torch.float64)
    for name in ("hidden", "weight", "bias"):
        getattr(inputs, name).requires_grad_(name == trained)
    check(inputs, None)


def test_no_grad_needs_no_gradient():
    inputs = head_inputs()
    weights = {"pair_weights": torch.tensor([3.0, 1.0]), "token_weights": torch.rand(4, 9)}
    for options in ({}, weights):
        with torch.no_grad():
            out = fused(inputs, **options)
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, fused(inputs, **options).loss.detach())


@pytest.mark.parametrize(
    ("dtype", "chunk_bytes", "confident"),
    covering([torch.float32, torch.bfloat16, torch.float16], [None, 70_000, 0], [0.0, 1.0], full=2),
)
def test_error_budget(dtype, chunk_bytes, confident):
    """70_000 bytes hold a fp32 dW accumulator beside two pairs, so low precision takes several groups too."""
    exact = head_inputs(12, 10, 32, 300, confident=confident).to(dtype).to(torch.float64)
    ours, naive = exact.to(dtype), exact.to(dtype)
    for inputs in (ours, naive, exact):
        inputs.ref_logps.copy_(linear_sequence_logps(*exact[:3], bias=exact.bias).logps.detach() - 1)
    out = fused(ours, chunk_bytes=chunk_bytes)
    theirs, truth = eager(naive)[0], eager(exact)[0]
    assert out.loss.dtype == torch.float32
    assert_within_budget(out.losses, theirs.losses, truth.losses, "losses")
    names = ("hidden", "weight", "bias")
    for name, mine, other, best in zip(
        names,
        torch.autograd.grad(out.loss, [getattr(ours, n) for n in names]),
        torch.autograd.grad(theirs.losses.mean(), [getattr(naive, n) for n in names]),
        torch.autograd.grad(truth.losses.mean(), [getattr(exact, n) for n in names]),
        strict=True,
    ):
        assert mine.dtype == dtype
        assert_within_budget(mine, other, best, f"d{name}")


def test_fp16_gradients_survive_a_loss_scale():
    """Gradients are formed after the scale is known: at 2^12 times the loss, small ones do not vanish in fp16."""
    exact = head_inputs(4, 9, 32, 300).to(torch.float16).to(torch.float64)
    ours = exact.to(torch.float16)
    scale = 2.0**12
    (mine,) = torch.autograd.grad(fused(ours, beta=1e-4).loss * scale, ours.weight)
    (best,) = torch.autograd.grad(eager(exact, beta=1e-4)[0].losses.mean() * scale, exact.weight)
    assert ((mine.double() - best).norm() / best.norm()).item() < 2e-3


def test_fp16_weights_are_formed_after_the_loss_scale_under_bf16_autocast_too():
    inputs = head_inputs().to(torch.float16)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        loss = fused(inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()  # path C would refuse: its gradients are formed already


def test_inside_a_checkpoint(monkeypatch):
    """Under activation checkpointing: the right gradients, and the head not computed again for them."""
    calls = []
    grouped = paths.linear_logps_grouped
    monkeypatch.setattr(paths, "linear_logps_grouped", lambda *a, **k: calls.append(1) or grouped(*a, **k))
    inputs, plain = head_inputs(), head_inputs()
    torch.utils.checkpoint.checkpoint(
        lambda h: fused(inputs._replace(hidden=h)).loss, inputs.hidden, use_reentrant=False
    ).backward()
    assert len(calls) == 1
    fused(plain).loss.backward()
    torch.testing.assert_close(inputs.hidden.grad, plain.hidden.grad)
    torch.testing.assert_close(inputs.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_autocast(chunk_bytes):
    inputs = head_inputs(6, 9)
    rounded = inputs.to(torch.bfloat16).to(torch.float64)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        out = fused(inputs, chunk_bytes=chunk_bytes)
    expected = eager(rounded)[0].losses.mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    names = ("hidden", "weight", "bias")
    for mine, best in zip(
        torch.autograd.grad(out.loss, [getattr(inputs, n) for n in names]),
        torch.autograd.grad(expected, [getattr(rounded, n) for n in names]),
        strict=True,
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_the_reference_gets_no_gradient(chunk_bytes):
    inputs = head_inputs()
    inputs.ref_logps.requires_grad_()
    loss = fused(inputs, chunk_bytes=chunk_bytes).loss
    loss.backward()
    assert inputs.ref_logps.grad is None and inputs.hidden.grad.any()


def of_ones_own(loss, losses, logps):
    """A term on log-probabilities, and a mean that is not over pairs alike, beside the loss."""
    return 2 * loss - 0.3 * logps.chunk(2)[0].mean() + losses.square().sum()


@pytest.mark.parametrize(
    ("impl", "options", "chunks", "frozen"),
    covering(IMPLS, [{}, {"ld_alpha": 0.3, "rpo_alpha": 0.5}, {"use_weighting": True}], list(CHUNKS), [False, True]),
    indirect=["impl"],
)
def test_gradients_through_log_probabilities_and_losses(options, chunks, frozen):
    """Right where they are asked for, or where the path has them; else an error that says how to ask."""
    inputs, chunk_bytes = head_inputs(6, 9, dtype=torch.float64), CHUNKS[chunks]
    for each in (inputs.weight, inputs.bias):
        each.requires_grad_(not frozen)
    wanted = [t for t in (inputs.hidden, inputs.weight, inputs.bias) if t.requires_grad]
    loss, logps = eager(inputs, **options)
    expected = torch.autograd.grad(of_ones_own(loss.loss, loss.losses, logps), wanted)
    out = fused(inputs, chunk_bytes=chunk_bytes, differentiable=("logps", "losses"), **options)
    found = torch.autograd.grad(of_ones_own(out.loss, out.losses, out.logps), wanted)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)
    out = fused(inputs, chunk_bytes=chunk_bytes, **options)
    for name, term in (("logps", out.logps[:2].mean()), ("losses", out.losses.sum())):
        if frozen or chunks == "recompute":
            torch.autograd.grad(out.loss - 1000 * term, wanted, retain_graph=True)
        else:
            with pytest.raises(RuntimeError, match=rf"a gradient came through {name},.* differentiable=\('{name}',\)"):
                torch.autograd.grad(out.loss - 1000 * term, wanted, retain_graph=True)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_through_log_probabilities_of_pairs_without_weight(frozen):
    inputs, weights = head_inputs(6, 9, dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0])
    for each in (inputs.weight, inputs.bias):
        each.requires_grad_(not frozen)
    loss, logps = eager(inputs)
    mean = (loss.losses * weights).sum() / weights.sum()
    expected = torch.autograd.grad(of_ones_own(mean, loss.losses, logps), inputs.hidden)
    out = fused(inputs, pair_weights=weights, differentiable=("logps", "losses"))
    found = torch.autograd.grad(of_ones_own(out.loss, out.losses, out.logps), inputs.hidden)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_numbers_of_numpy_are_numbers():
    inputs = head_inputs(6, 9)
    named = {"beta": np.float32(0.25), "softcap": np.float32(20.0), "temperature": np.float64(1.5)}
    named |= {"num_labelled": np.int64((inputs.labels != -100).sum()), "rpo_alpha": np.float32(0.5)}
    assert torch.equal(fused(inputs, **named).loss, fused(inputs, **{k: v.item() for k, v in named.items()}).loss)


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_values_that_nobody_takes_a_gradient_of_cost_nothing():
    inputs = head_inputs(6, 9)
    out = fused(inputs)
    (out.loss + 0 * out.logps.sum() + out.losses.detach().sum() + out.chosen_rewards.sum()).backward()
    assert inputs.hidden.grad.any()


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
def test_transforms_of_torch_func_are_refused():
    inputs = head_inputs(6, 9)

    def loss(hidden):
        return linear_dpo_loss(hidden, inputs.weight, inputs.labels, inputs.ref_logps).loss

    def logps(hidden):
        return linear_sequence_logps(hidden, inputs.weight, inputs.labels).logps.sum()

    for function in (loss, logps):
        for transform in (torch.func.grad, torch.func.jacrev):
            with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
                transform(function)(inputs.hidden.detach())
        with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
            torch.func.vmap(function)(inputs.hidden.detach()[None])
        with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
            torch.func.jvp(function, (inputs.hidden.detach(),), (inputs.hidden.detach(),))
    given = inputs.hidden, inputs.weight, inputs.labels, inputs.ref_logps
    for name, shape in (("token_weights", (6, 9)), ("pair_weights", (3,)), ("lengths", (6,))):
        with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
            torch.func.vmap(lambda w, name=name: linear_dpo_loss(*given, **{name: w}).loss)(torch.ones(2, *shape))
    with pytest.raises(RuntimeError, match="outside of torch.func's transforms"):
        labels = inputs.labels.clamp(max=30)
        torch.func.vmap(lambda w: sequence_logps(inputs.hidden, labels, token_weights=w).logps)(torch.ones(2, 6, 9))


@pytest.mark.parametrize("impl", ["torch"], indirect=True)  # what is above the implementations
@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_numbers_that_are_not_finite_are_named(chunk_bytes):
    for value, name, index in (
        (math.nan, "weight", (7, 3)),
        (math.inf, "weight", (7, 3)),
        (math.nan, "bias", (7,)),
        (math.inf, "bias", (7,)),
    ):
        inputs = head_inputs(6, 9)
        with torch.no_grad():
            getattr(inputs, name)[index] = value
        with pytest.raises(ValueError, match=rf"{name}: expected finite numbers, got NaN or infinity in 1 of .* is 7"):
            fused(inputs, chunk_bytes=chunk_bytes)
        assert fused(inputs, chunk_bytes=chunk_bytes, check_hidden=False).loss.isnan()
        with torch.no_grad():
            getattr(inputs, name)[(9, *index[1:])] = value
        with pytest.raises(ValueError, match=rf"{name}: .* in 2 of 123 vocabulary entries, the first is 7"):
            fused(inputs, chunk_bytes=chunk_bytes)
    inputs = head_inputs(6, 9)
    with torch.no_grad():
        inputs.bias[7] = -math.inf  # an entry that never is
    inputs.labels[inputs.labels == 7] = 8
    assert fused(inputs).loss.isfinite()
    for value in (math.nan, math.inf, -math.inf):
        inputs = head_inputs(6, 9)
        inputs.ref_logps[2] = value
        with pytest.raises(ValueError, match=rf"ref_logps: expected finite .* got {value} for sequence 2 \(1 such\)"):
            fused(inputs, chunk_bytes=chunk_bytes)


def test_what_is_kept_until_the_backward_and_not_longer():
    """A loss may outlive it, as in a sum that is logged."""
    for trained in (True, False):
        inputs = head_inputs(4, 9)
        inputs.hidden.requires_grad_(trained)
        loss = fused(inputs).loss
        assert (loss.grad_fn.places is not None) == trained
        loss.backward()
        assert not any(isinstance(value, torch.Tensor) for value in tree_leaves(vars(loss.grad_fn)))


def test_second_backward():
    inputs = head_inputs()
    loss = fused(inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="pass chunk_bytes=0"):
        loss.backward()
    loss = fused(inputs, chunk_bytes=0).loss
    loss.backward(retain_graph=True)
    loss.backward()


@pytest.mark.parametrize("chunk_bytes", CHUNKS.values(), ids=CHUNKS)
def test_no_gradient_flows_into_the_reference(chunk_bytes):
    inputs = head_inputs().to(torch.float64)
    inputs.ref_logps.requires_grad_()
    out = fused(inputs, chunk_bytes=chunk_bytes)
    out.loss.backward()
    assert inputs.ref_logps.grad is None and not out.chosen_rewards.requires_grad


def test_gradients_accumulate_into_leaves():
    # the gradients formed in the forward are handed over, not shared: a second step must not change the first's
    inputs = head_inputs()
    fused(inputs).loss.backward()
    once = inputs.weight.grad.clone()
    fused(inputs).loss.backward()
    torch.testing.assert_close(inputs.weight.grad, 2 * once)


def test_errors_name_the_argument(monkeypatch):
    monkeypatch.setattr(dispatch, "CUDA_PROBLEM", "it was not built")
    inputs = head_inputs()
    hidden, weight, labels, _, ref_logps = inputs
    cases = [
        (r"hidden: expected an even number.*got 3", (hidden[:3], weight, labels[:3], ref_logps[:3]), {}),
        (r"ref_logps: expected shape \[4\], got \(2,\)", (hidden, weight, labels, ref_logps[:2]), {}),
        (r"ref_logps: expected a floating", (hidden, weight, labels, ref_logps.long()), {}),
        (r"chunk_bytes: expected", (hidden, weight, labels, ref_logps), {"chunk_bytes": -1}),
        (r"chunk_bytes: expected", (hidden, weight, labels, ref_logps), {"chunk_bytes": math.nan}),
        (r"differentiable: expected", (hidden, weight, labels, ref_logps), {"differentiable": ("logps", "loss")}),
        (r"loss_type.*sigmoid", (hidden, weight, labels, ref_logps), {"loss_type": "sigmoidal"}),
        (r"beta", (hidden, weight, labels, ref_logps), {"beta": 0.0}),
        (r"ld_alpha", (hidden, weight, labels, ref_logps), {"ld_alpha": 2.0}),
        (r"impl: 'cuda' cannot run", (hidden, weight, labels, ref_logps), {"impl": "cuda"}),
    ]
    for message, args, options in cases:
        with pytest.raises(ValueError, match=message):
            linear_dpo_loss(*args, **options)
