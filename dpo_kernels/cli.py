"""The command `dpo-kernels`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from dpo_kernels import env
from dpo_kernels.bench import command as bench
from dpo_kernels.planning import command as plan
from dpo_kernels.training.config import add_flags, load_config, normalize_flags, require_packages

TRAIN_HELP = """\
Trains a model on preference pairs, by DPO or a relative of it.

Settings come from CONFIG, a YAML file of "name: value" lines, and from the flags, which win. Names may be written with
hyphens or underscores; what is true or false may be given as --setting and --no-setting. Without CONFIG, and unless
--model or --dataset is given, a tiny model learns an embedded preference set, in about a minute on two CPU cores.
"""

# What adds its arguments, what runs it, and what it is for.
COMMANDS = {
    "bench": (bench.add_arguments, bench.run, "time the head and the loss beside eager PyTorch and the peers"),
    "plan": (plan.add_arguments, plan.run, "say what memory a training step will need"),
    "env": (env.add_arguments, env.run, "show what is available, what is chosen, and why not the rest"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 where the run failed, 2 where the command line is wrong."""
    parser = argparse.ArgumentParser(prog="dpo-kernels", description="DPO training that never holds the logits.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,bench,plan,env}")
    train = commands.add_parser(
        "train",
        help="train a model on preference pairs",
        usage="dpo-kernels train [CONFIG] [--setting value ...]",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file with settings")
    train.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
    add_flags(train)
    for name, (add_arguments, _, summary) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=summary, allow_abbrev=False))

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:
            arguments = ["train", *normalize_flags(arguments[1:], besides=("help", "traceback"))]
        parsed = parser.parse_args(arguments)
        if parsed.command in COMMANDS:
            return COMMANDS[parsed.command][1](parsed)
        options = vars(parsed)
        del options["command"]
        path, show_traceback = options.pop("config"), options.pop("traceback")
        config = load_config(path, options)
        require_packages(config)
    except (ValueError, OSError, ImportError) as error:
        print(f"dpo-kernels: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpo-kernels: interrupted", file=sys.stderr)
        return 130

    _speak_plainly()
    from dpo_kernels.training import train as run

    try:
        run(config)
    except KeyboardInterrupt:
        print(
            f"dpo-kernels: interrupted; the same command goes on from the newest checkpoint in {config.output_dir}, "
            f"which is written every {config.save_steps} steps, or starts afresh if there is none",
            file=sys.stderr,
        )
        return 130
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if show_traceback:
            traceback.print_exc()
        print(f"dpo-kernels: error: {error}", file=sys.stderr)
        return 1
    return 0


def _speak_plainly() -> None:
    """What the package has to say as plain lines of text, warnings without lines of code, and one progress bar."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    handler = logging.StreamHandler(sys.stdout)
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
