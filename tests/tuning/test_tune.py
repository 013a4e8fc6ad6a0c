"""What is tried on a device, what becomes of kernels that are wrong, slow, hang or crash, and what "auto" takes then.

No GPU is needed: the CPU's own kernels are what is tried, with faults put into them in the process that tries them
(harm.py), and a table of measurements that says nothing of the CPU, as it says nothing of GPUs."""

import io
import json
import os
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from dpo_kernels import dispatch, env, linear_sequence_logps, measure, verdicts
from dpo_kernels.impl import native
from dpo_kernels.testing import head_inputs
from dpo_kernels.tuning import process, trial, worker
from dpo_kernels.tuning.trial import Untuned, common, keep, steps, tune, tune_first, with_bar
from dpo_kernels.verdicts import Head, Refusal, Times, Verdict

harm = pytest.importorskip("harm")
CPU = torch.device("cpu")
HEAD = Head("float32", 32, 300)
HARMED = (sys.executable, harm.__file__)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A folder of its own, and the CPU's kernels as the only ones that are not plain PyTorch's. It is the CPU that
    stands for a device of which no measurement comes with the package."""
    monkeypatch.setenv("DPO_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setattr(dispatch, "CHOICES", ())
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch", "cpu"])
    monkeypatch.setattr(dispatch, "_told", set())
    monkeypatch.setattr(dispatch, "_pinned", [])
    for module in (worker, trial):
        monkeypatch.setattr(module, "CASES", harm.CASES)
    monkeypatch.setattr(trial, "TOKENS", {"cpu": (16, 64)})
    monkeypatch.setattr(trial, "ROUNDS", 1)
    monkeypatch.setattr(measure, "FLUSH_BYTES", 2**20)
    monkeypatch.setattr(measure.gc, "collect", lambda *of: 0)
    if dispatch.CPU_PROBLEM:
        pytest.skip(dispatch.CPU_PROBLEM)
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


def harmed(monkeypatch, kind, *, heads=(HEAD,), **options):
    """The verdict, and the lines that were said, of a worker with a fault, in a process of its own."""
    monkeypatch.setenv("HARM", kind)
    said = []
    return tune(CPU, list(heads), command=HARMED, say=said.append, **options), said


@pytest.fixture
def within(monkeypatch):
    """A function that does the same in this process, which a fault must not end; and how often a worker was started."""
    started = []

    def watched(task, patience, command):
        started.append(task)
        told = []
        try:
            worker.work(task, lambda **message: told.append(message))
        except torch.OutOfMemoryError as error:
            told.append({"unusable": str(error)})
        return iter(told)

    def tried(kind="none", *, heads=(HEAD,), **options):
        said = []
        with monkeypatch.context() as patched:
            for name, function in harm.faults(kind).items():
                patched.setattr(native, name, function)
            return tune(CPU, list(heads), say=said.append, **options), said

    monkeypatch.setattr(trial, "watched", watched)
    tried.started = started
    return tried


def picked(path="A", head=HEAD, impl="auto"):
    return dispatch.choose(impl, CPU, path, getattr(torch, head.dtype), head.vocab, head.hidden)


def started():
    """How often a process was."""
    mark = Path(os.environ["MARK"])
    return mark.read_text().count("started") if mark.exists() else 0


def test_sound_kernels_are_verified_timed_and_kept(monkeypatch):
    verdict, said = harmed(monkeypatch, "none")
    assert said == [] and verdict.refused == []
    assert sorted(verdict.verified) == [("cpu", dtype) for dtype in ("bfloat16", "float16", "float32")]
    (times,) = verdict.times
    assert times.head == HEAD and times.tokens == (16, 64) and set(times.ms) == set("ABCDE")
    for ms in times.ms.values():
        assert set(ms) == {"torch", "cpu"} and all(min(found) > 0 and len(found) == 2 for found in ms.values())
    for path in "ABCDE":
        assert picked(path) == verdict.choice(times, path)
    assert verdicts.read(verdict.key) == verdict
    # known by now: nothing is started again
    assert harmed(monkeypatch, "aborts")[0] == verdict and started() == 1


def test_what_is_known_is_not_measured_again(within):
    first, _ = within()
    half = Head("bfloat16", 32, 700)
    verdict, _ = within(heads=(HEAD, half))
    assert [times.head for times in verdict.times] == [HEAD, half] and verdict.times[0] == first.times[0]
    (_, second) = within.started
    assert second["verify"] == [] and [given[:3] for given in second["heads"]] == [["bfloat16", 32, 700]]
    within(heads=(HEAD,), again=True)
    assert len(within.started[2]["verify"]) == 3 and len(within.started) == 3


def test_env_shows_verdict_times_and_refusals(within):
    assert "no verdict of this machine" in env.report()
    within("wrong in halves")
    report = env.report()
    assert str(HEAD) in report and "at 16 and 64 rows" in report
    assert "refused: cpu in bfloat16 wrong at path A" in report and "cpu in float32" not in report


REASONS = {
    "wrong": ("wrong", "rms error"),
    "other bits": ("wrong", "has other bits the second time"),
    "fails": ("failed", "RuntimeError: an illegal memory access was encountered"),
    "hangs": ("hung", "nothing came of it for 4 s"),
    "aborts": ("ended", "the process ended with SIGABRT"),
    "leaves": ("ended", "the process ended with exit status 3: no such function in this library"),
}


@pytest.mark.parametrize("fault", ["wrong", "other bits", "fails"])
def test_a_kernel_that_is_not_right_is_not_taken(within, fault):
    verdict, said = within(fault)
    is_not_taken(verdict, said, *REASONS[fault])
    again, _ = within(again=True)
    assert again.refused == [] if fault != "fails" else again.refused == verdict.refused


@pytest.mark.parametrize("fault", ["hangs", "aborts", pytest.param("leaves", marks=pytest.mark.full)])
def test_a_kernel_that_takes_its_process_along_is_never_tried_again(monkeypatch, fault):
    """The process is ended, and another one measures the rest."""
    verdict, said = harmed(monkeypatch, fault, patience=4.0)
    is_not_taken(verdict, said, *REASONS[fault])
    assert "it is not tried again" in said[0] and started() == 2
    again, _ = harmed(monkeypatch, fault, again=True)
    assert again.refused == verdict.refused and started() == 3
    assert set(again.times[0].ms["A"]) == {"torch"}


def is_not_taken(verdict, said, kind, reason):
    assert {each.kind for each in verdict.refused} == {kind} and reason in verdict.refused[0].reason
    assert verdict.refused[0].family == "cpu" and "path A" in verdict.refused[0].at
    assert kind in said[0] and reason in said[0]
    assert verdict.knows(HEAD) and set(verdict.times[0].ms["A"]) == {"torch"}
    assert [picked(path) for path in "ABCDE"] == ["torch"] * 5
    assert "refused: cpu" in env.report()


def test_a_failure_while_times_are_taken(monkeypatch, within):
    """Of a kernel that was right on small inputs."""
    of = worker.time_head

    def time_head(*arguments):
        with monkeypatch.context() as patched:
            for name, function in harm.faults("fails").items():
                patched.setattr(native, name, function)
            yield from of(*arguments)

    monkeypatch.setattr(worker, "time_head", time_head)
    verdict, said = within()
    assert ("cpu", "float32") in verdict.verified and verdict.refused[0].kind == "failed"
    assert "path A, float32, H=32, V=300, N=16" in said[0]
    assert "cpu" in verdict.times[0].ms["B"] and picked("B") == "torch"  # no path of it, then


def test_wrong_in_one_dtype_is_refused_in_that_one(within):
    half = Head("bfloat16", 32, 300)
    verdict, _ = within("wrong in halves", heads=(HEAD, half))
    assert {each.dtype for each in verdict.refused} == {"bfloat16", "float16"}
    assert "cpu" in verdict.times[0].ms["A"] and "cpu" not in verdict.times[1].ms["A"]
    assert picked(head=half) == "torch"


def test_a_slower_kernel_is_not_taken(within):
    verdict, said = within("slow")
    assert verdict.refused == [] and said == []
    assert verdict.times[0].ms["A"]["cpu"][0] > 50
    assert picked("A") == "torch"


@pytest.mark.parametrize(
    ("ms", "chosen"),
    [
        ({"torch": [1.0, 4.0], "cuda": [0.9, 3.0]}, "cuda"),
        ({"torch": [1.0, 4.0], "cuda": [0.98, 3.0]}, "torch"),  # less than 3 % for the few
        ({"torch": [1.0, 4.0], "cuda": [0.5, 3.95]}, "torch"),  # for the many
        ({"torch": [1.0, 4.0], "cuda": [0.9, 3.0], "triton": [0.8, 2.9]}, "triton"),
        ({"torch": [1.0, 4.0], "cuda": [0.9, 3.0], "triton": [0.1, 4.0]}, "cuda"),
        ({"torch": [1.0, 4.0], "cuda_fused": [0.1, 0.1]}, "torch"),  # not verified
        ({"torch": [1.0, 4.0], "cpu": [0.1, 0.1]}, "torch"),  # refused
        ({"torch": [1.0, 4.0], "cuda": [0.1]}, "torch"),  # not for the many
        ({"cuda": [0.1, 0.1]}, "torch"),
        ({}, "torch"),
    ],
    ids=str,
)
def test_what_is_chosen_of_times(ms, chosen):
    times = Times(HEAD, (16, 64), {"A": ms})
    verified = [(family, "float32") for family in ("cuda", "triton", "cpu")] + [("cuda_fused", "bfloat16")]
    refused = [Refusal("cpu", None, "hung", "path A", "it did"), Refusal("cuda", "bfloat16", "wrong", "path A", "so")]
    assert Verdict({}, verified, refused, [times]).choice(times, "A") == chosen


def test_heads_that_were_not_timed_take_the_nearest_one(monkeypatch):
    """The number of rows is not asked for. Too far, or another dtype: what there is without a verdict."""
    taken = {512: "cpu", 4096: "torch"}
    rows = tuple(dispatch.Row(torch.float32, 1000, h, (("A", family),)) for h, family in taken.items())
    monkeypatch.setattr(dispatch, "_known", {CPU: rows})
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "triton", "this test"),))

    def of(hidden, vocab=1000, dtype=torch.float32, path="A", impl="auto"):
        return dispatch.choose(impl, CPU, path, dtype, vocab, hidden)

    assert [of(h) for h in (512, 256, 1024, 4096, 2100, 8192)] == ["cpu"] * 3 + ["torch"] * 3
    assert of(512, vocab=500) == of(512, vocab=2000) == "cpu"
    far = [of(255), of(8193), of(512, vocab=2001), of(512, dtype=torch.bfloat16), of(512, path="B")]
    assert far == ["triton"] * 5
    assert of(None) == "cpu"  # path E has no hidden size
    assert of(512, impl="torch") == "torch"


def test_compiled_code_takes_the_verdict(monkeypatch):
    """In one graph."""
    rows = (dispatch.Row(torch.float32, 123, 31, tuple((path, "cpu") for path in "ABCDE")),)
    monkeypatch.setattr(dispatch, "_known", {CPU: rows})
    from dpo_kernels.impl import native

    taken = []
    monkeypatch.setattr(native, "fold_", lambda *a, of=native.fold_, **k: taken.append(1) or of(*a, **k))
    inputs = head_inputs()
    compiled = torch.compile(linear_sequence_logps, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        found, expected = compiled(*inputs[:3]), linear_sequence_logps(*inputs[:3], impl="torch")
    torch.testing.assert_close(found.logps, expected.logps)
    assert taken


def test_calls_never_tune_and_say_once_how_to(monkeypatch, cache):
    monkeypatch.setattr(process, "watched", None)
    inputs = head_inputs()
    with pytest.warns(UserWarning, match=r"computes with plain PyTorch on .*`dpo-kernels tune`") as heard:
        for _ in range(3):
            linear_sequence_logps(*inputs[:3])
            dispatch.forget()
    assert len(heard) == 1 and not cache.exists()


@pytest.mark.parametrize("speaks", ["DPO_KERNELS_TUNE=0", "nothing to choose from", "the package's own table"])
def test_nothing_is_said_where_nothing_is_to_be_done(monkeypatch, speaks):
    if speaks == "DPO_KERNELS_TUNE=0":
        monkeypatch.setenv("DPO_KERNELS_TUNE", "0")
    elif speaks == "nothing to choose from":
        monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    else:
        monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "cpu", "this test"),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_sequence_logps(*head_inputs()[:3])


# The file


def test_another_driver_has_no_verdict(monkeypatch, within):
    """Nor another version of anything. It is said what the difference is."""
    verdict, _ = within()
    key_of = verdicts.key_of
    monkeypatch.setattr(verdicts, "key_of", lambda device: key_of(device) | {"driver": "580.65", "torch": "3.0"})
    dispatch.forget()
    dispatch._told.clear()
    with pytest.warns(UserWarning, match=r"tuned with driver None, now 580.65, torch .*, now 3.0"):
        assert picked() == "torch"
    assert "there is one of driver None, now 580.65" in env.report()
    assert verdicts.read(verdict.key) == verdict


@pytest.mark.parametrize("part", ["name", "capability", "units", "driver", "torch", "triton", "dpo_kernels", "kernels"])
def test_the_key_is_all_that_a_verdict_rests_on(part):
    key = verdicts.key_of(CPU)
    assert part in key and verdicts.file_of(key) != verdicts.file_of(key | {part: "other"})


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", '{"format": 1}', "\x00\xff", '{"format": 2}',
        lambda good: good[: len(good) // 2],
        lambda good: good.replace('"hidden": 32', '"hidden": "32"'),
        lambda good: good.replace('"hidden": 32', '"hidden": -1'),
        lambda good: good.replace('"dtype": "float32"', '"dtype": "relu"'),
        lambda good: good.replace('"untimed": {}', '"untimed": 3'),
        lambda good: good.replace('"driver": null', '"driver": "1"'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_as_good_as_none(content):
    ms = {path: {"torch": [2.0, 3.0], "cpu": [1.0, 1.0]} for path in "ABCDE"}
    verdict = Verdict(verdicts.key_of(CPU), [("cpu", "float32")], [], [Times(HEAD, (16, 64), ms)])
    verdicts.write(verdict)
    assert picked() == "cpu"
    file = verdicts.file_of(verdict.key)
    text = content if isinstance(content, str) else content(file.read_text())
    assert text != file.read_text()
    file.write_text(text, encoding="latin-1")
    dispatch.forget()
    with pytest.warns(UserWarning) as heard:
        assert picked() == "torch"
    assert str(file) in str(heard[0].message) and "left out of account" in str(heard[0].message)


def test_a_damaged_file_is_written_again(within):
    verdict, _ = within()
    verdicts.file_of(verdict.key).write_text("{")
    with pytest.warns(UserWarning, match="`dpo-kernels tune` writes it again"):
        within()
    assert verdicts.read(verdict.key).knows(HEAD) and len(within.started) == 2


def test_a_file_is_whole_or_not_there(monkeypatch, within):
    """Whatever ends the process while it writes."""
    verdict, _ = within()
    before = verdicts.file_of(verdict.key).read_text()

    def cut(self, text, **options):
        Path.open(self, "w").write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        verdicts.write(verdict)
    assert verdicts.file_of(verdict.key).read_text() == before
    monkeypatch.undo()


def test_two_at_once(monkeypatch, cache):
    """The second one waits, says so, and takes what the first one found."""
    monkeypatch.setenv("HARM", "none")
    said, found = [], []

    def one():
        found.append(tune(CPU, [HEAD], command=HARMED, say=said.append))

    both = [threading.Thread(target=one) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert started() == 1
    assert found[0] == found[1] and found[0].knows(HEAD)
    assert said == [f"another process tunes {verdicts.cpu_name()}: waiting for what it finds"]


def test_what_was_begun_is_gone_on_with(monkeypatch, within):
    """A run that was ended between two paths leaves what it had; the rest is measured the next time."""
    verdict, _ = within()
    del verdict.times[0].ms["D"], verdict.times[0].ms["E"]
    verdict.verified.remove(("cpu", "float16"))
    verdicts.write(verdict)
    assert not verdict.knows(HEAD)
    again, _ = within()
    assert again.knows(HEAD) and ("cpu", "float16") in again.verified


def test_forget(within):
    verdict, _ = within("fails")
    other = Verdict(verdict.key | {"torch": "1"})
    verdicts.write(other)
    elsewhere = Verdict(verdict.key | {"name": "another one"})
    verdicts.write(elsewhere)
    assert len(verdicts.forget(verdict.key)) == 2 and verdicts.read(verdict.key) is None
    assert verdicts.read(elsewhere.key) is not None
    assert verdicts.forget(verdict.key) == []


def test_where_files_lie(monkeypatch, tmp_path):
    monkeypatch.delenv("DPO_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert verdicts.folder() == tmp_path / "dpo_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert verdicts.folder() == Path.home() / ".cache" / "dpo_kernels"


# Where it cannot be done


@pytest.mark.parametrize(
    ("ready", "reason"),
    [
        ("no memory", "no memory is left for a second process: OutOfMemoryError: 3 GiB asked for"),
        ("no second process", "AcceleratorError: all devices are busy or unavailable"),
    ],
)
def test_a_device_that_cannot_be_tried_keeps_pytorch(monkeypatch, caplog, capfd, ready, reason):
    """Nothing is held against the kernels then, and training goes on."""

    def work(task, tell):
        error = torch.OutOfMemoryError if ready == "no memory" else torch.AcceleratorError
        raise error(reason.partition(": ")[2].removeprefix("OutOfMemoryError: "))

    def watched(*arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("{}"))
        read, write = os.pipe()
        kept = os.dup(1)
        os.dup2(write, 1)
        try:
            with suppress(torch.AcceleratorError):
                worker.main(work)
        finally:
            os.dup2(kept, 1)
            os.close(write)
        with os.fdopen(read) as lines:
            yield from map(json.loads, lines)

    monkeypatch.setattr(trial, "watched", watched)
    with pytest.raises(Untuned, match=reason):
        tune(CPU, [HEAD])
    verdict = verdicts.read(verdicts.key_of(CPU))
    assert verdict is None or not verdict.refused
    with warnings.catch_warnings(), caplog.at_level("INFO", "dpo_kernels"):
        warnings.simplefilter("error")  # the line is enough
        assert set(tune_first("auto", CPU, HEAD, bar=False).values()) == {"torch"}
    assert reason in caplog.text and "plain PyTorch computes" in caplog.text


def test_a_process_that_never_speaks(monkeypatch):
    monkeypatch.setattr(process, "STARTED", 2.0)
    with pytest.raises(Untuned, match=r"was lost at the start: nothing came of it for 2 s"):
        harmed(monkeypatch, "mute", patience=2.0)
    assert verdicts.read(verdicts.key_of(CPU)) is None


def test_nothing_but_messages_is_read(monkeypatch, capfd):
    """Whatever a compiler or a driver prints."""
    script = (
        "import json, os, sys; json.load(sys.stdin); print(json.dumps({'at': 'cpu', 'what': 'x'})); "
        "print(json.dumps({'done': True})); sys.stdout.flush(); os.write(2, b'noise')"
    )
    assert [*process.watched({}, 20.0, (sys.executable, "-c", script))] == [{"at": "cpu", "what": "x"}]
    assert capfd.readouterr() == ("", "")


def test_nothing_to_choose_from(monkeypatch):
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    with pytest.raises(Untuned, match="nothing but plain PyTorch to choose from on cpu; cpu: .*; triton: .*; cuda: "):
        tune(CPU, [HEAD])
    with pytest.raises(Untuned, match="sees no device 'xpu'"):
        tune(torch.device("xpu"), [HEAD])


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_folder_that_cannot_be_written(within, cache, caplog):
    cache.write_text("a file")
    assert set(tune_first("auto", CPU, HEAD, bar=False).values()) == {"torch"}
    assert "could not be tried" in caplog.text and str(cache) in caplog.text


# What trainers do


def test_trainers_tune_first_where_nothing_speaks(within, caplog):
    with caplog.at_level("INFO", "dpo_kernels"):
        for _ in range(2):
            found = tune_first("auto", CPU, HEAD, bar=False)
            assert found == {path: picked(path) for path in "ABCDE"}
    assert caplog.text.count("trying the kernels for this head (float32, H=32, V=300)") == 1
    assert len(within.started) == 1


@pytest.mark.parametrize("why", ["wanted", "environment", "explicit", "table", "rank"])
def test_when_trainers_do_not(monkeypatch, cache, why):
    monkeypatch.setattr(trial, "with_bar", None)
    if why == "environment":
        monkeypatch.setenv("DPO_KERNELS_TUNE", "0")
    if why == "table":
        monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "cpu", "this test"),))
    if why == "rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    dispatch.say_no_more(CPU)
    found = tune_first("cpu" if why == "explicit" else "auto", CPU, HEAD, wanted=why != "wanted")
    assert set(found.values()) == ({"cpu"} if why in ("explicit", "table") else {"torch"}) and not cache.exists()


def test_what_all_verdicts_allow():
    a = {"A": "cuda_fused", "B": "cuda", "E": "cuda"}
    b = {"A": "cuda", "B": "cuda", "E": "torch"}
    assert common([a, b]) == {"A": "torch", "B": "cuda", "E": "torch"} and common([a, a]) == a


RANKS = """
import os, sys
import torch
from dpo_kernels import dispatch, verdicts
from dpo_kernels.tuning.trial import keep, tune_first
from dpo_kernels.verdicts import Head, Times, Verdict
rank = int(os.environ["RANK"])
os.environ["DPO_KERNELS_CACHE"] = sys.argv[1] + str(rank)
dispatch.CHOICES = ()
dispatch.families = lambda device: ["torch", "cpu"]
torch.distributed.init_process_group("gloo")
cpu, head = torch.device("cpu"), Head("float32", 32, 300)
ms = {path: {"torch": [2.0], "cpu": [1.0 if path == "A" or rank == 0 else 3.0]} for path in "ABCDE"}
verdicts.write(Verdict(verdicts.key_of(cpu), [("cpu", "float32")], [], [Times(head, (16,), ms)]))
own = dispatch.choices("auto", cpu, torch.float32, 300, 32)
assert own["B"] == ("cpu" if rank == 0 else "torch"), own
found = tune_first("auto", cpu, head)
assert found == {"A": "cpu", "B": "torch", "C": "torch", "D": "torch", "E": "torch"}, found
assert dispatch.choices("auto", cpu, torch.float32, 300, 32) == found
if rank == 1:
    dispatch.families = lambda device: ["torch"]
