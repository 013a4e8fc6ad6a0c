"""The command: exit status, what it prints where, and how it is told what to do."""

import subprocess
import sys

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
    assert "18 of 18 preference pairs kept" in printed.out
    assert "rewards/accuracies" in printed.out and str(output / "final") in printed.out
    assert "warning: beta 0.6 is outside 0.01 to 0.5" in printed.err
    assert (output / "metrics.jsonl").is_file() and (output / "final" / "model.safetensors").is_file()


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
