"""The benchmarks run, write what they promise, and would notice a contender that is wrong."""

import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_kernels import dispatch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GRADIENTS = {"dhidden", "dweight"}


def run(script, out, *arguments, **environment):
    """What the script prints, and its JSON."""
    command = [sys.executable, BENCHMARKS / script, "--quick", *arguments, "--json", out / "out.json"]
    path = os.pathsep.join([str(out), str(BENCHMARKS.parent), str(BENCHMARKS.parent / "tests")])
    environment["PYTHONPATH"] = os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "out.json").read_text()) | {"stdout": done.stdout}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return run("cpu.py", tmp_path_factory.mktemp("cpu"), "--no-memory", "--threads", "1")


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory):
    """Of the GPU's benchmark on the CPU, Triton's kernels interpreted, in larger blocks than ship."""
    out = tmp_path_factory.mktemp("gpu")
    if dispatch.HAS_TRITON:
        corrected = (
            "import interpreter\n\ninterpreter.correct()\nfrom dpo_kernels.impl import triton\n\ntriton.BLOCK_N = 32\n"
        )
        (out / "sitecustomize.py").write_text(corrected)
    impl = ["--impl", "torch", "triton", "cuda", "--only", "paths,E,tiles,masks", "--rounds", "1"]
    peers = ["--peers", "eager", "TRL", "Liger, not compiled", "QuACK", "QuACK, labelled"]
    options = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "DPO_KERNELS_COMMIT": "a copy"}
    return run("gpu.py", out, "--device", "cpu", *impl, *peers, **options)


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases
    import contenders
    import gpu
    import measure
    import peers
    import report

    return SimpleNamespace(cases=cases, contenders=contenders, gpu=gpu, measure=measure, peers=peers, report=report)


def rows_of(report, title):
    (table,) = [table for table in report["tables"] if table["title"].startswith(title)]
    return {row["name"]: row for row in table["rows"]}


def test_report_says_where_it_comes_from(report):
    environment = report["environment"]
    assert {"date", "commit", "cpu", "threads", "python", "versions"} <= set(environment)
    assert environment["threads"] == 1
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert report["arguments"]["quick"] is True and report["impl"] in ("torch", "cpu")


def test_every_row_is_timed_or_says_why_not(report):
    assert len(report["tables"]) == 7
    for table in report["tables"]:
        assert table["title"] in report["stdout"]
        for row in table["rows"]:
            assert "reason" in row or 0 < row["min_ms"] <= row["median_ms"], row
            assert "reason" not in row or row["package"] != "dpo_kernels", row


