"""How time and memory of the four paths grow with the number of tokens, and with the vocabulary.

    python benchmarks/scaling.py OUT

Runs `dpo-kernels bench` over both, writes its tables and curves to OUT, and ends with status 1 where a cost is not
linear in N V H, or memory is not flat.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from dpo_kernels.linear_dpo import DEFAULT_CHUNK_BYTES

MIB = 2**20
TOKENS = (256, 1024, 4096, 16384, 65536)
VOCABS = (32768, 65536, 131072, 262144, 524288)
FIXED_TOKENS, FIXED_VOCAB, HIDDEN = 1024, 32768, {"cpu": 128, "cuda": 1024}
# What the largest size may take of the time per N V H of the cheapest one.
GROWTH = 1.5


class Point(NamedTuple):
    tokens: int
    vocab: int
    hidden: int
    nanoseconds: float  # for each of N V
    over_limit: float
    mib: float | None
    sums_mib: float  # of a few [N, H] in fp32, which every path but the forward has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--impl", help="default: all that run there")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--vocab", nargs="+", type=int, default=VOCABS)
    parser.add_argument("--hidden", type=int, help=f"default: {HIDDEN}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    problems = []
    for name, tokens, vocab in (("tokens", args.tokens, [FIXED_VOCAB]), ("vocab", [FIXED_TOKENS], args.vocab)):
        command = [sys.executable, "-m", "dpo_kernels", "bench", "--mode", "forward", "frozen", "train", "--peers"]
        command += ["--device", args.device, "--rounds", str(args.rounds)]
        command += ["--impl", args.impl] if args.impl else []
        command += ["--hidden", str(args.hidden or HIDDEN[args.device])]
        command += ["--tokens", *map(str, tokens), "--vocab", *map(str, vocab), *["--no-memory"] * args.no_memory]
        report = args.out / f"{name}.json"
        if status := subprocess.run([*command, "--json", report, "--plot", args.out]).returncode:
            sys.exit(status)
        for line, problem in judged(json.loads(report.read_text())["tables"]):
            print(line)
            problems += [f"{name}: {problem}"] if problem else []
    if problems:
        sys.exit("\n".join(problems))


def judged(tables: list[dict[str, Any]]) -> list[tuple[str, str | None]]:
    """A line for each point of each contender, and what is wrong with it."""
    found = []
    for name, points in curves(tables).items():
        cheapest = min(point.nanoseconds / point.hidden for point in points)
        flat = min((point.mib - point.sums_mib for point in points if point.mib is not None), default=0.0)
        for point in points:
            memory = "" if point.mib is None else f"{point.mib:8.0f} MiB, {point.sums_mib:.0f} of them [N, H]"
            at = f"{name}: N={point.tokens} V={point.vocab}"
            line = f"{at}  {point.nanoseconds:.3f} ns a logit  x limit {point.over_limit:.2f}  {memory}"
            problem = None
            if point is max(points, key=lambda p: p.tokens * p.vocab):
                growth = point.nanoseconds / point.hidden / cheapest
                if growth > GROWTH:
                    problem = f"{at}: {growth:.2f} times the cost of the cheapest size, expected {GROWTH} at most"
            if point.mib is not None and point.mib - point.sums_mib > allowed_mib(name, flat):
                problem = f"{at}: {point.mib:.0f} MiB, expected {allowed_mib(name, flat) + point.sums_mib:.0f} at most"
            found.append((line, problem))
    return found


def allowed_mib(name: str, flat: float) -> float:
    """Flat: what the smallest size takes, and as much again; the fused loss may fill its budget."""
    budget = DEFAULT_CHUNK_BYTES / MIB if name.startswith("C") else 0.0
    return 2 * max(flat, 32.0) + budget


def curves(tables: list[dict[str, Any]]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = defaultdict(list)
    for table in tables:
        for row in table["rows"]:
            if "over_ours" in row:
                tokens, vocab, hidden = table["N"], table["V"], table["H"]
                sums = 0.0 if table["mode"] == "forward" else 3 * tokens * hidden * 4 / MIB
                each = row["median_ms"] * 1e6 / (tokens * vocab)
                found[row["name"]].append(
                    Point(tokens, vocab, hidden, each, row["over_limit"], row.get("peak_mib"), sums)
                )
    return found


if __name__ == "__main__":
    main()
