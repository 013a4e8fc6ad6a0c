"""Attention in rows where responses share a prompt: each sees that prompt and itself, never another.

A row holds groups `[prompt | response 1 | ... | response K]`, one after the other, and padding behind them. What a
position sees is an interval of its prompt and one of its own segment, up to itself, and the *layout* says so:

    layout [R, 1, T, 4] int32: prompt begin, prompt end, segment begin, position; of each position of each row

A position of a prompt has an empty interval of prompt. Layers with a sliding window of w look back less than w
*positions*, not slots. A model whose attention implementation is the one that is registered here, "dpo_kernels", makes
its masks of the layout within `laid_out`, and of what it is given elsewhere: there it attends as "sdpa" does.

Dimensions: R rows, T slots, h query heads, d head size.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax

from dpo_kernels.options import is_at_hand
from dpo_kernels.rows import check_places

ATTENTION = "dpo_kernels"
PROMPT_BEGIN, PROMPT_END, BEGIN, POSITION = FIELDS = range(4)


class Segment(NamedTuple):
    """Slots of a row that see one another, up to themselves, and a prompt: its own slots where it is one."""

    row: int
    begin: int
    end: int
    prompt: tuple[int, int]  # of a response; (begin, begin) of a prompt


class Sequences(NamedTuple):
    """Of the flat slots [R T], where each segment sees itself alone; padding is sequences of one slot."""

    bounds: Tensor  # [sequences + 1] int32: where each begins, and the end
    longest: int


def is_layout(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype == torch.int32 and mask.shape[-1] == len(FIELDS)


def sees(layout: Tensor, window: int | None = None) -> Tensor:
    """[R, 1, T, T] bool: whether the slot of a row (third) attends to another one (last)."""
    begin_of_prompt, end_of_prompt, begin, position = layout.unbind(-1)  # [R, 1, T] each
    slot = torch.arange(layout.shape[2], device=layout.device, dtype=torch.int32)
    key = slot[None, None, None, :]
    allowed = (key >= begin_of_prompt[..., None]) & (key < end_of_prompt[..., None])
    allowed |= (key >= begin[..., None]) & (key <= slot[None, None, :, None])
    if window is not None:
        allowed &= position[..., None] - position[..., None, :] < window
    return allowed


# Attention, block by block


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """An attention function of transformers: query [R, h, T, d], key and value [R, h / g, T, d] to [R, T, h, d]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    p = dropout if module.training else 0.0
    more = {name: options.get(name) for name in ("softcap", "s_aux")}
    plain = all(value is None for value in more.values())
    groups = query.shape[1] // key.shape[1]
    if not is_layout(attention_mask):
        if plain:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        mask = _additive(attention_mask, query, key)
        return _attend(query, key, value, mask, scale, p, **more).transpose(1, 2).contiguous(), None
    if query.shape[2] != attention_mask.shape[2] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"attention_mask: expected a layout of the {query.shape[2]} slots that are computed, and as many keys, "
            f"none from a cache or an adapter, got a layout of {attention_mask.shape[2]} and {key.shape[2]} keys"
        )
    window = options.get("sliding_window")
    if (windows := _windows.get()) is not None:
        windows.append(window)
    if query.device.type == "cuda" and plain and not p:
        sequences = _known(attention_mask).sequences(attention_mask) if takes_sequences(query) else None
        if sequences is not None:
            return _by_sequences(query, key, value, sequences, window, scale), None
        return _flex(query, key, value, attention_mask, window, scale), None
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return _in_blocks(query, key, value, attention_mask, window, scale, p, **more), None


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Tensor,
    window: int | None,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """A prompt and each of its responses as a block of its own, the prompt's keys and values read by each of these.
    Nothing is computed of what no slot sees, and slices are taken by `split`, whose gradient is one pass."""
    known = _known(layout)
    rows = []
    for row, segments in enumerate(known.rows(layout)):
        sizes = [segment.end - segment.begin for segment in segments]
        parts = zip(*(t[row : row + 1].split(sizes, dim=2) for t in (query, key, value)), strict=True)
        prompts: dict[int, tuple[Tensor, Tensor]] = {}
        found = []
        for segment, (q, k, v) in zip(segments, parts, strict=True):
            if segment.prompt[0] == segment.prompt[1]:
                prompts[segment.begin] = k, v
            else:
                k_prompt, v_prompt = prompts[segment.prompt[0]]
                k, v = _joined(k_prompt, k), _joined(v_prompt, v)
            fused = softcap is None and s_aux is None
            mask = known.mask(segment, window, q.dtype, always=not fused)
            if mask is None:
                found.append(scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, scale=scale))
            elif fused:
                found.append(scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale))
            else:
                found.append(_attend(q, k, v, mask, scale, dropout, softcap, s_aux))
        rows.append(torch.cat(found, dim=2))
    return torch.cat(rows).transpose(1, 2).contiguous()


