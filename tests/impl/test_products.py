"""Products whose long sums are computed in parts, side by side."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels.impl import products


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k, parts", [(96, 2), (97, 2), (101, 4)])
def test_parts_are_added(k, parts):
    """A remainder too. Operands are read where they are, as they lie: [k, m], whose rows are further apart."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(k, 16, generator=draw)[:, :10].t()
    b, out = torch.randn(k, 7, generator=draw), torch.empty(10, 7)
    with Operators() as operators:
        assert products._product_in_parts(a, b, out, parts) is out
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)
    assert operators.names.count("bmm") == 1 and not {"clone", "copy_"}.intersection(operators.names)
    assert operators.names.count("addmm.out") == (k % parts > 0)


def test_what_is_computed_in_parts(monkeypatch):
    """What leaves half of a GPU idle: 64 tiles of 132."""
    h200 = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    gpu = torch.device("cuda")
    assert products.parts_of_sum(1024, 151936, 2048, gpu) == 2
    assert products.parts_of_sum(1024, 151936, 2048, torch.device("cpu")) == 1
    assert products.parts_of_sum(1024, products.LONG_SUM - 1, 2048, gpu) == 1, "no sum over a vocabulary"
    assert products.parts_of_sum(8192, 151936, 2048, gpu) == 1, "there are tiles enough"


@pytest.mark.parametrize("parts", [1, 2])
def test_products_with_sums_in_fp32_ask(monkeypatch, parts):
    asked = []
    monkeypatch.setattr(products, "parts_of_sum", lambda *of: asked.append(of) or parts)
    a, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 96), (96, 32)))
    out = torch.empty(8, 32, device="meta")
    with Operators() as operators:
        assert products.product(a, b, out) is out
        assert asked == [(8, 96, 32, a.device)]
        products.product(a, b, out, accumulate=True)
    assert operators.names.count("bmm.dtype") == (parts > 1) and len(asked) == 1
