"""The benchmark for a GPU runs on a CPU too, writes what it promises, and goes on without what hangs or dies."""

import importlib.util
import json
import multiprocessing
import sys
import time

import forks
import pytest
from places import ROOT, python_path

from dpo_kernels import dispatch

BENCHMARKS = ROOT / "benchmarks"
GRADIENTS = {"dhidden", "dweight"}


@pytest.fixture(scope="module")
def run_gpu(tmp_path_factory):
    """Runs the GPU's benchmark on the CPU, Triton's kernels interpreted, in larger blocks than ship; its report."""

    def run(parts, python=forks.python, **environment):
        out = tmp_path_factory.mktemp("gpu")
        if dispatch.HAS_TRITON:
            corrected = "import interpreter\n\ninterpreter.correct()\n"
            corrected += "from dpo_kernels.impl import triton\n\ntriton.BLOCK_N = 32\n"
            (out / "sitecustomize.py").write_text(corrected)
        options = ["--quick", "--device", "cpu", "--impl", "torch", "triton", "cuda", "--only", parts, "--rounds", "1"]
        options += ["--peers", "eager", "TRL", "Liger, not compiled", "QuACK", "QuACK, labelled"]
        options += ["--json", out / "out.json"]
        environment |= {"TRITON_INTERPRET": "1", "DPO_KERNELS_COMMIT": "a copy", "PYTHONPATH": python_path(out)}
        done = python(BENCHMARKS / "gpu.py", *options, **environment)
        assert done.returncode == 0, done.stderr
        return json.loads((out / "out.json").read_text()) | {"stdout": done.stdout}

    return run


@pytest.fixture(scope="module")
def gpu_report(run_gpu):
    return run_gpu("paths,E,tiles,masks", TORCHDYNAMO_DISABLE="1")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def rows_of(report, title):
    (table,) = [table for table in report["tables"] if table["title"].startswith(title)]
    return {row["name"]: row for row in table["rows"]}


def test_gpu_rows_are_timed_or_say_why_not(gpu_report):
    assert len(gpu_report["tables"]) == 7 and gpu_report["left_out"] == []
    assert "NVIDIA" in gpu_report["unavailable"]["cuda"]
    assert gpu_report["environment"]["device"]["type"] == "cpu"
    for table in gpu_report["tables"]:
        assert table["title"] in gpu_report["stdout"]
        rows = {row["name"]: row for row in table["rows"]}
        for row in rows.values():
            assert "reason" in row or 0 < row["min_ms"] <= row["median_ms"], row
            assert "reason" not in row or row["package"] != "dpo_kernels", row
            if "over_baseline" in row:
                assert row["over_baseline"] == pytest.approx(row["median_ms"] / rows["1 x torch.mm"]["median_ms"])
        if table["title"].startswith("E"):
            assert rows["copy"]["percent"] == pytest.approx(100)
        elif table["part"] == "tiles":
            assert all(
                f"{path}, torch, tiles of 64 MiB" in rows for path in ("A forward", "C fused loss", "D any loss")
            )
        else:
            own, bare = (rows[name]["median_ms"] for name in ("B frozen head, torch", "2 x torch.mm"))
            assert rows["B frozen head, torch"]["percent"] == pytest.approx(100 * bare / own)


@pytest.mark.full
def test_gpu_rows_are_compiled(run_gpu):
    for table in run_gpu("E", forks.python_alone)["tables"]:
        (row,) = [row for row in table["rows"] if row["name"] == "eager, torch.compile"]
        assert "reason" in row or 0 < row["min_ms"] <= row["median_ms"], row


@pytest.mark.parametrize("title", ["paths", "masks"])
def test_gpu_contenders_are_right(gpu_report, title):
    rows = rows_of(gpu_report, title)
    found = {name: row for name, row in rows.items() if row["package"] == "dpo_kernels"}
    names = ["A forward", "B frozen head", "C fused loss", "C fused loss, 4 GiB", "D any loss"]
    expected = {name.replace(",", ", torch,") if "," in name else f"{name}, torch" for name in names}
    if dispatch.HAS_TRITON:
        expected |= {name.replace("torch", "triton") for name in expected} | {"A forward, triton, fused"}
    assert set(found) == expected
    for name, row in found.items():
        assert row["errors"]["logps"] < 1e-4 < rows["eager"]["errors"]["logps"], name
        for gradient in ("dhidden", "dweight"):
            assert row["errors"].get(gradient, 0) <= rows["eager"]["errors"][gradient], name
    gradients = {"A forward, torch": set(), "B frozen head, torch": {"dhidden"}, "D any loss, torch": set(GRADIENTS)}
    for name, kept in gradients.items():
        assert GRADIENTS & set(rows[name]["errors"]) == kept