def _joined(prompt: Tensor, own: Tensor) -> Tensor:
    return torch.cat([prompt, own], dim=2)


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Of a mask that "sdpa" takes, where no mask means causal attention."""
    if mask is None:
        n, m = query.shape[2], key.shape[2]
        mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scale: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """With what no fused attention has: a softcap of the scores (Gemma 2), or sinks (gpt-oss)."""
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    p = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    p = torch.nn.functional.dropout(p, dropout)
    return p[..., : k.shape[2]] @ v


class _Known:
    """What is found of a layout once, and asked for in every layer."""

    def __init__(self, layout: Tensor) -> None:
        self.device = layout.device
        self.flex: dict[int | None, Any] = {}
        self._sequences: list[Sequences | None] = []
        self._rows: list[list[Segment]] = []
        self._masks: dict[tuple[Segment, int | None, torch.dtype], Tensor] = {}

    def rows(self, layout: Tensor) -> list[list[Segment]]:
        """Read on the host, which waits for the device: where blocks are computed one by one alone."""
        if not self._rows:
            self._rows = [list(_segments(row, fields)) for row, fields in enumerate(layout[:, 0].tolist())]
        return self._rows

    def sequences(self, layout: Tensor) -> Sequences | None:
        """None where responses share a prompt. The device is waited for, once."""
        if not self._sequences:
            prompt_begin, prompt_end, begin, _ = layout.flatten(0, 2).unbind(-1)  # [R T] each
            slot = torch.arange(layout.shape[2], device=self.device).repeat(layout.shape[0])
            shared = (prompt_begin != prompt_end).any()
            starts = torch.nonzero(begin == slot)[:, 0]
            bounds = torch.cat([starts, starts.new_tensor([len(slot)])])
            is_shared, longest = torch.stack([shared.long(), bounds.diff().max()]).tolist()
            self._sequences.append(None if is_shared else Sequences(bounds.int(), longest))
        return self._sequences[0]

    def mask(self, segment: Segment, window: int | None, dtype: torch.dtype, always: bool = False) -> Tensor | None:
        """[n, keys] what is added to the scores of a segment's n slots, keys of its prompt first; None where plain
        causal attention is meant."""
        n, prompt = segment.end - segment.begin, segment.prompt[1] - segment.prompt[0]
        if window is not None and window >= prompt + n:
            window = None
        if not always and window is None and prompt == 0:
            return None
        found = self._masks.get((segment, window, dtype))
        if found is None:
            behind = torch.arange(prompt, prompt + n, device=self.device)[:, None]
            key = torch.arange(prompt + n, device=self.device)
            allowed = key <= behind
            if window is not None:
                allowed &= behind - key < window
            found = torch.zeros(n, prompt + n, dtype=dtype, device=self.device)
            found.masked_fill_(~allowed, torch.finfo(dtype).min)
            self._masks[segment, window, dtype] = found
        return found


def _segments(row: int, fields: list[list[int]]) -> Iterator[Segment]:
    """In order; padding is segments of one slot."""
    begin = 0
    while begin < len(fields):
        prompt_begin, prompt_end, own, _ = fields[begin]
        end = begin + 1
        while end < len(fields) and fields[end][BEGIN] == own:
            end += 1
        yield Segment(row, begin, end, (prompt_begin, prompt_end))
        begin = end


_layouts: dict[int, tuple[weakref.ref[Tensor], _Known]] = {}


def _known(layout: Tensor) -> _Known:
    found = _layouts.get(id(layout))
    if found is None or found[0]() is not layout:
        for key in [key for key, (of, _) in _layouts.items() if of() is None]:
            del _layouts[key]
        found = _layouts[id(layout)] = weakref.ref(layout), _Known(layout)
    return found[1]


# On a GPU


@functools.cache
def _varlen() -> tuple[Callable[..., Any], bool] | None:
    """Attention of sequences of any lengths, one after the other, and whether it takes fewer heads of keys than of
    queries; None in a PyTorch that has none with a scale and a window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters.keys()
    return (varlen_attn, "enable_gqa" in options) if {"scale", "window_size"} <= options else None


def takes_sequences(query: Tensor) -> bool:
    """Whether kernels of flash attention compute with such queries, of whole sequences."""
    size = query.shape[-1]
    return query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256 and _varlen() is not None


def _by_sequences(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, window: int | None, scale: float
) -> Tensor:
    """By kernels for sequences of any lengths, which make no mask."""
    varlen = _varlen()
    assert varlen is not None
    attention, takes_groups = varlen
    rows, groups, more = query.shape[0], query.shape[1] // key.shape[1], {}
    if groups > 1 and takes_groups:
        more["enable_gqa"] = True
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (query, key, value)]  # [R T, h, d]
    bounds, longest = sequences
    behind = -1 if window is None else window - 1  # without the position itself
    out: Tensor = attention(*flat, bounds, bounds, longest, longest, scale=scale, window_size=(behind, 0), **more)
    return out.unflatten(0, (rows, -1))


def _flex(query: Tensor, key: Tensor, value: Tensor, layout: Tensor, window: int | None, scale: float) -> Tensor:
    """By FlexAttention, which leaves out blocks that no slot sees."""
    known = _known(layout)
    if window not in known.flex:
        known.flex[window] = block_mask(layout, window)
    groups = query.shape[1] // key.shape[1]
    out = _compiled_flex()(query, key, value, block_mask=known.flex[window], scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2).contiguous()


