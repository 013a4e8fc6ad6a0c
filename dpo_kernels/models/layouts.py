"""Whether a model computes laid-out rows as it does padded ones: asked of the model itself, once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.models.operands import name_of
from dpo_kernels.models.segments import ATTENTION, laid_out, register, windows_seen

# Two groups of a prompt and two responses each, in tokens.
GROUPS = ((11, 7, 4), (5, 6, 9))
# The largest difference of hidden states, and of gradients, as a part of their own size.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
KINDS = {"full_attention", "sliding_attention"}


def use_layouts(*models: Any) -> None:
    """Gives models the attention that reads layouts, from now on. Outside `laid_out` they attend as "sdpa" does.

    Args:
        models: transformers causal language models, such as a policy and its reference, in adapters or without, on
            their device and not yet sharded. Each is asked once, forward and backward on a few tokens.

    Raises:
        ValueError: hidden states or gradients come out differently from those of a padded batch: of recurrent and
            convolutional layers, ALiBi, positions of its own, experts with a capacity. All models are as they were.
    """
    changed: list[tuple[Any, str]] = []
    try:
        for model in models:
            before = getattr(getattr(unwrap(model), "config", None), "_attn_implementation", None)
            _use_layouts(model)
            changed.append((unwrap(model), before or ""))
    except ValueError:
        for own, before in changed:
            if before:
                own.set_attn_implementation(before)
        raise


def _use_layouts(model: Any) -> None:
    own = unwrap(model)
    if not hasattr(own, "set_attn_implementation") or not hasattr(own, "config"):
        raise ValueError(f"model: expected a model of transformers, got {type(model).__name__}")
    before = getattr(own.config, "_attn_implementation", None)
    kinds = set(getattr(own.config.get_text_config(decoder=True), "layer_types", None) or ()) - KINDS
    if kinds:
        raise ValueError(
            f"{name_of(own)} has layers of {', '.join(sorted(kinds))}, which go through a row from slot to slot"
        )
    register()
    try:
        expected = _computed(model, "padded")
        own.set_attn_implementation(ATTENTION)
        with windows_seen() as windows:
            shared = _computed(model, "shared")
        whole = _computed(model, "whole")  # by other kernels, on a GPU
        reason = (
            _difference(own, "hidden states", shared.hidden, expected.hidden)
            or _difference(own, "gradients", shared.gradients, expected.gradients)
            or _difference(own, "hidden states", whole.hidden, expected.hidden)
            or _difference(own, "gradients", whole.gradients, expected.gradients)
            or _layers_missing(own, len(windows))
            or _windows_missing(own, windows)
        )
    except Exception as error:  # of a model that takes no such input
        reason = f"{name_of(own)} raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    if reason:
        if before is not None:
            own.set_attn_implementation(before)
        raise ValueError(reason)


def _difference(model: Any, what: str, found: list[Tensor], expected: list[Tensor]) -> str:
    size = torch.cat([t.float().flatten() for t in expected]).abs().max().clamp(min=1e-30)
    worst = max(
        ((a.double() - b.double()).abs().max() / size.double()).item() for a, b in zip(found, expected, strict=True)
    )
    if worst <= TOLERANCES.get(expected[0].dtype, 0.1):
        return ""
    return (
        f"{name_of(model)} computes other {what} where several sequences are in one row: they differ by "
        f"{worst:.2g} of their size. It has something else than attention by positions: recurrent or convolutional "
        "layers, ALiBi, or positions of its own"
    )


def _layers_missing(model: Any, seen: int) -> str:
    """Layers with an attention of their own may differ by little, of weights that are small."""
    layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 1)
    if seen >= layers:
        return ""
    return f"{name_of(model)} has {layers} layers, and {seen} of them take an attention from outside"


def _windows_missing(model: Any, windows: list[int | None]) -> str:
    """Layers whose window the attention is not told of would look back too far in rows longer than that."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return ""
    kinds = getattr(config, "layer_types", None)
    expected = sum(kind == "sliding_attention" for kind in kinds) if kinds else config.num_hidden_layers
    seen = sum(each is not None for each in windows)
    if seen >= expected:
        return ""
    return f"{name_of(model)} has {expected} layers with a window of {window}, and says so to the attention of {seen}"


