"""What memory a DPO step will take, before it is run: head and loss three ways, and the rest of the training beside it.

Head and loss are counted (`head_memory.py`), and so is what follows from the number of parameters. What the layers keep
for their backward is an estimate, for layers of the Llama kind as transformers 5 runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo_kernels.data.lengths import blank_labels, real_lengths
from dpo_kernels.models.shapes import ModelShape
from dpo_kernels.planning.head_memory import HeadMemory, eager_bytes, ours_bytes, trl_bytes

WAYS = ("eager", "TRL", "dpo_kernels")
TRAIN = ("full", "frozen-head", "lora")
REFERENCES = ("model", "precomputed", "none")
# To measure the share of labels: pairs in a batch at most, since larger ones are padded alike; tokens in both responses
# that are more than most pairs have.
MEASURED_PAIRS, RESPONSE_TOKENS = 150, 4096
MOST_PAIRS = 2**16


@dataclass(frozen=True)
class Step:
    """One micro-batch of DPO. `shape` None: the head alone."""

    hidden: int
    vocab: int
    pairs: int
    seq: int
    labelled: float
    shape: ModelShape | None = None
    dtype: torch.dtype = torch.bfloat16  # of the weights
    autocast: torch.dtype | None = None
    train: str = "full"
    lora_r: int = 16
    reference: str = "precomputed"
    checkpointing: bool = False
    chunk_bytes: int | None = None
    device: torch.device = torch.device("cpu")
    impl: str = "auto"

    @property
    def positions(self) -> int:
        return 2 * self.pairs * self.seq

    @property
    def tokens(self) -> int:
        """Labelled ones."""
        return math.ceil(self.labelled * self.positions)


def head_memory(step: Step, way: str) -> HeadMemory:
    """Of head and loss, one of `WAYS`."""
    train_head = step.train == "full"
    common: dict[str, Any] = {
        "positions": step.positions,
        "hidden": step.hidden,
        "vocab": step.vocab,
        "dtype": step.dtype,
        "compute_dtype": step.autocast,
        "softcap": step.shape is not None and step.shape.softcap is not None,
    }
    if way == "eager":
        return eager_bytes(**common, train_head=train_head)
    common |= {"tokens": step.tokens, "device": step.device}
    if way == "TRL":
        return trl_bytes(**common, train_head=train_head)
    return ours_bytes(
        "C" if train_head else "B", **common, impl=step.impl, chunk_bytes=step.chunk_bytes, pairs=step.pairs
    )


def state_bytes(step: Step, shape: ModelShape) -> dict[str, int]:
    """Weights, gradients, AdamW's two moments and the reference. Adapters are in fp32."""
    e = step.dtype.itemsize
    adapters = step.lora_r * shape.layers * sum(i + o for i, o in shape.linears)
    weights, trained = shape.parameters * e, shape.parameters * e
    if step.train == "frozen-head":
        trained -= shape.head_parameters * e
    elif step.train == "lora":
        trained = adapters * 4
        weights += trained
    with_copy = step.reference == "model" and step.train != "lora"  # which is the model without its adapters
    return {
        "weights": weights,
        "gradients": trained,
        "optimizer": 2 * trained,
        "reference": shape.parameters * e if with_copy else 0,
    }


