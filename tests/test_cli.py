"""The command: exit status, what it prints where, and how it is told what to do."""

import io
import json
import re
import subprocess
import sys

import forks
import pytest

from dpo_kernels.cli import main

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """What `main` sets up for a process of its own must not outlive the test."""
    import logging
    import warnings

    package = logging.getLogger("dpo_kernels")
    handlers, level, show = list(package.handlers), package.level, warnings.showwarning
    yield
    package.handlers[:], package.level, warnings.showwarning = handlers, level, show


def test_env(capsys):
    assert main(["env"]) == 0
    assert "auto picks" in capsys.readouterr().out


def test_version_is_a_line(capsys):
    import torch

    import dpo_kernels

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"dpo_kernels {dpo_kernels.__version__}, torch {torch.__version__}\n"


def test_help_lists_the_settings(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--learning-rate FLOAT" in text and "peak learning rate of AdamW" in text and "default: 1e-06" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning-rat", "1e-5"], "unknown flag '--learning-rat'; did you mean '--learning-rate'?"),
        (["--learning-rate", "fast"], "learning_rate: expected a finite number, got 'fast'"),
        (["missing.yaml"], "No such file or directory: 'missing.yaml'"),
        (["--dataset", "x.jsonl"], "model is missing"),
    ],
)
def test_a_wrong_command_line_has_status_2_and_no_traceback(capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dpo-kernels: error: ") and message in error and error.count("\n") == 1


def test_a_run_from_a_file_and_flags(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: demo\ndataset: demo\nmax_rows: 20\ntokenizer: train:300\nlearning_rate: 1e-3\nbeta: 0.9\n"
    )
    output = tmp_path / "out"
    flags = ["--output-dir", str(output), "--max_steps", "2", "--no-progress-bar", "--beta=0.6"]
    assert main(["train", str(config), *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("train: 18 of 18 preference pairs kept") == 1
    assert printed.out.count("eval: 2 of 2 preference pairs kept") == 1
    assert printed.out.count("one of the training pairs:\nprompt (") == 1 and printed.out.count("(labelled text") == 1
    assert "rewards/accuracies" in printed.out and str(output / "final") in printed.out
    assert "warning: beta 0.6 is outside 0.01 to 0.5" in printed.err
    assert (output / "metrics.jsonl").is_file() and (output / "final" / "model.safetensors").is_file()
    import torch
    from safetensors.torch import load_file

    from dpo_kernels.data.demo import demo_model

    # a warm-up's first step learns
    start, first = demo_model(300, seed=42).state_dict(), tmp_path / "first"
    assert main(["train", str(config), "--output-dir", str(first), "--max-steps", "1", "--no-progress-bar"]) == 0
    final = load_file(first / "final" / "model.safetensors")
    assert not any(torch.equal(start[name], final[name]) for name in final if final[name].dim() > 1)


def rows(tmp_path, name="pairs.jsonl"):
    pairs = [{"prompt": f"{n} is ", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(4)]
    pairs += [
        {"prompt": "\x1b[31m \u202e\ud83d\ude00 é ", "chosen": "\x07", "rejected": "同じ"},
        {**pairs[0], "rejected": "0!"},
    ]
    (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(tmp_path / name)


def preview(*arguments):
    return main(["preview", "--model", "demo", "--tokenizer", "train:300", *map(str, arguments)])


def test_a_preview_shows_reports_lengths_and_pairs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = rows(tmp_path)
    assert preview("--dataset", dataset, "--eval-dataset", rows(tmp_path, "eval.jsonl"), "-n", 2, "--seed", 3) == 0
    printed = capsys.readouterr().out
    for part in ("train", "eval"):
        assert f"{part}: 5 of 6 preference pairs kept\n  dropped 1: chosen and rejected are identical" in printed
    assert printed.count("prompt tokens: ") == printed.count("chosen tokens: ") == printed.count("#  ") * 0 + 2
    assert printed.count(f", from {dataset}, row ") == 2 and printed.count("\u27e6") >= 4 and "\x1b" not in printed
    assert "of them labelled" in printed and [path.name for path in tmp_path.iterdir()].count("dpo-output") == 0
    assert preview("--dataset", dataset, "-n", 2, "--seed", 3, "--eval-fraction", 0) == 0
    again = capsys.readouterr().out
    assert again.partition("pair ")[2].partition("\n\n")[0] in printed and "eval: " not in again
    assert preview("--dataset", dataset, "-n", 0, "--eval-fraction", 0) == 0
    assert "labelled" not in capsys.readouterr().out
    assert preview("--dataset", dataset, "-n", 100, "--eval-fraction", 0) == 0
    everything = capsys.readouterr().out
    assert everything.count(", from ") == 5 and r"\x1b[31m \u202e😀 é" in everything and r"\x07" in everything


def test_a_preview_takes_a_file_and_all_flags_of_train(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: demo\ndataset: {rows(tmp_path)}\ntokenizer: train:300\neval_fraction: 0\n")
    assert main(["preview", str(config), "-n1", "--max-length", "99", "--max-rows", "7", "--dataset", "demo"]) == 0
    assert "train: 7 of 7 preference pairs kept" in capsys.readouterr().out
    assert main(["preview", "-n", "1", str(config)]) == 0
    assert "train: 5 of 6 preference pairs kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["-n", -1], 2, "pairs: expected a number of at least 0, got -1"),
        (["--dataset", "none.jsonl"], 1, "dataset: there is no file or directory 'none.jsonl'"),
        (["--learning-rat", 1], 2, "unknown flag '--learning-rat'; did you mean '--learning-rate'?"),
        (["--train-on", "first"], 2, "train_on: expected one of all, last, got 'first'"),
        (["--chat-template", "none.jinja"], 1, "chat_template: expected a file with a template or the text of one"),
        (["--chat-template-kwargs", "{"], 2, "chat_template_kwargs: expected a JSON object"),
        (["--dataset", "a", "--dataset-weights", 1, 2], 2, "dataset_weights: expected one for each of 1 datasets"),
    ],
    ids=str,
)
def test_a_preview_that_fails_says_why(capsys, arguments, status, message):
    assert (
        preview(*arguments if "--dataset" in arguments else ["--dataset", "demo", "--max-rows", 5, *arguments])
        == status
    )
    error = capsys.readouterr().err
    assert f"dpo-kernels: error: {message}" in error and "Traceback" not in error


def test_a_preview_needs_no_model(tmp_path, capsys, monkeypatch):
    from dpo_kernels.data.demo import demo_tokenizer

    demo_tokenizer(["hello"], 300).save_pretrained(tmp_path)  # a folder without weights
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ("accelerate", "peft") else name)
    arguments = ["--model", str(tmp_path), "--dataset", rows(tmp_path), "--lora-r", "4", "--reference", "precompute"]
    assert main(["preview", *arguments]) == 0
    assert "labelled text is between" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_a_terminal_gets_colours_unless_it_wants_none(tmp_path, capsys, monkeypatch, environment, coloured):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert preview("--dataset", "demo", "--max-rows", 5, "-n", 1) == 0
    printed = capsys.readouterr().out
    assert ("\x1b[32m" in printed) == coloured == ("\u27e6" not in printed)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "shift_jis"])
def test_output_of_any_encoding_is_written(tmp_path, monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    assert preview("--dataset", rows(tmp_path), "-n", 9, "--eval-fraction", 0) == 0
    text = written.getvalue().decode(encoding)
    assert "[[" in text and (r"\u540c" in text) == (encoding != "shift_jis") and r"\U0001f600" in text


def test_nobody_has_to_read_on(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text=""):
            raise BrokenPipeError(32, "Broken pipe")

        flush = write

    error = io.StringIO()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert preview("--dataset", "demo", "--max-rows", 5) == main(["env"]) == 141
    assert preview("--dataset", "demo", "--max-rows", 5, "--dataset-weights", 1) == 141  # which is logged
    assert "Broken" not in error.getvalue() and "dpo-kernels" not in error.getvalue()


PLAN = ("plan", "--model", "Qwen/Qwen2.5-0.5B", "--batch", 4, "--seq", 512, "--device", "cpu")
BENCH = ("bench", "--quick", "--rounds", 1, "--no-memory", "--peers", "--impl", "torch")
PREVIEW = ("preview", "--dataset", "demo", "--model", "demo", "--max-rows", 20)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["env"], PLAN, BENCH, PREVIEW], ids=lambda found: " ".join(found[:2])
)
def test_a_pipe_that_is_closed_ends_the_command_in_silence(tmp_path, arguments):
    """As by `| head -1`; output is kept back until there is much of it, as it is into a pipe."""
    script = tmp_path / "closed.py"
    script.write_text(
        "import os, sys\n\nreads, writes = os.pipe()\nos.close(reads)\nos.dup2(writes, 1)\n"
        "sys.stdout = open(1, 'w', closefd=False)\n"
        f"from dpo_kernels.cli import main\n\nsys.exit(main({list(map(str, arguments))!r}))\n"
    )
    ended = forks.python(script, cwd=tmp_path)
    # argparse keeps the error of a help that is longer than what is kept back to itself
    assert ended.returncode == (0 if arguments[0] == "train" else 141) and not re.search(
        "Traceback|Error|Broken|Exception", ended.stderr
    ), ended.stderr