class _Computed(NamedTuple):
    hidden: list[Tensor]  # of each response of the groups, from the token before it on
    gradients: list[Tensor]  # of the embeddings of each prompt and each response


@torch.enable_grad()
def _computed(model: Any, way: Literal["padded", "shared", "whole"]) -> _Computed:
    """From padded rows; or from one row, of groups that share a prompt, or of whole sequences."""
    own = unwrap(model)
    device = own.get_input_embeddings().weight.device
    entries = min(own.get_input_embeddings().weight.shape[0], own.config.get_text_config(decoder=True).vocab_size)
    draw = torch.Generator().manual_seed(0)
    groups = [[torch.randint(entries, (size,), generator=draw) for size in sizes] for sizes in GROUPS]
    head, embedded = LMHead(model), []

    def leaf(module: Any, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    def gradient(hidden: list[Tensor]) -> Tensor:
        direction = torch.linspace(-1, 1, hidden[0].shape[-1], dtype=hidden[0].dtype, device=device)
        (found,) = torch.autograd.grad(torch.cat([each @ direction for each in hidden]).sum(), embedded[:1])
        return found

    def in_one_row(tokens: Tensor, layout: list[tuple[int, int, int, int]]) -> Tensor:
        ids, positions = tokens[None].to(device), torch.tensor([[field[3] for field in layout]], device=device)
        with laid_out(torch.tensor(layout, dtype=torch.int32, device=device)[None, None], required=False):
            return head.hidden_states(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions)[0]

    with ExitStack() as stack:
        stack.enter_context(_evaluated(model))
        stack.callback(own.get_input_embeddings().register_forward_hook(leaf).remove)
        if way != "shared":
            rows = [torch.cat([prompt, response]) for prompt, *responses in groups for response in responses]
            prompts = [len(prompt) for prompt, *responses in groups for _ in responses]
            of_responses = [slice(p - 1, len(row)) for row, p in zip(rows, prompts, strict=True)]
            if way == "padded":
                pad, ones = torch.nn.utils.rnn.pad_sequence, [torch.ones_like(row) for row in rows]
                ids, mask = (pad(each, batch_first=True).to(device) for each in (rows, ones))
                hidden, _ = head.hidden_states(input_ids=ids, attention_mask=mask)
                of_rows = list(hidden)
            else:
                begins = [0, *itertools.accumulate(map(len, rows))]
                layout = [
                    (first, first, first, n) for first, row in zip(begins, rows, strict=False) for n in range(len(row))
                ]
                hidden = in_one_row(torch.cat(rows), layout)
                of_rows = list(hidden[0].split([len(row) for row in rows]))
            found = [row[own] for row, own in zip(of_rows, of_responses, strict=True)]
            dembedded = gradient(found)
            drows = iter(dembedded if way == "padded" else dembedded[0].split([len(row) for row in rows]))
            gradients = []
            for prompt, *responses in groups:
                own_rows = [next(drows) for _ in responses]
                gradients.append(torch.stack([row[: len(prompt)] for row in own_rows]).sum(0))
                gradients += [
                    row[len(prompt) : len(prompt) + len(response)]
                    for row, response in zip(own_rows, responses, strict=True)
                ]
            return _Computed([each.detach() for each in found], gradients)
        layout = []
        places, begin = [], 0
        for prompt, *responses in groups:
            end = begin + len(prompt)
            layout += [(begin, begin, begin, n) for n in range(len(prompt))]
            slot = end
            for response in responses:
                layout += [(begin, end, slot, len(prompt) + n) for n in range(len(response))]
                places.append([end - 1, *range(slot, slot + len(response))])
                slot += len(response)
            begin = slot
        hidden = in_one_row(torch.cat([segment for group in groups for segment in group]), layout)
        found = [hidden[0, place] for place in places]
        of_segments = gradient(found)[0].split([len(segment) for group in groups for segment in group])
        return _Computed([each.detach() for each in found], list(of_segments))


@contextmanager
def _evaluated(model: Any) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
