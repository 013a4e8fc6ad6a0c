"""The command `dpo-kernels`."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_kernels import env
from dpo_kernels.bench import command as bench
from dpo_kernels.planning import command as plan
from dpo_kernels.training.config import TrainConfig, add_flags, load_config, normalize_flags, require_packages
from dpo_kernels.tuning import command as tune

TRAIN_HELP = """\
Trains a model on preference pairs, by DPO or a relative of it.

Settings come from CONFIG, a YAML file of "name: value" lines, and from the flags, which win. Names may be written with
hyphens or underscores; what is true or false may be given as --setting and --no-setting. Without CONFIG, and unless
--model or --dataset is given, a tiny model learns an embedded preference set, in about a minute on two CPU cores.
"""

PREVIEW_HELP = """\
Shows what `dpo-kernels train` with the same CONFIG and flags would train on, without loading a model: what became of
the rows, how long the pairs are, and some of them as their tokens read, with what is labelled in colour or between
marks.
"""


def plan_settings(path: Path) -> dict[str, Any]:
    """The flags of `dpo-kernels plan` that a configuration of `dpo-kernels train` comes to."""
    from dpo_kernels.training.reference_model import resolve

    config = load_config(path, required=("model",))
    return {
        "model": config.model.removeprefix("config:"),
        # of so many tokens: it depends on the data
        "batch": config.per_device_batch_size if config.max_tokens_per_batch is None else None,
        "seq": config.max_length,
        "dtype": config.dtype,
        "mixed_precision": config.mixed_precision,
        "train": "lora" if config.lora_r else "full",
        "lora_r": config.lora_r or None,
        "reference": {None: "none", "precompute": "precomputed"}.get(resolve(config), "model"),
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_accumulation": config.gradient_accumulation_steps,
        "batching": config.batching,
        "sharding": config.sharding,
        "chunk_bytes": config.chunk_bytes,
        "impl": config.impl,
    }


def run_plan(options: argparse.Namespace) -> int:
    return plan.run(options, plan_settings)


# What adds its arguments, what runs it, and what it is for.
COMMANDS = {
    "bench": (bench.add_arguments, bench.run, "time the head and the loss beside eager PyTorch and the peers"),
    "plan": (plan.add_arguments, run_plan, "say what memory a training step will need"),
    "tune": (tune.add_arguments, tune.run, "prove and time the kernels on this machine's own device"),
    "env": (env.add_arguments, env.run, "show what is available, what is chosen, and why not the rest"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 where the run failed, 2 where the command line is wrong, 130
    where it was interrupted, and 141 where nobody reads on what it prints, as of `| head`."""
    try:
        try:
            return _main(arguments)
        finally:  # also where --help ends it
            sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # of a standard output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        return 141


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="dpo-kernels", description="DPO training that never holds the logits.")
    parser.add_argument("--version", action="version", version=env.versions(), help="show the versions and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,preview,bench,plan,tune,env}")
    train, preview = (
        commands.add_parser(
            name,
            help=summary,
            usage=f"dpo-kernels {name} [CONFIG] {usage}[--setting value ...]",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, summary, usage, description in (
            ("train", "train a model on preference pairs", "", TRAIN_HELP),
            ("preview", "show what would be trained on", "[-n PAIRS] ", PREVIEW_HELP),
        )
    )
    preview.add_argument("-n", "--pairs", type=int, default=3, help="pairs to show (default: %(default)s)")
    for command in (train, preview):
        command.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file with settings")
        command.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
        add_flags(command)
    for name, (add_arguments, _, summary) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, allow_abbrev=False))

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] in (["train"], ["preview"]):
            besides = ("help", "traceback", *["pairs"] * (arguments[0] == "preview"))
            arguments = [arguments[0], *normalize_flags(arguments[1:], besides=besides)]
        parsed = parser.parse_args(arguments)
        if parsed.command in COMMANDS:
            return COMMANDS[parsed.command][1](parsed)
        options = vars(parsed)
        name, path, show_traceback = (options.pop(key) for key in ("command", "config", "traceback"))
        pairs = options.pop("pairs", 0)
        config = load_config(path, options)
        if pairs < 0:
            raise ValueError(f"pairs: expected a number of at least 0, got {pairs}")
        require_packages(config, data_alone=name == "preview")
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        print(f"dpo-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpo-kernels: interrupted", file=sys.stderr)
        return 130

    _speak_plainly(_Lines(sys.stdout) if name == "preview" else logging.StreamHandler(sys.stdout))
    try:
        if name == "preview":
            show_preview(config, pairs)
        else:
            from dpo_kernels.training import train as run

            run(config)
    except KeyboardInterrupt:
        goes_on = (
            f"; the same command goes on from the newest checkpoint in {config.output_dir}, "
            f"which is written every {config.save_steps} steps, or starts afresh if there is none"
        )
        print(f"dpo-kernels: interrupted{goes_on * (name == 'train')}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"dpo-kernels: error: {error}", file=sys.stderr)
        return 1
    return 0


def show_preview(config: TrainConfig, wanted: int) -> None:
    """Prints what became of the rows, the lengths of the pairs that are left, and `wanted` of those to train on."""
    from dpo_kernels.data.preview import histogram, pair_text, rankings, some_rows
    from dpo_kernels.training.pairs import decoder, load_parts
    from dpo_kernels.training.sizes import pair_lengths

    tokenizer, parts = load_parts(config)
    for part in parts:
        print(part.summary())
        for column, lengths in pair_lengths(part.pairs).items():
            print(histogram(f"{column.removesuffix('_ids')} tokens", lengths))
        if "group" in part.pairs.column_names:
            print(rankings(part.pairs["group"][:]))
        print()
    train, encoding = parts[0], sys.stdout.encoding or "ascii"
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for row in some_rows(len(train.pairs), wanted, config.seed):
        pair = train.pairs[row]
        weight = f", {pair['weight']:.3g} times the weight of the heaviest" if "weight" in pair else ""
        print(f"pair {row + 1} of {len(train.pairs)}, from {train.source(row)}{weight}")
        print(pair_text(pair, decoder(tokenizer), colour=colour, encoding=encoding), end="\n\n")


class _Lines(logging.StreamHandler):
    """What nobody reads on is no use to go on with; a training is."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            raise
        super().handleError(record)


def _speak_plainly(handler: logging.Handler) -> None:
    """What the package has to say as plain lines of text, warnings without lines of code, and one progress bar. What
    the output cannot write is written as its number."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("dpo_kernels")
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    elsewhere = warnings.showwarning

    def show(message: Any, category: type[Warning], *where: Any) -> None:
        if category is UserWarning:
            print(f"warning: {message}", file=sys.stderr)
        else:
            elsewhere(message, category, *where)

    warnings.showwarning = show  # type: ignore[assignment]
