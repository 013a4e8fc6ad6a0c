"""What is tried on a device, what becomes of kernels that are wrong, slow, hang or crash, and what "auto" takes then.

No GPU is needed: the CPU's own kernels are what is tried, with faults put into them in the process that tries them
(harm.py), and a table of measurements that says nothing of the CPU, as it says nothing of GPUs."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_kernels import dispatch, env, linear_sequence_logps, measure, verdicts
from dpo_kernels.impl import native
from dpo_kernels.testing import head_inputs
from dpo_kernels.tuning import process, trial, worker
from dpo_kernels.tuning.trial import Kernels, Untuned, common, steps, tune, with_bar
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
    monkeypatch.setattr(worker, "CASES", harm.CASES)
    monkeypatch.setattr(trial, "TOKENS", {"cpu": (16, 64)})
    monkeypatch.setattr(trial, "ROUNDS", 1)
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
    assert verdict.verified == [("cpu", "float32")]
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
    assert second["verify"] == [("cpu", "bfloat16")]
    assert [given[:3] for given in second["heads"]] == [["bfloat16", 32, 700]]
    third, _ = within(heads=(HEAD,), again=True)
    assert within.started[2]["verify"] == [("cpu", "float32")] and len(within.started) == 3
    assert third.times == [verdict.times[1], third.of(HEAD)]  # not what nobody asked for again
    capped = HEAD._replace(softcap=30.0)  # which is as fast
    within(heads=(capped,))
    assert len(within.started) == 3 and within(heads=(capped,), again=True)[0].of(HEAD).head == capped


def test_env_shows_verdict_times_and_refusals(within):
    assert "no verdict of this machine" in env.report()
    within("wrong in halves", heads=(HEAD, HEAD._replace(dtype="bfloat16")))
    report = env.report()
    assert str(HEAD) in report and "at 16 and 64 rows" in report
    assert "refused: cpu in bfloat16 wrong at path A" in report and "cpu in float32" not in report


REASONS = {
    "wrong": ("wrong", "rms error"),
    "other bits": ("wrong", "has other bits the second time"),
    "fails": ("failed", "RuntimeError: an illegal memory access was encountered"),
    "hangs": ("hung", "nothing came of it for 4 s"),
    "leaves": ("ended", "the process ended with exit status 3: no such function in this library"),
}


@pytest.mark.parametrize("fault", ["wrong", "other bits", "fails"])
def test_a_kernel_that_is_not_right_is_not_taken(within, fault):
    verdict, said = within(fault)
    is_not_taken(verdict, said, *REASONS[fault])
    again, _ = within(again=True)
    assert again.refused == [] if fault != "fails" else again.refused == verdict.refused


# That a signal ends a process is told as its own exit is: test_a_process_that_ends_is_not_done.
@pytest.mark.parametrize("fault", ["hangs", pytest.param("leaves", marks=pytest.mark.full)])
def test_a_kernel_that_takes_its_process_along_is_never_tried_again(monkeypatch, within, fault):
    """The process is ended, and another one measures the rest."""
    with monkeypatch.context() as patched:
        patched.setattr(trial, "watched", process.watched)
        verdict, said = harmed(monkeypatch, fault, patience=4.0)
    is_not_taken(verdict, said, *REASONS[fault])
    assert "it is not tried again" in said[0] and started() == 2
    again, _ = within(fault, again=True)  # which would take this process along
    assert again.refused == verdict.refused and len(within.started) == 1
    assert set(again.times[0].ms["A"]) == {"torch"}


def is_not_taken(verdict, said, kind, reason):
    assert {each.kind for each in verdict.refused} == {kind} and reason in verdict.refused[0].reason
    assert verdict.refused[0].family == "cpu" and "path A" in verdict.refused[0].at
    assert len({each.dtype for each in verdict.refused}) == len(verdict.refused)  # nothing more is tried of it
    assert verdict.verified == []
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
    assert all("cpu" not in ms for ms in verdict.times[0].ms.values()) and picked("B") == "torch"  # nor tried again


@pytest.mark.parametrize("where", ["inputs", "call"])
def test_a_path_without_room_is_left_to_pytorch(monkeypatch, within, where):
    """Nothing is held against the kernels, and it is tried again when that is asked for."""

    def no_room():
        raise torch.OutOfMemoryError("3 GiB asked for")

    def timed_call(path, given, softcap, of=worker.timed_call):
        if path == "C" and given.labels.numel() == 64:
            return no_room() if where == "inputs" else no_room
        return of(path, given, softcap)

    monkeypatch.setattr(worker, "timed_call", timed_call)
    verdict, said = within()
    assert verdict.refused == [] and "path C, float32, H=32, V=300, was not timed in full" in said[0]
    assert "3 GiB asked for" in verdict.times[0].untimed["C"] and picked("C") == "torch"
    assert not verdict.knows(HEAD) and verdict.knows(HEAD, whole=False)
    Kernels("auto", CPU, HEAD, bar=False)  # a trainer does not try again each time
    assert len(within.started) == 1
    within()
    assert len(within.started) == 2


def test_no_memory_to_verify_in(monkeypatch, within):
    """As little is held against them then."""

    def fold_(*arguments, **options):
        raise torch.OutOfMemoryError("3 GiB asked for")

    monkeypatch.setattr(native, "fold_", fold_)
    with pytest.raises(Untuned, match="3 GiB asked for"):
        within()
    verdict = verdicts.read(verdicts.key_of(CPU))
    assert verdict is None or not verdict.refused


def test_wrong_in_one_dtype_is_refused_in_that_one(within):
    half = Head("bfloat16", 32, 300)
    verdict, _ = within("wrong in halves", heads=(HEAD, half))
    assert {each.dtype for each in verdict.refused} == {"bfloat16"}
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
        ({"torch": [1.0, 4.0], "triton_fused": [0.1, 0.1]}, "triton_fused"),
        ({"torch": [1.0, 4.0], "cpu_fused": [0.1, 0.1]}, "torch"),  # what it goes back to is refused
        ({"cuda": [0.1, 0.1]}, "torch"),
        ({}, "torch"),
    ],
    ids=str,
)
def test_what_is_chosen_of_times(ms, chosen):
    times = Times(HEAD, (16, 64), {"A": ms})
    verified = [(family, "float32") for family in ("cuda", "triton", "triton_fused", "cpu", "cpu_fused")]
    verified += [("cuda_fused", "bfloat16")]
    refused = [Refusal("cpu", None, "hung", "path A", "it did"), Refusal("cuda", "bfloat16", "wrong", "path A", "so")]
    assert Verdict({}, verified, refused, [times]).choice(times, "A") == chosen


def test_heads_that_were_not_timed_take_the_nearest_one(monkeypatch):
    """The number of rows is not asked for. Too far, or another dtype: what there is without a verdict."""
    taken = {512: "cpu", 4096: "torch"}
    rows = tuple(dispatch.Row("cpu", torch.float32, 1000, h, (("A", family),)) for h, family in taken.items())
    monkeypatch.setattr(dispatch, "_known", {CPU: rows})
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "triton", "this test"),))

    def of(hidden, vocab=1000, dtype=torch.float32, path="A", impl="auto"):
        return dispatch.choose(impl, CPU, path, dtype, vocab, hidden)

    assert [of(h) for h in (512, 256, 1024, 4096, 2100, 8192)] == ["cpu"] * 3 + ["torch"] * 3
    assert of(512, vocab=500) == of(512, vocab=2000) == "cpu"
    far = [of(255), of(8193), of(512, vocab=2001), of(512, dtype=torch.bfloat16)]
    assert far == ["triton"] * 4 and of(512, path="B") == "triton_fused", "which is Triton's own choice there"
    assert of(None) == "cpu"  # path E has no hidden size
    assert of(512, impl="torch") == "torch"


def test_the_first_of_equally_near_heads_is_taken(monkeypatch):
    """So a pin goes before what was measured, and a later pin before an earlier one."""
    monkeypatch.setattr(dispatch, "_known", {CPU: (dispatch.Row("cpu", torch.float32, 300, 32, (("A", "cpu"),)),)})
    for family in ("triton", "torch"):
        row = dispatch.pin({"A": family}, "cpu", torch.float32, 300, 32)
        assert picked() == family
    dispatch.unpin(row)
    assert picked() == "triton"
    with dispatch.taking("cuda"):
        assert picked() == "cuda"
    assert picked() == "triton" and len(dispatch._pinned) == 1


def measured():
    """A verdict that the CPU's kernels are faster, which is kept."""
    ms = {path: {"torch": [2.0, 3.0], "cpu": [1.0, 1.0]} for path in "ABCDE"}
    verdict = Verdict(verdicts.key_of(CPU), [("cpu", "float32")], [], [Times(HEAD, (16, 64), ms)])
    verdicts.write(verdict)
    return verdict


