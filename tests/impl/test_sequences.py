"""What the kernels that take positions [S, T] as they are compute of whole sequences, and how much they launch."""

import pytest
import torch
from places import DEVICE

from dpo_kernels import ops
from dpo_kernels.dispatch import default

pytestmark = [
    pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True),
    pytest.mark.usefixtures("impl"),
]


def scattered(t):
    """The same numbers, apart in memory."""
    apart = torch.full((t.shape[1], 2 * t.shape[0]), 7, dtype=t.dtype)
    apart[:, ::2] = t.t()
    return apart[:, ::2].t()


def tokens(sequences, length, dtype, weighted, seed=0):
    """Log-probabilities, labels and weights, NaN where there is no label; none of them contiguous."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    labels = torch.randint(5, (sequences, length), generator=generator) - 1  # -1 is none
    logps = -torch.rand(sequences, length, dtype=dtype, generator=generator) * (labels != -1)
    weights = torch.rand(sequences, length, dtype=dtype, generator=generator).masked_fill(labels == -1, torch.nan)
    return scattered(logps), scattered(labels), scattered(weights) if weighted else None


def sum_tokens(logps, labels, weights=None, mean=False):
    return ops.sum_tokens(logps, labels, weights, -1, mean, default(torch.get_default_device()))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# more than a program goes through at once; nothing to go through
@pytest.mark.parametrize("shape", [(3, 2500), (2, 1), (2, 0), (0, 3)])
def test_sums_lose_nothing(shape, dtype, weighted, mean):
    logps, labels, weights = tokens(*shape, dtype, weighted)
    sums, counts = sum_tokens(logps, labels, weights, mean)
    labelled = labels != -1
    products = logps if weights is None else logps * weights.masked_fill(~labelled, 0)
    expected = products.double().sum(1)
    if mean:
        expected /= labelled.sum(1).clamp(min=1)
    assert counts.dtype == torch.int64 and torch.equal(counts, labelled.sum(1))
    assert sums.dtype == dtype
    rtol = 2**-24 if dtype == torch.float32 else 1e-13  # half a last digit: rounded once
    torch.testing.assert_close(sums.double(), expected, rtol=rtol, atol=0)
    assert torch.equal(sums, sum_tokens(logps, labels, weights, mean)[0])


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_gradients_of_sums(trained, mean):
    logps, labels, weights = tokens(3, 7, torch.float64, True)
    labels[1] = -1
    leaves = [t.detach().nan_to_num().requires_grad_(each) for t, each in zip((logps, weights), trained, strict=True)]
    assert torch.autograd.gradcheck(lambda p, w: sum_tokens(p, labels, w, mean)[0], leaves)
    assert torch.autograd.gradcheck(lambda p: sum_tokens(p, labels, None, mean)[0], [logps.detach().requires_grad_()])


def test_gradients_of_sums_in_several_blocks():
    """Of one number for all sequences, in as many blocks as a long response takes."""
    found = []
    for by_kernel in (True, False):
        logps, labels, weights = (t.detach() for t in tokens(2, 2500, torch.float32, True))
        logps.requires_grad_(), weights.requires_grad_()
        masked = weights.masked_fill(labels == -1, 0)
        sums = sum_tokens(logps, labels, weights)[0] if by_kernel else (logps * masked).sum(1)
        found.append(torch.autograd.grad(sums.sum(), [logps, weights]))
    for mine, other in zip(*found, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck_sums(weighted, mean):
    logps, labels, weights = tokens(2, 5, torch.float32, weighted)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (logps, weights)]
    name = default(torch.get_default_device())
    torch.library.opcheck(ops.sum_tokens, (leaves[0], labels, leaves[1], -1, mean, name))
    _, counts = sum_tokens(logps, labels, weights, mean)
    given = (torch.rand(2), logps, labels, weights, counts, -1, mean, weighted, name)
    torch.library.opcheck(ops.sum_tokens_bwd, given)
