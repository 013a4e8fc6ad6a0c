"""The vocabulary-parallel head: each rank has consecutive entries of the vocabulary, and no rank gathers them.

Dimensions: R ranks, N labelled rows, H hidden size, V vocabulary size, V_r of it on rank r, K statistics. All ranks
have the same hidden states and labels. What they exchange, in bytes: `AGREED_BYTES` of each rank once a call, so that
they wait for one another only where they fit; `ROW_BYTES` N of each rank, what it remembers of the rows; and the sum of
dX [N, H] over the ranks, in the accumulation dtype. dW [V_r, H] stays where it is.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels.dispatch import Family, Path, choose, is_fused, load
from dpo_kernels.impl.fold import Fold

# What a rank says of a row: the seven numbers of `Fold.state` and where the largest logit is, in fp64, so that neither
# dtypes nor implementations of ranks matter.
ROW_NUMBERS = 8
ROW_BYTES = ROW_NUMBERS * 8
# What ranks say before they compute, int64 each; all but entries, bias and place must be the same.
AGREED = (
    "entries",
    "bias",
    "vocabulary",
    "place",
    "hidden 0",
    "hidden 1",
    "hidden 2",
    "width",
    "dtypes",
    "gradients",
    "labels",
    "options",
)
AGREED_BYTES = len(AGREED) * 8
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def gather(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, *t.shape] what each rank has."""
    gathered = t.new_empty(dist.get_world_size(group), *t.shape)
    dist.all_gather(list(gathered.unbind()), t.contiguous(), group=group)
    return gathered


class VocabularyShards:
    """Which entries of the vocabulary are on which rank of a group; `interface.Shards`."""

    def __init__(self, group: dist.ProcessGroup, sizes: Sequence[int]):
        rank = dist.get_rank(group)
        self.group = group
        self.first, self.here, self.vocab = sum(sizes[:rank]), sizes[rank], sum(sizes)
        self.largest = max(sizes)

    def gather(self, t: Tensor) -> Tensor:
        """[R, *t.shape] what each rank has."""
        return gather(t, self.group)

    def join_(self, fold: Fold) -> Tensor:
        if fold.y.shape[0] == 0:
            return torch.ones_like(fold.max)
        everywhere = (fold.argmax + self.first)[None].double()
        # merged in the order of ranks by each of them: an all-reduce may add in any, and ranks would have other bits
        of_ranks = []
        for table in self.gather(torch.cat([fold.state.double(), everywhere])):
            of_ranks.append(Fold(fold.y, torch.float64, fold.names))
            of_ranks[-1].state.copy_(table[:-1])
            of_ranks[-1].argmax.copy_(table[-1])
        joint, *others = of_ranks
        for later in others:
            joint.merge_(later)
        rescale = torch.exp(fold.max - joint.max).to(fold.max.dtype)
        fold.state.copy_(joint.state)
        fold.argmax.copy_(joint.argmax - self.first)
        return rescale

    def start_sum(self, t: Tensor) -> Callable[[], object]:
        work = dist.all_reduce(t, group=self.group, async_op=True)
        assert work is not None
        return work.wait


