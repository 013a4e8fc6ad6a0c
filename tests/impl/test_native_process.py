"""The C++ kernels as part of a process: how they are chosen, what happens without them, and whose threads they use."""

import re
import shutil
import sys
import sysconfig
import threading
import time
from pathlib import Path

import forks
import pytest
import torch
from places import python_path

from dpo_kernels import dispatch, linear_sequence_logps, sequence_logps

_native = pytest.importorskip("dpo_kernels._native", reason="the extension was not built")
native = pytest.importorskip("dpo_kernels.impl.native")


@pytest.fixture(scope="module")
def python():
    """A function that runs a script, which finds what the package imports of PyTorch loaded; what it prints."""
    found = forks.Forks("torch._dynamo", PYTHONPATH=python_path())

    def run(script, *arguments):
        done = found.run(script, *arguments)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    yield run
    found.close()


def test_auto_picks_cpu(monkeypatch):
    assert dispatch.default(torch.device("cpu")) == "cpu"
    logits, labels = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.int64)
    calls, fold = [], _native.logits_fold
    monkeypatch.setattr(_native, "logits_fold", lambda *args: (calls.append(args), fold(*args)))
    assert torch.equal(sequence_logps(logits, labels).logps, sequence_logps(logits, labels, impl="cpu").logps)
    assert len(calls) == 2
    sequence_logps(logits, labels, impl="torch")
    assert len(calls) == 2


def test_cpu_on_another_device_is_an_error():
    message = "impl: 'cpu' cannot run on device 'meta': it computes on the CPU, not on 'meta'"
    with pytest.raises(ValueError, match=re.escape(message)):
        dispatch.check_runs("cpu", torch.device("meta"))
    with pytest.raises(ValueError, match=re.escape(message)):
        sequence_logps(
            torch.randn(2, 3, 5, device="meta"), torch.ones(2, 3, dtype=torch.int64, device="meta"), impl="cpu"
        )


WITHOUT_EXTENSION = """
import sys
# an editable install's finder would find the extension of the tree it points to
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
import torch
from dpo_kernels import dispatch, env, sequence_logps
assert dispatch.__file__.startswith(sys.argv[2])
cpu = torch.device("cpu")
assert dispatch.default(cpu) == "torch"
reason = dispatch.unavailable_reason("cpu", cpu)
assert "DPO_KERNELS_BUILD=cpu" in reason and sys.argv[1] in reason, reason
assert reason in env.report(), env.report()
logits, labels = torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.int64)
expected = logits.log_softmax(-1)[..., 1].sum(1)
torch.testing.assert_close(sequence_logps(logits, labels).logps, expected)
try:
    sequence_logps(logits, labels, impl="cpu")
except ValueError as error:
    assert reason in str(error), error
    print("named the reason")
"""


@pytest.mark.parametrize(("broken", "says"), [(False, "compiler"), (True, "does not load")])
def test_without_the_extension(tmp_path, broken, says, python):
    """None there, or one that does not load: "auto" goes on without it and the reason can be read."""
    leave_out = shutil.ignore_patterns("_native.*.so", "_native.so")
    shutil.copytree(Path(dispatch.__file__).parent, tmp_path / "dpo_kernels", ignore=leave_out)
    if broken:
        (tmp_path / "dpo_kernels" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no library")
    (tmp_path / "script.py").write_text(WITHOUT_EXTENSION)
    assert "named the reason" in python(tmp_path / "script.py", says, tmp_path)


THREADS = """
import os, re, sys
import torch
from dpo_kernels.impl import native
from dpo_kernels.impl.interface import Columns, LogitTransform

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(int(sys.argv[1]))
a = torch.empty(64, 4096)  # not filled: nothing has run on several threads yet
fold = native.new_fold(torch.arange(64), torch.float32, ())
before = tasks()
native.fold_(fold, a, slice(0, 64), Columns(0, None), LogitTransform(), keep=False)
print(tasks() - before)
torch.randn(512, 512) @ torch.randn(512, 512)
runtimes = {line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib(gomp|omp|iomp5)\\b[^/]*$", line)}
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_are_those_of_pytorchs_openmp(tmp_path, threads, python):
    """As many as PyTorch was told, this one among them, from the only OpenMP runtime in the process."""
    if not native.HAS_THREADS:
        pytest.skip("this PyTorch has no OpenMP")
    (tmp_path / "script.py").write_text(THREADS)
    assert int(python(tmp_path / "script.py", threads)) == threads - 1


@pytest.mark.parametrize("kernel", ["logits_fold", "logits_bwd", "fold", "dlogits"])
def test_other_python_threads_run_meanwhile(monkeypatch, kernel):
    """A thread that ticks goes on ticking while this one is inside the kernel."""
    ticks, calls, stop = [], [], threading.Event()
    compiled = getattr(_native, kernel)

    def timed(*arguments):
        start = time.monotonic()
        compiled(*arguments)
        calls.append((start, time.monotonic()))

    def tick():
        while not stop.wait(0.001):
            ticks.append(time.monotonic())

    monkeypatch.setattr(_native, kernel, timed)
    # 8 million entries in fp64, one row of memory; 24 million products with a weight of one column
    logits = torch.randn(1, 1, 8192, dtype=torch.float64).expand(1, 1000, 8192)
    labels = torch.zeros(1, 1000, dtype=torch.int64)
    hidden, weight = torch.randn(1, 3000, 1, dtype=torch.float64), torch.randn(8192, 1, dtype=torch.float64)
    other = threading.Thread(target=tick)
    other.start()
    if kernel.startswith("logits"):
        sequence_logps(logits.requires_grad_(), labels, impl="cpu").logps.sum().backward()
    else:
        linear_sequence_logps(
            hidden, weight.requires_grad_(), labels[:, :1].expand(1, 3000), impl="cpu"
        ).logps.sum().backward()
    stop.set()
    other.join()
    # without the first and last millisecond, which other work may reach into
    inside = sum(start + 0.001 < t < end - 0.001 for t in ticks for start, end in calls)
    assert inside >= 1, f"{len(ticks)} ticks, none in {[round(end - start, 4) for start, end in calls]} s"


@pytest.mark.skipif(
    not Path("/proc/cpuinfo").exists() or "flags" not in Path("/proc/cpuinfo").read_text(),
    reason="reads the flags of an x86 processor",
)
def test_the_fastest_kernels_that_this_processor_has(python, tmp_path):
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    best = "baseline"
    if {"avx2", "fma", "f16c"} <= flags:
        best = "avx2"
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        best = "avx512"
    (tmp_path / "script.py").write_text("import torch, dpo_kernels._native as n; print(n.isa())")
    assert python(tmp_path / "script.py").strip() == best