def test_without_the_extra_the_package_works_and_training_says_what_is_missing():
    """As after a plain `pip install .`: PyTorch, and nothing else."""
    code = """
import importlib.util, sys
extras = ("transformers", "datasets", "accelerate", "peft", "safetensors", "matplotlib", "tqdm", "triton")
for name in extras:
    sys.modules[name] = None
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in extras else find_spec(name)
import dpo_kernels
from dpo_kernels.cli import main
assert main(["env"]) == 0
sys.exit(main(["train"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "training needs transformers" in ended.stderr and "pip install 'dpo_kernels[train]'" in ended.stderr
    assert "auto picks" in ended.stdout


def test_an_interrupted_run_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpo_kernels.training.loop.train", interrupted)
    assert main(["train", "--output-dir", str(tmp_path)]) == 130
    assert "interrupted; the same command goes on from the newest checkpoint" in capsys.readouterr().err


def test_a_run_that_fails_has_status_1_and_a_traceback_on_demand(tmp_path, capsys):
    arguments = ["train", "--model", "demo", "--dataset", str(tmp_path / "none.jsonl"), "--output-dir", str(tmp_path)]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "none.jsonl" in error and "Traceback" not in error
    assert main([*arguments, "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_run_that_diverges_is_one_line(monkeypatch, capsys, tmp_path):
    import dpo_kernels.training

    def diverges(config):
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(dpo_kernels.training, "train", diverges)
    assert main(["train", "--model", "demo", "--dataset", "demo", "--output-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "dpo-kernels: error: loss is nan" in captured.err and "Traceback" not in captured.err
