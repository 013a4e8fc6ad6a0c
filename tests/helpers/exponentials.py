"""Heads whose exponentials, or gradients of logits, are stored in 16 bits: what they are held against."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels.impl import exponential_paths, paths
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.testing import head_inputs


def by_eager(inputs, coefficients, names, transform, with_bias):
    """Log-probabilities and gradients of the textbook, in the dtype of the inputs."""
    logits = eager_logits(inputs.hidden, inputs.weight, bias=inputs.bias if with_bias else None, **transform)
    token_logps = eager_token_logps(logits, inputs.labels)
    wanted = [getattr(inputs, name) for name in names]
    return token_logps, torch.autograd.grad((token_logps.sum(1) * coefficients.to(token_logps.dtype)).sum(), wanted)


def assert_rows_within(ours, eager, oracle, what):
    """Each row by itself: the worst is no further off than eager's worst, nor than two roundings to bf16."""
    size = oracle.norm(dim=-1).clamp(min=1e-30)
    mine, theirs = (((t.double() - oracle).norm(dim=-1) / size).max().item() for t in (ours, eager))
    assert mine <= max(theirs, 2**-7), f"{what}: a row is {mine:.2e} off, eager's worst {theirs:.2e}"


def hinge_coefficients(inputs):
    """Of the sum over sequences that the loss of `trained` has the gradient of."""
    pairs = inputs.labels.shape[0] // 2
    return torch.tensor([-0.001 / pairs] * pairs + [0.001 / pairs] * pairs)


def bytes_for_some(kernels, inputs, need, buffer):
    """The `chunk_bytes` in which exponentials of so many vocabulary entries fit, beside those in the memory of dW, and
    how many are stored then; the rest are not. In no case does the sum of dW, or a pair."""
    n, dweight = int((inputs.labels >= 0).sum()), "weight" in need
    stored = buffer + (exponential_paths.kept_columns(kernels, n, inputs.weight) if dweight else 0)
    rest = inputs.weight.shape[0] - stored
    assert inputs.labels.shape[0] == 2 and rest > 0, "one pair, which is not stored whole"
    found = paths.kept_bytes(kernels, n, inputs.weight, torch.float32, True, dweight, stored).buffer
    assert exponential_paths.stored_columns(kernels, n, inputs.weight, dweight, found) == stored
    assert exponential_paths.stored_columns(kernels, n, inputs.weight, dweight, found - 1) < stored
    return found, stored


def growing(after=40, by=200.0, vocab=123):
    """Logits that grow beyond fp32's exponentials behind the first columns, in some rows; and their labels: among the
    first, the large ones, and the last."""
    inputs = head_inputs(4, 12, 48, vocab, labelled=1.0, logit_std=1.0)
    hidden, weight = inputs.hidden.detach().clone(), inputs.weight.detach().clone()
    weight[:, 0] = 0.0
    weight[after:, 0] = by / 4
    hidden[..., 0] = 0.0
    hidden[:, ::3, 0] = 4.0
    labels = inputs.labels.clone()
    labels[:, 1::4], labels[:, 2::4] = 3, vocab - 1
    return inputs._replace(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), labels=labels)


class Operators(TorchDispatchMode):
    """Counts PyTorch's operators that launch something, and notes the largest tensor in fp32 that comes to be."""

    WITHOUT_KERNEL = ("empty", "view", "slice", "select", "t", "transpose", "as_strided", "unbind", "detach", "alias")

    def __init__(self):
        super().__init__()
        self.count, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::").partition(".")[0]
        if not any(name == each or name.startswith((f"{each}_", f"new_{each}")) for each in self.WITHOUT_KERNEL):
            self.count[name] += 1
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.largest = max(self.largest, out.numel())
        return out
