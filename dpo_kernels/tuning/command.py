"""dpo-kernels tune: the command."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from dpo_kernels import dispatch, verdicts
from dpo_kernels.models.shapes import find_shape
from dpo_kernels.tuning.trial import PATIENCE, Untuned, usual_heads, with_bar
from dpo_kernels.verdicts import Head

DTYPES = ("bfloat16", "float16", "float32")
DESCRIPTION = """
Tries each family of kernels on this machine's own device, in a process that may crash or hang: is it right, held
against fp64, and how fast is it beside plain PyTorch? "auto" takes what is right and at least 3 % faster, path by
path; the verdict is kept for this device, driver and version. `dpo-kernels env` shows it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    add = parser.add_argument
    add("--model", nargs="+", default=[], metavar="NAME", help="for the heads of these models, or config.json files")
    add("--hidden", type=int, metavar="H", help="for a head of this hidden size")
    add("--vocab", type=int, metavar="V", help="and this vocabulary; default: a handful of usual heads")
    add("--dtype", nargs="+", choices=DTYPES, help="of heads; default: float32 on a CPU, bfloat16 elsewhere")
    add("--device", help="default: the accelerator that PyTorch sees, else the CPU")
    add("--patience", type=float, default=PATIENCE, metavar="S", help="seconds a step may take (default: %(default)g)")
    add("--again", action="store_true", help="measure anew; what hung or crashed is still not tried again")
    add("--forget", action="store_true", help="delete the verdicts of this device, crashes included, and end")


def run(options: argparse.Namespace) -> int:
    device = device_of(options.device)
    key = verdicts.key_of(device)
    if key is None:
        raise ValueError(f"--device: PyTorch sees no device {str(device)!r} here")
    if options.forget:
        gone = verdicts.forget(key)
        print("\n".join(f"deleted {file}" for file in gone) or f"there is no verdict of {key['name']}")
        return 0
    if not options.patience > 0:
        raise ValueError(f"--patience: expected a number of seconds above 0, got {options.patience}")
    heads = heads_of(options, device)
    try:
        verdict = with_bar(device, heads, sys.stderr.isatty(), again=options.again, patience=options.patience)
    except Untuned as error:
        print(f"no verdict: {error}", file=sys.stderr)
        return 1
    print(f"{key['name']}, driver {key['driver']}, torch {key['torch']}, triton {key['triton']}")
    for head in heads:
        times = verdict.of(head)
        if times is not None:
            print(f"\n{head}\n{table(verdict, times)}")
    for refusal in verdict.refused:
        print(f"\nrefused: {refusal}")
    print(f"\n{verdicts.file_of(key)}")
    return 0


def device_of(name: str | None) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:  # torch knows no such device
        raise ValueError(f"--device: {error}") from error


def heads_of(options: argparse.Namespace, device: torch.device) -> list[Head]:
    """Those that the options mean."""
    if options.model and (options.hidden or options.vocab):
        raise ValueError("--model: a model says --hidden and --vocab already, got both")
    if (options.hidden is None) != (options.vocab is None):
        raise ValueError("--hidden: expected with --vocab, and --vocab with --hidden")
    for name in ("hidden", "vocab"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name}: expected a positive number, got {getattr(options, name)}")
    dtypes = options.dtype or (["float32"] if device.type == "cpu" else ["bfloat16"])
    sizes: list[tuple[Any, ...]] = []
    for name in options.model:
        shape = find_shape(name)
        sizes.append((shape.hidden, shape.vocab, shape.softcap))
    if options.hidden:
        sizes.append((options.hidden, options.vocab))
    sizes = sizes or [head[1:] for head in usual_heads(device)]
    return list(dict.fromkeys(Head(dtype, *size) for dtype in dtypes for size in sizes))


def table(verdict: verdicts.Verdict, times: verdicts.Times) -> str:
    """Milliseconds of each path and family, and what is picked."""
    families = ["torch", *(f for f in dispatch.FAMILIES[1:] if any(f in found for found in times.ms.values()))]
    lines = [["path", "rows", *(f"{family} ms" for family in families), "picked", "faster"]]
    for path in verdicts.PATHS:
        found, picked = times.ms.get(path, {}), verdict.choice(times, path)
        for number, tokens in enumerate(times.tokens):
            of = {family: times_of[number] for family, times_of in found.items() if number < len(times_of)}
            shown = [f"{of[family]:.4g}" if family in of else "-" for family in families]
            gain = "" if picked == "torch" else f"{of['torch'] / of[picked]:.2f} x"
            lines.append([path, str(tokens), *shown, picked, gain])
    missing = [f"path {path} was not timed in full: {why}" for path, why in times.untimed.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*rows, *missing])
