"""`dpo-kernels plan`: what a DPO step will take, as a table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_kernels.dispatch import IMPLEMENTATIONS
from dpo_kernels.models.shapes import ModelShape, find_shape
from dpo_kernels.planning.batches import BATCHING, measured_batching, measured_share
from dpo_kernels.planning.step import MOST_PAIRS, REFERENCES, SHARDING, TRAIN, WAYS, Step, plan

DTYPES = ("bfloat16", "float16", "float32")
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MIB, GIB = 2**20, 2**30


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


def text(step: Step, found: dict[str, Any], name: str, share: str, auto: bool = False) -> str:
    heads = found["head"]
    ours = heads["dpo_kernels"]
    dtype = str(step.dtype).removeprefix("torch.")
    computed = "" if step.autocast is None else f", computed in {str(step.autocast).removeprefix('torch.')}"
    cap = "" if step.shape is None or step.shape.softcap is None else f", softcap {step.shape.softcap:g}"
    size = "" if step.shape is None else f"{found['parameters'] / 1e9:.3g} billion parameters, "
    if step.shape is not None and step.shape.active < step.shape.parameters:
        size += f"{step.shape.active / 1e9:.3g} of them active for a token, "
    lines = [
        f"{name}: {size}head [{step.vocab}, {step.hidden}]{cap}; weights in {dtype}{computed}",
        f"{step.pairs} pairs, {2 * step.pairs} sequences of {step.seq} tokens: {step.positions} positions, "
        f"{step.tokens} of them labelled ({share})",
        *_batching(step, auto),
        *_beyond_one_batch(step),
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
        parts = [part for part in LABELS if part != "gathered" or step.sharding != "none"]
        rows = {LABELS[part]: [_number(totals[way][part], GIB) for way in WAYS] for part in parts}
        rows[f"of {found['device_bytes'] / GIB:.1f} GiB ({step.device})"] = [
            "fits" if found["fits"][way] else "does not fit" for way in WAYS
        ]
        rows["largest batch, pairs"] = [_batch(found["largest_batch"][way]) for way in WAYS]
        lines += [*_table("whole step, GiB", rows), ""]
    return "\n".join([*lines, *_assumptions(step)])


LABELS = {
    "weights": "weights",
    "gradients": "gradients from before the backward",
    "optimizer": "optimizer, AdamW",
    "reference": "reference model",
    "gathered": "gathered at a time",
    "activations": "activations (estimated)",
    "head and loss": "head and loss",
    "later": "backward and optimizer, beyond that",
    "total": "total",
}


def _batching(step: Step, auto: bool) -> list[str]:
    name = step.batching.name
    lines = [f"batching auto: {name}, and what the model allows is asked when it is trained"] if auto else []
    if step.batching.in_blocks:
        lines += [
            f"dpo_kernels, {name}: {step.computed} ({step.computed / step.positions:.0%}) of these positions are",
            "computed, as many as in the largest of real batches; eager and TRL compute all",
        ]
    return lines


def _beyond_one_batch(step: Step) -> list[str]:
    lines = []
    if step.accumulation > 1:
        lines.append(f"{step.accumulation} micro-batches in a step: {step.accumulation * step.pairs} pairs")
    if step.sharding != "none":
        lines.append(f"sharded by {_NAMES[step.sharding]} over {step.processes} processes; what follows is one of them")
    return lines


_NAMES = {"fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


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
        "Counted is what PyTorch allocates on one device, the longest sequence as long as may be. Without accumulation",
        "the backward makes gradients while activations go; with it those of earlier micro-batches stay throughout.",
        "eager: logits.float().log_softmax(-1) of every position. TRL: the head of its DPOTrainer since 1.15.",
    ]
    if step.shape is not None:
        eager = step.shape.eager_attention or step.shape.attention_softcap is not None
        attention = "eager attention" if eager else "SDPA and a padding mask"
        lines += [
            "AdamW keeps two moments in the dtype of what it trains. Activations are an estimate, within a quarter, of",
            f"what layers keep in transformers 5 with {attention}. Not counted: CUDA's context, cuBLAS'",
            "workspace, memory lost between blocks; leave a GiB or two. The largest batch has these shares.",
        ]
        if step.shape.experts_per_token:
            lines.append("Weights are those of all experts, activations those of the experts that compute for a token.")
        if step.shape.rough:
            lines.append("Layers of this kind were not measured: activations are from half to twice the estimate.")
        if step.batching.in_blocks:
            flex = step.device.type == "cuda" and not eager
            of_ours = (
                "FlexAttention's, which no GPU has confirmed" if flex else "that of blocks, with copies of prompts"
            )
            lines.append(f"The attention of dpo_kernels is {of_ours}.")
        if step.sharding == "fsdp2":
            lines += [
                "FSDP2: weights, gradients, moments and reference are divided evenly, and gradients reduced after each",
                "micro-batch. One unit is whole at a time, a layer or what no layer holds, with its gradients in the",
                "backward. The next unit, which is gathered ahead, and buffers of the collectives are not counted.",
            ]
        if step.by_deepspeed:
            lines += [
                f"{_NAMES[step.sharding]}: gradients and moments are divided evenly, and gradients are reduced in the",
                "backward, hidden^2 numbers at once. With ZeRO-3 weights and reference are divided too, the head is",
                "whole beside one other matrix. What DeepSpeed gathers ahead, and its buffers, are not counted.",
            ]
    return lines


# The flags that a training configuration comes to, by its path
ReadTraining = Callable[[Path], dict[str, Any]]
SETTINGS_FILES = (".yaml", ".yml")
# What a step is where neither a flag nor a training configuration says it.
DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "mixed_precision": "no",
    "train": "full",
    "lora_r": 16,
    "reference": "precomputed",
    "gradient_checkpointing": False,
    "gradient_accumulation": 1,
    "batching": "concatenated",
    "sharding": "none",
    "processes": 1,
    "chunk_bytes": None,
    "impl": "auto",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    def add(flag: str, help: str, **options: Any) -> None:
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        shown = f" (default: {default})" if isinstance(default, str | int) and default is not False else ""
        parser.add_argument(flag, help=help + shown, **options)

    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "config",
        nargs="?",
        metavar="CONFIG",
        help="configuration of `dpo-kernels train`, which says what the flags do not; also as config:FILE",
    )
    add(
        "--model",
        "hub name or its last part, or a config.json or its folder, also as config:FILE; nothing is downloaded",
    )
    add("--hidden", "hidden size, for the head alone", type=int)
    add("--vocab", "vocabulary size, for the head alone", type=int)
    add("--batch", "pairs in one forward pass", type=int, metavar="PAIRS")
    add("--seq", "tokens of prompt and response, padded", type=int, metavar="TOKENS")
    add("--labelled", "of positions; default: as in real pairs of this length", type=float, metavar="SHARE")
    add("--dtype", "dtype of the weights", choices=DTYPES)
    add("--mixed-precision", "autocast dtype", choices=AUTOCAST)
    add("--train", "what is trained", choices=TRAIN)
    add("--lora-r", "rank of the adapters, on all matrices", type=int)
    add("--reference", "model: a frozen copy beside the policy; under LoRA the policy itself", choices=REFERENCES)
    add(
        "--gradient-checkpointing",
        "layers are computed again in the backward",
        action=argparse.BooleanOptionalAction,
    )
    add("--gradient-accumulation", "micro-batches in one optimizer step", type=int, metavar="N")
    add(
        "--batching",
        "how pairs go through the model, as dpo-kernels train takes it; auto: packed_shared_prefix, or concatenated "
        "where layers are of a kind that was not measured",
        choices=BATCHING,
    )
    add(
        "--sharding",
        "fsdp2, zero3: weights, gradients and optimizer divided among --processes; zero2: all but the weights",
        choices=tuple(SHARDING),
    )
    add("--processes", "that share a sharded model, one a device", type=int, metavar="N")
    add("--chunk-bytes", "as linear_dpo_loss takes it (default: 1 GiB)", type=int)
    add("--impl", "of dpo_kernels", choices=("auto", *IMPLEMENTATIONS))
    add("--device", "cpu, cuda, ...; default: the accelerator if there is one")
    add("--memory", "of the device; default: what it says it has", type=float, metavar="GIB")
    add("--json", "where to write all numbers, in bytes", type=Path, metavar="FILE")


def settle(options: argparse.Namespace, read_training: ReadTraining | None) -> None:
    """Fills in what the flags leave open: from a configuration of `dpo-kernels train`, if `config` or `model` names
    one, then from `DEFAULTS`. `model` becomes the name or path of a model, `source` the file that it comes from."""
    options.source, training = None, None
    for key in ("config", "model"):
        named = getattr(options, key)
        if named is None or not (key == "config" or named.startswith("config:") or named.endswith(SETTINGS_FILES)):
            continue
        path = Path(named.removeprefix("config:")).expanduser()
        if not path.exists():
            raise ValueError(f"{key}: there is no file {str(path)!r}, which {named!r} names, in {Path.cwd()}")
        if path.is_dir() or path.suffix == ".json":
            options.model = str(path)
        elif training is not None:
            raise ValueError(f"model: expected a model beside the configuration {training}, got another one: {named!r}")
        else:
            training = path
            if key == "model":
                options.model = None
    known: dict[str, Any] = {}
    if training is not None:
        if read_training is None:
            raise ValueError(f"config: nobody here reads {training}, a configuration of `dpo-kernels train`")
        known = read_training(training)
    model = known.pop("model", None)
    if model is not None and options.model is None and options.hidden is None and options.vocab is None:
        options.model, options.source = model, training
    for name, value in (DEFAULTS | known).items():
        if getattr(options, name) is None:
            setattr(options, name, DEFAULTS.get(name) if value is None else value)
    for name, setting in (("batch", "per_device_batch_size"), ("seq", "max_length")):
        if getattr(options, name) is None:
            without = "or a configuration" if training is None else f"since {training} has no {setting}"
            raise ValueError(f"{name}: expected --{name}, {without}")


def _shape(options: argparse.Namespace) -> ModelShape | None:
    try:
        return None if options.model is None else find_shape(options.model)
    except ValueError as error:
        raise ValueError(f"{options.source}: {error}" if options.source else str(error)) from None


def _batching_name(options: argparse.Namespace, shape: ModelShape | None) -> str:
    """Without "auto": whether a model allows it is asked of the model itself, when it trains."""
    if options.batching != "auto":
        return options.batching
    return "concatenated" if shape is not None and shape.rough else "packed_shared_prefix"


def _check_sharding(options: argparse.Namespace) -> None:
    n = options.processes
    if options.sharding == "none" and n > 1:
        raise ValueError(
            f"processes: expected --sharding beside --processes {n}; without it each process takes the same"
        )
    if options.sharding != "none" and n < 2:
        raise ValueError(f"processes: expected --processes of at least 2 beside --sharding {options.sharding}, got {n}")
    if options.sharding != "none" and options.model is None:
        raise ValueError("sharding: expected --model, since a head alone is whole when it is used")


def run(options: argparse.Namespace, read_training: ReadTraining | None = None) -> int:
    """Prints the plan. `read_training` knows the settings of a training, which this part of the package does not."""
    settle(options, read_training)
    least_values = {"batch": 1, "seq": 2, "lora_r": 1, "hidden": 1, "vocab": 1, "chunk_bytes": 0}
    least_values |= {"gradient_accumulation": 1, "processes": 1}
    for name, least in least_values.items():
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
    _check_sharding(options)
    shape = _shape(options)
    share = options.labelled or measured_share(options.batch, options.seq)
    batching = measured_batching(_batching_name(options, shape), options.batch, options.seq)
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
        accumulation=options.gradient_accumulation,
        sharding=options.sharding,
        processes=options.processes,
        chunk_bytes=options.chunk_bytes,
        device=default_device() if options.device is None else _device(options.device),
        impl=options.impl,
        batching=batching,
    )
    memory = device_memory(step.device) if options.memory is None else int(options.memory * GIB)
    found = plan(step, memory)
    source = "given" if options.labelled else "measured on real pairs cut at this length"
    print(text(step, found, options.model or "head", f"{share:.0%}, {source}", options.batching == "auto"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0
