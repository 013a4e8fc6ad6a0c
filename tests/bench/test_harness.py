"""The harness behind the benchmarks: would it notice a contender that is wrong, slow or hungry?"""

import json
import os
from pathlib import Path

import pytest
import torch

from dpo_kernels import dispatch, measure
from dpo_kernels.bench import cases, contenders, peers, report
from dpo_kernels.data.lengths import LENGTHS, MIN_PAIRS, real_lengths


def test_excluded_contender_is_not_run():
    case = cases.HeadCase(16, 8, 64)
    entries = [report.Entry(name, contenders.Contender(name, peers.eager), case) for name in "ab"]
    heard = []
    harness = report.Harness(1, memory=False, excluded={"a": "it hung"}, at=lambda *what: heard.append(what))
    a, b = report.compare("both", entries, harness)["rows"]
    assert a["reason"] == "it hung" and "median_ms" not in a and "median_ms" in b
    assert [what for what in heard if what[0] in "ab"] == [("b", "check"), ("b", "time")]


@pytest.mark.parametrize("fused", [True, False])
def test_fused_forward_is_switched_for_one_call(monkeypatch, fused):
    if reason := dispatch.unavailable_reason("triton", torch.device("cpu")):
        pytest.skip(reason)
    module, heard = dispatch.load("triton"), []
    forward = module.linear_token_logps
    monkeypatch.setitem(dispatch.FORWARD_OF, "triton", "triton" if fused else "triton_fused")
    before = dict(dispatch.FORWARD_OF)
    monkeypatch.setattr(module, "linear_token_logps", lambda *args, **of: heard.append(True) or forward(*args, **of))
    inputs = cases.HeadCase(16, 16, 64, dtype=torch.bfloat16).inputs()
    contenders.path_a(inputs, impl="triton", fused=fused)
    assert heard == [True] * fused and before == dispatch.FORWARD_OF


@pytest.mark.parametrize("loss", ["sigmoid_loss", "likelihood_loss"])
def test_oracle_is_eager(monkeypatch, loss):
    """Some rows at a time, and with positions that have no label."""
    monkeypatch.setattr(cases, "ORACLE_BYTES", 5 * 64 * 8)
    case = cases.HeadCase(12, 8, 64, ((3, 2, 4), (2, 3, 3)), dtype=torch.float64)
    inputs, loss = case.inputs(), getattr(cases, loss)
    found = case.oracle(inputs, loss)
    logp = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    picked = logp.gather(-1, inputs.labels.clamp(min=0)[..., None])[..., 0] * inputs.labelled
    value = loss(picked.sum(1), inputs)
    dhidden, dweight = torch.autograd.grad(value, (inputs.hidden, inputs.weight))
    torch.testing.assert_close(found.gradients, {"hidden": dhidden, "weight": dweight})
    torch.testing.assert_close(found.token_logps, picked.detach())
    torch.testing.assert_close(found.loss, value.detach())


def test_wrong_contender_is_not_timed():
    case = cases.HeadCase(32, 8, 64)

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
    oracle = case.oracle(inputs, cases.sigmoid_loss)
    found = {c.name: report.check(report.Entry(c.name, c, case), inputs, oracle) for c in compared}
    assert "reason" not in found["eager"]
    assert found["off"]["reason"].startswith("wrong: error of dweight 1.0e-02")
    assert found["fails"]["reason"] == "RuntimeError: no such luck"
    assert found["missing"]["reason"] == "not installed: pip install no-such-distribution"


def test_in_place_backward_finds_the_logits_again():
    _, contender = contenders.from_logits("auto", backward=True)
    inputs = cases.LogitsCase(16, 64).inputs()
    before = inputs.logits.detach().clone()
    inputs.prepare(contender.overwrites)
    contender.run(inputs)
    assert not torch.equal(inputs.logits, before)
    inputs.prepare(contender.overwrites)
    assert torch.equal(inputs.logits, before)


def test_peak_memory_sees_what_is_allocated():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    case = cases.LogitsCase(256, 32768)  # 32 MiB, of which log_softmax makes another 32
    eager = peers.logits_peers(torch.float32, backward=False)["eager"]
    assert measure.peak_memory(eager, case, 1) == pytest.approx(32, abs=4)
    assert measure._peak_memory(contenders.READ, case, 1) < 4  # in this process


def test_samples_interleave():
    order = []
    runs = [measure.Run(lambda name=name: order.append(name), lambda: None) for name in "abc"]
    samples = measure.interleaved(runs, 3)
    rounds = {"".join(order[i : i + 3]) for i in (0, 3, 6)}
    assert all(sorted(each) == list("abc") for each in rounds) and len(rounds) > 1
    assert [len(times) for times in samples] == [3, 3, 3]
    spread = measure.spread([3.0, 1.0, 2.0])
    assert (spread["median_ms"], spread["min_ms"], spread["iqr_ms"]) == (2000, 1000, 1000)
    assert measure.spread([1.0])["iqr_ms"] == 0