@pytest.mark.parametrize("package, name", [("torch", "eager"), ("trl", "TRL"), ("liger_kernel", "Liger, not compiled")])
def test_gpu_peers_do_what_their_row_says(gpu_report, package, name):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for title in ("paths", "masks"):
        rows = rows_of(gpu_report, title)
        if name not in ("eager", "TRL") and title == "paths":
            assert name not in rows
            continue
        for mode, gradients in ((", forward", set()), (", frozen head", {"dhidden"}), ("", GRADIENTS)):
            row = rows[name + mode]
            assert "reason" not in row and GRADIENTS & set(row["errors"]) == gradients, row


def test_gpu_peers_that_are_missing_are_named(gpu_report):
    if importlib.util.find_spec("quack"):
        pytest.skip("QuACK is installed")
    rows = rows_of(gpu_report, "masks")
    assert rows["QuACK"]["reason"] == rows["QuACK, labelled"]["reason"] == "not installed: pip install quack-kernels"
    assert "QuACK: not installed: pip install quack-kernels" in gpu_report["stdout"]


def gpu_arguments(gpu, monkeypatch, *arguments):
    command = ["gpu.py", "--quick", "--device", "cpu", "--impl", "torch", "--peers", "eager", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    args = gpu.arguments()
    args.deadline = time.time() + 300
    return args, {"environment": {}, "tables": [], "left_out": []}


def test_process_that_is_lost_is_followed(gpu, monkeypatch, tmp_path):
    args, found = gpu_arguments(gpu, monkeypatch, "--patience", "0.2", "--json", str(tmp_path / "out.json"))
    row = {"title": "a table", "rows": []}
    for end, lost in ((None, "it did not return within 0 s"), (("error", "no such luck"), "the process failed: no")):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        for message in (("device", "one"), ("at", "a"), ("table", row), ("at", "b"), *([end] if end else [])):
            sender.send(message)
        if end:
            sender.close()
        done, at, why = gpu.follow(receiver, "start", args, found)
        assert (done, at) == (1, "b") and why.startswith(lost)
    assert [table["title"] for table in json.loads((tmp_path / "out.json").read_text())["tables"]] == ["a table"] * 2


def test_contender_that_ends_the_process_is_left_out(gpu, monkeypatch, tmp_path):
    """The next process is told to leave it out; a table that is lost with nothing to leave out is named."""
    (tmp_path / "worker.py").write_text(
        "import os\n\n\n"
        "def work(left, excluded, args, pipe):\n"
        "    if not excluded:\n"
        "        pipe.send(('at', 'D any loss, torch'))\n"
        "        os._exit(1)\n"
        "    if len(left) == 2:\n"
        "        pipe.send(('table', {'title': 'first', 'rows': [], 'excluded': excluded}))\n"
        "    pipe.send(('at', 'inputs'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import worker

    args, found = gpu_arguments(gpu, monkeypatch, "--only", "paths,flat")
    left = list(gpu.jobs(args))
    gpu.supervise(worker.work, left, args, found)
    (table,) = found["tables"]
    assert table["excluded"] == {"D any loss, torch": "the process ended"}
    assert found["left_out"] == [f"{left[1].title}: the process ended"]

    args.deadline = time.time()
    gpu.supervise(worker.work, left, args, found)
    assert found["left_out"][1:] == [f"{job.title}: out of time" for job in left]


def test_memory_is_held_against_the_plan(gpu_report, gpu):
    """Here it is not measured; what a tenth more or less is, is said."""
    rows = rows_of(gpu_report, "paths")
    assert {name for name, row in rows.items() if "planned_mib" in row} >= {
        "B frozen head, torch",
        "eager",
        "eager, forward",
    }
    assert rows["eager, forward"]["planned_mib"] < rows["eager"]["planned_mib"]
    ours = {"name": "ours", "package": "dpo_kernels", "planned_mib": 100.0}
    table = {
        "title": "a table",
        "rows": [ours | {"peak_mib": 109.0}, ours | {"peak_mib": 111.0}, ours | {"peak_mib": 89.0}],
    }
    table["rows"] += [ours | {"peak_mib": "out of memory"}, {**ours, "package": "torch", "peak_mib": 500.0}]
    took = [f"a table: ours took {mib} MiB, planned were 100" for mib in (111, 89)]
    assert gpu.misplanned(table) == took
