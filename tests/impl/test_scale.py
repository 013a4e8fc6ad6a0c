"""Gradients that were formed before the loss's own gradient was known are multiplied by it."""

import pytest
import torch
from places import DEVICE

from dpo_kernels import linear_dpo_loss
from dpo_kernels.testing import head_inputs

pytestmark = pytest.mark.parametrize("impl", ["torch", "cpu", "triton", "cuda"], indirect=True)


def numbers(shape, dtype):
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3000, 5), (2, 4099), (7,), (0, 3)], ids=str)
def test_products_are_rounded_once(impl, dtype, shape):
    """Not the factor: a third has no bf16."""
    t, factor = numbers(shape, dtype), torch.tensor(1 / 3)
    expected = (t.to(torch.promote_types(dtype, torch.float32)) * factor).to(dtype)
    impl.scale_(t, factor)
    assert torch.equal(t, expected)


def test_nothing_is_written_where_the_factor_is_one(impl):
    """A signaling NaN would become a quiet one in a product."""
    if impl.__name__.endswith(("torch", "native")):
        pytest.skip("PyTorch's own multiplication")
    t = torch.full((3, 40), 0x7F81, dtype=torch.int16).view(torch.bfloat16)
    impl.scale_(t, torch.tensor(1.0))
    assert (t.view(torch.int16) == 0x7F81).all()
    impl.scale_(t, torch.tensor(2.0))
    assert t.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_that_is_scaled(impl, dtype):
    found = []
    for scale in (1.0, 1.0, -4.0):
        inputs = head_inputs(4, 9, 48, 123, seed=1).to(dtype)
        leaves = [t.detach().requires_grad_() for t in inputs[:2]]
        loss = linear_dpo_loss(*leaves, inputs.labels, inputs.ref_logps).loss
        found.append(torch.autograd.grad(loss * scale, leaves))
    for once, again, scaled in zip(*found, strict=True):
        assert torch.equal(once, again) and torch.equal(scaled, -4 * once) and once.any()
