"""The process that tries kernels: does it see what is wrong with them, and does it pass those that are right?"""

import pytest
import torch
from places import DEVICE

from dpo_kernels import dispatch, measure
from dpo_kernels.tuning import worker

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = {str(case): case for case in worker.CASES}


def test_cases_have_every_value_and_option():
    def values(name):
        return {getattr(case, name) for case in worker.CASES}

    assert values("rows") == {1, 130, 300} and values("vocab") == {123, 600, 1500} and values("hidden") == {40, 72, 128}
    assert all(values(name) == {True, False} for name in ("bias", "stats", "unaligned")) and max(values("confident"))
    transforms = [case.transform for case in worker.CASES]
    assert any(t.get("logit_scale", 1) < 0 for t in transforms) and any("softcap" in t for t in transforms)


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_what_the_case_says(case):
    of = CASES[case]
    given = worker.inputs_of(of, torch.bfloat16, torch.device("cpu"))
    assert (given.labels != -100).sum() == of.rows and given.weight.shape == (of.vocab, of.hidden)
    assert given.hidden.dtype == torch.bfloat16 and (given.bias is not None) == of.bias
    assert given.weight.is_contiguous() != of.unaligned and bool(given.weight.data_ptr() % 16) == of.unaligned
    if of.confident:
        sure = worker.eager("A", given, of, torch.float64)["token_logps"][given.labels != -100].exp() > worker.SURE
        assert sure.float().mean() > 0.3


# Triton's interpreter takes a minute for all cases of a dtype
@pytest.mark.full(when=lambda impl, case: impl in ("triton", "cuda") and case != str(worker.CASES[0]))
@pytest.mark.parametrize("case", [*CASES][:1] + [*CASES][2:3] + [*CASES][5:6])
def test_kernels_pass(impl, case):
    """Every family, as `tune` looks at it."""
    name = impl.__name__.rpartition(".")[2].replace("native", "cpu")
    fused = [f"{name}_fused"] if hasattr(impl, "has_fused_forward") else []
    dtypes = DTYPES if DEVICE != "cpu" or name in ("cpu", "torch") else DTYPES[:1]
    for family in [name, *fused]:
        for dtype in dtypes if family == name else dtypes[:2]:
            for path in "ABCDE" if family == name else "AD":
                with dispatch.taking(family):
                    assert worker.wrong(path, CASES[case], dtype, torch.device(DEVICE)) == "", (family, dtype, path)


@pytest.mark.parametrize(
    ("path", "name"), [("A", "fold_"), ("B", "fold_exp_"), ("C", "dlogits"), ("D", "dlogits"), ("E", "logps_bwd_")]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_small_error_is_seen(monkeypatch, path, name, dtype):
    """Of a part in 500, in halves; they round at 1 in 256."""
    from dpo_kernels.impl import torch as kernels

    of = getattr(kernels, name)

    def off(*arguments, **options):
        found = of(*arguments, **options)
        if name == "fold_":
            arguments[0].state[3] *= 1.001
        elif name == "fold_exp_":
            arguments[2].mul_(1.02)
        elif name == "dlogits":
            arguments[1].mul_(1.02)
        else:
            arguments[3].mul_(1.01)
        return found

    case = CASES["N=130, H=128, V=1500"]
    with dispatch.taking("torch"):
        assert worker.wrong(path, case, dtype, torch.device("cpu")) == ""
        monkeypatch.setattr(kernels, name, off)
        assert "rms error" in worker.wrong(path, case, dtype, torch.device("cpu"))


def test_confident_rows_are_looked_at_by_themselves(monkeypatch):
    from dpo_kernels.impl import torch as kernels

    case = next(case for case in worker.CASES if case.confident and not case.transform)
    of = kernels.fold_

    def off(fold, *arguments, **options):
        of(fold, *arguments, **options)
        sure = fold.target - fold.max > 5
        fold.state[3] *= torch.where(sure, 1.0002, 1.0)  # of what is left beside the label

    with dispatch.taking("torch"):
        monkeypatch.setattr(kernels, "fold_", off)
        assert "confident" in worker.wrong("A", case, torch.float32, torch.device("cpu"))


def test_families_take_turns_and_are_named_before_they_begin(monkeypatch):
    """So that whoever hangs is known by name."""
    told = []
    monkeypatch.setattr(measure, "FLUSH_BYTES", 2**20)
    head = worker.verdicts.Head("float32", 16, 64)
    task = {"tokens": [16, 32], "rounds": 1, "seconds": 10.0}
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch", "cpu"])
    timed = list(
        worker.time_head(head, ["torch", "cpu"], task, torch.device("cpu"), lambda **message: told.append(message))
    )
    assert [path for path, _, _ in timed] == list("ABCDE")
    for _, ms, why in timed:
        assert why == "" and {name: len(found) for name, found in ms.items()} == {"torch": 2, "cpu": 2}
    at = [(message["at"], message["what"]) for message in told]
    assert at.count(("cpu", "path C, float32, H=16, V=64, N=32")) == 2  # one to warm up