def test_samples_of_a_run_that_fails_and_of_one_that_is_slow():
    def fail():
        raise MemoryError("no such luck")

    runs = [measure.Run(lambda: None, call) for call in (fail, lambda: None)]
    failed, samples = measure.interleaved(runs, 9, seconds=0)
    assert failed == "MemoryError: no such luck"
    assert len(samples) == measure.MIN_ROUNDS


def test_what_nvidia_smi_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measure.gpu() is None
    said = "NVIDIA H200, 580.159.04, 143771 MiB, 345 MHz, 1980 MHz, 3201 MHz, 76.5 W, 700.00 W, 30"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    found = measure.gpu()
    assert (found["name"], found["clocks.sm"], found["temperature.gpu"]) == ("NVIDIA H200", "345 MHz", "30")


def test_commit_of_a_copy_without_its_repository(monkeypatch):
    monkeypatch.setattr(measure, "_git", lambda *arguments: None)
    monkeypatch.setenv("DPO_KERNELS_COMMIT", "abc")
    found = measure.environment([])
    assert (found["commit"], found["uncommitted_changes"]) == ("abc", None)


def test_commit_is_of_this_package_alone(monkeypatch, tmp_path):
    """Installed below the repository of another project, it has no commit to name."""
    monkeypatch.delenv("DPO_KERNELS_COMMIT", raising=False)
    monkeypatch.setattr(measure, "_output", lambda *command: str(tmp_path))
    assert measure.environment([])["commit"] is None
    root = str(Path(measure.__file__).resolve().parents[1])
    monkeypatch.setattr(measure, "_output", lambda *command: root if "--show-toplevel" in command else "abc")
    assert measure.environment([])["commit"] == "abc"


@pytest.mark.parametrize("tokens, max_length", [(1, 512), (5000, 512), (400_000, 1024)])
def test_real_batches_are_cut_and_labelled(tokens, max_length):
    lengths = real_lengths(tokens, max_length)
    case = cases.HeadCase.of_pairs(lengths, 8, 64)
    assert all(prompt >= 1 and prompt + max(rest) <= max_length and min(rest) >= 1 for prompt, *rest in lengths)
    assert int((case.labels() == 0).sum()) == case.tokens >= tokens
    # the last pair is needed
    assert len(lengths) == MIN_PAIRS or case.tokens - sum(lengths[-1][1:]) < tokens
    assert real_lengths(tokens, max_length) == lengths != real_lengths(tokens, max_length, seed=7)


def test_labels_of_a_real_batch():
    labels = cases.HeadCase.of_pairs(((3, 2, 3),), 8, 64).labels()
    assert (labels == 0).int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


def test_lengths_have_no_texts():
    found = json.loads(LENGTHS.read_text())
    assert len(found["lengths"]) == 300
    assert all(len(row) == 3 and all(isinstance(value, int) for value in row) for row in found["lengths"])


@pytest.mark.parametrize("lengths", [(), ((3, 2, 4), (2, 3, 3))])
def test_inputs_are_peaked_like_those_of_a_trained_model(lengths):
    """About half of the labels are nearly certain, logits have the standard deviation that is said, none is zero."""
    case = cases.HeadCase(512, 1024, 1000) if not lengths else cases.HeadCase.of_pairs(lengths, 64, 1000)
    inputs = case.inputs()
    assert inputs.num_labelled == case.tokens == int(inputs.labelled.sum())
    oracle = case.oracle(inputs, cases.sigmoid_loss)
    if not lengths:
        assert 0.4 < (oracle.token_logps > -0.01).double().mean() < 0.6
        logits = (inputs.hidden @ inputs.weight.T)[oracle.token_logps < -1]
        assert logits.std().item() == pytest.approx(cases.LOGIT_STD, rel=0.1)
    from_logits = cases.LogitsCase(512, 1000).inputs() if not lengths else None
    if from_logits is not None:
        logp = from_logits.logits.log_softmax(-1).gather(-1, from_logits.labels[..., None])
        assert 0.4 < (logp > -0.01).double().mean() < 0.6


def test_peers_from_logits_agree_on_padded_batches():
    case = cases.LogitsCase.of_pairs(((3, 2, 4), (2, 3, 3)), 64)
    inputs = case.inputs()
    oracle = case.oracle(inputs, cases.sigmoid_loss)
    ours = [contender for impl in ("torch", "auto") for contender in contenders.from_logits(impl, backward=True)]
    eager = [c for c in peers.logits_peers(torch.float32, backward=True).values() if not c.compiled]
    assert len(ours) == 4 and len(eager) == 3
    for contender in (*ours, *eager):
        inputs.prepare(contender.overwrites)
        found = cases.errors(contender.run(inputs), oracle)
        assert set(found) == {"logps", "token_logps", "dlogits"} and max(found.values()) < 1e-5, contender.name
        inputs.prepare(contender.overwrites)


def test_traffic_from_logits():
    """Rows with a label are read, once more for the backward, which writes all of the gradient."""
    case = cases.LogitsCase.of_pairs(((3, 2, 4),), 64, dtype=torch.bfloat16)
    assert case.traffic(backward=False) == 6 * 64 * 2
    assert case.traffic(backward=True) == (2 * 6 + 2 * 6) * 64 * 2  # 2 sequences of 6 positions


