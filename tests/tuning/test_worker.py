"""The process that tries kernels: does it see what is wrong with them, and does it pass those that are right?"""

import pytest
import torch
from places import DEVICE

from dpo_kernels import dispatch, linear_dpo, measure
from dpo_kernels.tuning import worker

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = {str(case): case for case in worker.CASES}


FUSED = {str(case): case for case in worker.FUSED_CASES}


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


def smaller(case):
    """What an interpreter can do, still of many blocks."""
    return case if DEVICE != "cpu" else case._replace(rows=min(case.rows, 70), vocab=min(case.vocab, 410))


# Triton's interpreter takes its time for all cases of a dtype
@pytest.mark.full(when=lambda impl, case: impl in ("triton", "cuda") and case != str(worker.CASES[0]))
@pytest.mark.parametrize("case", [*CASES][:1] + [*CASES][2:3] + [*CASES][5:6])
def test_kernels_pass(impl, case, monkeypatch):
    """Every family, as `tune` looks at it."""
    name = impl.__name__.rpartition(".")[2].replace("native", "cpu")
    of = CASES[case]
    if name in ("triton", "cuda"):
        of = smaller(of)
        monkeypatch.setattr(worker, "TILE_BYTES", worker.TILE_BYTES if of == CASES[case] else 2**15)
    fused = [f"{name}_fused"] if hasattr(impl, "has_fused_forward") else []
    dtypes = DTYPES if DEVICE != "cpu" or name in ("cpu", "torch") else DTYPES[:1]
    for family in [name, *fused]:
        for dtype in dtypes if family == name else dtypes[:2]:
            for path in "ABCDE" if family == name else "AD":
                with worker._taken(family, of):
                    assert worker.wrong(path, of, dtype, torch.device(DEVICE)) == "", (family, dtype, path)


@pytest.mark.full(when=lambda impl, case: impl == "triton" and case != str(worker.FUSED_CASES[0]))
@pytest.mark.parametrize("impl", ["triton", "cuda"], indirect=True)
@pytest.mark.parametrize("case", [*FUSED][:4])
def test_fused_kernels_pass(impl, case):
    """And are taken, in blocks as on a GPU; one that is not is no proof."""
    family = f"{impl.__name__.rpartition('.')[2]}_fused"
    with worker._taken(family, smaller(FUSED[case])) as taken:
        assert worker.wrong("A", smaller(FUSED[case]), torch.bfloat16, torch.device(DEVICE)) == ""
    assert taken == [True, True]


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

    case = worker.CASES[1]
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


def test_fused_kernels_are_held_against_fp64_where_they_are_taken(monkeypatch, emulated_cuda):
    """Of path E nothing is fused; and one that was never taken is not verified."""
    told, tried, takes = [], [], [True]

    def wrong(path, case, dtype, device):
        tried.append((path, case, dispatch.choose("auto", device, path, dtype, case.vocab, case.hidden)))
        if takes[0]:
            emulated_cuda.linear_fold_()
        return ""

    monkeypatch.setattr(worker, "wrong", wrong)
    monkeypatch.setattr(emulated_cuda, "linear_fold_", lambda: True)
    task = {"device": "cpu", "threads": 0, "precision": "highest", "heads": []}
    task["verify"] = [("cuda_fused", "bfloat16"), ("cuda", "float32")]
    for takes[0] in (True, False):
        worker.work(task, lambda **message: told.append(message))
    fused = [(path, case, "cuda_fused") for case in worker.FUSED_CASES for path in "ABCD"]
    plain = [case for case in worker.CASES if not case.autocast]
    assert tried == (fused + [(path, case, "cuda") for case in plain for path in "ABCDE"]) * 2
    none = "its fused forward took none of them"
    assert [message for message in told if "verified" in message or "wrong" in message] == [
        {"verified": "cuda_fused", "dtype": "bfloat16"},
        {"verified": "cuda", "dtype": "float32"},
        {
            "wrong": "cuda_fused",
            "dtype": "bfloat16",
            "what": "all cases",
            "reason": none,
        },
        {"verified": "cuda", "dtype": "float32"},
    ]
    with dispatch.taking("cuda_fused"):
        assert dispatch.choices("auto", torch.device("cpu"), torch.float32, 64, 16) == {
            "A": "cuda_fused", "B": "cuda_fused", "C": "cuda_fused", "D": "cuda_fused", "E": "cuda",
        }  # fmt: skip


def test_large_heads_are_tried_in_small(monkeypatch):
    """Many tiles, later ones with labels, sums over groups of pairs."""
    from dpo_kernels.impl import torch as kernels

    starts, of = set(), kernels.dlogits

    def dlogits(a, out, rows, columns, transform):
        starts.add(columns.start)
        return of(a, out, rows, columns, transform)

    monkeypatch.setattr(kernels, "dlogits", dlogits)
    case = next(case for case in worker.CASES if case.tiles)
    with worker._taken("torch", case):
        assert worker.wrong("D", case, torch.bfloat16, torch.device("cpu")) == ""
        assert len(starts) > 3
        groups = []
        plan = linear_dpo.plan_groups
        monkeypatch.setattr(linear_dpo, "plan_groups", lambda *a, **k: groups.append(plan(*a, **k)) or groups[-1])
        assert worker.wrong("C", case, torch.bfloat16, torch.device("cpu")) == ""
    assert {len(found) for found in groups} == {2}


