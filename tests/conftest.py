"""Settings for all tests: nothing is fetched from a hub, and a process has one thread.

DPO_KERNELS_TEST_DEVICE=cuda runs what uses the fixture `impl` on a GPU: tensors that name no device are made there.

There are two lengths of test run. `@pytest.mark.full` is on what only `--full` runs: the whole of a test, one of its
values (`pytest.param(..., marks=pytest.mark.full)`, or `grids.covering` for what a long run adds), or, with
`when=lambda impl, dtype: ...`, the cases of those parameters for which this is true. `--only-full` runs what `--full`
adds, and nothing else, but for `@pytest.mark.release`: what takes minutes for what seldom changes, and is run before a
release.
"""

import gc
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from places import DEVICE

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1" if DEVICE == "cpu" else "0")  # Triton's kernels on the CPU
os.environ.setdefault("DPO_KERNELS_CACHE", tempfile.mkdtemp())  # no verdict of this machine
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: more threads would only wait for one another

import emulation
import pytest
import torch

from dpo_kernels import dispatch, measure

if dispatch.HAS_TRITON and DEVICE == "cpu":
    import interpreter

    interpreter.correct()
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
measure.FLUSH_BYTES = 2**20  # nobody looks at the times


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the long grids too")
    parser.addoption("--only-full", action="store_true", help="run what --full adds, and nothing else")


def pytest_configure(config):
    config.addinivalue_line("markers", "full(when=None): run with --full alone; when(**parameters) says of which cases")
    config.addinivalue_line("markers", "release: run with --full alone, and not with --only-full")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Each process has tests that stand together, until it has none left and takes some of another's: so a module's
    fixtures are made in one or two of them."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(config, items):
    full, only = config.getoption("--full"), config.getoption("--only-full")
    if full and not only:
        return
    kept, left_out = [], []
    for item in items:
        of_release = item.get_closest_marker("release") is not None
        (kept if not of_release and is_long(item) == only else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def is_long(item):
    """Whether a mark says that only `--full` runs it."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}

    def applies(mark):
        when = mark.kwargs.get("when")
        return when is None or when(**{name: parameters[name] for name in inspect.signature(when).parameters})

    return any(applies(mark) for mark in item.iter_markers("full"))


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage():
    """What was imported so far is left out when garbage is collected, as trainers and `dpo_kernels.testing.allocated`
    do in every call: it would cost them more than all else they do."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def process_left_as_it_was():
    """For tests of TRL, whose arguments set a device and a precision for the whole process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=["torch", "cpu", "triton", "cuda"])
def impl(request, monkeypatch):
    """Runs a test once with each implementation as what "auto" picks; its module."""
    if request.param == "cuda" and DEVICE == "cpu":
        request.getfixturevalue("emulated_cuda")
    reason = dispatch.unavailable_reason(request.param, torch.device(DEVICE))
    if reason is not None:
        pytest.skip(f"impl {request.param!r}: {reason}")
    monkeypatch.setattr(dispatch, "CHOICES", (dispatch.Choice(torch.device(DEVICE).type, request.param, "this test"),))
    module = dispatch.load(request.param)
    if request.param == "triton" and DEVICE == "cpu":
        monkeypatch.setattr(module, "BLOCK_N", 32)  # the interpreter takes its time for each program
    return module


@pytest.fixture(params=["triton", "cuda"])
def gpu_impl(request, monkeypatch):
    """The names of those for GPUs, with the fused forward as their own; in blocks that an interpreter can do, without
    one in the blocks that ship."""
    return small_blocks_of(request, monkeypatch)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def finding_impl(request, monkeypatch):
    """The same of all whose kernels find labelled rows."""
    if request.param != "cpu":
        return small_blocks_of(request, monkeypatch)
    if reason := dispatch.unavailable_reason("cpu", torch.get_default_device()):
        pytest.skip(reason)
    return "cpu"


def small_blocks_of(request, monkeypatch):
    if request.param == "cuda" and DEVICE == "cpu":
        request.getfixturevalue("emulated_cuda")
    if reason := dispatch.unavailable_reason(request.param, torch.get_default_device()):
        pytest.skip(reason)
    if not dispatch.load(request.param).has_fused_forward(torch.get_default_device()):
        pytest.skip("the fused forward is Hopper's")
    if request.param == "triton":
        monkeypatch.setitem(dispatch.FORWARD_OF, "triton", "triton_fused")
        if DEVICE == "cpu":
            linear = importlib.import_module("dpo_kernels.impl.triton_linear")
            monkeypatch.setattr(linear, "BLOCK_N", 16)
            monkeypatch.setattr(linear, "BLOCK_H", 32)
            monkeypatch.setattr(linear, "block_v", lambda stats, softcap, hopper: 32)
            monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_join"), "JOIN_SPLITS", 2)
            monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_rows"), "BLOCK_P", 16)
            pairs = importlib.import_module("dpo_kernels.impl.triton_pairs")
            for name, size in (("BLOCK_N", 16), ("BLOCK_B", 4), ("BLOCK_S", 4), ("BLOCK_T", 16)):
                monkeypatch.setattr(pairs, name, size)
    return request.param


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The CUDA implementation with its kernels compiled for the CPU."""
    reason = emulation.unavailable_reason()
    if reason is not None:
        pytest.skip(f"impl 'cuda': {reason}")
    monkeypatch.setitem(sys.modules, "dpo_kernels._cuda", emulation.cuda_module())
    monkeypatch.setattr(dispatch, "CUDA_DEVICE", "cpu")
    monkeypatch.setattr(dispatch, "CUDA_PROBLEM", None)
    module = dispatch.load("cuda")
    for each in (module, module.cuda_linear, module.cuda_exponentials, module.cuda_positions):
        monkeypatch.setattr(each, "_cuda", emulation.cuda_module())
    return module


@pytest.fixture
def not_interpreted(impl):
    """For what takes too long without a GPU, and for memory: Triton's interpreter copies what it is given."""
    if DEVICE == "cpu" and impl.__name__ in ("dpo_kernels.impl.triton", "dpo_kernels.impl.cuda"):
        pytest.skip("takes too long without a GPU, or more memory than on one")


@pytest.fixture
def set_tile_bytes(impl, monkeypatch):
    """A function that sets the tile size of that implementation, and has it use tiles."""

    def set_size(size):
        monkeypatch.setattr(impl, "tile_bytes", lambda device: size)
        monkeypatch.setattr(impl, "linear_fold_", lambda *operands: False)
        monkeypatch.setattr(impl, "takes_exponentials", lambda *operands: False)

    return set_size


@pytest.fixture
def run_python():
    """A function that runs Python in a process of its own, with the package of `root`, or this one's; its output."""

    def run(*args, root=None):
        path = os.pathsep.join([str(root or Path(dispatch.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command, env = [sys.executable, *map(str, args)], {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    return run