def test_compiled_contenders_warm_up_in_a_round_of_their_own():
    calls = []
    runs = [
        measure.Run(lambda: None, lambda: calls.append("eager")),
        measure.Run(lambda: None, lambda: calls.append("compiled"), warm_up=True),
    ]
    samples = measure.interleaved(runs, 2)
    assert calls[0] == "compiled" and sorted(calls[1:3]) == sorted(calls[3:]) == ["compiled", "eager"]
    assert [len(times) for times in samples] == [2, 2]


def table_of(**milliseconds):
    rows = [{"name": "limit", "package": "torch", "median_ms": 1.0, "errors": {}}]
    for name, value in milliseconds.items():
        package = "dpo_kernels" if name.startswith("ours") else "torch"
        row = {"name": name, "package": package, "errors": {"loss": 1e-9}}
        rows.append(row | ({"median_ms": value, "over_limit": value} if value else {"reason": "out of luck"}))
    return report.hold_against({"title": "a table", "rows": rows}, "ours")


def test_who_is_faster_is_said():
    table = table_of(ours=2.0, ours_opted=1.6, eager=1.5, other=8.0, missing=None)
    shown = report.text(table)
    assert "eager takes 0.75 of the time of ours" in shown and "missing: out of luck" in shown
    assert "of ours ours_opted is the fastest, 0.80" in shown and "other takes" not in shown
    assert [row.get("over_ours") for row in table["rows"]] == [None, 1.0, 0.8, 0.75, 4.0, None]
    assert "none of 1 others is faster than ours here" in report.text(table_of(ours=1.0, eager=1.0))
    for nobody in (table_of(ours=1.0), table_of(ours=1.0, eager=None), table_of(ours=None, eager=1.0)):
        assert "faster" not in report.text(nobody)
    lines = report.summary([table, table_of(ours=1.0, eager=3.0), table_of(ours=None, eager=1.0)]).splitlines()
    assert lines[2].split() == ["a", "table", "ours", "2.00", "2.00", "0.75", "eager", "0.75"]
    assert lines[3].split() == ["a", "table", "ours", "1.00", "1.00", "3.00", "eager", "3.00"]
    assert lines[4].split() == ["a", "table", "ours"]


def test_errors_of_tokens_are_of_labelled_ones():
    case = cases.HeadCase.of_pairs(((3, 2, 4), (2, 3, 3)), 8, 64)
    inputs = case.inputs()
    oracle = case.oracle(inputs, cases.sigmoid_loss)
    off = oracle.token_logps + 0.25 * inputs.labelled
    found = cases.errors(cases.Result(token_logps=off), oracle)
    assert found["token_logps"] == pytest.approx(0.25)
    assert cases.wrong({"loss": float("nan")}, case).startswith("wrong: error of loss nan")
    assert cases.wrong({"token_logps": 0.25}, cases.HeadCase(8192, 8, 64, dtype=torch.bfloat16))
    assert cases.wrong({"token_logps": 0.15, "logps": 5.0}, cases.HeadCase(8192, 8, 64, dtype=torch.bfloat16)) is None


def test_forward_only_leaves_nothing_that_wants_a_gradient():
    """Liger and CCE look at the tensors to see whether there is a backward to prepare."""
    seen = []
    inputs = cases.HeadCase(16, 8, 64).inputs()
    peers.forward_only(inputs, peer=lambda given: seen.append((given, torch.is_grad_enabled())))
    ((given, grad_enabled),) = seen
    assert not (grad_enabled or given.hidden.requires_grad or given.weight.requires_grad)
    assert given.labels is inputs.labels


def test_fused_forward_that_is_tiles_is_an_error():
    if reason := dispatch.unavailable_reason("triton", torch.device("cpu")):
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="went on in tiles"):
        contenders.path_a(cases.HeadCase(16, 16, 64).inputs(), impl="triton", fused=True)


@pytest.mark.parametrize("dtype, hidden", [(torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 24)])
def test_fused_forward_is_a_row_where_it_can_be_taken(dtype, hidden):
    if not dispatch.HAS_TRITON:
        pytest.skip("Triton is not installed")
    found = contenders.variants("A", "triton", cases.HeadCase(16, hidden, 64, dtype=dtype))
    assert [contender.name for contender in found] == ["A forward, triton", "A forward, triton, fused"][
        : 1 + (dtype == torch.bfloat16 and hidden == 16)
    ]


def test_limit_from_logits_writes_all_of_the_gradient():
    inputs = cases.LogitsCase.of_pairs(((3, 2, 4), (2, 3, 3)), 64).inputs()
    before = inputs.logits.detach().clone()
    inputs.prepare(contenders.READ_AND_SCALE.overwrites)
    contenders.READ_AND_SCALE.run(inputs)
    assert torch.equal(inputs.logits, before * inputs.labelled[..., None])
    inputs.prepare(contenders.READ_AND_SCALE.overwrites)
    assert torch.equal(inputs.logits, before)
