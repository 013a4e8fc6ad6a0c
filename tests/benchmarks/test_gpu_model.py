"""The model of the paths on a GPU says what the code launches, and which targets follow."""

import importlib
import math
import re
import sys
from collections import Counter
from itertools import pairwise

import pytest
import torch
from places import ROOT
from recording import Operators, record
from torch.utils._python_dispatch import _disable_current_modes

from dpo_kernels import dispatch, linear_dpo, linear_dpo_loss, linear_sequence_logps, logps, ops, sequence_logps
from dpo_kernels.impl import exponential_paths, paths, waves
from dpo_kernels.impl.blocks import spans
from dpo_kernels.impl.interface import GradRows, LogitTransform
from dpo_kernels.testing import head_inputs

pytest.importorskip("triton", reason="Triton is not installed")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def gpu_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("gpu_model")


@pytest.fixture
def run(gpu_model, monkeypatch, capsys):
    """The script with these arguments: what it prints."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_model.py", *arguments])
        gpu_model.main()
        return capsys.readouterr().out

    return run


# What it prints


def rows_of(table):
    """Cells by the name of the path, each from where its column begins to where it ends."""
    title, header, *lines = table.splitlines()
    names = re.findall(r"x g, best|% of copy|GB moved|% of waves|\S+", header)
    ends = [header.index(name) + len(name) for name in names]
    spans = list(pairwise([0, *ends]))
    begins = min(len(line) - len(line.lstrip()) for line in lines)
    assert begins == 0
    name_width = max(line.index("  ") for line in lines)
    return {
        line[:name_width].strip(): dict(
            zip(names, (line[max(a, name_width) : b].strip() for a, b in spans), strict=True)
        )
        for line in lines
    }


def test_a_table_for_each_size_that_has_targets(run, gpu_model):
    *tables, last = run().strip().split("\n\n")
    assert len(tables) == 2 * len(gpu_model.SIZES) and "3 us a launch" in last
    assert tables[0].startswith("H200, cuda: N 8192, H 4096, V 128256, bf16; predicted, g = 10.88 ms\n")
    for table in tables:
        rows = rows_of(table)
        assert list(rows) == list(gpu_model.PATHS)
        for path, row in rows.items():
            assert int(row["launches"]) > 0 and float(row["ms"]) > 0 and float(row["GB moved"]) > 0
            assert bool(row["% of copy"]) == path.startswith("E") != bool(row["x g, best"])
            if row["x g, best"]:
                assert 1 <= float(row["x g, best"]) <= float(row["expected"]) and float(row["% of waves"]) <= 100


@pytest.mark.parametrize("gpu", ["H100", "H100-PCIe", "A100", "B200", "L40S"])
def test_any_size_on_any_gpu(run, gpu_model, gpu):
    found = run("--rows", "1000", "--hidden", "1024", "--vocab", "50257", "--gpu", gpu, "--launches")
    impls = ["cuda", "triton"] if gpu.startswith("H") else ["tiles", "triton"]
    assert [f"{gpu}, {impl}: N 1000, H 1024, V 50257" in found for impl in impls] == [True, True]
    assert "linear_exp_fwd_kernel" in found and "us, best" in found


def test_commands_of_the_readme(run):
    text = (ROOT / "benchmarks" / "README.md").read_text()
    commands = re.findall(r"^ +python benchmarks/gpu_model.py(.*?)(?:  # .*)?$", text, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert "% of waves" in run(*command.split())


def test_figures_of_the_readme(run, gpu_model):
    """And of docs/gpu.md, which has the first size."""
    tables = run("--markdown").strip().split("\n\n")
    printed = dict(zip(tables[::2], tables[1::2], strict=True))
    text = (ROOT / "benchmarks" / "README.md").read_text()
    stated = re.findall(r"^(N .*:)\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert len(stated) == 2 and all(printed[size] == table.strip() for size, table in stated)
    docs = (ROOT / "docs" / "gpu.md").read_text()
    for line in printed["N 8192, H 4096, V 128256:"].splitlines()[2:]:
        path, *figures, target, _ = [cell.strip() for cell in line.strip("|").split("|")] + [""]
        figures = " | ".join(f"{figure} g" for figure in figures)
        assert re.search(rf"^\| {path[0]}, .* \| {re.escape(figures)} \| {target}", docs, re.MULTILINE), path


@pytest.mark.parametrize(
    "arguments",
    [("--rows", "8"), ("--gpu", "A100", "--impl", "cuda"), ("--gpu", "A100", "--markdown"), ("--gpu", "V100")],
)
def test_what_cannot_be_predicted_is_refused(run, capsys, arguments):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "error: " in capsys.readouterr().err


# What follows of the targets


def test_targets_at_the_sizes_that_have_them(gpu_model):
    h200 = gpu_model.GPUS["H200"]
    for size in gpu_model.SIZES:
        for path, target in gpu_model.TARGETS.items():
            assert round(gpu_model.predict(path, "cuda", h200, size).over_g(), 2) <= target
        for path in ("E", "E, backward too"):
            of_copy = gpu_model.predict(path, "cuda", h200, size).of_copy(path != "E")
            assert gpu_model.TARGET_OF_COPY <= of_copy <= 100


def test_targets_of_triton_follow_from_its_rate_alone(gpu_model):
    """If its products ran at the library's rate, and hid their epilogues."""
    h200 = gpu_model.GPUS["H200"]
    for size in gpu_model.SIZES:
        for path, target in gpu_model.TARGETS.items():
            found = gpu_model.predict(path, "triton", h200, size)
            assert (found.over_g(best=True) <= target) == (path != "C, 4 GiB" or size[1] == 4096)
            assert found.over_g() > target


