"""What memory a DPO step will take, before it is run: head and loss three ways, and the rest of the training beside it.

Head and loss are counted (`head_memory.py`), and so is what follows from the number of parameters. What the layers keep
for their backward is an estimate, for layers of the Llama kind as transformers 5 runs them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dpo_kernels.dispatch import check_impl
from dpo_kernels.linear_dpo import check_chunk_bytes
from dpo_kernels.models.shapes import ModelShape
from dpo_kernels.planning.batches import PADDED, Batching
from dpo_kernels.planning.head_memory import HeadMemory, eager_bytes, ours_bytes, trl_bytes

WAYS = ("eager", "TRL", "dpo_kernels")
TRAIN = ("full", "frozen-head", "lora")
REFERENCES = ("model", "precomputed", "none")
# What each of several processes has a part of; of the rest it has all.
SHARDING: dict[str, tuple[str, ...]] = {
    "none": (),
    "fsdp2": ("weights", "gradients", "optimizer", "reference"),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer", "reference"),
}
MOST_PAIRS = 2**16


@dataclass(frozen=True)
class Step:
    """A step of DPO: `accumulation` micro-batches and an update, on one of `processes`. `shape` None: a head alone.

    `labelled` is the share of labels in the padded batch, whatever the `batching`, which is that of dpo_kernels alone:
    eager logits and TRL's head have padded batches.
    """

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
    accumulation: int = 1
    sharding: str = "none"
    processes: int = 1
    chunk_bytes: int | None = None
    device: torch.device = torch.device("cpu")
    impl: str = "auto"
    batching: Batching = PADDED

    def __post_init__(self) -> None:
        for name in ("hidden", "vocab", "pairs", "seq", "lora_r", "accumulation", "processes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a whole number above 0, got {value!r}")
        if not isinstance(self.labelled, (int, float)) or not 0 <= self.labelled <= 1:
            raise ValueError(f"labelled: expected a share in [0, 1], got {self.labelled!r}")
        if self.shape is not None and not isinstance(self.shape, ModelShape):
            raise ValueError(f"shape: expected a ModelShape, as find_shape(name) gives, or None, got {self.shape!r}")
        for name, known in (("train", TRAIN), ("reference", REFERENCES), ("sharding", tuple(SHARDING))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name, kind in (("dtype", torch.dtype), ("device", torch.device)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name}: expected a {kind.__name__} of torch, got {getattr(self, name)!r}")
        if self.autocast is not None and not isinstance(self.autocast, torch.dtype):
            raise ValueError(f"autocast: expected a dtype of torch or None, got {self.autocast!r}")
        if not isinstance(self.batching, Batching):
            raise ValueError(f"batching: expected a Batching, as measured_batching gives, got {self.batching!r}")
        if not all(0 <= share <= 1 for share in self.batching[1:]):
            raise ValueError(f"batching: expected shares in [0, 1], got {self.batching!r}")
        if self.labelled * (self.seq - 1) > self.batching.computed * self.seq:  # the first position has no label
            raise ValueError(
                f"labelled: expected at most {self.batching.computed:.3g}, the share of positions that are computed "
                f"with {self.batching.name}, got {self.labelled!r}"
            )
        if self.by_deepspeed and self.dtype != torch.float32 and self.train != "lora":
            raise ValueError(
                f"dtype: expected float32 beside sharding {self.sharding!r} without LoRA, got "
                f"{str(self.dtype).removeprefix('torch.')}"
            )
        check_chunk_bytes(self.chunk_bytes)
        check_impl(self.impl)

    @property
    def by_deepspeed(self) -> bool:
        return self.sharding in ("zero2", "zero3")

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there before a backward: of earlier micro-batches, or ZeRO-3's memory for them."""
        return self.accumulation > 1 or self.sharding == "zero3"

    @property
    def positions(self) -> int:
        """Of the padded batch."""
        return 2 * self.pairs * self.seq

    @property
    def computed(self) -> int:
        """Positions that go through the layers."""
        return round(self.batching.computed * self.positions)

    @property
    def tokens(self) -> int:
        """Labelled ones."""
        return math.ceil(self.labelled * self.positions)


def of_way(step: Step, way: str) -> Step:
    """The step as `way` takes it: all but ours are padded."""
    return step if way == "dpo_kernels" else replace(step, batching=PADDED)


