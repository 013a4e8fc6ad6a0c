"""The CPU benchmark runs, writes what it promises, and would notice a contender that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "out.json"
    command = [sys.executable, BENCHMARKS / "cpu.py", "--quick", "--no-memory", "--threads", "1", "--json", out]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()) | {"stdout": done.stdout}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cases
    import cpu
    import measure
    import peers

    return cases, peers, measure, cpu


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


def test_wrong_contender_is_not_timed(modules):
    cases, peers, _, cpu = modules
    case = cases.HeadCase(32, 8, 64)

    def off_by_a_percent(inputs):
        result = peers.eager(inputs)
        return result._replace(gradients={**result.gradients, "weight": 1.01 * result.gradients["weight"]})

    def failing(inputs):
        raise RuntimeError("no such luck")

    contenders = [
        peers.Contender("eager", peers.eager),
        peers.Contender("off", off_by_a_percent),
        peers.Contender("fails", failing),
        peers.Contender("missing", peers.eager, "no-such-distribution"),
    ]
    inputs = case.inputs()
    found = {c.name: cpu.check(cpu.Entry(c.name, c, case), inputs, case.oracle(inputs)) for c in contenders}
    assert "reason" not in found["eager"]
    assert found["off"]["reason"].startswith("wrong: error of dweight 1.0e-02")
    assert found["fails"]["reason"] == "RuntimeError: no such luck"
    assert found["missing"]["reason"] == "no-such-distribution is not installed"


def test_in_place_backward_finds_the_logits_again(modules):
    cases, peers, _, _ = modules
    contender = peers.from_logits("auto", torch.float32, backward=True)["E in place"]
    inputs = cases.LogitsCase(16, 64).inputs()
    before = inputs.logits.detach().clone()
    inputs.prepare(contender.overwrites)
    contender.run(inputs)
    assert not torch.equal(inputs.logits, before)
    inputs.prepare(contender.overwrites)
    assert torch.equal(inputs.logits, before)


def test_peak_memory_sees_what_is_allocated(modules):
    cases, peers, measure, _ = modules
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    case = cases.LogitsCase(256, 32768)  # 32 MiB, of which log_softmax makes another 32
    contenders = peers.from_logits("auto", torch.float32, backward=False)
    assert measure.peak_memory(contenders["eager"], case, 1) == pytest.approx(32, abs=4)
    assert measure.peak_memory(contenders["read"], case, 1) < 4


def test_samples_interleave(modules):
    _, _, measure, _ = modules
    order = []
    runs = [measure.Run(lambda name=name: order.append(name), lambda: None) for name in "abc"]
    samples = measure.interleaved(runs, 3)
    assert "".join(order) == "abcbcacab"
    assert [len(times) for times in samples] == [3, 3, 3]
    spread = measure.spread([3.0, 1.0, 2.0])
    assert (spread["median_ms"], spread["min_ms"], spread["iqr_ms"]) == (2000, 1000, 1000)
    assert measure.spread([1.0])["iqr_ms"] == 0


def test_batches_are_cut_and_labelled(modules):
    cases = modules[0]
    made = cases.batches(BENCHMARKS / "lengths_en.json", 75, 4, 512, 8, 64)
    assert len(made) == 75
    for case in made:
        assert all(prompt >= 1 and prompt + max(rest) <= 512 for prompt, *rest in case.lengths)
        assert int((case.labels() == 0).sum()) == case.tokens
    with pytest.raises(ValueError, match="at most 300 pairs, got 76 batches of 4"):
        cases.batches(BENCHMARKS / "lengths_en.json", 76, 4, 512, 8, 64)
    labels = cases.HeadCase(5, 8, 64, ((3, 2, 3),)).labels()
    assert (labels == 0).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
