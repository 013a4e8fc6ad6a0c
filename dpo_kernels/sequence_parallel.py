"""Sequences that are split along their positions: each rank has a part of every one, and the head (context parallel).

Only sums over positions cross, [S] a sum: a response's log-probability is the sum of its parts, and so is what losses
need beside it. Each rank then has the same losses, and gradients of its own positions, for which nothing is exchanged.
Ranks say first what they are given, so that they wait for one another only where it fits together, and how many
labelled tokens of each sequence they have, from which plans are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels.parallel import check_group, gather, in_words, is_dtensor, refuse_differences

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class SequenceRanks:
    """The ranks of a `sequence_group`, within one call."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("dpo_kernels: sequences in parts are not computed under torch.compile: call it outside")
        check_group("sequence_group", group)
        self.group = group
        self.rank = dist.get_rank(group)
        self.have_agreed = False
        self.counts: list[list[int]] = []
        """[R][S] labelled tokens of each sequence on each rank, once they have agreed."""

    def agree(self, labelled: Tensor, **values: object) -> Whole:
        """What is known of the whole sequences of which labelled [S, T_r] is here.

        Args:
            values: by the argument's name, what has to be the same on all ranks.

        Raises:
            ValueError: ranks that disagree, or of which one was given what it refuses; the same on all of them.
        """
        said = {name: in_words(value) for name, value in values.items()}
        said["labels"] = f"{labelled.shape[0]} sequences"
        self.have_agreed = True
        everywhere = self._exchange((said, labelled.sum(1).tolist()))
        refuse_differences([words for words, _ in everywhere], "of sequence_group")
        self.counts = [counts for _, counts in everywhere]
        counts = torch.tensor(self.counts, dtype=torch.int64, device=labelled.device)
        return Whole(counts.sum(0), counts[: self.rank].sum(0), self.group)

    def tell(self, error: Exception) -> NoReturn:
        """What a rank does that comes no further: the others hear of it when they would agree."""
        self.have_agreed = True
        try:
            self._exchange(f"{error}")
        except ValueError as told:
            raise (TypeError(f"{told}") if isinstance(error, TypeError) else told) from error
        raise AssertionError("unreachable") from error

    def _exchange(self, mine: Any) -> list[Any]:
        everywhere: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everywhere, mine, group=self.group)
        for rank, said in enumerate(everywhere):
            if isinstance(said, str):
                raise ValueError(f"{said} (on rank {rank} of sequence_group)")
        return everywhere


class Whole(NamedTuple):
    """What is known of S sequences of which a part is here."""

    num_tokens: Tensor  # [S] int64: labelled tokens on all ranks
    before: Tensor  # [S] int64: those on earlier ranks
    group: dist.ProcessGroup

    def of(self, take: Callable[[Tensor], Tensor]) -> Whole:
        """The same of other sequences, those that `take` makes of [S]."""
        return self._replace(num_tokens=take(self.num_tokens), before=take(self.before))

    def join(self, sums: Tensor) -> Tensor:
        """[S] sums over the positions here, to those over the positions of all ranks: added in the order of ranks by
        each of them, since an all-reduce may add in any, and ranks would have other bits. Each rank computes the whole
        loss, so the gradient of its part is that of the sum."""
        return _Join.apply(sums, self.group)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: Tensor, group: dist.ProcessGroup) -> Tensor:
        first, *others = gather(sums, group)
        return functools.reduce(torch.add, others, first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def in_step(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """A decorator: what one rank of `sequence_group` refuses is an error of all, so that none waits for it."""

    @functools.wraps(function)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        group: Any = kwargs.get("sequence_group")
        if group is None or isinstance(group, SequenceRanks):  # of the call that this one is in
            return function(*args, **kwargs)
        kwargs["sequence_group"] = ranks = SequenceRanks(group)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if ranks.have_agreed:
                raise
            ranks.tell(error)

    return wrapped


def ranks_of(sequence_group: object) -> SequenceRanks | None:
    """What `in_step` has put in the place of a group."""
    return sequence_group if isinstance(sequence_group, SequenceRanks) else None


def check_parts(ranks: SequenceRanks | None, shift: bool, weight: object = None, group: object = None) -> None:
    """What is no part of a sequence on each rank, of a call with this head."""
    if ranks is None:
        return
    if is_dtensor(weight) and weight.device_mesh.ndim == 1:
        group = weight.device_mesh.get_group()
    if isinstance(group, dist.ProcessGroup):
        shared = set(dist.get_process_group_ranks(ranks.group)) & set(dist.get_process_group_ranks(group))
        if len(shared) > 1:
            raise ValueError(
                "sequence_group: expected no rank but this one of those that share the head, which have the same rows, "
                f"got {sorted(shared)} in both groups"
            )
    if shift:
        raise ValueError(
            "shift: expected False with sequence_group, since what a part's last position predicts lies on another "
            "rank: shift the labels before they are split, got True"
        )


def described(t: Tensor | None, shape: str = "") -> str:
    """What is the same of a tensor on all ranks whose values are not compared."""
    if t is None:
        return "None"
    needs = ", with a gradient" if t.requires_grad and torch.is_grad_enabled() else ""
    return f"{t.dtype}{shape or list(t.shape)}{needs}"


def of_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None, temperature: float
) -> dict[str, object]:
    return {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "hidden": described(hidden, f"[S, T, {hidden.shape[2]}]"),
        "weight": described(weight),
        "bias": described(bias),
    }