def head_memory(step: Step, way: str) -> HeadMemory:
    """Of head and loss, one of `WAYS`."""
    if not isinstance(step, Step):
        raise ValueError(f"step: expected a Step, got {type(step).__name__}")
    if way not in WAYS:
        raise ValueError(f"way: expected one of {WAYS}, got {way!r}")
    step, train_head = of_way(step, way), step.train == "full"
    common: dict[str, Any] = {
        "positions": step.computed,
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
    """Weights, the gradients of all that is trained, AdamW's two moments and the reference. Adapters are in fp32.
    DeepSpeed's optimizer has a copy of what is trained beside its moments.

    Of those that `SHARDING` names each process has a part.
    """
    e = step.dtype.itemsize
    adapters = step.lora_r * shape.adapted
    weights, trained = shape.parameters * e, shape.parameters * e
    if step.train == "frozen-head":
        trained -= shape.head_parameters * e
    elif step.train == "lora":
        trained = adapters * 4
        weights += trained
    with_copy = step.reference == "model" and step.train != "lora"  # which is the model without its adapters
    state = {
        "weights": weights,
        "gradients": trained,
        "optimizer": (3 if step.by_deepspeed else 2) * trained,
        "reference": shape.parameters * e if with_copy else 0,
    }
    divided = SHARDING[step.sharding]
    return {name: math.ceil(size / step.processes) if name in divided else size for name, size in state.items()}


def gathered_bytes(step: Step, shape: ModelShape) -> int:
    """What is whole at a time of weights in shards. FSDP2: the weights of the largest unit, in the dtype that is
    computed in. A layer is a unit, and so is what no layer holds: embeddings, head and last norm. ZeRO-3: the head, and
    the largest other matrix, as they are."""
    if "weights" not in SHARDING[step.sharding]:
        return 0
    if step.by_deepspeed:
        return (shape.head_parameters + _largest_matrix(shape)) * step.dtype.itemsize
    unit = max(shape.layer_parameters, shape.parameters - shape.layers * shape.layer_parameters)
    return unit * (step.dtype if step.autocast is None else step.autocast).itemsize


def _largest_matrix(shape: ModelShape) -> int:
    """Numbers of the largest one but the head."""
    return max(0 if shape.tied else shape.head_parameters, *(i * o for i, o in shape.linears))


def layer_bytes(step: Step, shape: ModelShape) -> int:
    """Estimate: what one layer saves for the backward.

    H, q, k, i: hidden size, queries, keys, intermediate size; e bytes of the weights, c of what is computed. For each
    position that is computed:

    - Norms: their input in fp32 (4H), and where their weight is trained the normalized one (eH, 4H in Gemma).
    - Inputs of matrices that are trained: of queries, keys and values, of gate and up, and of down; that of the output
      matrix is the attention's result. Autocast casts for each matrix, and so do adapters, to fp32.
    - Attention: `attention_bytes`.
    - MLP: gate, its activation, and up (3ci). In a mixture of experts i is the width of all that a token goes through,
      and each expert of a token has its input and its output apart.
    """
    h, q, k, i = shape.hidden, shape.queries, shape.keys, shape.intermediate
    e, trained, c = step.dtype.itemsize, step.train != "lora", _computed_bytes(step)
    norms = shape.norms * h * (4 + trained * (4 if shape.wide_norms else e))
    if shape.qk_norm:
        norms += (q + k) * (4 + trained * (4 if shape.wide_norms else c))
    if step.autocast is not None:
        inputs = c * (5 * h + i + (0 if trained else q))
    elif trained or e == 4:
        inputs = e * (2 * h + i)
    else:
        inputs = 4 * (5 * h + q + i)
    adapters = 0 if trained else 7 * step.lora_r * (4 if step.autocast is None else c)
    experts = 2 * c * h * shape.experts_per_token
    return step.computed * (norms + inputs + 3 * c * i + adapters + experts) + attention_bytes(step, shape)


def attention_bytes(step: Step, shape: ModelShape) -> int:
    """Estimate: what the attention of one layer saves for the backward.

    - Padded: queries, keys and values, repeated for all heads since padding needs a mask, and the result (4cq a
      position); a log-sum-exp a head; the mask in numbers (c for each position it sees). With a softcap, which the
      fused attention does not take, scores after tanh and after softmax, a number for each head and position seen; with
      sinks these.
    - In blocks: the same, but the result is there twice where the output matrix keeps its input, since blocks are put
      together; responses have copies of the keys and values that they read (2cq each); and the mask is one for all
      layers (`mask_bytes`). Scores are those of the blocks alone.
    - By FlexAttention, on a GPU: queries, keys and values as they are, the result, twice as above, a log-sum-exp.
    """
    q, c, batching = shape.queries, _computed_bytes(step), step.batching
    capped, fused = shape.attention_softcap is not None, _fused_attention(shape)
    after_softmax = 4 + (c if c < 4 else 0)
    if not batching.in_blocks:
        if shape.eager_attention:
            seen = shape.heads * step.seq * c
        elif not capped:
            seen = 4 * shape.heads + c * step.seq
        else:
            seen = shape.heads * step.seq * (c + after_softmax)
        return step.positions * (4 * c * q + seen)
    keeps_input = step.train != "lora" or (step.autocast is None and step.dtype.itemsize == 4)
    put_together = step.computed * c * q * keeps_input
    if fused and step.device.type == "cuda":
        return step.computed * (2 * c * (q + shape.keys) + 4 * shape.heads) + put_together
    copies = round(2 * c * q * batching.copied * step.positions)
    if fused:
        return step.computed * (4 * c * q + 4 * shape.heads) + put_together + copies
    scores = round(shape.heads * batching.attended * step.positions * step.seq) * (c * capped + after_softmax)
    return step.computed * 3 * c * q + put_together + copies + scores


def mask_bytes(step: Step, shape: ModelShape) -> int:
    """Masks of blocks, which all layers share: of responses, and where scores are computed apart of all of them."""
    fused = _fused_attention(shape)
    if not step.batching.in_blocks or (fused and step.device.type == "cuda"):
        return 0
    share = step.batching.masked if fused else step.batching.attended
    return round(share * step.positions * step.seq) * _computed_bytes(step)


def _fused_attention(shape: ModelShape) -> bool:
    return not shape.eager_attention and shape.attention_softcap is None


def _computed_bytes(step: Step) -> int:
    return (step.dtype if step.autocast is None else step.autocast).itemsize


def activation_bytes(step: Step, shape: ModelShape) -> tuple[int, int]:
    """Estimate of what the forward leaves for the backward, and of what is computed again at a time in the backward.

    Beside the layers' there are the last norm and the hidden states that the head reads; under autocast a copy of every
    matrix. Gradient checkpointing keeps the input of each layer instead, and computes one layer again at a time.
    """
    e, h = step.dtype.itemsize, shape.hidden
    last = step.computed * h * (4 + (step.train != "lora") * (4 if shape.wide_norms else e) + e)
    last += mask_bytes(step, shape)
    layer = layer_bytes(step, shape)
    copies = 0 if step.autocast is None else shape.linear_parameters * step.autocast.itemsize
    if step.checkpointing:
        return shape.layers * h * e * step.computed + last, layer + copies // shape.layers
    return shape.layers * layer + last + copies, 0


def cast_bytes(step: Step, shape: ModelShape) -> int:
    """Autocast's copies of trained matrices, which it keeps until head and loss are over, where no layer keeps them."""
    if step.autocast is None or not step.checkpointing or step.train == "lora":
        return 0
    return shape.linear_parameters * step.autocast.itemsize


def later_bytes(step: Step, shape: ModelShape, head: HeadMemory) -> dict[str, int]:
    """What is alive after head and loss, at the moments when that is most, beside weights, moments and reference.

    `zero_grad` sets gradients to None: without accumulation they come into being in the backward, while activations go,
    so that most is alive at its first layer or at its last. With accumulation those of earlier micro-batches are there
    all the time, and each new one is added to its own. A tied matrix has two gradients, the head's and the embedding's,
    until the backward is over. In shards, FSDP2 has the gradients of a unit whole until all of them are there, and
    DeepSpeed those of a matrix, and as many as it reduces at once.
    """
    gradients = state_bytes(step, shape)["gradients"]
    earlier = gradients if step.keeps_gradients else 0
    kept, again = activation_bytes(step, shape)
    hidden = step.computed * shape.hidden * step.dtype.itemsize
    matrix = shape.head_parameters * step.dtype.itemsize
    with_embedding = step.train == "full" or (step.train == "frozen-head" and not shape.tied)
    dhead = matrix if step.train == "full" else 0
    dembedding = matrix if with_embedding else 0
    sharded = step.sharding != "none"
    reduced = _largest_matrix(shape) + shape.hidden**2 if step.by_deepspeed else shape.layer_parameters
    unit = reduced * step.dtype.itemsize if step.train != "lora" and sharded else 0
    one_layer = hidden + again if step.checkpointing else kept // shape.layers
    if earlier or sharded:
        last_layer = gradients + (dhead if shape.tied or sharded else 0)
        end = last_layer + dembedding
    else:
        last_layer = max(0, gradients - (not shape.tied) * dembedding)
        end = gradients + shape.tied * dembedding
    return {
        "first layer": earlier + kept + again + head.returned + unit,
        "last layer": last_layer + one_layer + hidden + unit,
        "embedding": end + hidden,
        "optimizer": gradients + _optimizer_temporary(step, shape),
    }


def _optimizer_temporary(step: Step, shape: ModelShape) -> int:
    """AdamW takes one parameter at a time on a CPU, and has two more of its size; fused, on a GPU, none."""
    if step.device.type != "cpu" or step.train == "lora":
        return 0
    embedding = 0 if step.train == "frozen-head" and shape.tied else shape.head_parameters
    return 2 * step.dtype.itemsize * max(embedding, *(i * o for i, o in shape.linears))


def footprint(step: Step, way: str) -> dict[str, int]:
    """Bytes of everything at the moment of a step when most is alive, and the total.

    Parts add up to the moment of head and loss; "later" is what is alive beyond that at a later one.
    """
    head, step = head_memory(step, way), of_way(step, way)
    if step.shape is None:
        return {"head and loss": head.peak, "total": head.peak}
    state = state_bytes(step, step.shape)
    kept = activation_bytes(step, step.shape)[0] + cast_bytes(step, step.shape)
    earlier = state["gradients"] if step.keeps_gradients else 0
    extra = max(0, max(later_bytes(step, step.shape, head).values()) - earlier - kept - head.peak)
    parts = state | {
        "gradients": earlier,
        "gathered": gathered_bytes(step, step.shape),
        "activations": kept,
        "head and loss": head.peak,
        "later": extra,
    }
    return parts | {"total": sum(parts.values())}


def largest_batch(step: Step, way: str, memory: int) -> int:
    """The most pairs of this length whose step fits, 0 if one does not."""
    _check_memory(memory)

    def fits(pairs: int) -> bool:
        return footprint(replace(step, pairs=pairs), way)["total"] <= memory

    low, high = 0, 1
    while high < MOST_PAIRS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan(step: Step, memory: int) -> dict[str, Any]:
    """Everything that is printed or written, in bytes."""
    _check_memory(memory)
    heads = {way: head_memory(step, way) for way in WAYS}
    found: dict[str, Any] = {
        "step": _plain(step),
        "positions": step.positions,
        "labelled_positions": step.tokens,
        "computed_positions": {way: of_way(step, way).computed for way in WAYS},
        "device_bytes": memory,
        "head": {way: head._asdict() | {"temporary": head.temporary} for way, head in heads.items()},
    }
    if step.shape is None:
        return found
    found["parameters"], found["active_parameters"] = step.shape.parameters, step.shape.active
    found["total"] = {way: footprint(step, way) for way in WAYS}
    found["fits"] = {way: parts["total"] <= memory for way, parts in found["total"].items()}
    found["largest_batch"] = {way: largest_batch(step, way, memory) for way in WAYS}
    return found


def _check_memory(memory: object) -> None:
    if not isinstance(memory, (int, float)) or isinstance(memory, bool) or memory < 0:
        raise ValueError(f"memory: expected a number of bytes of at least 0, got {memory!r}")


def _plain(step: Step) -> dict[str, Any]:
    plain = {**vars(step), "shape": None if step.shape is None else asdict(step.shape)}
    plain["batching"] = step.batching._asdict()
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, torch.device)) else value
        for name, value in plain.items()
    }
