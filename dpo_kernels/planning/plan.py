"""What memory a DPO step will take, before it is run: head and loss three ways, and the rest of the training beside it.

Head and loss are counted (`head_memory.py`), and so is what follows from the number of parameters. What the layers keep
for their backward is an estimate, for layers of the Llama kind as transformers 5 runs them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_kernels.bench.cases import blank_labels, real_lengths
from dpo_kernels.dispatch import IMPLEMENTATIONS
from dpo_kernels.head_memory import HeadMemory, eager_bytes, ours_bytes, trl_bytes
from dpo_kernels.model_shapes import ModelShape, find_shape

WAYS = ("eager", "TRL", "dpo_kernels")
DTYPES = ("bfloat16", "float16", "float32")
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAIN = ("full", "frozen-head", "lora")
REFERENCES = ("model", "precomputed", "none")
# To measure the share of labels: pairs in a batch at most, since larger ones are padded alike; tokens in both responses
# that are more than most pairs have.
MEASURED_PAIRS, RESPONSE_TOKENS = 150, 4096
MOST_PAIRS = 2**16
MIB, GIB = 2**20, 2**30


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


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:  # torch knows no such device
        raise ValueError(f"device: {error}") from error


def default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def device_memory(device: torch.device) -> int:
    """Bytes of the accelerator's memory, or of the machine's for the CPU."""
    if device.type == "cpu":
        if not hasattr(os, "sysconf"):
            raise ValueError("memory: not known on this system; pass --memory GIB")
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = default_device()
    properties = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    if found.type != device.type or properties is None:
        raise ValueError(f"memory: this machine has no {device.type!r} that says how much it has; pass --memory GIB")
    return properties(device).total_memory


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


def text(step: Step, found: dict[str, Any], name: str, share: str) -> str:
    heads = found["head"]
    ours = heads["dpo_kernels"]
    dtype = str(step.dtype).removeprefix("torch.")
    computed = "" if step.autocast is None else f", computed in {str(step.autocast).removeprefix('torch.')}"
    cap = "" if step.shape is None or step.shape.softcap is None else f", softcap {step.shape.softcap:g}"
    size = "" if step.shape is None else f"{found['parameters'] / 1e9:.3g} billion parameters, "
    lines = [
        f"{name}: {size}head [{step.vocab}, {step.hidden}]{cap}; weights in {dtype}{computed}",
        f"{step.pairs} pairs, {2 * step.pairs} sequences of {step.seq} tokens: {step.positions} positions, "
        f"{step.tokens} of them labelled ({share})",
        "",
        *_table(
            "head and loss, MiB",
            {
                "rows through the head": [str(heads[way]["rows"]) for way in WAYS],
                "matrix products": [str(heads[way]["products"]) for way in WAYS],
                "gradients that stay": [_number(heads[way]["returned"], MIB) for way in WAYS],
                "beside them, at most": [_number(heads[way]["temporary"], MIB) for way in WAYS],
                "peak": [_number(heads[way]["peak"], MIB) for way in WAYS],
            },
        ),
        f"dpo_kernels takes path {ours['path']}, {ours['products']} products: {ours['why']}.",
        "",
    ]
    if step.shape is not None:
        totals = found["total"]
        parts = [part for part in LABELS if part != "one layer again" or step.checkpointing]
        rows = {LABELS[part]: [_number(totals[way][part], GIB) for way in WAYS] for part in parts}
        rows[f"of {found['device_bytes'] / GIB:.1f} GiB ({step.device})"] = [
            "fits" if found["fits"][way] else "does not fit" for way in WAYS
        ]
        rows["largest batch, pairs"] = [_batch(found["largest_batch"][way]) for way in WAYS]
        lines += [*_table("whole step, GiB", rows), ""]
    return "\n".join([*lines, *_assumptions(step)])


LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer, AdamW",
    "reference": "reference model",
    "activations": "activations (estimated)",
    "head and loss": "head and loss",
    "one layer again": "one layer again, beyond that",
    "total": "total",
}


def _number(size: int, unit: int) -> str:
    return f"{size / unit:,.0f}" if unit == MIB else f"{size / unit:.2f}"


def _batch(pairs: int) -> str:
    return f"{pairs} or more" if pairs >= MOST_PAIRS else str(pairs)


def _table(title: str, rows: dict[str, list[str]]) -> list[str]:
    """Columns of `WAYS`."""
    cells = {title: list(WAYS)} | rows
    first = max(map(len, cells))
    width = max(len(cell) for row in cells.values() for cell in row) + 2
    return [f"{label:<{first}}" + "".join(f"{cell:>{width}}" for cell in row) for label, row in cells.items()]


def _assumptions(step: Step) -> list[str]:
    lines = [
        "Counted is what PyTorch allocates on one device in one micro-batch, every sequence padded to its length.",
        "eager: logits.float().log_softmax(-1) of every position. TRL: the head of its DPOTrainer since 1.15. Head and",
        "loss hold their gradients beside those that are there from earlier micro-batches.",
    ]
    if step.shape is not None:
        attention = "eager attention" if step.shape.attention_softcap is not None else "SDPA and a padding mask"
        lines += [
            "AdamW keeps two moments in the dtype of what it trains. Activations are an estimate, within a quarter, of",
            f"what layers keep in transformers 5 with {attention}. Not counted: CUDA's context, cuBLAS'",
            "workspace, memory lost between blocks; leave a GiB or two. The largest batch has this share of labels.",
        ]
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add("--model", help="hub name or its last part, or a config.json or its folder; nothing is downloaded")
    add("--hidden", type=int, help="hidden size, for the head alone")
    add("--vocab", type=int, help="vocabulary size, for the head alone")
    add("--batch", type=int, required=True, metavar="PAIRS", help="pairs in one forward pass")
    add("--seq", type=int, required=True, metavar="TOKENS", help="tokens of prompt and response, padded")
    add("--labelled", type=float, metavar="SHARE", help="of positions; default: as in real pairs of this length")
    add("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the weights (default: %(default)s)")
    add("--mixed-precision", choices=AUTOCAST, default="no", help="autocast dtype (default: %(default)s)")
    add("--train", choices=TRAIN, default="full", help="what is trained (default: %(default)s)")
    add("--lora-r", type=int, default=16, help="rank of the adapters, on all matrices (default: %(default)s)")
    add(
        "--reference",
        choices=REFERENCES,
        default="precomputed",
        help="model: a frozen copy beside the policy; under LoRA the policy itself (default: %(default)s)",
    )
    add("--gradient-checkpointing", action="store_true", help="layers are computed again in the backward")
    add("--chunk-bytes", type=int, help="as linear_dpo_loss takes it (default: 1 GiB)")
    add("--impl", choices=("auto", *IMPLEMENTATIONS), default="auto", help="of dpo_kernels (default: %(default)s)")
    add("--device", help="cpu, cuda, ...; default: the accelerator if there is one")
    add("--memory", type=float, metavar="GIB", help="of the device; default: what it says it has")
    add("--json", type=Path, metavar="FILE", help="where to write all numbers, in bytes")


def run(options: argparse.Namespace) -> int:
    for name, least in (("batch", 1), ("seq", 2), ("lora_r", 1), ("hidden", 1), ("vocab", 1), ("chunk_bytes", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if options.labelled is not None and not 0 < options.labelled <= 1:
        raise ValueError(f"labelled: expected a share above 0, at most 1, got {options.labelled}")
    if options.memory is not None and not options.memory > 0:
        raise ValueError(f"memory: expected GiB above 0, got {options.memory}")
    by_numbers = options.hidden is not None and options.vocab is not None
    if (options.model is None) != by_numbers or (options.hidden is None) != (options.vocab is None):
        raise ValueError("model: expected --model, or both --hidden and --vocab for the head alone")
    shape = None if options.model is None else find_shape(options.model)
    share = options.labelled or measured_share(options.batch, options.seq)
    step = Step(
        hidden=options.hidden if shape is None else shape.hidden,
        vocab=options.vocab if shape is None else shape.vocab,
        pairs=options.batch,
        seq=options.seq,
        labelled=share,
        shape=shape,
        dtype=getattr(torch, options.dtype),
        autocast=AUTOCAST[options.mixed_precision],
        train=options.train,
        lora_r=options.lora_r,
        reference=options.reference,
        checkpointing=options.gradient_checkpointing,
        chunk_bytes=options.chunk_bytes,
        device=default_device() if options.device is None else _device(options.device),
        impl=options.impl,
    )
    memory = device_memory(step.device) if options.memory is None else int(options.memory * GIB)
    found = plan(step, memory)
    source = "given" if options.labelled else "measured on real pairs cut at this length"
    print(text(step, found, options.model or "head", f"{share:.0%}, {source}"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0
