"""A head of which each rank has some entries of the vocabulary, in 2 and 3 processes: `parallel_checks.py` says what
they look at. Here is what they found."""

import sys
from pathlib import Path

import pytest
import torch

from dpo_kernels import dispatch, linear_dpo_loss, linear_sequence_logps
from dpo_kernels.impl import paths
from dpo_kernels.impl.interface import STATS, GradRows, LogitTransform
from dpo_kernels.parallel import VocabularyShards
from dpo_kernels.testing import head_inputs

sys.path.append(str(Path(__file__).parent))
import parallel_checks

pytestmark = pytest.mark.skipif(dispatch.CPU_PROBLEM is not None, reason=f"impl 'cpu': {dispatch.CPU_PROBLEM}")


# 2: the first shard and the last one, of different sizes; 3: one between them, and 123 is divisible
@pytest.mark.full(when=lambda processes: processes != 3)
@pytest.mark.parametrize("processes", [2, 3])
def test_ranks(processes, tmp_path):
    parallel_checks.assert_ranks_found_nothing(parallel_checks, tmp_path, processes)


class Alone(VocabularyShards):
    """Ranks one after the other, in one process: what each hands in is kept for a second time, when all get it."""

    def __init__(self, sizes, rank, tables):
        self.first, self.here, self.vocab, self.largest = sum(sizes[:rank]), sizes[rank], sum(sizes), max(sizes)
        self.rank, self.tables = rank, tables

    def gather(self, t):
        self.tables[self.rank] = t
        return torch.stack([self.tables.get(rank, t) for rank in range(3)])

    def start_sum(self, t):
        return lambda: None


@pytest.mark.parametrize("path", ["B", "D"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_every_implementation(impl, path, softcap):
    inputs = head_inputs(2, 9, 31, 70, dtype=torch.float64)
    rows = (inputs.labels >= 0).nonzero(as_tuple=True)
    x, weight, bias, y = inputs.hidden.detach()[rows], inputs.weight.detach(), inputs.bias.detach(), inputs.labels[rows]
    transform = LogitTransform(1.3, softcap, 0.9)
    fixed = {"compute_dtype": torch.float64}

    def forward(part, shards, y):
        return paths.linear_logps_fwd(
            impl,
            x,
            weight[part],
            bias[part],
            y,
            transform,
            stats=STATS,
            with_dhidden=path == "B",
            shards=shards,
            **fixed,
        )

    def backward(found, part, shards, y):
        of = GradRows(y, found.norm, found.logp, torch.arange(1.0, len(y) + 1, dtype=torch.float64))
        return paths.linear_logps_bwd(
            impl, x, weight[part], bias[part], of, transform, need=(True, True, True), shards=shards, **fixed
        )

    everything = slice(None)
    whole = forward(everything, None, y)
    sizes, tables, dx, dweight, dbias = (0, 64, 6), {}, 0, [], []
    for _ in range(2):
        ranks = [Alone(sizes, rank, tables) for rank in range(3)]
        found = [forward(slice(r.first, r.first + r.here), r, y - r.first) for r in ranks]
    for ranked in found:
        for name in ("logp", "norm", "stats"):
            torch.testing.assert_close(getattr(ranked, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
            assert torch.equal(getattr(ranked, name), getattr(found[0], name)), name
    if path == "B":
        torch.testing.assert_close(sum(ranked.dhidden for ranked in found), whole.dhidden, rtol=1e-11, atol=1e-12)
        return
    for ranked, r in zip(found, ranks, strict=True):
        of_x, of_weight, of_bias = backward(ranked, slice(r.first, r.first + r.here), r, y - r.first)
        dx, dweight, dbias = dx + of_x, [*dweight, of_weight], [*dbias, of_bias]
    expected = backward(whole, everything, None, y)
    for ours, theirs in zip((dx, torch.cat(dweight), torch.cat(dbias)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("group", ["tp", object()])
def test_without_torch_distributed(group):
    inputs = head_inputs()
    for call in (
        lambda: linear_sequence_logps(inputs.hidden, inputs.weight, inputs.labels, group=group),
        lambda: linear_dpo_loss(*inputs[:3], inputs.ref_logps, group=group),
    ):
        with pytest.raises(ValueError, match=f"group: .* not initialised, got {type(group).__name__}"):
            call()
    assert not torch.distributed.is_initialized()
