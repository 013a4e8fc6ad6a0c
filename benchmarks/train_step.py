"""Times a whole training step of DPO on real preferences: TRL's trainer with its head and with ours, eager logits, and
this project's loop.

    python benchmarks/train_step.py --dataset preferences.jsonl --json out.json
    python benchmarks/train_step.py --device cuda --model Qwen/Qwen2.5-0.5B --mixed-precision bf16
    python benchmarks/train_step.py --responses 4 --pairs 4                  # rankings of four answers
    python benchmarks/train_step.py --quick                                  # does it run?

All start from the same weights and take the same batches, step by step in turns: collate, forward of the policy, the
reference's log-probabilities, loss, backward, clipping, AdamW. Their losses have to agree at every step.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_kernels import measure
from dpo_kernels.bench.cases import Result
from dpo_kernels.bench.report import PACKAGES, aligned, save
from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.demo import demo_model
from dpo_kernels.data.packing import PackedCollator
from dpo_kernels.dispatch import check_runs, default
from dpo_kernels.impl.reference import eager_token_logps
from dpo_kernels.models.head import LMHead
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.pairs import load_data
from dpo_kernels.training.policy import PolicyLoss, load_model
from dpo_kernels.training.reference_model import LOGP_COLUMNS, Reference, frozen_copy
from dpo_kernels.training.setup import deterministic_algorithms, make_optimizer
from dpo_kernels.training.sizes import check_fits

# Token ids, as `tokenize_preferences` makes them, the reference's log-probabilities, and of a ranking its number
Pair = dict[str, Any]

TOLERANCE = 1e-3  # relative, of a loss in fp32: contenders sum in different orders, and AdamW passes that on
REFERENCES = ("precompute", "copy")
OURS, PACKED, FLOOR = "dpo_kernels", "dpo_kernels, each prompt once", "no head"


@dataclass(frozen=True)
class Setup:
    """What every contender starts from. Picklable: memory is measured in other processes."""

    config: TrainConfig
    shape: dict[str, Any]  # of the demo's model, where the configuration names no other
    tokenizer: Any
    batches: list[list[Pair]]  # one a step
    device: str

    @property
    def precomputed(self) -> bool:
        return self.config.reference == "precompute"

    @property
    def pad_token_id(self) -> int:
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in found if token is not None)

    def new_model(self) -> Any:
        if self.config.model != "demo":
            return load_model(self.config, self.config.model, self.tokenizer).to(self.device)
        model: Any = demo_model(**self.shape, seed=self.config.seed)
        return model.to(self.device)

    def accelerator(self) -> Any:
        from accelerate import Accelerator

        return Accelerator(mixed_precision=self.config.mixed_precision, cpu=self.device == "cpu")

    def largest(self) -> Setup:
        """With the one batch that has the most positions."""
        return replace(self, batches=[max(self.batches, key=positions)])


class Contender(Protocol):
    """An optimizer step in two halves."""

    collate: Callable[[list[Pair]], dict[str, Any]]
    """Makes the batch; its `attention_mask` has a number for each position that is computed, 0 on padding."""

    def gradients(self, pairs: list[Pair]) -> Tensor:
        """The loss [], without a gradient; the weights have theirs."""

    def update(self) -> None:
        """Clips, steps, and forgets the gradients."""


class OwnStep:
    """What the steps share that are not a trainer's; `loss` tells them apart."""

    def __init__(self, setup: Setup) -> None:
        self.config = setup.config
        self.device = torch.device(setup.device)
        self.accelerator = setup.accelerator()
        self.collate: Callable[[list[Pair]], dict[str, Any]] = PairCollator(setup.pad_token_id)
        self.pad_token_id = setup.pad_token_id
        self.model = setup.new_model().train()
        self.reference = None if setup.precomputed else frozen_copy(self.model)
        self.trainable = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = self.accelerator.prepare(make_optimizer(self.trainable, self.config, self.device))

    def loss(self, batch: dict[str, Any]) -> Tensor:
        raise NotImplementedError

    def gradients(self, pairs: list[Pair]) -> Tensor:
        batch = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in self.collate(pairs).items()
        }
        loss = self.loss(batch)
        self.accelerator.backward(loss)
        return loss.detach()

    def update(self) -> None:
        self.accelerator.clip_grad_norm_(self.trainable, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(OwnStep):
    """As `dpo_kernels.training.loop` does it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        collate = self.collator()
        self.collate = lambda pairs: collate(examples(pairs))
        self.policy = self.accelerator.prepare(PolicyLoss(self.model, self.config))
        self.scorer = Reference(LMHead.from_model(self.reference), self.config) if self.reference is not None else None

    def collator(self) -> PairCollator:
        return PairCollator(self.pad_token_id)

    def gradients(self, pairs: list[Pair]) -> Tensor:
        with deterministic_algorithms(self.config.deterministic):
            return super().gradients(pairs)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        if self.scorer is not None:
            with self.accelerator.autocast():
                batch["ref_logps"] = self.scorer.logps(batch)
        loss, _ = self.policy(batch, batch["num_labelled"] / len(batch["labels"]))
        return loss


class Packed(Ours):
    """The same with each prompt once, and without padding."""

    def collator(self) -> PairCollator:
        for model in (self.model, self.reference):
            if model is not None:
                use_layouts(model)
        return PackedCollator(self.pad_token_id)


class Eager(OwnStep):
    """Logits of all positions, as trainers had them."""

    def loss(self, batch: dict[str, Any]) -> Tensor:
        logps = self.logps(self.model, batch)
        with torch.no_grad():
            ref_logps = batch["ref_logps"] if self.reference is None else self.logps(self.reference, batch)
        chosen, rejected = (logps - ref_logps).chunk(2)
        return -F.logsigmoid(self.config.beta * (chosen - rejected)).mean()

    def logps(self, model: Any, batch: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return eager_token_logps(logits[:, :-1], batch["labels"][:, 1:]).sum(1)


class NoHead(OwnStep):
    """All of the step but the head and the loss: hidden states get a gradient out of nowhere, the head's weights one
    that is zero. What is left is the same for everybody."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.heads = [LMHead.from_model(model) for model in (self.model, self.reference) if model is not None]
        self.weight = self.model.get_output_embeddings().weight
        self.zero = torch.zeros_like(self.weight)

    def gradients(self, pairs: list[Pair]) -> Tensor:
        batch = self.collate(pairs)
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        with self.accelerator.autocast():
            policy, *reference = self.heads
            hidden, _ = policy.hidden_states(**inputs)
            with torch.no_grad():
                for head in reference:
                    head.hidden_states(**inputs)
        hidden.backward(torch.full_like(hidden, 1e-3))
        if self.weight.grad is None:  # it is not tied to the embeddings
            self.weight.grad = self.zero
        return torch.full((), math.nan)


class OfTrainer:
    """The step of `DPOTrainer` in `module`, as transformers' `Trainer` drives it, without its logs and callbacks."""

    def __init__(self, setup: Setup, module: str) -> None:
        trainer_class = importlib.import_module(module).DPOTrainer
        from datasets import Dataset
        from trl import DPOConfig

        config = setup.config
        self.folder = TemporaryDirectory()
        arguments = DPOConfig(
            self.folder.name,
            use_cpu=setup.device == "cpu",
            per_device_train_batch_size=config.per_device_batch_size,
            beta=config.beta,
            max_length=config.max_length,
            learning_rate=config.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            bf16=config.mixed_precision == "bf16",
            gradient_checkpointing=False,  # it trades time for memory, and nobody else here does
            precompute_ref_log_probs=setup.precomputed,
            report_to=[],
            disable_tqdm=True,
            seed=config.seed,
        )
        model = setup.new_model()
        # it wants texts to tokenize, and has its way; what is trained on are the pairs that all others get too
        texts = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
        self.trainer = trainer_class(
            model,
            None if setup.precomputed else frozen_copy(model),
            arguments,
            train_dataset=texts,
            processing_class=setup.tokenizer,
        )
        self.trainer.create_optimizer_and_scheduler(len(setup.batches))
        self.trainer.current_gradient_accumulation_steps = 1
        self.collate = self.trainer.data_collator
        accelerator = self.trainer.accelerator
        self.model, self.optimizer = accelerator.prepare(self.trainer.model, self.trainer.optimizer)

    def gradients(self, pairs: list[Pair]) -> Tensor:
        return self.trainer.training_step(self.model, self.collate(pairs))

    def update(self) -> None:
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.trainer.lr_scheduler.step()
        self.model.zero_grad()


# In the order of the table; losses are held against the first that has one.
CONTENDERS: dict[str, Callable[[Setup], Contender]] = {
    FLOOR: NoHead,
    "eager": Eager,
    "TRL": partial(OfTrainer, module="trl"),
    "TRL, our head": partial(OfTrainer, module="dpo_kernels.trl"),
    OURS: Ours,
    PACKED: Packed,
}


# Measuring


class Recorded:
    """A contender, and what its steps took and gave so far."""

    def __init__(self, contender: Contender, setup: Setup) -> None:
        self.contender, self.setup = contender, setup
        self.device = torch.device(setup.device)
        self.losses: list[float] = []
        self.gradient_seconds: list[float] = []
        self.update_seconds: list[float] = []

    def step(self) -> None:
        marks = [self._now()]
        loss = self.contender.gradients(self.setup.batches[len(self.losses)])
        marks.append(self._now())
        self.contender.update()
        marks.append(self._now())
        self.losses.append(float(loss))
        self.gradient_seconds.append(marks[1] - marks[0])
        self.update_seconds.append(marks[2] - marks[1])

    def _now(self) -> float:
        measure.synchronize(self.device)
        return time.perf_counter()


class OneStep(NamedTuple):
    """What `measure` asks for to find the memory of a call: here it is a step after one that is not counted, so that
    weights, reference and AdamW's state are there before."""

    name: str
    setup: Setup
    compiled: bool = True  # the first call is a whole one
    overwrites: bool = True

    def inputs(self) -> Prepared:
        return Prepared(CONTENDERS[self.name](self.setup))

    def run(self, prepared: Prepared) -> Result:
        prepared.contender.gradients(self.setup.batches[0])
        prepared.contender.update()
        return Result()


@dataclass
class Prepared:
    contender: Contender

    def prepare(self, overwrites: bool) -> None:
        """Every step goes on from the one before."""


def table(setup: Setup, args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(setup.device)
    rows: dict[str, dict[str, Any]] = {name: {"name": name} for name in args.contenders}
    recorded: dict[str, Recorded] = {}
    for name, row in rows.items():
        say(f"  {name}: its model and optimizer")
        try:
            recorded[name] = Recorded(CONTENDERS[name](setup), setup)
        except ImportError as error:
            row["reason"] = f"not installed: {error}"
        except Exception as error:  # a trainer may fail in any way
            row["reason"] = measure.described(error)
    runs = [measure.Run(lambda: None, each.step) for each in recorded.values()]
    found = measure.interleaved(runs, len(setup.batches), device=device, progress=lambda line: say(f"  {line}"))
    for name, seconds in zip(recorded, found, strict=True):
        if isinstance(seconds, str):
            rows[name]["reason"] = seconds
    whole = {name: each for name, each in recorded.items() if "reason" not in rows[name]}
    for name, row in measured(whole, args.warmup).items():
        rows[name] |= row
    for name in whole if not args.no_memory else ():
        say(f"  {name}: memory")
        one = OneStep(name, setup.largest())
        if device.type == "cuda":
            rows[name]["peak_mib"] = measure.peak_allocated(one, Prepared(whole[name].contender), device)
        else:
            rows[name]["peak_mib"] = measure.peak_memory(one, one, torch.get_num_threads())
    floor = rows.get(FLOOR, {}).get("peak_mib")
    for row in rows.values():
        if isinstance(floor, float) and isinstance(row.get("peak_mib"), float) and row["name"] != FLOOR:
            row["head_mib"] = row["peak_mib"] - floor
    reference = "precomputed" if setup.precomputed else "from a frozen copy, in every step"
    return {
        "title": f"Reference log-probabilities {reference}",
        "reference": setup.config.reference,
        "rows": list(rows.values()),
    }


def measured(recorded: dict[str, Recorded], warmup: int) -> dict[str, dict[str, Any]]:
    """A row for each, of the steps after the first `warmup`; the losses are those of all."""
    rows: dict[str, dict[str, Any]] = {}
    deviations = loss_deviations({name: each.losses for name, each in recorded.items() if name != FLOOR})
    steps = {name: np.add(each.gradient_seconds, each.update_seconds)[warmup:] for name, each in recorded.items()}
    for name, each in recorded.items():
        step, gradient = steps[name], np.array(each.gradient_seconds[warmup:])
        row: dict[str, Any] = measure.spread(step.tolist())
        row["gradients_ms"] = 1e3 * statistics.median(gradient)
        row["update_ms"] = 1e3 * statistics.median(each.update_seconds[warmup:])
        row["positions"], row["padding"] = computed(each.contender, each.setup.batches[warmup:])
        row["tokens_per_second"] = sum(map(tokens, each.setup.batches[warmup:])) / step.sum()
        if OURS in recorded:
            row["over_ours"] = float(np.median(step / steps[OURS]))
        if name != FLOOR:
            row |= {"losses": each.losses, "loss_deviation": max(deviations[name]), "loss_deviations": deviations[name]}
        if FLOOR in recorded and name not in (FLOOR, PACKED):  # which has a floor of its own
            head = gradient - np.array(recorded[FLOOR].gradient_seconds[warmup:])
            row["head_ms"], row["head_share"] = 1e3 * float(np.median(head)), float(np.median(head / step))
        row["samples_ms"] = (1e3 * step).tolist()
        rows[name] = row
    return rows


def loss_deviations(losses: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of every step, relative to the first contender."""
    right = next(iter(losses.values()), [])
    return {
        name: [abs(value - expected) / abs(expected) for value, expected in zip(each, right, strict=True)]
        for name, each in losses.items()
    }


def problems(tables: Sequence[dict[str, Any]], config: TrainConfig) -> list[str]:
    """What of ours did not run, and in fp32 whose loss is another one than the first contender's."""
    found = []
    for each in tables:
        for row in each["rows"]:
            where = f"{each['title']}: {row['name']}"
            if "reason" in row and row["name"] in (OURS, PACKED):
                found.append(f"{where}: {row['reason']}")
            # NaN is another loss too
            off = [step for step, value in enumerate(row.get("loss_deviations", ())) if not value <= TOLERANCE]
            if off and config.mixed_precision == "no":
                loss, value = row["losses"][off[0]], row["loss_deviations"][off[0]]
                found.append(f"{where}: wrong: loss {loss:.6f} of step {off[0] + 1} is off by {value:.1e}")
    return found


# Data and output


def computed(contender: Contender, batches: list[list[Pair]]) -> tuple[float, float]:
    """Positions that go through the model in a step, on average, and the share of them that is padding."""
    masks = [contender.collate(pairs)["attention_mask"] for pairs in batches]
    positions, real = sum(mask.numel() for mask in masks), sum(int(mask.sum()) for mask in masks)
    return positions / len(batches), 1 - real / positions


def positions(pairs: list[Pair]) -> int:
    longest = max(len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs)
    return 2 * len(pairs) * longest


def tokens(pairs: list[Pair]) -> int:
    return sum(2 * len(p["prompt_ids"]) + labelled([p]) for p in pairs)


def once(pairs: list[Pair]) -> int:
    """Tokens, those of each prompt counted once."""
    return PackedCollator(0)(examples(pairs))["input_ids"].numel()


def examples(pairs: list[Pair]) -> list[dict[str, Any]]:
    """Pairs as they are, but those of one ranking, the best answer against each, together."""
    found: list[dict[str, Any]] = []
    for number, of_one in itertools.groupby(pairs, key=lambda pair: pair.get("ranking")):
        if number is None:
            found += of_one
            continue
        first, *others = of_one
        responses = [first["chosen_ids"], first["rejected_ids"], *(each["rejected_ids"] for each in others)]
        ranking = {"prompt_ids": first["prompt_ids"], "response_ids": responses}
        ranking["pairs"] = [(0, n) for n in range(1, len(responses))]
        if "ref_chosen_logps" in first:
            rejected = [each["ref_rejected_logps"] for each in (first, *others)]
            ranking["ref_logps"] = [first["ref_chosen_logps"], *rejected]
        found.append(ranking)
    return found


def rankings(pairs: list[Pair], responses: int, max_length: int) -> list[Pair]:
    """Of each prompt the pairs of its chosen answer with its rejected one, and with answers to the prompts that follow,
    cut where they are too long for it."""
    found = []
    for number, pair in enumerate(pairs):
        room, others = max_length - len(pair["prompt_ids"]), (pairs[number:] + pairs)[1:]
        answers = [pair["rejected_ids"], *(each[key] for each in others for key in ("chosen_ids", "rejected_ids"))]
        found += [pair | {"rejected_ids": answer[:room], "ranking": number} for answer in answers[: responses - 1]]
    return found


def labelled(pairs: list[Pair]) -> int:
    return sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs)


def setups(args: argparse.Namespace) -> list[Setup]:
    """One a kind of reference; precomputed, the pairs carry its log-probabilities."""
    config = TrainConfig(
        model=args.model or "demo",
        dataset=args.dataset,
        tokenizer=None if args.model else f"train:{args.tokenizer_size}",
        max_length=args.max_length,
        max_rows=args.max_rows,
        eval_fraction=0,
        per_device_batch_size=args.pairs * (args.responses - 1),
        learning_rate=args.learning_rate,
        mixed_precision=args.mixed_precision,
        impl=args.impl,
        seed=args.seed,
    )
    tokenizer, data, _ = load_data(config)
    order = np.random.default_rng(args.seed).permutation(len(data))
    steps = args.warmup + args.steps
    rows = [order[np.arange(step * args.pairs, (step + 1) * args.pairs) % len(data)] for step in range(steps)]
    batches = [[data[int(row)] for row in of_step] for of_step in rows]
    if args.responses > 2:
        batches = [rankings(pairs, args.responses, args.max_length) for pairs in batches]
    shape = {"hidden_size": args.hidden, "layers": args.layers, "heads": args.heads, "tied": args.tied}
    shape |= {"vocab_size": args.vocab, "max_positions": max(2048, args.max_length)}
    setup = Setup(config, shape, tokenizer, batches, args.device)
    model = setup.new_model()
    check_fits(data, model, config.model)
    found = []
    for reference in args.reference:
        with_it = batches if reference == "copy" else scored(setup, model)
        found.append(replace(setup, config=replace(config, reference=reference), batches=with_it))
    return found


def scored(setup: Setup, model: Any) -> list[list[Pair]]:
    """The batches with the reference's log-probabilities."""
    collate, reference = PairCollator(setup.pad_token_id), Reference(LMHead.from_model(model.eval()), setup.config)
    accelerator, found = setup.accelerator(), []
    for pairs in setup.batches:
        batch = {name: v.to(setup.device) if isinstance(v, Tensor) else v for name, v in collate(pairs).items()}
        with accelerator.autocast():
            logps = reference.logps(batch).view(2, -1).T.tolist()
        found.append(
            [pair | dict(zip(LOGP_COLUMNS, both, strict=True)) for pair, both in zip(pairs, logps, strict=True)]
        )
    return found


COLUMNS = {
    "median_ms": ("step ms", "{:.1f}"),
    "iqr_ms": ("iqr", "{:.1f}"),
    "gradients_ms": ("gradients", "{:.1f}"),
    "update_ms": ("update", "{:.1f}"),
    "head_ms": ("head, loss", "{:.1f}"),
    "head_share": ("of step", "{:.0%}"),
    "positions": ("positions", "{:.0f}"),
    "padding": ("padding", "{:.0%}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
    "over_ours": ("x ours", "{:.2f}"),
    "peak_mib": ("peak MiB", "{:.0f}"),
    "head_mib": ("head, loss", "{:.0f}"),
    "loss_deviation": ("loss off by", "{:.1e}"),
}


def heading(report: dict[str, Any]) -> str:
    args, batches = report["arguments"], report["batches"]
    model = args["model"] or f"Qwen2, H={args['hidden']}, {args['layers']} layers, V={args['vocab']}"
    share = sum(batch["labelled"] for batch in batches) / sum(batch["positions"] for batch in batches)
    dataset = Path(args["dataset"]).name
    of_what = "pairs" if args["responses"] == 2 else f"prompts with {args['responses']} responses"
    return (
        f"{model}, {args['device']}, {report['environment']['threads']} threads, mixed precision: "
        f"{args['mixed_precision']}, impl {report['impl']}\n{args['steps']} steps after {args['warmup']}, each on "
        f"{args['pairs']} {of_what} of {dataset}, cut at {args['max_length']} tokens: {share:.0%} of the positions "
        "are labelled"
    )


def text(found: dict[str, Any]) -> str:
    lines = [["", *(title for title, _ in COLUMNS.values())]]
    for row in found["rows"]:
        cells = [(row.get(key), form) for key, (_, form) in COLUMNS.items()]
        shown = ["" if v is None else v if isinstance(v, str) else form.format(v) for v, form in cells]
        lines.append([row["name"], *shown])
    reasons = [f"{row['name']}: {row['reason']}" for row in found["rows"] if "reason" in row]
    return "\n".join([found["title"], *aligned(lines), *reasons])


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="demo", metavar="FILE", help="preference pairs in any layout (default: the embedded demo)")
    add("--max-rows", type=int, help="take only the first rows of the dataset")
    add("--model", metavar="NAME", help="hub name or path; default: a Qwen2 with random weights, of these sizes:")
    add("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    add("--layers", type=int, default=2, help="default: %(default)s")
    add("--heads", type=int, default=4, help="attention heads (default: %(default)s)")
    add("--vocab", type=int, default=151936, help="rows of embeddings and head (default: %(default)s)")
    add("--tied", action="store_true", help="embeddings and head are one matrix")
    add("--tokenizer-size", type=int, default=8192, help="of the BPE made from the texts (default: %(default)s)")
    add("--pairs", type=int, default=4, help="in a step, or prompts with more responses (default: %(default)s)")
    add("--responses", type=int, default=2, help="to each prompt, the best against each other (default: %(default)s)")
    add("--max-length", type=int, default=512, help="tokens at which pairs are cut (default: %(default)s)")
    add("--steps", type=int, default=10, help="timed steps (default: %(default)s)")
    add("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    add("--learning-rate", type=float, help="constant; default: 1e-6, for random weights 3e-4, so that losses move")
    add("--seed", type=int, default=42, help="of weights and of the order of pairs (default: %(default)s)")
    add("--reference", nargs="+", choices=REFERENCES, default=REFERENCES, help="default: both, a table each")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="default: all")
    add("--mixed-precision", choices=("no", "bf16"), default="no", help="autocast (default: %(default)s)")
    add("--impl", default="auto", help="implementation of dpo_kernels (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--no-memory", action="store_true", help="do not measure memory, for which a CPU needs a process each")
    add("--quick", action="store_true", help="tiny sizes, to see that everything runs; the times mean nothing")
    add("--json", type=Path, metavar="FILE", help="write all samples and losses, versions and machine")
    args = parser.parse_args()
    if args.learning_rate is None:
        args.learning_rate = 1e-6 if args.model else 3e-4
    if args.quick:
        args.hidden, args.layers, args.heads, args.vocab, args.tokenizer_size = 32, 1, 2, 512, 300
        args.max_length, args.max_rows, args.pairs = 64, args.max_rows or 20, 2
        args.steps, args.warmup = min(args.steps, 3), 1
    if args.responses < 2 or args.responses > 2 * args.pairs:
        parser.error(f"--responses: expected 2 to {2 * args.pairs}, twice --pairs, got {args.responses}")
    if min(args.steps, args.pairs, args.hidden, args.layers, args.heads) < 1 or args.warmup < 0:
        parser.error("--steps, --pairs, --hidden, --layers, --heads: expected at least 1; --warmup: at least 0")
    return parser, args


def main() -> None:
    from datasets import disable_progress_bars

    parser, args = arguments()
    warnings.simplefilter("ignore", FutureWarning)  # of peers to one another, here and in processes to come
    os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    os.environ["TQDM_DISABLE"] = "1"  # TRL's
    disable_progress_bars()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
        impl = default(device) if args.impl == "auto" else check_runs(args.impl, device)
        made = setups(args)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    report: dict[str, Any] = {
        "environment": measure.environment([*PACKAGES, "accelerate", "datasets"]),
        "gpu": measure.gpu() if args.device != "cpu" else None,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        | {"dataset": Path(args.dataset).name},
        "impl": impl,
        "batches": [
            {"positions": positions(b), "tokens": tokens(b), "labelled": labelled(b), "once": once(b)}
            for b in made[0].batches
        ],
        "tables": [],
    }
    print(heading(report), flush=True)
    for setup in made:
        say(f"reference: {setup.config.reference}")
        report["tables"].append(table(setup, args))
        print("\n" + text(report["tables"][-1]), flush=True)
        if args.json:
            save(args.json, report)
    if found := problems(report["tables"], made[0].config):
        sys.exit("\n".join(found))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
