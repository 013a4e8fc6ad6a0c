"""The benchmark of path C's products runs, and tells where they are wrong."""

import json
import sys

import pytest
import torch
from places import ROOT


@pytest.fixture
def run(emulated_cuda, monkeypatch, capsys, tmp_path):
    if torch.get_default_device().type != "cpu":
        pytest.skip("an emulation, of numbers on the host")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gradients

    def run():
        out = tmp_path / "out.json"
        arguments = ["gradients.py", "--device", "cpu", "--quick", "--rounds", "1", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        gradients.main()
        return json.loads(out.read_text()), capsys.readouterr().out.splitlines()

    return run


def test_both_products_are_timed_and_compared(run):
    found, (header, line, last) = run()
    (row,) = found["rows"]
    assert header.split()[:3] == ["N", "H", "V"] and line.split()[:3] == ["48", "64", "520"]
    assert all(row[name] > 0 for name in ("dX", "dX_of_d", "dW", "dW_of_d")) and 0 < row["difference"] < 1e-2
    assert last.startswith("dX ") and last.endswith(" of PyTorch's time at most, at 1 sizes of 1")


@pytest.mark.parametrize("wrong", ["dX", "dW"])
def test_a_product_that_is_wrong_is_told(run, emulated_cuda, monkeypatch, wrong):
    products = emulated_cuda.cuda_exponentials.Dlogits
    name = {"dX": "dhidden", "dW": "dweight"}[wrong]
    of = getattr(products, name)

    def twice(self, *args):
        of(self, *args)
        args[wrong == "dW"].mul_(2)

    monkeypatch.setattr(products, name, twice)
    with pytest.raises(SystemExit):
        run()