@pytest.fixture
def brief(monkeypatch):
    """Without what makes times reproducible: more is spent on that than on what is tested."""
    monkeypatch.setattr(measure.gc, "collect", lambda *of: 0)


@pytest.mark.parametrize("path", ["A", "C", "D"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_row_that_is_wrong_is_seen(monkeypatch, path, dtype):
    from dpo_kernels.impl import torch as kernels

    case, of = worker.CASES[2], kernels.fold_

    def off(fold, *arguments, **options):
        of(fold, *arguments, **options)
        if fold.y.shape[0] > 1:
            fold.state[3][0] *= 1.0 if fold.state[3][0] == 0 else 1.1  # of one of 300, in each tile

    monkeypatch.setattr(kernels, "fold_", off)
    monkeypatch.setattr(worker, "beyond_budget", lambda *arguments: "")
    with worker._taken("torch", case):
        assert "one number is" in worker.wrong(path, case, dtype, torch.device("cpu"))


def test_a_kernel_that_is_wrong_at_the_size_of_the_head_alone(monkeypatch, brief):
    from dpo_kernels.impl import native

    of, told = native.dlogits, []

    def dlogits(a, out, *arguments, **options):
        value = of(a, out, *arguments, **options)
        out.mul_(1.5)
        return value

    monkeypatch.setattr(native, "dlogits", dlogits)
    head, task = worker.verdicts.Head("float32", 16, 64), {"tokens": [32], "rounds": 1, "seconds": 1.0}
    timed = worker.time_head(
        head, ["torch", "cpu"], set(), task, torch.device("cpu"), lambda **message: told.append(message)
    )
    assert {path: set(ms) for path, ms, _ in timed}["D"] == {"torch"}
    (first, *_) = [message for message in told if "wrong" in message]
    assert first["wrong"] == "cpu" and "plain PyTorch's" in first["reason"] and first["what"].startswith("path C")


def test_fused_kernels_are_timed_where_they_are_taken(monkeypatch):
    timed = {}

    def by_turns(call, families, what, *arguments):
        timed[what[:6]] = families
        return dict.fromkeys(families, 1.0), ""

    monkeypatch.setattr(worker, "_by_turns", by_turns)
    monkeypatch.setattr(worker, "_agrees", lambda *arguments: True)
    head = worker.verdicts.Head("bfloat16", 16, 64)
    families = ["torch", "triton", "triton_fused"]
    list(worker.time_head(head, families, set(), {"tokens": [16]}, torch.device("cpu"), lambda **message: None))
    assert timed == {f"path {path}": families if path in "ABCD" else families[:2] for path in "ABCDE"}


def test_a_device_may_have_no_fused_forward(monkeypatch):
    kernels = pytest.importorskip("dpo_kernels.impl.triton")
    if dispatch.unavailable_reason("triton", torch.device(DEVICE)):
        pytest.skip("Triton cannot run here")
    assert {"triton", "triton_fused"} <= set(dispatch.families(torch.device(DEVICE)))
    monkeypatch.setattr(kernels, "has_fused_forward", lambda device: False)
    assert "triton" in dispatch.families(torch.device(DEVICE))
    assert "triton_fused" not in dispatch.families(torch.device(DEVICE))


def test_times_are_medians(monkeypatch):
    """Neither the luckiest one, nor one that something else disturbed."""
    monkeypatch.setattr(measure, "interleaved", lambda *arguments, **options: [[3.0, 9.0, 1.0]])
    task = {"rounds": 3, "seconds": 1.0}
    found = worker._by_turns(lambda: None, ["torch"], "path A", task, torch.device("cpu"), lambda **message: None)
    assert found == ({"torch": 3.0}, "")


def test_threads_and_precision_are_those_of_whoever_asks(monkeypatch):
    taken = []
    for name in ("set_num_threads", "set_float32_matmul_precision"):
        monkeypatch.setattr(torch, name, taken.append)
    task = {"device": "cpu", "threads": 3, "precision": "medium", "verify": [], "heads": []}
    worker.work(task, lambda **message: None)
    assert taken == [3, "medium"]


def test_families_take_turns_and_are_named_before_they_begin(monkeypatch, brief):
    """So that whoever hangs is known by name."""
    told = []
    head = worker.verdicts.Head("float32", 16, 64)
    task = {"tokens": [16, 32], "rounds": 1, "seconds": 10.0}
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch", "cpu"])
    timed = list(
        worker.time_head(
            head, ["torch", "cpu"], set(), task, torch.device("cpu"), lambda **message: told.append(message)
        )
    )
    assert [path for path, _, _ in timed] == list("ABCDE")
    for _, ms, why in timed:
        assert why == "" and {name: len(found) for name, found in ms.items()} == {"torch": 2, "cpu": 2}
    at = [(message["at"], message["what"]) for message in told]
    assert at.count(("cpu", "path C, float32, H=16, V=64, N=32")) == 3  # one to compare, one to warm up
