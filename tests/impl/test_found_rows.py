"""Labelled rows that a kernel finds and another one copies together, in C++, Triton and CUDA: which they are, what is
wrong with them, and that all paths compute the same of them as of those that PyTorch finds. Without a GPU Triton
interprets its kernels, and CUDA's run through the emulation in tests/impl/cuda."""

import dataclasses
import importlib
import os
import sys

import pytest
import torch
from grids import covering
from places import DEVICE
from recording import Operators, launches_of
from torch.utils._python_dispatch import _disable_current_modes

from dpo_kernels import dispatch, linear_dpo, linear_dpo_loss, linear_sequence_logps, logps, sequence_logps
from dpo_kernels.impl import exponential_paths, paths, positions
from dpo_kernels.impl.interface import Rows
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.rows import LabelledRows
from dpo_kernels.testing import head_inputs

BF16 = torch.bfloat16


@pytest.fixture
def kernels(finding_impl):
    return dispatch.load(finding_impl)


def found(kernels, labels, vocab=67, **options):
    of = {"ignore_index": -100, "shift": False, "num_labelled": None, "predictors": None, "slots": labels.numel()}
    return kernels.find_rows(labels, vocab, **{**of, "stats": 2, **options})


def assert_finds(kernels, labels, ignore_index=-100, shift=0, predictors=None, **options):
    """Fields in the order of positions, and zeros at the others."""
    s, t = labels.shape
    aligned = torch.full((s, t), ignore_index)
    aligned[:, : t - shift] = labels[:, shift:].long()
    is_row = aligned != ignore_index
    is_row[:, t - shift :] = False
    places = torch.nonzero(is_row.flatten())[:, 0]
    slots = places if predictors is None else predictors.flatten()[places]
    expected = [places // t, places % t, places, aligned.flatten()[places], slots]
    mine = found(kernels, labels, ignore_index=ignore_index, shift=bool(shift), predictors=predictors, **options)
    assert mine.table.dtype == torch.int64 and torch.equal(mine.table, torch.stack(expected))
    assert [*map(torch.equal, (*mine.rows, mine.places, mine.y, mine.slots), expected)] == [True] * 5
    for table in (mine.token_logps, *mine.stats):
        assert table.shape == labels.shape and table.dtype == torch.float32 and not table[~is_row].any()
    assert mine.broken.item() == 0


@pytest.fixture
def large(kernels, monkeypatch):
    """In blocks of positions as they ship."""
    if kernels.__name__.endswith("triton"):
        monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_rows"), "BLOCK_P", 2048)
    return kernels


def some_labels(s, t, dtype=torch.int64, share=0.5):
    draw = torch.Generator().manual_seed(s * t)
    labels = torch.randint(67, (s, t), generator=draw)
    return labels.masked_fill(torch.rand(s, t, generator=draw) > share, 7 if dtype == torch.uint8 else -100).to(dtype)


@pytest.fixture
def fills_memory(monkeypatch):
    """New memory holds numbers that are wrong wherever they are not overwritten."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: new_empty(*args, **more).fill_(77))


@pytest.mark.parametrize(
    ("dtype", "shift", "known"),
    covering([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], [0, 1], [False, True]),
)
def test_labels_of_any_integers_that_lie_anyhow(kernels, fills_memory, dtype, shift, known):
    labels = some_labels(5, 23, dtype)
    ignored = 7 if dtype == torch.uint8 else -100
    wide = torch.full((5, 50), 3, dtype=dtype)
    wide[:, 2:48:2] = labels
    for lying in (
        labels,
        labels.T.contiguous().T,
        wide[:, 2:48:2],
        labels[:1].expand(4, 23),
        labels[:, :1].expand(5, 9),
    ):
        count = int((lying[:, shift:] != ignored).sum())
        assert_finds(kernels, lying, ignored, shift, num_labelled=count if known else None)


# fewer than a block has, what fills blocks, one more; more blocks than there may be
SIZES = [(1, 1), (1, 3), (700, 1), (3, 1023), (2, 1024), (41, 100), (5, 2049), (3, 22000)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_of_many_blocks(large, fills_memory, size, share):
    """Whose sequences do not lie one after the other."""
    apart = torch.nn.functional.pad(some_labels(*size, share=share), (2, 3), value=5)
    assert_finds(large, apart[:, 2:-3])


@pytest.mark.parametrize("at", [(0, 0), (0, 2048), (2, 700), (2, 2048)])
@pytest.mark.parametrize("what", ["label", "predictor", "count"])
def test_what_does_not_fit_in_any_block_is_found(large, at, what):
    labels, predictors = some_labels(3, 2049), torch.arange(3 * 2049).view(3, 2049).flip(1)
    labels[at] = 5
    count = int((labels >= 0).sum())
    assert found(large, labels, predictors=predictors, num_labelled=count) is not None
    for wrong in (67, -1) if what == "label" else (labels.numel(), -1) if what == "predictor" else (-1, 1):
        changed, predicted, known = labels.clone(), predictors.clone(), count
        if what == "label":
            changed[at] = wrong
        elif what == "predictor":
            predicted[at] = wrong
        else:
            known += wrong
        assert found(large, changed, predictors=predicted, num_labelled=known) is None


def test_predictors_of_ignored_labels_may_be_anything(kernels, fills_memory):
    labels = some_labels(4, 9)
    predictors = torch.randint(50, (9, 4)).T.masked_fill(labels < 0, 2**40)
    assert_finds(kernels, labels, predictors=predictors, slots=50)


def test_the_order_of_threads_changes_nothing_that_is_found(finding_impl, large, monkeypatch):
    labels = some_labels(3, 2049)
    tables = []
    for seed in range(4 if finding_impl == "cuda" else 2):
        monkeypatch.setenv("DPO_EMULATION_SEED", str(seed))
        tables.append(found(large, labels).table)
    assert all(torch.equal(table, tables[0]) for table in tables)


def test_what_no_kernel_counts(kernels):
    """Is left to PyTorch, which says what is wrong."""
    labels = some_labels(2, 3)
    assert found(kernels, labels[:0]) is None and found(kernels, labels[:, :0]) is None
    assert found(kernels, labels.to(torch.uint16)) is None
    assert found(kernels, labels, predictors=torch.zeros(2, 3, dtype=torch.int32)) is None
    assert found(kernels, labels, predictors=torch.zeros(2, 3, dtype=torch.int64), shift=True) is None
    assert found(kernels, torch.zeros(1, dtype=torch.int64).expand(2, positions.MOST_POSITIONS // 2)) is None


@pytest.mark.parametrize(
    ("dtype", "h"), covering([BF16, torch.float16, torch.float32, torch.float64], [1, 9, 64, 5000])
)
def test_rows_are_copied_from_anywhere(kernels, dtype, h):
    whole = torch.randn(3, 9, h + 5, 2).to(dtype)
    slots = torch.tensor([0, 14, 7, 7, 3])
    broken = torch.zeros((), dtype=torch.int64)
    views = [whole[:, :5, :h, 0].contiguous(), whole[:, :5, :h, 0], whole[..., 0].contiguous()[:, :5, 5:]]
    views += [whole[:, 4:, 5:, 1].transpose(0, 1).contiguous().transpose(0, 1), torch._neg_view(whole[:, :5, 5:, 1])]
    for hidden in views:
        assert hidden.shape == (3, 5, h)
        copied = kernels.gather_rows(hidden, slots, broken)
        assert copied.is_contiguous() and torch.equal(copied, hidden.flatten(0, 1)[slots])
    assert broken.item() == 0 and kernels.gather_rows(views[0], slots[:0], broken).shape == (0, h)
    for wrong in (torch.nan, torch.inf, -torch.inf):
        for place, expected in ((14, 1), (13, 0)):  # of a row that is taken, and of one that is not
            hidden = views[0].clone()
            hidden.view(15, h)[place, h // 2] = wrong
            broken = torch.zeros((), dtype=torch.int64)
            assert torch.equal(kernels.gather_rows(hidden, slots, broken).isfinite().all(), torch.tensor(not expected))
            assert broken.item() == expected


# Calls


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("function", ["logps", "logits", "loss", "reference"])
def test_more_labels_than_positions(function, shift):
    """What the host knows by itself it does not leave to an assertion."""
    inputs = head_inputs(4, 13, 32, 67)
    operands = inputs.hidden, inputs.weight, inputs.labels
    call = {
        "logps": lambda n: linear_sequence_logps(*operands, shift=shift, num_labelled=n),
        "logits": lambda n: sequence_logps(inputs.hidden, inputs.labels % 32, shift=shift, num_labelled=n),
        "loss": lambda n: linear_dpo_loss(*operands, torch.zeros(4), shift=shift, num_labelled=n),
        "reference": lambda n: linear_reference_logps(*operands, gradients=(), shift=shift, num_labelled=n),
    }[function]
    most = 4 * (13 - shift)
    with pytest.raises(ValueError, match=f"num_labelled: expected at most {most}, .* got {most + 1}"):
        call(most + 1)


def calls(impl, path, hidden, weight, labels, **options):
    """Results of a call, and the gradients that its path forms."""
    hidden, weight = hidden.detach().requires_grad_(path != "reference"), weight.detach()
    if path in ("C", "D"):
        weight.requires_grad_()
    given = {"impl": impl, **options}
    if path == "reference":
        out = linear_reference_logps(hidden, weight, labels, gradients=("hidden", "weight"), **given)
        return [out.logps, out.num_tokens, out.token_logps]
    if path == "C":
        out = linear_dpo_loss(hidden, weight, labels, torch.zeros(4), stats=("entropy",), beta=0.01, **given)
        loss, found = out.loss, [out.logps, out.num_tokens, out.stats["entropy"]]
    else:
        out = linear_sequence_logps(hidden, weight, labels, stats=("entropy",), **given)
        loss, found = out.logps.sum(), [out.logps, out.num_tokens, out.token_logps, out.stats["entropy"]]
    return [*found, *torch.autograd.grad(loss, [t for t in (hidden, weight) if t.requires_grad])]


OPTIONS = [{}, {"shift": True}, {"predicted": True}, {"known": True}, {"autocast": True}]


@pytest.mark.parametrize(
    ("path", "dtype", "options"),
    covering(["B", "C", "D", "reference"], [BF16, torch.float32, torch.float64], OPTIONS, full=2),
)
def test_paths_compute_the_same_of_rows_that_pytorch_finds(finding_impl, kernels, monkeypatch, path, dtype, options):
    """To the bit, gradients too."""
    inputs, options = head_inputs(4, 9, 32, 123).to(dtype), dict(options)
    hidden, labels, given = inputs.hidden, inputs.labels.int(), {}
    if options.pop("predicted", False):
        given["predictors"] = torch.arange(36).view(4, 9) * 3 % 36
        hidden = inputs.hidden.view(2, 18, 32)
    if options.pop("known", False):
        given["num_labelled"] = int((labels >= 0).sum())
    autocast = options.pop("autocast", False) and dtype == torch.float32
    looked, find = [], kernels.find_rows
    monkeypatch.setattr(kernels, "find_rows", lambda *args, **more: looked.append(find(*args, **more)) or looked[-1])
    results = []
    for _ in range(2):
        with torch.autocast(hidden.device.type, BF16, enabled=autocast):
            results.append(calls(finding_impl, path, hidden, inputs.weight, labels, **given, **options))
        assert (None in looked) == bool(len(results) - 1)
        monkeypatch.setattr(kernels, "find_rows", lambda *_, **__: looked.append(None))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.parametrize("predicted", [False, True])
@pytest.mark.parametrize("path", ["C", "reference"])
def test_rows_that_are_sorted_by_the_parts_of_a_loss(gpu_impl, monkeypatch, path, predicted):
    """Each with its label and its hidden state."""
    kernels = dispatch.load(gpu_impl)
    inputs = head_inputs(4, 90, 16, 75, labelled=0.8).to(BF16)
    sizes = (inputs.labels >= 0).sum(1).view(2, -1).sum(0).tolist()
    of_row = paths.kept_bytes(kernels, 1, inputs.weight, torch.float32, True, True).of_row
    given = {"chunk_bytes": kernels.padded_rows(max(sizes)) * of_row + inputs.weight.numel() * 4}
    if predicted:
        given["predictors"] = torch.arange(360).view(4, 90) * 7 % 360
    monkeypatch.setattr(exponential_paths, "stored_columns", lambda *_: 0)  # and so in several parts
    taken, take = [], LabelledRows.take
    monkeypatch.setattr(LabelledRows, "take", lambda rows, order: taken.append(rows.found) or take(rows, order))
    results = []
    for _ in range(2):
        results.append(calls(gpu_impl, path, inputs.hidden, inputs.weight, inputs.labels, **given))
        monkeypatch.setattr(kernels, "find_rows", lambda *_, **__: None)
    assert len(taken) == 2 and taken[0] is not None and taken[1] is None
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("path", ["B", "C", "D", "reference"])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("shape", [(4, 5), (4, 0), (4, 1)])
def test_no_labelled_rows(finding_impl, path, known, shape):
    labels = torch.full(shape, -100)
    results = calls(
        finding_impl, path, torch.full((*shape, 32), torch.nan).to(BF16), torch.randn(123, 32).to(BF16), labels,
        num_labelled=0 if known else None,
    )  # fmt: skip
    assert all((found == 0).all() for found in results) and results[0].shape == (4,)


@pytest.mark.parametrize("path", ["B", "C", "D", "reference"])
def test_what_is_wrong_is_named(finding_impl, path):
    inputs = head_inputs(4, 9, 32, 123, labelled=0.9).to(BF16)
    hidden, weight, labels = inputs.hidden.detach(), inputs.weight, inputs.labels.clone()
    labels[1, 3], labels[2, 7] = 5, -100
    count, predictors = int((labels >= 0).sum()), torch.arange(36).view(4, 9)

    def at(t, place, value):
        changed = t.clone()
        changed[place] = value
        return changed

    for wrong in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"hidden: expected finite .* for sequence 1, position 3 \(1 such"):
            calls(finding_impl, path, at(hidden, (1, 3, 4), wrong), weight, labels)
        calls(finding_impl, path, at(hidden, (2, 7, 4), wrong), weight, labels)  # of no label
    with pytest.raises(ValueError, match=r"labels: .* got 123 for sequence 1, position 3 \(1 such"):
        calls(finding_impl, path, hidden, weight, at(labels, (1, 3), 123))
    with pytest.raises(ValueError, match="predictors: .* 0 to 35, got 36 for sequence 1, position 3"):
        calls(finding_impl, path, hidden, weight, labels, predictors=at(predictors, (1, 3), 36))
    calls(finding_impl, path, hidden, weight, labels, predictors=at(predictors, (2, 7), 36))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=f"num_labelled: expected {count}, .* got {count - 1}"):
            calls(finding_impl, path, hidden, weight, labels, num_labelled=count - 1)


# forward and backward, of one block of rows or of the vocabulary, which are three launches. B: rows found and copied,
# the first columns folded, sums joined, dX finished, log-probabilities summed; dX goes where zeros are. D: rows found
# and copied, folded, joined, put back and summed; a gradient is picked at the rows; dX is finished and put where zeros
# are.
AROUND = {"B": (6, 2), "D": (6, 4)}


@pytest.mark.parametrize("path", AROUND)
@pytest.mark.skipif(DEVICE != "cpu", reason="what the emulation is asked for is counted")
def test_what_is_launched_around_the_products(gpu_impl, monkeypatch, path):
    kernels = dispatch.load(gpu_impl)
    inputs, launches = head_inputs(4, 20, 64, 600).to(BF16), launches_of(monkeypatch, gpu_impl)
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_(path == "D")
    num_labelled, given = int((inputs.labels >= 0).sum()), torch.ones(4)
    of = kernels.product

    def product(*args, **options):
        launches["product"] += 1
        with _disable_current_modes():  # one of the library's on a GPU
            return of(*args, **options)

    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(kernels, "recomputed_columns", lambda *_: 600)
    monkeypatch.setattr(logps, "check_head_is_finite", lambda *_: None)  # looks at nothing but a CPU's
    options, counts = {"num_labelled": num_labelled, "check_hidden": False, "impl": gpu_impl}, []
    with Operators(launches):
        out = linear_sequence_logps(hidden, weight, inputs.labels, **options).logps
        counts.append(launches.total())
        out.backward(given)
        counts.append(launches.total() - counts[0])
    forward, backward = AROUND[path]
    assert counts == ([forward + 3, backward] if path == "B" else [forward, backward + 3]), launches


# Of a whole call of path C, the loss of pairs among it: rows found and copied, dX finished, what was formed multiplied
# by the loss's gradient, dX put where zeros are; and six a part. For several, rows are sorted, sums of dW rounded.
@pytest.mark.parametrize(("parts", "chunk_bytes"), [(1, None), (4, 160 * 600 + 600 * 16 * 4)])
@pytest.mark.skipif(DEVICE != "cpu", reason="what the emulation is asked for is counted")
def test_what_path_c_launches(gpu_impl, monkeypatch, parts, chunk_bytes):
    kernels, launches = dispatch.load(gpu_impl), launches_of(monkeypatch, gpu_impl)
    inputs, of, planned = head_inputs(8, 20, 16, 600, labelled=1.0).to(BF16), kernels.product, []

    def product(*args, **options):
        launches["product"] += 1
        with _disable_current_modes():  # one of the library's on a GPU
            return of(*args, **options)

    plan = linear_dpo.plan_groups
    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(exponential_paths, "stored_columns", lambda *_: 0)
    monkeypatch.setattr(linear_dpo, "plan_groups", lambda *a, **more: planned.append(plan(*a, **more)) or planned[-1])
    for name in ("check_head_is_finite", "check_finite_logps"):  # of a CPU's
        monkeypatch.setattr(linear_dpo, name, lambda *_: None)
    with Operators(launches):
        out = linear_dpo_loss(
            *inputs[:3], inputs.ref_logps, num_labelled=160, check_hidden=False, chunk_bytes=chunk_bytes, impl=gpu_impl
        )
        out.loss.backward(torch.tensor(2.0))
    assert [len(groups) for groups in planned] == [parts]
    for name in ("lift_fresh", "_local_scalar_dense"):  # whether the gradient on a CPU is 1
        del launches[name]
    assert launches.total() == 7 + 6 * parts + 9 * (parts > 1), launches
    ours = {"triton": ("linear_pack_fwd_kernel", "join_kernel", "compare_kernel", "exp_dlogits_kernel", "product"),
            "cuda": ("linear_exp", "join", "compare", "weigh", "linear_dhidden", "linear_dweight")}  # fmt: skip
    assert sum(launches[name] for name in ours[gpu_impl]) == 6 * parts


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@pytest.mark.parametrize("h", [1, 67, 4100])
def test_rows_that_are_put_back(gpu_impl, dtype, h):
    """Times gradients that lie anyhow, each rounded once."""
    draw = torch.Generator().manual_seed(h)
    rows, wide = torch.randn(7, h, generator=draw), torch.randn(4, 22, generator=draw)
    place = torch.randperm(4 * 9, generator=draw)[:7].sort().values
    at = Rows(place // 9, place % 9)
    negative = torch.complex(wide, -wide).conj().imag[:, :9]
    assert negative.is_neg()
    transposed = wide[:, :9].T.contiguous().T
    for g in (wide[:, :9].contiguous(), wide[:, 2:20:2], transposed, wide[:, :1].expand(4, 9), negative):
        out = torch.full((4, 9, h), 5.0, dtype=dtype)
        expected = out.clone()
        expected[at.sequence, at.position] = (rows * g[at.sequence, at.position][:, None]).to(dtype)
        dispatch.load(gpu_impl).put_rows(rows, g, at, out)
        assert torch.equal(out, expected)


WRONG = {
    "count": {"num_labelled": 3},
    "label": {"num_labelled": 2, "vocab": 30},
    "predictor": {"num_labelled": 2, "predictors": [[0, 5, 99], [0, 0, 0]]},
}


@pytest.mark.parametrize("wrong", [None, *WRONG])
@pytest.mark.skipif(DEVICE != "cpu", reason="an assertion on a GPU ends what is done with it")
def test_a_host_that_does_not_wait_is_told_by_an_assertion(gpu_impl, monkeypatch, capfd, wrong):
    kernels = dispatch.load(gpu_impl)
    options = {"num_labelled": 2, **WRONG.get(wrong, {})}
    if "predictors" in options:
        options["predictors"] = torch.tensor(options["predictors"])
    labels = torch.tensor([[-100, 50, 3], [-100, -100, -100]])
    monkeypatch.setattr(positions.Search, "asserts", True)
    if gpu_impl == "triton":
        monkeypatch.setattr(importlib.import_module("dpo_kernels.impl.triton_rows"), "WITH_ASSERTS", {})
        builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    process = os.fork()  # which an assertion ends
    if process == 0:
        status = 1
        try:
            found(kernels, labels, **options)
            status = 0
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert (status == 0) == (wrong is None)
    assert ("num_labelled does not fit the labels" in capfd.readouterr().err) == (wrong is not None)
