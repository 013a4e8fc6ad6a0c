"""The check of attention in rows that share prompts runs on a CPU, passes there, and sees what is wrong."""

import importlib
import sys

import pytest
import torch
from places import ROOT

pytest.importorskip("transformers")
from dpo_kernels.models import segments

TINY = ("--pairs", "2", "--longest", "32", "--head-dim", "8")


CASES = ((False, False), (False, True), (True, False))  # a softcap, prompts that are shared


@pytest.fixture
def check(monkeypatch):
    """A function that runs the script here: what it ends with."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("attention")
    precision = torch.get_float32_matmul_precision()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["attention.py", *TINY, *arguments])
        try:
            script.main()
        except SystemExit as error:
            return error.code
        finally:
            torch.set_float32_matmul_precision(precision)

    run.script = script
    return run


def test_blocks_are_right(check, capsys):
    assert check() is None
    lines = capsys.readouterr().out.splitlines()
    models = [line for line in lines if line.startswith(check.script.MODELS)]
    assert len(models) == 12 and len(lines) == 12 + 48 + 1 and all(": blocks: " in line for line in lines[:-1])
    assert all("dk" in line or "dweights" in line for line in lines[:-1])


def test_what_is_seen_and_should_not_be_is_noticed(check, monkeypatch):
    """A window that is not kept to, in fp32 and bf16; a model says so itself, when it is looked at."""
    mask = segments._Known.mask

    def without_window(known, segment, window, *rest, **options):
        return mask(known, segment, None, *rest, **options)

    monkeypatch.setattr(segments._Known, "mask", without_window)
    lines = check("--models", "mistral").splitlines()
    refused = [line for line in lines if "computed by nothing, since MistralForCausalLM computes other hidden" in line]
    assert [line.partition(":")[0] for line in refused] == [
        "mistral, one row",
        "mistral, rows",
        "mistral, whole sequences",
    ]
    alone = [line for line in lines if line.startswith("dtype")]
    assert len(alone) == 24 == len(lines) - 3 and all("window 8" in line for line in alone)


def test_what_computes_is_what_was_to(check, monkeypatch):
    """On a GPU blocks alone would be right, and are not what is asked about, but with a softcap."""
    expected_of = check.script.expected_of
    cuda = torch.device("cuda")
    monkeypatch.setattr(check.script, "expected_of", lambda device, *of: expected_of(cuda, *of))
    lines = check("--models").splitlines()
    assert len(lines) == 24 and sum(line.endswith("expected sequences") for line in lines) == 4
    lines = [line for line in lines if not line.endswith("expected sequences")]
    assert all("softcap None" in line and line.endswith("expected FlexAttention") for line in lines)
    monkeypatch.undo()
    dtypes = torch.bfloat16, torch.float32
    found = [expected_of(cuda, dtype, softcap, shared) for dtype in dtypes for softcap, shared in CASES]
    assert found == ["sequences", "FlexAttention", "blocks"] + ["FlexAttention", "FlexAttention", "blocks"]
