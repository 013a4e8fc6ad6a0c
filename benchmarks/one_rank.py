"""Holds what goes through NCCL against what does not, on one device: a vocabulary-parallel head on a group of one rank
against the whole head, and training on weights in shards (FSDP2) against training without.

    torchrun --nproc_per_node 1 benchmarks/one_rank.py --device cuda    # NCCL
    torchrun --nproc_per_node 1 benchmarks/one_rank.py                  # gloo, on a CPU

A line for each comparison, with the largest difference over the largest number; the exit status tells if one is beyond
`LIMIT`.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_kernels import linear_dpo_loss
from dpo_kernels.testing import head_inputs
from dpo_kernels.training import TrainConfig, train
from dpo_kernels.training.checkpoint import damage, list_checkpoints, read_metrics

LIMIT = 1e-4  # of fp32
TRAINING = {
    "max_rows": 32,
    "tokenizer": "train:300",
    "max_length": 256,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 2,
    "eval_fraction": 0,
    "impl": "torch",
    "progress_bar": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    args = parser.parse_args()
    logging.getLogger("dpo_kernels").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("highest")

    if args.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        torch.cuda.set_device(0)
    dist.init_process_group({"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[args.device])
    backend = dist.get_backend_config()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for name, ours, expected in (*heads(args), *steps(Path(folder))):
            difference = float((ours - expected).abs().max() / expected.abs().max())
            print(f"{name}: {difference:.1e}", flush=True)
            problems += [name] * (not difference <= LIMIT)  # NaN is beyond it, too
        checkpoints = list_checkpoints(Path(folder) / "fsdp2")
        problems += [*filter(None, map(damage, checkpoints))] if len(checkpoints) == 2 else ["checkpoints are missing"]
    if problems:
        sys.exit(f"beyond {LIMIT:g}: {', '.join(problems)}")
    print(f"all within {LIMIT:g}, through {backend}")


def heads(args: argparse.Namespace) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Values and gradients."""
    inputs = head_inputs(8, 33, args.hidden, args.vocab, device=args.device)
    found = []
    for group in (dist.group.WORLD, None):
        given = inputs.to(torch.float32)
        out = linear_dpo_loss(given.hidden, given.weight, given.labels, given.ref_logps, bias=given.bias, group=group)
        out.loss.backward()
        found.append([out.losses.detach(), out.logps.detach(), given.hidden.grad, given.weight.grad, given.bias.grad])
    for name, ours, expected in zip(("losses", "logps", "dhidden", "dweight", "dbias"), *found, strict=True):
        yield f"head, {name}", ours, expected


def steps(folder: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Losses and norms of runs from the same seed, and the checkpoints in between."""
    from accelerate.state import AcceleratorState

    found = {}
    for sharding in ("fsdp2", "none"):
        settings = TRAINING | {"sharding": sharding, "async_checkpoints": sharding == "fsdp2"}
        train(TrainConfig(**settings, output_dir=str(folder / sharding)))
        rows = read_metrics(folder / sharding / "metrics.jsonl")
        found[sharding] = torch.tensor([[row[name] for row in rows] for name in ("loss", "grad_norm")])
        AcceleratorState._reset_state(True)
        os.environ.pop("LOCAL_RANK", None)  # the second run is of no process group
    for name, ours, expected in zip(("loss", "grad_norm"), found["fsdp2"], found["none"], strict=True):
        yield f"fsdp2, {name}", ours, expected


if __name__ == "__main__":
    main()