def layer_bytes(step: Step, shape: ModelShape) -> int:
    """Estimate: what one layer saves for the backward, for each position of a padded batch.

    H, q, k, i: hidden size, queries, keys, intermediate size; e bytes of the weights, c of what is computed.

    - Norms: their input in fp32 (4H), and where their weight is trained the normalized one (eH, 4H in Gemma).
    - Inputs of matrices that are trained: of queries, keys and values, of gate and up, and of down; that of the output
      matrix is the attention's result. Autocast casts for each matrix, and so do adapters, to fp32.
    - Attention: queries, keys and values, repeated for all heads since padding needs a mask, and the result (4cq); a
      log-sum-exp a head; the mask in numbers (c for each position it sees). With a softcap, which the fused attention
      does not take, scores after tanh and after softmax, a number for each head and position seen.
    - MLP: gate, its activation, and up (3ci).
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    e, trained = step.dtype.itemsize, step.train != "lora"
    c = e if step.autocast is None else step.autocast.itemsize
    norms = shape.norms * h * (4 + trained * (4 if shape.wide_norms else e))
    if shape.qk_norm:
        norms += (q + k) * (4 + trained * (4 if shape.wide_norms else c))
    if step.autocast is not None:
        inputs = c * (5 * h + i + (0 if trained else q))
    elif trained or e == 4:
        inputs = e * (2 * h + i)
    else:
        inputs = 4 * (5 * h + q + i)
    attention = 4 * c * q
    if shape.attention_softcap is None:
        attention += 4 * shape.heads + c * step.seq
    else:
        attention += shape.heads * step.seq * (c + 4 + (c if c < 4 else 0))
    adapters = 0 if trained else 7 * step.lora_r * (4 if step.autocast is None else c)
    return norms + inputs + attention + 3 * c * i + adapters


def activation_bytes(step: Step, shape: ModelShape) -> tuple[int, int]:
    """Estimate of what the forward leaves for the backward, and of what is computed again at a time in the backward.

    Beside the layers' there are the last norm and the hidden states that the head reads; under autocast a copy of every
    matrix. Gradient checkpointing keeps the input of each layer instead, and computes one layer again at a time.
    """
    e, h = step.dtype.itemsize, shape.hidden
    last = h * (4 + e + (step.train != "lora") * (4 if shape.wide_norms else e))
    layer = layer_bytes(step, shape) * step.positions
    copies = 0 if step.autocast is None else shape.linear_parameters * step.autocast.itemsize
    if step.checkpointing:
        return (shape.layers * h * e + last) * step.positions, layer + copies // shape.layers
    return shape.layers * layer + last * step.positions + copies, 0


def footprint(step: Step, way: str) -> dict[str, int]:
    """Bytes of everything in one step, and the total. One layer computed again and the head are never there at once."""
    head = head_memory(step, way)
    if step.shape is None:
        return {"head and loss": head.peak, "total": head.peak}
    kept, again = activation_bytes(step, step.shape)
    parts = state_bytes(step, step.shape) | {"activations": kept, "head and loss": head.peak}
    extra = max(0, again + head.returned - head.peak)
    return parts | {"one layer again": extra, "total": sum(parts.values()) + extra}


def largest_batch(step: Step, way: str, memory: int) -> int:
    """The most pairs of this length whose step fits, 0 if one does not."""

    def fits(pairs: int) -> bool:
        return footprint(replace(step, pairs=pairs), way)["total"] <= memory

    low, high = 0, 1
    while high < MOST_PAIRS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measured_share(pairs: int, seq: int) -> float:
    """The share of positions with a label in padded batches of so many real preference pairs, cut at `seq` tokens."""
    pairs = min(pairs, MEASURED_PAIRS)
    lengths = real_lengths(min(2 * seq, RESPONSE_TOKENS) * MEASURED_PAIRS, seq)
    batches = [blank_labels(0, 0, lengths[i : i + pairs]) for i in range(0, len(lengths) - pairs + 1, pairs)]
    return sum(int((labels == 0).sum()) for labels in batches) / sum(labels.numel() for labels in batches)


def plan(step: Step, memory: int) -> dict[str, Any]:
    """Everything that is printed or written, in bytes."""
    heads = {way: head_memory(step, way) for way in WAYS}
    found: dict[str, Any] = {
        "step": _plain(step),
        "positions": step.positions,
        "labelled_positions": step.tokens,
        "device_bytes": memory,
        "head": {way: head._asdict() | {"temporary": head.temporary} for way, head in heads.items()},
    }
    if step.shape is None:
        return found
    found["parameters"] = step.shape.parameters
    found["total"] = {way: footprint(step, way) for way in WAYS}
    found["fits"] = {way: parts["total"] <= memory for way, parts in found["total"].items()}
    found["largest_batch"] = {way: largest_batch(step, way, memory) for way in WAYS}
    return found


def _plain(step: Step) -> dict[str, Any]:
    plain = {**vars(step), "shape": None if step.shape is None else vars(step.shape)}
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value
        for name, value in plain.items()
    }