def test_limits_and_baselines_are_of_the_same_table(report):
    for table in report["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        for row in rows.values():
            for what in ("limit", "baseline"):
                if what in row and "batches" not in table:  # whose ratios are medians of ratios
                    ratio = row["median_ms"] / rows[row[what]]["median_ms"]
                    assert row[f"over_{what}"] == pytest.approx(ratio)
    every = rows_of(report, "Every position")
    limits = {name: row["limit"] for name, row in every.items() if name[:2] in ("A ", "B ", "C ", "D ")}
    assert [limit[0] for limit in limits.values()] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("title", ["Every position", "Real batches"])
def test_ours_are_right(report, title):
    rows = rows_of(report, title)
    ours = [row for row in rows.values() if row["package"] == "dpo_kernels"]
    assert len(ours) == (4 if title == "Every position" else 2)
    for row in ours:
        # eager in the same precision, with room for sums of few terms that differ by luck
        for name, error in row["errors"].items():
            assert error <= 2 * rows["eager"]["errors"][name] + 1e-7, (row["name"], name)


@pytest.mark.parametrize(
    "package, name",
    [
        ("trl", "TRL"),
        ("liger_kernel", "Liger, compiled"),
        ("liger_kernel", "Liger, not compiled"),
        ("cut_cross_entropy", "CCE torch_compile"),
        ("torch", "F.linear_cross_entropy"),
        ("torch", "F.linear_cross_entropy, 256 rows"),
    ],
)
def test_peers_compute_the_same(report, package, name):
    pytest.importorskip(package)
    if package == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this version of PyTorch has no linear_cross_entropy")
    for title in ("Every position", "Real batches"):
        row = rows_of(report, title)[name]
        if name in ("Liger, compiled", "CCE torch_compile") and not row.get("reason", "wrong").startswith("wrong"):
            pytest.skip(f"torch.compile does not work here: {row['reason']}")
        assert "reason" not in row, row
        assert max(row["errors"].values()) < 1e-4, row


def test_bf16_inputs_keep_exact_log_probabilities(report):
    rows = rows_of(report, "bf16 over fp32")
    for path in "ABD":
        (row,) = [row for name, row in rows.items() if name.startswith(path + " ") and name.endswith("bf16")]
        assert row["errors"]["token_logps"] < 1e-5 < 1e-3 < rows["eager, bf16"]["errors"]["token_logps"]
    for table in ("E, forward: N=64 V=512, bfloat16", "E, forward and backward: N=64 V=512, bfloat16"):
        rows = rows_of(report, table)
        assert rows["E"]["errors"]["token_logps"] < 1e-5 < 1e-3 < rows["eager"]["errors"]["token_logps"]


def test_gpu_rows_are_timed_or_say_why_not(gpu_report):
    assert len(gpu_report["tables"]) == 7 and gpu_report["left_out"] == []
    assert "NVIDIA" in gpu_report["unavailable"]["cuda"]
    assert gpu_report["environment"]["device"]["name"] == "cpu"
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
    pytest.importorskip(package)
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
    assert rows["QuACK"]["reason"] == rows["QuACK, labelled"]["reason"] == "quack-kernels is not installed"
    assert "QuACK: quack-kernels is not installed" in gpu_report["stdout"]


def gpu_arguments(modules, monkeypatch, *arguments):
    command = ["gpu.py", "--quick", "--device", "cpu", "--impl", "torch", "--peers", "eager", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    args = modules.gpu.arguments()
    args.deadline = time.time() + 300
    return args, {"environment": {}, "tables": [], "left_out": []}


def test_process_that_is_lost_is_followed(modules, monkeypatch, tmp_path):
    args, found = gpu_arguments(modules, monkeypatch, "--patience", "0.2", "--json", str(tmp_path / "out.json"))
    row = {"title": "a table", "rows": []}
    for end, lost in ((None, "it did not return within 0 s"), (("error", "no such luck"), "the process failed: no")):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        for message in (("device", "one"), ("at", "a"), ("table", row), ("at", "b"), *([end] if end else [])):
            sender.send(message)
        if end:
            sender.close()
        done, at, why = modules.gpu.follow(receiver, "start", args, found)
        assert (done, at) == (1, "b") and why.startswith(lost)
    assert [table["title"] for table in json.loads((tmp_path / "out.json").read_text())["tables"]] == ["a table"] * 2


def test_contender_that_ends_the_process_is_left_out(modules, monkeypatch, tmp_path):
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

    args, found = gpu_arguments(modules, monkeypatch, "--only", "paths,flat")
    left = list(modules.gpu.jobs(args))
    modules.gpu.supervise(worker.work, left, args, found)
    (table,) = found["tables"]
    assert table["excluded"] == {"D any loss, torch": "the process ended"}
    assert found["left_out"] == [f"{left[1].title}: the process ended"]

    args.deadline = time.time()
    modules.gpu.supervise(worker.work, left, args, found)
    assert found["left_out"][1:] == [f"{job.title}: out of time" for job in left]


def test_excluded_contender_is_not_run(modules):
    case = modules.cases.HeadCase(16, 8, 64)
    contenders = [modules.contenders.Contender(name, modules.peers.eager) for name in "ab"]
    entries = [modules.report.Entry(contender.name, contender, case) for contender in contenders]
    heard = []
    harness = modules.report.Harness(1, memory=False, excluded={"a": "it hung"}, at=lambda *what: heard.append(what))
    a, b = modules.report.compare("both", entries, harness)["rows"]
    assert a["reason"] == "it hung" and "median_ms" not in a and "median_ms" in b
    assert [what for what in heard if what[0] in "ab"] == [("b", "check"), ("b", "time")]


@pytest.mark.parametrize("fused", [True, False])
def test_fused_forward_is_switched_for_one_call(modules, monkeypatch, fused):
    if reason := dispatch.unavailable_reason("triton", torch.device("cpu")):
        pytest.skip(reason)
    module, heard = dispatch.load("triton"), []
    fold = module.linear_fold_
    monkeypatch.setattr(module, "FUSED_FORWARD", not fused)
    monkeypatch.setattr(module, "linear_fold_", lambda *args: heard.append(module.FUSED_FORWARD) or fold(*args))
    inputs = modules.cases.HeadCase(16, 8, 64, dtype=torch.bfloat16).inputs()
    modules.contenders.path_a(inputs, impl="triton", fused=fused)
    assert heard == [fused] and module.FUSED_FORWARD is not fused


@pytest.mark.parametrize("loss", ["sigmoid_loss", "likelihood_loss"])
def test_oracle_is_eager(modules, monkeypatch, loss):
    """Some rows at a time, and with positions that have no label."""
    monkeypatch.setattr(modules.cases, "ORACLE_BYTES", 5 * 64 * 8)
    case = modules.cases.HeadCase(12, 8, 64, ((3, 2, 4), (2, 3, 3)), dtype=torch.float64)
    inputs, loss = case.inputs(), getattr(modules.cases, loss)
    found = case.oracle(inputs, loss)
    logp = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    picked = logp.gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0] * inputs.labelled
    value = loss(picked.sum(1), inputs)
    dhidden, dweight = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
    torch.testing.assert_close(found.gradients, {"hidden": dhidden, "weight": dweight})
    torch.testing.assert_close(found.token_logps, picked.detach())
    torch.testing.assert_close(found.loss, value.detach())


def test_wrong_contender_is_not_timed(modules):
    peers, contenders, report = modules.peers, modules.contenders, modules.report
    case = modules.cases.HeadCase(32, 8, 64)

    def off_by_a_percent(inputs):
        result = peers.eager(inputs)
        return result._replace(gradients={**result.gradients, "weight": 1.01 * result.gradients["weight"]})

    def failing(inputs):
        raise RuntimeError("no such luck")

    compared = [
        contenders.Contender("eager", peers.eager),
        contenders.Contender("off", off_by_a_percent),
        contenders.Contender("fails", failing),
        contenders.Contender("missing", peers.eager, "no-such-distribution"),
    ]
    inputs = case.inputs()
    oracle = case.oracle(inputs, modules.cases.sigmoid_loss)
    found = {c.name: report.check(report.Entry(c.name, c, case), inputs, oracle) for c in compared}
    assert "reason" not in found["eager"]
    assert found["off"]["reason"].startswith("wrong: error of dweight 1.0e-02")
    assert found["fails"]["reason"] == "RuntimeError: no such luck"
    assert found["missing"]["reason"] == "no-such-distribution is not installed"


def test_in_place_backward_finds_the_logits_again(modules):
    contender = modules.contenders.from_logits("auto", torch.float32, backward=True)["E in place"]
    inputs = modules.cases.LogitsCase(16, 64).inputs()
    before = inputs.logits.detach().clone()
    inputs.prepare(contender.overwrites)
    contender.run(inputs)
    assert not torch.equal(inputs.logits, before)
    inputs.prepare(contender.overwrites)
    assert torch.equal(inputs.logits, before)


def test_peak_memory_sees_what_is_allocated(modules):
    measure = modules.measure
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    case = modules.cases.LogitsCase(256, 32768)  # 32 MiB, of which log_softmax makes another 32
    held = modules.contenders.from_logits("auto", torch.float32, backward=False)
    assert measure.peak_memory(held["eager"], case, 1) == pytest.approx(32, abs=4)
    assert measure.peak_memory(held["read"], case, 1) < 4


def test_samples_interleave(modules):
    measure = modules.measure
    order = []
    runs = [measure.Run(lambda name=name: order.append(name), lambda: None) for name in "abc"]
    samples = measure.interleaved(runs, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(times) for times in samples] == [3, 3, 3]
    spread = measure.spread([3.0, 1.0, 2.0])
    assert (spread["median_ms"], spread["min_ms"], spread["iqr_ms"]) == (2000, 1000, 1000)
    assert measure.spread([1.0])["iqr_ms"] == 0


def test_samples_of_a_run_that_fails_and_of_one_that_is_slow(modules):
    def fail():
        raise MemoryError("no such luck")

    runs = [modules.measure.Run(lambda: None, call) for call in (fail, lambda: None)]
    failed, samples = modules.measure.interleaved(runs, 9, seconds=0)
    assert failed == "MemoryError: no such luck"
    assert len(samples) == modules.measure.MIN_ROUNDS


def test_what_nvidia_smi_says(modules, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert modules.measure.gpu() is None
    said = "NVIDIA H200, 580.159.04, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 76.5 W, 700.00 W, 30"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = modules.measure.gpu()
    assert (found["name"], found["clocks.sm"], found["temperature.gpu"]) == ("NVIDIA H200", "345 MHz", "30")


def test_commit_of_a_copy_without_its_repository(modules, monkeypatch):
    monkeypatch.setattr(modules.measure, "_git", lambda *arguments: None)
    monkeypatch.setenv("DPO_KERNELS_COMMIT", "abc")
    found = modules.measure.environment([])
    assert (found["commit"], found["uncommitted_changes"]) == ("abc", None)


def test_batches_are_cut_and_labelled(modules):
    cases = modules.cases
    made = cases.batches(BENCHMARKS / "lengths_en.json", 75, 4, 512, 8, 64)
    assert len(made) == 75
    for case in made:
        assert all(prompt >= 1 and prompt + max(rest) <= 512 for prompt, *rest in case.lengths)
        assert int((case.labels() == 0).sum()) == case.tokens
    with pytest.raises(ValueError, match="at most 300 pairs, got 76 batches of 4"):
        cases.batches(BENCHMARKS / "lengths_en.json", 76, 4, 512, 8, 64)
    labels = cases.HeadCase(5, 8, 64, ((3, 2, 3),)).labels()
    assert (labels == 0).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