class Head(NamedTuple):
    """A head, or what of it is here."""

    weight: Tensor  # [V, H], or [V_r, H]
    bias: Tensor | None  # [V], or [V_r]
    shards: VocabularyShards | None

    @property
    def is_sharded(self) -> bool:
        return self.shards is not None

    @property
    def vocab(self) -> int:
        return self.weight.shape[0] if self.shards is None else self.shards.vocab

    @property
    def planned(self) -> Tensor:
        """What stands for the weight in plans, which must be the same on all ranks: [V, H], or as many entries as a
        rank has at most, in one number's memory."""
        if self.shards is None:
            return self.weight
        return self.weight.detach().new_empty(()).expand(self.shards.largest, self.weight.shape[1])

    def family(self, impl: str, path: Path, dtype: torch.dtype) -> Family:
        """The kernels that compute `path`: of the tile kernels of any implementation, labels that lie in no tile are
        nothing new. None in one kernel that forgets the numbers which ranks exchange."""
        return choose(impl, self.weight.device, path, dtype, *self.planned.shape)

    def takes_exponentials(self, family: str, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether path C of this family stores exponentials in the place of logits."""
        fused = is_fused(family) and self.shards is None
        return fused and load(family).takes_exponentials(x_dtype, self.weight, dtype)


def is_dtensor(t: object) -> TypeGuard[Any]:
    """Without an import, which takes its time and is no part of every PyTorch."""
    if type(t) in (Tensor, torch.nn.Parameter):
        return False
    return isinstance(t, Tensor) and hasattr(t, "device_mesh") and hasattr(t, "placements")


def head_here(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | VocabularyShards | None,
    **options: object,
) -> Head:
    """What of a head is on this rank: all of it, without `group` and DTensor. The ranks agree on that in one exchange,
    for which an accelerator is waited for. `group`: what this has found before is taken as it is. `options`: other
    arguments, by name, which have to be the same on all ranks.

    Raises:
        ValueError: a weight that is sharded in another way, or ranks that disagree; then on all of them.
    """
    if isinstance(group, VocabularyShards):
        return Head(weight, bias, group)
    if not is_dtensor(weight):
        if is_dtensor(bias):
            raise ValueError("bias: expected a plain tensor, as weight is, got a DTensor")
        if group is None:
            return Head(weight, bias, None)
        check_group("group", group)
        ranks, sharding = group, (-1, dist.get_rank(group))
    else:
        if group is not None:
            raise ValueError("group: expected None with a DTensor as weight, whose mesh says which ranks there are")
        mesh = _mesh_of("weight", weight)
        if bias is not None and not is_dtensor(bias):
            raise ValueError("bias: expected a DTensor, sharded as weight is, got a plain tensor")
        if bias is not None and _mesh_of("bias", bias) != mesh:
            raise ValueError(f"bias: expected the mesh of weight, {mesh}, got {bias.device_mesh}")
        ranks, sharding = mesh.get_group(), (weight.shape[0], mesh.get_local_rank())
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape [{weight.shape[0]}], got {tuple(bias.shape)}")
        weight, bias = weight.to_local(), None if bias is None else bias.to_local()
    if torch.compiler.is_compiling():
        raise RuntimeError("dpo_kernels: a sharded head is not computed under torch.compile: call it outside")
    for name, t in (("hidden", hidden), ("weight", weight), ("labels", labels)):
        if not isinstance(t, Tensor) or is_dtensor(t):
            raise ValueError(f"{name}: expected a plain tensor with a sharded head, got {type(t).__name__}")
    return Head(
        weight, bias, VocabularyShards(ranks, _agreed_sizes(hidden, weight, labels, bias, ranks, sharding, options))
    )


def check_group(name: str, group: object) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{name}: expected a process group of torch.distributed, which is not initialised, got "
            f"{type(group).__name__}"
        )
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"{name}: expected a process group with this rank in it, got {type(group).__name__}")


def _mesh_of(name: str, t: Any) -> Any:
    """The mesh of a DTensor that is sharded as a vocabulary-parallel head is."""
    if t.device_mesh.ndim != 1 or not t.placements[0].is_shard(0):
        raise ValueError(
            f"{name}: expected a DTensor with the placement Shard(0) on a mesh of one dimension, got "
            f"{list(t.placements)} on one of {t.device_mesh.ndim}"
        )
    return t.device_mesh


def _agreed_sizes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup,
    sharding: tuple[int, int],
    options: Mapping[str, object],
) -> list[int]:
    """[R] the entries of each rank, where the ranks are called with what fits together: else they would wait for one
    another, or compute nonsense."""
    needs = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    words = {name: in_words(value) for name, value in options.items()}
    own = {
        "entries": weight.shape[0] if weight.dim() else 0,
        "bias": -1 if bias is None else bias.numel(),
        "vocabulary": sharding[0],
        "place": sharding[1],
        **{f"hidden {i}": hidden.shape[i] if i < hidden.dim() else -1 for i in range(3)},
        "width": weight.shape[-1] if weight.dim() == 2 else -1,
        "dtypes": sum(_number(t) * 8**i for i, t in enumerate((hidden, weight, bias))),
        "gradients": sum(2**i for i, need in enumerate(needs) if need),
        "labels": _checksum(labels.long()),
        "options": zlib.crc32(repr(words).encode()),
    }
    assert tuple(own) == AGREED
    mine = torch.tensor(list(own.values()), device=hidden.device)
    of_ranks = gather(mine, group).tolist()
    said = {name: [row[i] for row in of_ranks] for i, name in enumerate(own)}
    for name, values in said.items():
        if name == "options" and len(set(values)) > 1:
            _refuse_other_options(words, group)
        if name not in ("entries", "bias", "place") and len(set(values)) > 1:
            raise ValueError(_DISAGREE[name.split()[0]] + f", got others on rank(s) {_others(values)} of the group")
    if said["place"] != list(range(len(of_ranks))):
        raise ValueError("weight: expected a DTensor on a mesh whose ranks are in the order of its group")
    sizes, vocab = said["entries"], said["vocabulary"][0]
    if bias is not None and said["bias"] != sizes:
        raise ValueError(f"bias: expected {sizes} entries on the ranks of the group, as of weight, got {said['bias']}")
    if vocab >= 0:
        step = -(-vocab // len(sizes))  # as torch.chunk
        expected = [max(0, min(step, vocab - rank * step)) for rank in range(len(sizes))]
        if sizes != expected:
            raise ValueError(
                f"weight: expected {expected} of the {vocab} entries that the DTensor says there are, on the ranks of "
                f"its mesh, got {sizes}"
            )
    if sum(sizes) == 0:
        raise ValueError("weight: expected at least one vocabulary entry on some rank, got none")
    return sizes


_DISAGREE = {
    "vocabulary": "weight: expected DTensors of one shape on all ranks, or no DTensor on any",
    "hidden": "hidden: expected the same shape on all ranks that share a head",
    "width": "weight: expected parts of one head on all ranks, with the same H",
    "dtypes": "weight: expected the same dtypes of hidden, weight and bias on all ranks that share a head",
    "gradients": "hidden: expected that hidden, weight and bias require a gradient on all ranks alike",
    "labels": "labels: expected the same on all ranks, each of which computes all rows with its part of the vocabulary "
    "(a weight that FSDP2 has sharded is gathered by its module's hooks)",
}


def _refuse_other_options(words: Mapping[str, str], group: dist.ProcessGroup) -> NoReturn:
    """In one exchange more, which of them it is. All ranks know that they disagree."""
    everywhere: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, words, group=group)
    refuse_differences(everywhere, "that share a head")
    raise AssertionError("unreachable")


def refuse_differences(everywhere: Sequence[Mapping[str, str]], ranks: str) -> None:
    """Raises `ValueError`, the same on all ranks, for the first argument that is not the same on each. `everywhere`: of
    each rank, arguments by name, `in_words`."""
    for name in dict.fromkeys(name for words in everywhere for name in words):
        first, *others = (words.get(name, "a call of another function") for words in everywhere)
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise ValueError(
                    f"{name}: expected the same on all ranks {ranks}, got {first:.200} on rank 0 and {other:.200} on "
                    f"rank {rank}"
                )


def in_words(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{value}"
    if value.numel() <= 16:
        return f"{value.tolist()} of {value.dtype}"
    numbers = value.detach().double().view(torch.int64) if value.is_floating_point() else value.long()
    return f"{list(value.shape)} of {value.dtype} with the checksum {_checksum(numbers)}"


def _checksum(numbers: Tensor) -> int:
    """Of int64: it wraps around, and has odd factors, so that a number in another place counts."""
    flat = numbers.reshape(-1)
    return int((flat * (2 * torch.arange(flat.numel(), device=flat.device) + 1)).sum())


def _number(t: Tensor | None) -> int:
    return 7 if t is None else _DTYPES.index(t.dtype) if t.dtype in _DTYPES else 6


def _others(values: Sequence[int]) -> list[int]:
    return [rank for rank, value in enumerate(values) if value != values[0]]


def check_shards_are_finite(logps: Tensor, head: Head) -> None:
    """`logps.check_head_is_finite`, with one exchange where there is NaN among the log-probabilities, which all ranks
    see. The entry is counted in the whole vocabulary, the error the same on all ranks."""
    shards = head.shards
    assert shards is not None
    if logps.device.type != "cpu" or not logps.isnan().any():
        return
    found = []
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        wrong = logps.new_zeros(shards.here, dtype=torch.bool)
        if values is not None:
            values = values.detach()
            # -inf in a bias: an entry that never is
            wrong = ~values.isfinite().all(1) if name == "weight" else values.isnan() | values.isposinf()
        entries = torch.nonzero(wrong).flatten()
        found += [len(entries), int(entries[0]) + shards.first if len(entries) else shards.vocab]
    table = shards.gather(torch.tensor(found)).view(-1, 2, 2)
    for i, name in enumerate(("weight", "bias")):
        count, first = int(table[:, i, 0].sum()), int(table[:, i, 1].min())
        if count:
            raise ValueError(
                f"{name}: expected finite numbers, got NaN or infinity in {count} of {shards.vocab} vocabulary "
                f"entries, the first is {first}"
            )