kept, reason = keep({path: "cpu" for path in "ABCDE"}, "auto", cpu, head)
assert kept == found and "cannot run here" in reason, (kept, reason)
"""


def test_ranks_with_different_verdicts(tmp_path):
    """All take what all allow; and keep what all can."""
    import two_processes

    (tmp_path / "script.py").write_text(RANKS)
    two_processes.run_in_two(tmp_path / "script.py", tmp_path / "cache")


def test_a_run_that_goes_on_keeps_its_kernels(monkeypatch):
    now = {path: "torch" for path in "ABCDE"}
    begun = now | {"A": "cpu"}
    assert dispatch.choices("auto", CPU, torch.float32, 300, 32) == now
    assert keep(begun, "auto", CPU, HEAD) == (begun, "")
    assert dispatch.choices("auto", CPU, torch.float32, 300, 32) == begun
    kept, reason = keep(now | {"A": "cuda_fused"}, "auto", CPU, HEAD)
    assert kept == begun and "computed by A cuda_fused, B torch" in reason and "cannot run here" in reason
    assert keep(begun, "torch", CPU, HEAD) == (now, "")  # what was told goes before what was recorded


def test_progress_is_counted(within, capsys):
    heard = []
    within(step=heard.append)
    assert len(heard) == steps(CPU, [HEAD]) and heard[0].startswith("cpu: path A, bfloat16, N=1, H=40, V=123, bias")
    assert sum("N=64" in what for what in heard) == 5
    verdicts.forget(verdicts.key_of(CPU))
    with_bar(CPU, [HEAD], True)
    assert "step" in capsys.readouterr().err
