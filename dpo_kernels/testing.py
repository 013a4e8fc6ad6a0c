"""What tests and benchmarks share: random inputs like a model's, the error budget, and a record of what was made."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_kernels.ops import IMPLEMENTATION_OF

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear_pointwise")


class HeadInputs(NamedTuple):
    """hidden [S, T, H], weight [V, H], labels [S, T] with ignored ones, bias [V], ref_logps [S] fp32."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor
    ref_logps: Tensor

    def to(self, dtype: torch.dtype) -> HeadInputs:
        """Fresh leaves of another dtype with the same values, requiring gradients."""
        hidden, weight, bias = (
            t.detach().to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight, self.bias)
        )
        return HeadInputs(hidden, weight, self.labels, bias, self.ref_logps)


def head_inputs(
    sequences: int = 4,
    length: int = 9,
    hidden_size: int = 31,
    vocab_size: int = 123,
    *,
    dtype: torch.dtype = torch.float32,
    logit_std: float = 2.0,
    labelled: float = 0.6,
    confident: float = 0.0,
    ignore_index: int = -100,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> HeadInputs:
    """Random inputs whose logits have standard deviation `logit_std`. A fraction `labelled` of the positions counts;
    for a fraction `confident` of these, the hidden state is turned to its label until p_y is about 0.99 and more. The
    numbers are the same on every device; PyTorch's default one is meant where none is named."""
    drawn: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed), "device": "cpu"}
    hidden = torch.randn(sequences, length, hidden_size, **drawn)
    weight = torch.randn(vocab_size, hidden_size, **drawn)
    bias = torch.randn(vocab_size, **drawn)
    weight *= logit_std / hidden_size**0.5
    labels = torch.randint(vocab_size, (sequences, length), **drawn)
    is_confident = torch.rand(sequences, length, **drawn) < confident
    toward = weight[labels] / weight[labels].square().sum(-1, keepdim=True)
    hidden = torch.where(is_confident[..., None], hidden + toward * (4 * logit_std + 6), hidden)
    labels[torch.rand(sequences, length, **drawn) >= labelled] = ignore_index
    ref_logps = -labels.ne(ignore_index).sum(1) * (2.0 + torch.rand(sequences, **drawn))
    device = torch.get_default_device() if device is None else device
    hidden, weight, bias = (t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias))
    return HeadInputs(hidden, weight, labels.to(device), bias, ref_logps.to(device))


def rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item() if error.numel() else 0.0


def assert_within_budget(ours: Tensor, eager: Tensor, oracle: Tensor, what: str, epsilon: float = 1e-6) -> None:
    """The error budget: our rms error against the fp64 oracle is at most eager's in the same dtype, plus `epsilon`
    times the oracle's own rms."""
    reason = beyond_budget(ours, eager, oracle, what, epsilon)
    assert not reason, reason


def beyond_budget(ours: Tensor, eager: Tensor, oracle: Tensor, what: str, epsilon: float = 1e-6) -> str:
    """How `ours` is beyond the error budget, in words; "" if it is not."""
    if ours.shape != oracle.shape or not torch.isfinite(ours).all():
        return f"{what}: shape or finiteness"
    ours_error, eager_error = rms(ours.double() - oracle), rms(eager.double() - oracle)
    limit = eager_error + epsilon * max(rms(oracle), 1e-30)
    if ours_error <= limit:
        return ""
    return f"{what}: rms error {ours_error:.3e}, eager {eager_error:.3e}, limit {limit:.3e}"


class Record(TorchDispatchMode):
    """Records, inside the custom operators too, every tensor's storage that comes to be and every matrix product.

    `largest`: (bytes, operator, shape) of the largest new storage. `multiplications`: of all matrix products; where
    the head's are the only ones, `multiplications` / (N H V) counts how often its product was done.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest: tuple[int, str, tuple[int, ...]] = (0, "", ())
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name()
        if name in IMPLEMENTATION_OF:
            with self:
                return IMPLEMENTATION_OF[name](*args)
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        if name.split(".")[0] in PRODUCTS:
            a, _ = [t for t in args if isinstance(t, Tensor)][-2:]
            self.multiplications += a.shape[-1] * out.numel()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known:
                self.largest = max(self.largest, (t.untyped_storage().nbytes(), name, tuple(t.shape)))
        return out


class SavedBytes:
    """Context that adds up the storages autograd saves for backward, those of `inputs` apart."""

    def __init__(self, *inputs: Tensor) -> None:
        self._seen = {t.untyped_storage().data_ptr() for t in inputs}
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)

    def _pack(self, t: Tensor) -> Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in self._seen:
            self._seen.add(pointer)
            self.total += t.untyped_storage().nbytes()
        return t

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._hooks.__exit__(*exc)


class Allocated(NamedTuple):
    """Bytes that PyTorch's allocator handed out on the CPU during a call, inside operators too."""

    peak: int
    """The most at once, beyond what was there before."""
    left: int
    """What was not given back when the call returned: its result, and what that keeps."""
    result: Any


def allocated(call: Callable[[], Any]) -> Allocated:
    """What `call` allocates, by the profiler's record of every allocation."""
    gc.collect()  # what is freed during the call is to be the call's own
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    kineto: Any = profile.profiler
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    left = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        left += event.nbytes()
        peak = max(peak, left)
    return Allocated(peak, left, result)