def test_what_path_c_stores(gpu_model):
    """Within the default of 1 GiB all at one of the four sizes, and elsewhere most: the rest is computed again."""
    h200 = gpu_model.GPUS["H200"]
    for size in gpu_model.SIZES:
        chunks, stored = gpu_model.Model(h200, "cuda", *size).chunks(2**30)
        found, whole = (gpu_model.predict(path, "cuda", h200, size).over_g() for path in ("C", "C, 4 GiB"))
        again = 0 if stored is None else 1 - stored / size[2]
        assert len(chunks) == 1 and (stored is None) == (size[1:] == (4096, 128256)) and again < 0.4
        assert abs(found - whole - again) < 0.1, "a product that is computed again takes a product's time"


def test_tiles_take_longer(gpu_model):
    for path in ("A", "B", "C, 4 GiB", "D"):
        tiles, ours = (
            gpu_model.predict(path, impl, gpu_model.GPUS["H200"], (8192, 4096, 128256)) for impl in ("tiles", "cuda")
        )
        assert tiles.over_g() > ours.over_g() + 0.1 and tiles.count > ours.count


# What is launched

SHAPES = {"one": (80, 48, 251), "tails": (36, 48, 123)}


@pytest.fixture
def recorded(monkeypatch):
    """An implementation with small blocks; its launches, products by shape, and the operators' mode."""
    if reason := dispatch.unavailable_reason("triton", torch.get_default_device()):
        pytest.skip(reason)
    kernels = dispatch.load("triton")
    linear = importlib.import_module("dpo_kernels.impl.triton_linear")
    exponentials = importlib.import_module("dpo_kernels.impl.triton_exponentials")
    if torch.get_default_device().type == "cpu":  # blocks that an interpreter can do
        monkeypatch.setattr(linear, "BLOCK_N", 16)
        monkeypatch.setattr(linear, "BLOCK_H", 32)
        monkeypatch.setattr(linear, "block_v", lambda stats, softcap, hopper: 64)
    monkeypatch.setattr(exponential_paths, "DW_COLUMNS", 40)
    monkeypatch.setattr(exponential_paths, "ALIGNED", 16)
    parts = ("", "_join", "_pairs", "_rows", "_scale", "_sequences")
    others = (importlib.import_module(f"dpo_kernels.impl.triton{part}") for part in parts)
    launches, shapes = record(monkeypatch, kernels, linear, exponentials, *others)
    return kernels, launches, shapes


