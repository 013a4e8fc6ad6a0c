"""Sequences that kernels sum, and pairs that they compare, against the same in fp64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import DEVICE

from dpo_kernels import dispatch
from dpo_kernels.impl.interface import PairTables, Rows


def drawn(pairs, length, dtype, weighted=False, seed=0):
    """Tables, and rows anywhere in them; what is to be written holds something else before."""
    draw = torch.Generator(DEVICE).manual_seed(seed)
    s = 2 * pairs
    labelled = torch.rand(s, length, generator=draw) < 0.6
    at = Rows(*labelled.nonzero().unbind(1))  # strided
    logps = -3 * torch.rand(len(at.sequence), generator=draw, dtype=dtype)
    weights = torch.rand(length, s, generator=draw, dtype=dtype).T.masked_fill(~labelled, 0) if weighted else None
    of_sequences, of_pairs = (torch.full((n,), 7.0, dtype=dtype) for n in (s, pairs))
    tables = PairTables(
        torch.where(labelled, 7.0, 0.0).to(dtype),
        weights,
        -3 * length * torch.rand(s, generator=draw, dtype=dtype),
        of_sequences.long(),
        *(of_sequences.clone() for _ in range(2)),
        *(of_pairs.clone() for _ in range(3)),
        torch.tensor(7.0, dtype=dtype),
    )
    return logps, at, tables


def compare(kernels, logps, at, tables, ends, beta):
    """Part by part, whose rows lie together; the slopes in the order of `logps`."""
    pairs, slopes = tables.losses.shape[0], torch.full_like(logps, 7.0)
    for first, stop in zip([0, *ends], [*ends, pairs], strict=True):
        here = ((first <= at.sequence % pairs) & (at.sequence % pairs < stop)).nonzero()[:, 0]
        part = Rows(*(t[here] for t in at))
        slopes[here] = kernels.compare(logps[here], part, tables, slice(first, stop), beta)
    return slopes


def expected(logps, at, tables, beta):
    """In fp64, from sums in the type of the tables: of a graph."""
    leaf = logps.double().requires_grad_()
    token_logps = torch.zeros_like(tables.token_logps, dtype=torch.float64).index_put(tuple(at), leaf)
    weights = torch.ones_like(token_logps) if tables.token_weights is None else tables.token_weights.double()
    sums = (token_logps * weights).sum(1)
    ratios = sums - tables.ref_logps.double()
    chosen, rejected = ratios.chunk(2)
    losses = -F.logsigmoid(beta * (chosen - rejected))
    (slopes,) = torch.autograd.grad(losses.mean(), leaf)
    return token_logps, sums, losses, beta * chosen, beta * rejected, losses.mean(), slopes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("pairs", "length", "ends"), [(1, 1, []), (5, 70, []), (7, 33, [2, 3]), (1100, 2, [40])])
def test_pairs_are_compared(finding_impl, pairs, length, ends, weighted, dtype):
    kernels, beta = dispatch.load(finding_impl), 0.1
    logps, at, tables = drawn(pairs, length, dtype, weighted)
    slopes = compare(kernels, logps, at, tables, ends, beta)
    once = [t.clone() for t in (*tables[3:], slopes)]
    again = compare(kernels, logps, at, tables, ends, beta)
    assert all(map(torch.equal, once, (*tables[3:], again)))
    token_logps, sums, losses, chosen, rejected, loss, of_graph = expected(logps, at, tables, beta)
    exact = 1e-6 if dtype == torch.float32 else 1e-13
    found = (tables.token_logps, tables.logps, tables.losses, tables.chosen_rewards, tables.rejected_rewards)
    for mine, true in zip((*found, tables.loss), (token_logps, sums, losses, chosen, rejected, loss), strict=True):
        torch.testing.assert_close(mine.double(), true.detach(), rtol=exact, atol=exact * length)
    torch.testing.assert_close(slopes.double(), of_graph, rtol=exact * (1 + length), atol=0)
    assert torch.equal(tables.num_tokens, at.sequence.bincount(minlength=2 * pairs))
    # of these the arithmetic is PyTorch's
    ratios = tables.logps - tables.ref_logps
    assert torch.equal(torch.cat([tables.chosen_rewards, tables.rejected_rewards]), beta * ratios)


def negative(t):
    """The same, whose memory holds its negative, every second number."""
    both = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert both.is_neg() and not both.is_contiguous()
    return both


def test_tensors_that_lie_anyhow(finding_impl):
    kernels, results = dispatch.load(finding_impl), []
    for lie in (negative, torch.Tensor.clone):
        logps, at, tables = drawn(5, 12, torch.float32, weighted=True)
        tables = tables._replace(token_weights=lie(tables.token_weights), ref_logps=lie(tables.ref_logps))
        slopes = kernels.compare(torch.stack([logps, logps], 1)[:, 0], at, tables, slice(0, 5), 0.1)
        sums = kernels.sum_rows(logps, at, tables.token_logps.clone(), tables.token_weights)
        results.append([slopes, sums, *(t for t in tables if t is not None)])
    for lain, dense in zip(*results, strict=True):
        assert torch.equal(lain, dense)


@pytest.mark.parametrize("beta", [np.float32(0.3), np.float64(0.3), 1])
def test_beta_of_any_kind(finding_impl, beta):
    results = []
    for each in (beta, float(beta)):
        logps, at, tables = drawn(3, 5, torch.float32)
        slopes = dispatch.load(finding_impl).compare(logps, at, tables, slice(0, 3), each)
        results.append([slopes, tables.losses])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_alone_are_those_of_pairs(finding_impl, weighted):
    kernels = dispatch.load(finding_impl)
    logps, at, tables = drawn(3, 150, torch.float32, weighted)
    compare(kernels, logps, at, tables, [1], 0.3)
    table = torch.where(tables.token_logps != 0, 7.0, 0.0)
    sums = kernels.sum_rows(logps, at, table, tables.token_weights)
    assert torch.equal(sums, tables.logps) and torch.equal(table, tables.token_logps)
    odd = at.sequence < 5
    sums = kernels.sum_rows(logps[odd], Rows(*(t[odd] for t in at)), table[:5].clone(), None)
    torch.testing.assert_close(sums, table[:5].sum(1))
    assert kernels.sum_rows(logps[:0], Rows(*(t[:0] for t in at)), table[:0], None).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_of_any_size(finding_impl, dtype):
    """Losses keep their digits where they are next to nothing; what is not finite goes on."""
    kernels = dispatch.load(finding_impl)
    margins = [0.0, 1e-3, -1e-3, 3.0, -3.0, 11.5, 30.0, 80.0, -80.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan]
    pairs = len(margins)
    logps = torch.tensor([*margins, *[0.0] * pairs], dtype=dtype)
    at = Rows(torch.arange(2 * pairs), torch.zeros(2 * pairs, dtype=torch.int64))
    new = logps.new_empty
    tables = PairTables(
        new(2 * pairs, 1), None, torch.zeros_like(logps), new(2 * pairs, dtype=torch.int64),
        *(new(2 * pairs) for _ in range(2)), *(new(pairs) for _ in range(3)), new(()),
    )  # fmt: skip
    slopes = kernels.compare(logps, at, tables, slice(0, pairs), 1.0)
    h = logps[:pairs].double()
    exact = {"rtol": 2e-7 if dtype == torch.float32 else 1e-14, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(tables.losses.double(), -F.logsigmoid(h), **exact)
    slope = -torch.sigmoid(-h).to(dtype).double() / pairs
    torch.testing.assert_close(slopes.double(), torch.cat([slope, -slope]), **{**exact, "atol": 1e-44})
    assert tables.losses[0] == torch.tensor(2, dtype=torch.float64).log().to(dtype)
    assert tables.loss.isnan()