def block_mask(layout: Tensor, window: int | None = None) -> Any:
    """FlexAttention's mask of a layout: one comparison of intervals."""
    from torch.nn.attention.flex_attention import create_block_mask

    begin_of_prompt, end_of_prompt, begin, position = (t[:, 0] for t in layout.unbind(-1))  # [R, T] each

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed = ((k >= begin_of_prompt[b, q]) & (k < end_of_prompt[b, q])) | ((k >= begin[b, q]) & (k <= q))
        return allowed if window is None else allowed & (position[b, q] - position[b, k] < window)

    slots = layout.shape[2]
    return create_block_mask(seen, layout.shape[0], None, slots, slots, device=str(layout.device))


_flex_attention: list[Any] = []


def _compiled_flex() -> Any:
    if not _flex_attention:
        from torch.nn.attention.flex_attention import flex_attention

        _flex_attention.append(torch.compile(flex_attention, dynamic=True))
    return _flex_attention[0]


# In a model


def register() -> None:
    """Makes transformers know the attention function; to do it twice is to do it once."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def mask(*sizes: Any, **options: Any) -> Any:
        laid = _laid.get()
        if laid is None:
            return sdpa_mask(*sizes, **options)
        laid.read = True
        return laid.layout

    AttentionInterface.register(ATTENTION, attention_forward)
    AttentionMaskInterface.register(ATTENTION, mask)


_windows: ContextVar[list[int | None] | None] = ContextVar("windows", default=None)


@contextmanager
def windows_seen() -> Iterator[list[int | None]]:
    """The windows that layers give to the attention, one for each."""
    seen: list[int | None] = []
    token = _windows.set(seen)
    try:
        yield seen
    finally:
        _windows.reset(token)


@dataclass
class _Laid:
    layout: Tensor
    read: bool = False


_laid: ContextVar[_Laid | None] = ContextVar("laid", default=None)


@contextmanager
def laid_out(layout: Tensor | None, required: bool = True) -> Iterator[None]:
    """Within, a model that `use_layouts` was called with attends as this layout says. Layers get it as an argument, so
    that checkpointing, which runs them again later, has it too.

    Args:
        layout: [R, 1, T, 4] int32 of the inputs [R, T], as `PackedCollator` gives it; None: the model's masks are those
            of what it is given.
        required: whether it is an error that no model has read it.

    Raises:
        ValueError: at the end, that none has: `use_layouts` was not called with it, its attention was changed since, or
            it was compiled with another layout.
    """
    if layout is not None and not is_layout(layout):
        got = f"{list(layout.shape)} of {layout.dtype}" if isinstance(layout, Tensor) else type(layout).__name__
        raise ValueError(
            f"layout: expected None or int32 [R, 1, T, {len(FIELDS)}], as PackedCollator gives it, got {got}"
        )
    laid = None if layout is None else _Laid(layout)
    token = _laid.set(laid)
    try:
        yield
    finally:
        _laid.reset(token)
    if required and laid is not None and not laid.read:
        raise ValueError(
            "laid_out: expected a model that reads the layout, which use_layouts (dpo_kernels.models) makes of one; "
            "that of which something was computed has another attention, and its responses saw each other"
        )


def refuse_restarts(model: Any, position_ids: Any, attention_mask: Any) -> None:
    """Raises `ValueError` for rows of several sequences that the model's attention would take for one: outside of
    `laid_out`, where positions begin again. It is looked at on the CPU alone."""
    is_ours = getattr(model.config, "_attn_implementation", None) == ATTENTION
    if _laid.get() is not None or not is_ours or not isinstance(position_ids, Tensor) or not is_at_hand(position_ids):
        return
    goes_back = position_ids.diff(dim=-1) < 0
    if isinstance(attention_mask, Tensor) and attention_mask.shape == position_ids.shape:
        goes_back &= attention_mask[:, 1:] != 0
    if goes_back.any():
        raise ValueError(
            "position_ids: expected those of one sequence a row, got some that begin again: rows of several are "
            "computed within laid_out(batch['layout'])"
        )


def hidden_of_responses(hidden: Tensor, predictors: Tensor) -> Tensor:
    """The hidden states that predict the tokens of responses.

    Args:
        hidden: [R, T, H] of laid-out rows.
        predictors: [S, L] int64, their slots in the flat [R T], as `PackedCollator` gives them.

    Returns:
        [S, L, H], whose labels are aligned: not shifted.

    Raises:
        ValueError: what are no hidden states or slots of them.
    """
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        shape = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"hidden: expected a tensor [R, T, H], got {shape}")
    if not isinstance(predictors, Tensor) or predictors.dtype != torch.int64:
        kind = predictors.dtype if isinstance(predictors, Tensor) else type(predictors).__name__
        raise ValueError(f"predictors: expected int64 [S, L], got {kind}")
    check_places(hidden, predictors, predictors, -1, hidden.device.type == "cpu")
    return hidden.flatten(0, 1)[predictors]