def test_kernels_that_can_run_here_no_more_are_not_taken(monkeypatch):
    """Whatever was found when they could."""
    measured()
    assert picked() == "cpu"
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    dispatch.forget()
    assert picked() == "torch"


def test_compiled_code_takes_the_verdict(monkeypatch):
    """In one graph."""
    rows = (dispatch.Row("cpu", torch.float32, 123, 31, tuple((path, "cpu") for path in "ABCDE")),)
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


def test_the_key_of_a_gpu(monkeypatch):
    """Its driver is a part of it."""
    found = {}
    for driver in ("580.65", "580.66"):
        of = SimpleNamespace(name="a GPU", major=9, minor=0, multi_processor_count=132)
        with monkeypatch.context() as patched:
            patched.setattr(torch.accelerator, "is_available", lambda: True)
            patched.setattr(torch.accelerator, "device_count", lambda: 1)
            patched.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
            patched.setattr(torch.cuda, "get_device_properties", lambda device, of=of: of)
            patched.setattr(verdicts, "driver", lambda device, driver=driver: driver)
            found[driver] = verdicts.key_of(torch.device("cuda", 0))
            assert verdicts.key_of(torch.device("xpu")) is None and verdicts.key_of(torch.device("cuda", 1)) is None
    first, second = found.values()
    assert first["name"] == "a GPU" and first["capability"] == "9.0" and first["units"] == 132
    assert verdicts.difference(first, second) == "driver 580.66, now 580.65"
    assert verdicts.file_of(first) != verdicts.file_of(second)


