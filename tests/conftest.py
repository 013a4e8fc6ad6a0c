"""Settings for all tests: nothing is fetched from a hub, and parallel workers share the cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402

from dpo_kernels import dispatch  # noqa: E402


@pytest.fixture(params=["torch", "cpu"])
def impl(request, monkeypatch):
    """Runs a test once with each implementation as what "auto" picks; its module."""
    reason = dispatch.unavailable_reason(request.param, torch.device("cpu"))
    if reason is not None:
        pytest.skip(f"impl {request.param!r}: {reason}")
    monkeypatch.setattr(dispatch, "PREFERRED", {"cpu": (request.param,)})
    return dispatch.load(request.param)


@pytest.fixture
def set_tile_bytes(impl, monkeypatch):
    """A function that sets the tile size of that implementation."""
    return lambda size: monkeypatch.setattr(impl, "tile_bytes", lambda device: size)