def inputs_of(n, h, v):
    inputs = head_inputs(2, n // 2, h, v, labelled=1.0).to(BF16)
    return inputs.hidden.detach().flatten(0, 1), inputs.weight.detach(), inputs.labels.flatten()


def predicted(gpu_model, n, h, v, launches):
    """Names with their counts, and shapes of the products of the library; on one multiprocessor, which no product
    leaves without work."""
    one = gpu_model.GPUS["H200"]._replace(multiprocessors=1)
    found = launches(gpu_model.Model(one, "triton", n, h, v))
    names = Counter()
    for launch in found:
        names[launch.name] += launch.count
    shapes = [
        (*launch.product, launch.sums > 0) for launch in found if launch.name == "product" for _ in range(launch.count)
    ]
    return names, shapes


def test_what_path_a_launches(gpu_model, recorded):
    """Where labelled rows lie anywhere among the positions: four, and five with a copy of them."""
    kernels, launches, _ = recorded
    inputs = head_inputs(2, 40, 48, 251, labelled=0.6).to(BF16)
    hidden, weight, labels = inputs.hidden.detach(), inputs.weight.detach(), inputs.labels
    labelled = int((labels >= 0).sum())
    with Operators(launches):
        found = kernels.linear_token_logps(
            hidden, weight, None, labels, LogitTransform(), compute_dtype=BF16, ignore_index=-100, shift=False,
            stats=(), num_labelled=labelled, predictors=None,
        )  # fmt: skip
        ops.sum_tokens(found.token_logps, labels, None, -100, False, "triton")
    names, _ = predicted(gpu_model, labelled, 48, 251, lambda model: model.path_a())
    assert launches["linear_fold_fwd_kernel"] == names["linear_fold_fwd_kernel"] == 1
    assert launches.total() == names.total() == 4, launches
    on_hopper = gpu_model.Model(gpu_model.GPUS["H200"], "cuda", labelled, 48, 251).path_a()
    assert sum(launch.count for launch in on_hopper) == 5  # see test_path_a.py


# What the model calls Triton's kernels, and those of the operators that come together.
IN_MODEL = {
    "sum_tokens_fwd_kernel": "sum_tokens", "scale_kernel": "scale_",
    "linear_dlogits_bwd_kernel": "linear_dlogits_kernel",
}  # fmt: skip


@pytest.mark.parametrize("path", ["B", "C", "D"])
def test_what_a_whole_call_launches(gpu_model, recorded, monkeypatch, path):
    """Labelled rows lie anywhere among the positions, and their number is known. Counted by name."""
    kernels, launches, _ = recorded
    n, h, v = 48, 48, 251
    inputs = head_inputs(4, 40, h, v, labelled=0.6).to(BF16)
    labels = torch.full((4, 40), -100)
    labels[:, 5:29:2] = 7
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_(path != "B")
    # on a GPU these are assertions, or look at nothing
    for module in (logps, linear_dpo):
        monkeypatch.setattr(module, "is_at_hand", lambda t: False)
        monkeypatch.setattr(module, "check_head_is_finite", lambda *_: None)
    monkeypatch.setattr(waves, "columns_at_a_time", lambda *_, **__: 128)
    monkeypatch.setattr(kernels, "exponential_rows", lambda *_: n)
    options = {"num_labelled": n, "check_hidden": False, "impl": "triton"}
    given, ref_logps = torch.full(() if path == "C" else (4,), 2.0), torch.zeros(4)
    with Operators(launches):
        if path == "C":
            out = linear_dpo_loss(hidden, weight, labels, ref_logps, **options).loss
        else:
            out = linear_sequence_logps(hidden, weight, labels, **options).logps
        out.backward(given)
    names, _ = predicted(gpu_model, n, h, v, gpu_model.PATHS[path])
    found = Counter()
    for name, count in launches.items():
        found[IN_MODEL.get(name, name) if path != "C" or name.endswith("kernel") else name] += count
    if path == "C":
        assert found.pop("_local_scalar_dense") == 1  # whether the gradient on a CPU is 1
    assert found == names


@pytest.mark.parametrize("backward", [False, True])
def test_what_path_e_launches(gpu_model, recorded, backward):
    _, launches, _ = recorded
    logits = torch.randn(2, 20, 123).to(BF16).requires_grad_()
    labels, given = torch.randint(123, (2, 20)), torch.ones(2)
    with Operators(launches):
        logps = sequence_logps(logits, labels, impl="triton", num_labelled=40).logps
        if backward:
            torch.autograd.grad(logps, logits, given)
    names, _ = predicted(gpu_model, 40, 48, 123, lambda model: model.path_e(backward))
    assert launches.total() <= names.total(), launches


@pytest.mark.parametrize("columns", [64, 128])
def test_what_path_d_launches(gpu_model, recorded, monkeypatch, columns):
    """Its backward: three launches a block of the vocabulary, and no more than five; each product once."""
    kernels, launches, shapes = recorded
    n, h, v = 80, 48, 251
    x, weight, y = inputs_of(n, h, v)
    of = GradRows(y, torch.stack([torch.zeros(n), torch.full((n,), float(v))]), torch.full((n,), -3.0), torch.ones(n))
    monkeypatch.setattr(waves, "columns_at_a_time", lambda *_, **__: columns)
    with Operators(launches):
        dx, dw, _ = paths.linear_logps_bwd(
            kernels, x, weight, None, of, LogitTransform(), compute_dtype=BF16, need=(True, True, False), fused=True
        )
    assert dx.shape == x.shape and dw.shape == weight.shape
    names, products = predicted(gpu_model, n, h, v, lambda model: model.recomputed_d())
    assert sorted(shapes) == sorted(products) and len(products) == 2 * -(-v // columns)
    assert launches.total() <= names.total() + 4, launches


@pytest.mark.parametrize("shape", SHAPES)
def test_what_path_b_launches(gpu_model, recorded, monkeypatch, shape):
    (n, h, v), (kernels, launches, shapes) = SHAPES[shape], recorded
    x, weight, y = inputs_of(n, h, v)
    rows = 48 if n > 48 else n
    monkeypatch.setattr(kernels, "exponential_rows", lambda *_: rows)
    with Operators(launches):
        paths.linear_logps_fwd(
            kernels, x, weight, None, y, LogitTransform(), compute_dtype=BF16, with_dhidden=True, fused=True
        )
    names, products = predicted(gpu_model, n, h, v, lambda model: model.exponentials_b(rows))
    assert launches == names and sorted(shapes) == sorted(products)


@pytest.mark.parametrize(
    ("chunks", "stored"),
    [((80,), None), ((36,), None), ((40, 40), None), ((40, 24, 16), None), ((80,), 176)],
    ids=str,
)
def test_what_path_c_launches(gpu_model, recorded, monkeypatch, chunks, stored):
    n, h, v = sum(chunks), 48, 251
    kernels, launches, shapes = recorded
    monkeypatch.setattr(waves, "columns_at_a_time", lambda *_, **__: 64)
    x, weight, y = inputs_of(n, h, v)
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    groups = [slice(end - size, end) for end, size in zip(ends, chunks, strict=True)]
    with Operators(launches):
        paths.linear_logps_grouped(
            kernels, x, weight, None, y, LogitTransform(), groups, lambda i, logp, stats: logp,
            compute_dtype=BF16, need=(True, True, False), exponentials=True, stored=stored,
        )  # fmt: skip
    names, products = predicted(gpu_model, n, h, v, lambda model: model.exponentials_c(list(chunks), stored))
    if stored is not None:
        assert names["linear_dlogits_kernel"] == 2
        launches["linear_dlogits_kernel"] = launches.pop("linear_dlogits_bwd_kernel")
    assert launches == names and sorted(shapes) == sorted(products)


@pytest.mark.parametrize(("chunks", "stored"), [((80,), None), ((40, 40), None), ((80,), 832)], ids=str)
def test_what_path_c_launches_on_cuda(gpu_model, emulated_cuda, monkeypatch, chunks, stored):
    """Where dW comes in three blocks, if there is one chunk: products of ours alone, but for what is not stored."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("an emulation, of numbers on the host")
    n, h, v = sum(chunks), 48, 1300
    groups = list(spans(n, chunks[0]))
    monkeypatch.setattr(exponential_paths, "DW_COLUMNS", 256)
    monkeypatch.setattr(waves, "columns_at_a_time", lambda *_, **__: 256)
    x, weight, y = inputs_of(n, h, v)
    launches, native = Counter(), emulated_cuda._cuda

    class Native:
        def __getattr__(self, name):
            of = getattr(native, name)
            return of if name[0].isupper() else lambda *args: launches.update([name]) or of(*args)

    for module in (emulated_cuda, emulated_cuda.cuda_linear, emulated_cuda.cuda_exponentials):
        monkeypatch.setattr(module, "_cuda", Native())

    def product(a, b, out, accumulate=False):
        launches.update(["product"])
        with _disable_current_modes():
            return out.copy_((out if accumulate else 0) + a.float() @ b.float())

    monkeypatch.setattr(emulated_cuda, "product", product)
    with Operators(launches):
        paths.linear_logps_grouped(
            emulated_cuda, x, weight, None, y, LogitTransform(), groups, lambda i, logp, stats: logp,
            compute_dtype=BF16, need=(True, True, False), exponentials=True, stored=stored,
        )  # fmt: skip
    found = gpu_model.Model(gpu_model.GPUS["H200"], "cuda", n, h, v).exponentials_c(list(chunks), stored)
    names = Counter()
    for launch in found:
        names[launch.name] += launch.count
    assert launches.pop("linear_dhidden") + launches.pop("linear_dweight") == names.pop("linear_gradient_kernel")
    assert sorted(launches.values()) == sorted(names.values()) and launches["weigh"] == names["weigh_kernel"], launches
    gradients = [launch for launch in found if launch.name == "linear_gradient_kernel"]
    assert sum(math.prod(launch.product) for launch in gradients) == 2 * n * h * (stored or v)
    assert launches["product"] == names["product"] == (0 if stored is None else 4)
    assert [launch.sums > 0 for launch in gradients] == ([False] * 4 if len(chunks) == 1 else [False] * 3 + [True])


# The schedules of the CUDA kernels


def test_clusters_go_through_tiles_as_predicted(gpu_model):
    found = constants("linear_gradients.cu") | constants("kernels.h")
    assert found["kPairsTogether"] == gpu_model.GRADIENTS_TOGETHER and found["kColumns"] == waves.TILE_COLUMNS
    assert found["kBlockColumns"] == waves.TILE_COLUMNS, "blocks of dW begin where shifts do"
    model = gpu_model.Model(gpu_model.GPUS["H200"], "cuda", 8192, 4096, 128256)
    assert model.gradient(8192, 128256, 0).rounds == 8 * waves.TILE * 128256  # 32 x 16 tiles of 66 clusters
    assert model.gradient(512, 8192, 0).rounds == waves.TILE * 8192


def constants(source):
    text = (ROOT / "csrc" / "cuda" / source).read_text()
    return {name: int(value) for name, value in re.findall(r"\b(k\w+) = (\d+)\b", text)}


def busiest(n, v, splits, clusters):
    """Blocks of columns that the busiest cluster of linear_fold.cu goes through, item by item as it does."""
    pairs, blocks = -(-n // 256), -(-v // 256)
    load = [0] * clusters
    item = 0
    for first in range(0, pairs, 8):
        for split in range(splits):
            for _ in range(first, min(first + 8, pairs)):
                load[item % clusters] += blocks // splits + (split < blocks % splits)
                item += 1
    return max(load)


@pytest.mark.parametrize("n, v", [(8192, 128256), (8192, 151936), (1024, 128256), (2048, 151936), (1000, 50257)])
@pytest.mark.parametrize("gpu", ["H200", "H100-PCIe"])
def test_clusters_are_as_busy_as_predicted(gpu_model, gpu, n, v):
    found = constants("linear_fold.cu") | constants("kernels.h")
    assert found["kRowPairsTogether"] == gpu_model.ROWS_TOGETHER and found["kClusterBlocks"] == gpu_model.CLUSTER
    assert found["kClusterRows"] == waves.TILE_ROWS * gpu_model.CLUSTER and found["kBlockColumns"] == waves.TILE_COLUMNS
    multiprocessors = gpu_model.GPUS[gpu].multiprocessors
    splits = gpu_model.Model(gpu_model.GPUS[gpu], "cuda", n, 4096, v).splits(n, v)
    time = waves.fold_time(n, v, 4096, multiprocessors, gpu_model.CLUSTER)
    blocks = busiest(n, v, splits, multiprocessors // 2)
    # eight groups of rows after the other, each of which begins with the longer ones
    assert abs(time / (blocks * waves.TILE * 4096) - 1) < 0.01