@pytest.mark.parametrize("changed", ["native.py", "triton_linear.py", Path(native.__file__).parents[1].name])
def test_other_kernels_are_another_key(monkeypatch, changed):
    """Be it the Python around them."""
    before = verdicts._digest_of_kernels.__wrapped__()
    assert before == verdicts._digest_of_kernels.__wrapped__() == verdicts.key_of(CPU)["kernels"]

    def read_bytes(file, of=Path.read_bytes):
        is_it = file.name == changed or (file.suffix == ".so" and file.parent.name == changed)
        return of(file) + b" " * is_it

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert verdicts._digest_of_kernels.__wrapped__() != before


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
        lambda good: good.replace('"format": 1', '"format": 2'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_as_good_as_none(content):
    verdict = measured()
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


def test_two_at_once(monkeypatch, within):
    """The second one waits, says so, and takes what the first one found."""
    said, found, waits, of = [], [], threading.Event(), trial.watched

    def watched(*arguments):
        assert waits.wait(60)
        return of(*arguments)

    def say(line):
        said.append(line)
        waits.set()

    def one():
        found.append(tune(CPU, [HEAD], say=say))

    monkeypatch.setattr(trial, "watched", watched)

    both = [threading.Thread(target=one) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(within.started) == 1
    assert found[0] == found[1] and found[0].knows(HEAD)
    assert said == [f"another process tunes {verdicts.cpu_name()}: waiting for what it finds"]


def test_what_was_begun_is_gone_on_with(monkeypatch, within):
    """A run that was ended between two paths leaves what it had; the rest is measured the next time."""
    verdict, _ = within()
    del verdict.times[0].ms["D"], verdict.times[0].ms["E"]
    verdict.verified.clear()
    verdicts.write(verdict)
    assert not verdict.knows(HEAD)
    again, _ = within()
    assert again.knows(HEAD) and again.verified == [("cpu", "float32")]


def test_what_was_found_outlives_whoever_tunes(monkeypatch):
    """Each thing is in the file before the next one begins, and what a process was lost at above all. It is not tried
    by the next process either. Fused kernels are verified in halves alone."""
    tasks = []

    def watched(task, patience, command):
        tasks.append(task)
        if len(tasks) == 2:
            raise KeyboardInterrupt
        yield {"ready": str(verdicts.key_of(CPU))}
        yield {"verified": "cpu", "dtype": "bfloat16"}
        assert verdicts.read(verdicts.key_of(CPU)).verified == [("cpu", "bfloat16")]
        yield {"at": "cpu", "what": "path A"}
        raise process.Lost("ended", "the process ended with SIGSEGV")

    monkeypatch.setattr(dispatch, "families", lambda device: ["torch", "cpu", "cuda_fused"])
    monkeypatch.setattr(trial, "watched", watched)
    with pytest.raises(KeyboardInterrupt):
        tune(CPU, [HEAD, HEAD._replace(dtype="bfloat16")])
    (refusal,) = verdicts.read(verdicts.key_of(CPU)).refused
    assert refusal == Refusal("cpu", None, "ended", "path A", "the process ended with SIGSEGV")
    first, second = tasks
    fused = [("cuda_fused", "bfloat16")]
    assert first["verify"] == [("cpu", "bfloat16"), ("cpu", "float32"), *fused]
    assert second["verify"] == fused and [head[-1] for head in second["heads"]] == [["cuda_fused"]] * 2


def test_calls_take_what_was_found_from_then_on(monkeypatch):
    dispatch.say_no_more(CPU)
    assert picked() == "torch"
    told = [{"verified": "cpu", "dtype": "float32"}]
    told += [
        {"timed": HEAD, "path": path, "why": "", "ms": {"torch": [2.0, 2.0], "cpu": [1.0, 1.0]}} for path in "ABCDE"
    ]
    monkeypatch.setattr(trial, "watched", lambda *arguments: iter([*told, {"finished": HEAD}]))
    tune(CPU, [HEAD])
    assert picked() == "cpu"


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
        os.write(1, b"what a driver prints\n")
        error = torch.OutOfMemoryError if ready == "no memory" else torch.AcceleratorError
        raise error(reason.partition(": ")[2].removeprefix("OutOfMemoryError: "))

    def watched(*arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("{}\n"))
        monkeypatch.setattr(worker, "_end_with_input", lambda: None)
        read, write = os.pipe()
        with suppress(torch.AcceleratorError):
            worker.main(write, work)
        with os.fdopen(read) as lines:
            yield from map(json.loads, lines)

    monkeypatch.setattr(trial, "watched", watched)
    with pytest.raises(Untuned, match=reason):
        tune(CPU, [HEAD])
    verdict = verdicts.read(verdicts.key_of(CPU))
    assert verdict is None or not verdict.refused
    with warnings.catch_warnings(), caplog.at_level("INFO", "dpo_kernels"):
        warnings.simplefilter("error")  # the line is enough
        assert set(Kernels("auto", CPU, HEAD, bar=False).families.values()) == {"torch"}
    assert reason in caplog.text and "plain PyTorch computes" in caplog.text


def test_a_process_that_never_speaks(monkeypatch):
    monkeypatch.setattr(process, "STARTED", 0.5)
    mute = sys.executable, "-c", "import time; time.sleep(1000)"
    with pytest.raises(Untuned, match=r"was lost at the start: nothing came of it for 0.5 s"):
        tune(CPU, [HEAD], command=mute, patience=0.5)
    assert verdicts.read(verdicts.key_of(CPU)) is None


def test_nothing_but_messages_is_read(monkeypatch, capfd):
    """Whatever a compiler or a driver prints."""
    script = (
        "import json, os, sys; sys.stdin.readline(); print('noise'); print(3); print('[]'); "
        "print(json.dumps({'at': 'cpu', 'what': 'x'})); "
        "print(json.dumps({'done': True})); sys.stdout.flush(); os.write(2, b'noise')"
    )
    assert [*process.watched({}, 20.0, (sys.executable, "-c", script))] == [{"at": "cpu", "what": "x"}]
    assert capfd.readouterr() == ("", "")


def test_patience_begins_when_a_process_has_spoken(monkeypatch):
    """PyTorch takes its time to start. It is ended when there is no more patience."""
    monkeypatch.setattr(process, "STARTED", 20.0)
    script = (
        "import json, os, sys, time; sys.stdin.readline(); time.sleep(0.6); "
        "print(json.dumps({'at': os.getpid()}), flush=True); time.sleep(60)"
    )
    messages = process.watched({}, 0.4, (sys.executable, "-c", script))
    number = next(messages)["at"]
    with pytest.raises(process.Lost, match=r"nothing came of it for 0.4 s") as lost:
        next(messages)
    assert lost.value.kind == "hung"
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


@pytest.mark.parametrize(("number", "kind"), [(9, "killed"), (15, "killed"), (11, "ended"), (6, "ended")])
def test_a_process_that_ends_is_not_done(number, kind):
    """Whoever kills it from outside says nothing of a kernel."""
    script = f"import os; os.kill(os.getpid(), {number})"
    name = signal.Signals(number).name
    with pytest.raises(process.Lost, match=f"the process ended with {name}") as lost:
        list(process.watched({}, 20.0, (sys.executable, "-c", script)))
    assert lost.value.kind == kind


def test_what_is_killed_from_outside_is_held_against_nobody(monkeypatch):
    def watched(task, patience, command):
        yield {"at": "cpu", "what": "path A"}
        raise process.Lost("killed", "the process ended with SIGTERM")

    monkeypatch.setattr(trial, "watched", watched)
    with pytest.raises(Untuned, match="was lost at path A: the process ended with SIGTERM"):
        tune(CPU, [HEAD])
    assert verdicts.read(verdicts.key_of(CPU)) is None


def test_a_device_that_an_error_leaves_of_no_use(monkeypatch):
    """As after an illegal access on a GPU: that process can do nothing more, another one goes on."""
    tasks = []

    def watched(task, patience, command):
        tasks.append(task)
        yield {"at": "cpu", "what": "path A"}
        if len(tasks) == 1:
            yield {"failed": "cpu", "what": "path A", "reason": "an illegal memory access"}
            raise process.Lost("ended", "the process ended with exit status 1")
        for path in "ABCDE":
            yield {"timed": [*HEAD], "path": path, "ms": {"torch": [1.0, 1.0]}, "why": ""}
        yield {"finished": [*HEAD]}

    monkeypatch.setattr(trial, "watched", watched)
    verdict = tune(CPU, [HEAD])
    assert [each.kind for each in verdict.refused] == ["failed"] and len(tasks) == 2 and verdict.knows(HEAD)


def test_another_device_than_was_asked_for(monkeypatch):
    monkeypatch.setattr(trial, "watched", lambda *arguments: iter([{"ready": "a GPU of another kind"}]))
    with pytest.raises(Untuned, match="another process sees another device: a GPU of another kind"):
        tune(CPU, [HEAD])


def test_the_worker_imports_what_its_parent_does(monkeypatch, tmp_path):
    """Not what lies where it was started; and what is printed on the way is no message."""
    (tmp_path / "statistics.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.chdir(tmp_path)
    task = {"device": "cpu", "threads": 1, "precision": "highest", "verify": [], "heads": []}
    assert [list(message) for message in process.watched(task, 60.0)] == [["ready"]]


def test_a_worker_ends_with_its_parent(tmp_path):
    """However that ended."""
    child = (
        "import json, os, sys\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'at': os.getpid()}), flush=True)\n"
        "from dpo_kernels.tuning.worker import _end_with_input\n"
        "_end_with_input()\n"
    )
    parent = (
        "import sys, os\n"
        "from dpo_kernels.tuning import process\n"
        f"command = sys.executable, '-c', {child!r}\n"
        "print(next(process.watched({}, 60.0, command))['at'], flush=True)\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=120)
    for _ in range(100):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            return
        time.sleep(0.1)
    raise AssertionError("it goes on")


def test_nothing_to_choose_from(monkeypatch):
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    with pytest.raises(Untuned, match="nothing but plain PyTorch to choose from on cpu; cpu: .*; triton: .*; cuda: "):
        tune(CPU, [HEAD])
    with pytest.raises(Untuned, match="sees no device 'xpu'"):
        tune(torch.device("xpu"), [HEAD])


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_a_folder_that_cannot_be_written(within, cache, caplog):
    cache.write_text("a file")
    assert set(Kernels("auto", CPU, HEAD, bar=False).families.values()) == {"torch"}
    assert "could not be tried" in caplog.text and str(cache) in caplog.text


# What trainers do


def test_trainers_tune_first_where_nothing_speaks(monkeypatch, within, caplog):
    """The first process of each machine, be it of many."""
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with caplog.at_level("INFO", "dpo_kernels"):
        for _ in range(2):
            found = Kernels("auto", CPU, HEAD, bar=False).families
            assert found == {path: picked(path) for path in "ABCDE"}
    assert caplog.text.count("trying the kernels for this head (float32, H=32, V=300)") == 1
    assert len(within.started) == 1


@pytest.mark.parametrize("why", ["wanted", "environment", "explicit", "table", "rank"])
def test_when_trainers_do_not(monkeypatch, cache, why):
    tried = []
    monkeypatch.setattr(trial, "with_bar", lambda *arguments, **options: tried.append(arguments))
    if why == "environment":
        monkeypatch.setenv("DPO_KERNELS_TUNE", "0")
    if why == "table":
        monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "cpu", "this test"),))
    if why == "rank":
        monkeypatch.setenv("LOCAL_RANK", "1")
    dispatch.say_no_more(CPU)
    found = Kernels("cpu" if why == "explicit" else "auto", CPU, HEAD, wanted=why != "wanted").families
    assert tried == []
    assert set(found.values()) == ({"cpu"} if why in ("explicit", "table") else {"torch"}) and not cache.exists()


def test_what_all_verdicts_allow():
    a = {"A": "cuda_fused", "B": "cuda", "E": "cuda"}
    b = {"A": "cuda", "B": "cuda", "E": "torch"}
    assert common([a, b]) == {"A": "torch", "B": "cuda", "E": "torch"} and common([a, a]) == a


RANKS = """
import os, sys
import torch
from dpo_kernels import dispatch, verdicts
from dpo_kernels.tuning.trial import Kernels
from dpo_kernels.verdicts import Head, Times, Verdict
rank = int(os.environ["RANK"])
os.environ["DPO_KERNELS_CACHE"] = sys.argv[1] + str(rank)
dispatch.CHOICES = ()
dispatch.families = lambda device: ["torch", "cpu"]
torch.distributed.init_process_group("gloo")
cpu, head = torch.device("cpu"), Head("float32", 32, 300)
ms = {path: {"torch": [2.0], "cpu": [1.0 if path == "A" or rank == 0 else 3.0]} for path in "ABCDE"}
verdicts.write(Verdict(verdicts.key_of(cpu), [("cpu", "float32")], [], [Times(head, (16,), ms)]))

def now():
    return dispatch.choices("auto", cpu, torch.float32, 300, 32)

own = now()
assert own["B"] == ("cpu" if rank == 0 else "torch"), own
kernels = Kernels("auto", cpu, head)
found = kernels.families
assert found == {"A": "cpu", "B": "torch", "C": "torch", "D": "torch", "E": "torch"}, found
assert now() == found
kernels.release()
assert now() == own
if rank == 1:
    dispatch.families = lambda device: ["torch"]
    dispatch.forget()
all_of_ours = {path: "cpu" for path in "ABCDE"}
kept = Kernels("auto", cpu, head, recorded=all_of_ours)
assert set(kept.families.values()) == {"torch"} and "cpu cannot run here" in kept.reason, (kept.families, kept.reason)
"""


def test_ranks_with_different_verdicts(tmp_path):
    """All take what all allow; and keep what all can."""
    import two_processes

    (tmp_path / "script.py").write_text(RANKS)
    two_processes.run_in_two(tmp_path / "script.py", tmp_path / "cache")


NOW = {path: "torch" for path in "ABCDE"}
BEGUN = NOW | {"A": "cpu"}


def now(device=CPU):
    return dispatch.choices("auto", device, torch.float32, 300, 32)


def test_a_run_that_goes_on_keeps_its_kernels():
    """Until it ends, and no other run."""
    dispatch.say_no_more(CPU)
    kernels = Kernels("auto", CPU, HEAD, recorded=BEGUN)
    assert kernels.families == BEGUN == now() and kernels.reason == ""
    kernels.release()
    assert now() == NOW and dispatch._pinned == []
    kernels = Kernels("auto", CPU, HEAD, recorded=NOW | {"A": "cuda_fused"})
    assert kernels.families == NOW
    assert "computed by A cuda_fused, B torch" in kernels.reason and "cuda_fused cannot run here" in kernels.reason
    assert Kernels("torch", CPU, HEAD, recorded=BEGUN).families == NOW  # what was told goes before what was recorded


def test_what_hung_here_is_not_kept_either():
    verdicts.write(Verdict(verdicts.key_of(CPU), refused=[Refusal("cpu", None, "hung", "path A", "it did")]))
    kernels = Kernels("auto", CPU, HEAD, recorded=BEGUN)
    assert kernels.families == NOW and "since here cpu hung at path A: it did" in kernels.reason


def test_a_pin_is_for_one_type_of_device(monkeypatch):
    """A run on a GPU says nothing of a CPU in the same process."""
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice("cpu", "cpu", "this test"),))
    row = dispatch.pin(BEGUN | {"A": "cuda"}, "cuda", torch.float32, 300, 32)
    assert picked("A") == "cpu"
    dispatch.unpin(row)


def test_compiled_code_notices_a_pin(monkeypatch):
    from dpo_kernels.impl import torch as plain

    taken = []
    for module, name in ((native, "cpu"), (plain, "torch")):
        fold_ = module.fold_
        monkeypatch.setattr(module, "fold_", lambda *a, of=fold_, name=name, **k: taken.append(name) or of(*a, **k))
    compiled = torch.compile(linear_sequence_logps, fullgraph=True, backend="eager")
    inputs = head_inputs()
    dispatch.say_no_more(CPU)
    with torch.no_grad():
        compiled(*inputs[:3])
        with dispatch.taking("cpu"):
            compiled(*inputs[:3])
        compiled(*inputs[:3])
    assert list(dict.fromkeys(taken)) == ["torch", "cpu"] and taken[-1] == "torch"


def test_progress_is_counted(within, capsys):
    heard = []
    within(step=heard.append)
    assert len(heard) == steps(CPU, [HEAD]) and heard[0].startswith("cpu: path A, float32, N=1, H=40, V=123, bias")
    assert sum("N=64" in what for what in heard) == 5
    verdicts.forget(verdicts.key_of(CPU))
    with_bar(CPU, [HEAD], True)
    assert "step" in capsys.readouterr().err
    verdict = with_bar(CPU, [HEAD], False, again=True, tokens=(8,))
    assert verdict.times[0].tokens == (8,) and len(within.started) == 3


@pytest.mark.parametrize("home", ["nowhere", "an Apple GPU"])
def test_where_there_is_no_place_or_no_name_for_a_verdict(monkeypatch, home):
    """Calls go on without."""
    if home == "nowhere":
        monkeypatch.delenv("DPO_KERNELS_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def nobody():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", nobody)
        with pytest.raises(OSError, match="Could not determine home directory. DPO_KERNELS_CACHE names a folder"):
            tune(CPU, [HEAD])
    else:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        assert verdicts.key_of(torch.device("mps")) is None
        assert dispatch.choose("auto", torch.device("mps"), "A", torch.float32, 300, 32) == "torch"
    dispatch.say_no_more(CPU)
    linear_sequence_logps(*head_inputs()[:3])
    assert "auto picks" in env.report()


def test_a_system_without_locks(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert set(Kernels("auto", CPU, HEAD, bar=False).families.values()) == {"torch"}
    assert "could not be tried" in caplog.text and "no locks" in caplog.text
