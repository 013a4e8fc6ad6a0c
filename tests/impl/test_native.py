"""The C++ kernels beyond what every implementation is tested for: each instruction set by itself, accuracy over all of
fp32, every tail length, memory bounds, strides."""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_kernels import linear_dpo_loss, linear_sequence_logps, sequence_logps
from dpo_kernels.impl import torch as plain
from dpo_kernels.impl.interface import STATS, Columns, GradPositions, GradRows, Labels, LogitTransform
from dpo_kernels.impl.reference import eager_logits, eager_token_logps
from dpo_kernels.losses import dpo_loss
from dpo_kernels.testing import assert_within_budget, head_inputs

_native = pytest.importorskip("dpo_kernels._native", reason="the extension was not built")
native = pytest.importorskip("dpo_kernels.impl.native")

HERE = Path(__file__).resolve().parent
LANES = {"avx512": 16, "avx2": 8, "baseline": 4}
SEQUENCE_WEIGHTS = torch.tensor([0.3, -0.7, 1.1, -0.2], dtype=torch.float64)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TRANSFORMS = {  # and whether there is a bias
    "plain": (LogitTransform(), False),
    "bias": (LogitTransform(), True),
    "scale": (LogitTransform(0.3, None, 0.7), False),
    "negative": (LogitTransform(-0.5, None, 1.7), True),  # the largest logit is that of the smallest product
    "softcap": (LogitTransform(1.0, 3.0, 1.0), False),
    "all": (LogitTransform(-0.5, 5.0, 1.7), True),
}


@pytest.fixture(params=_native.isas())
def isa(request):
    before = _native.isa()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)


@pytest.fixture(autouse=True)
def set_threads():
    """One thread unless a test asks for more: the few rows here are done before a second one has woken up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_use_isa():
    before = _native.isa()
    for name in _native.isas():
        _native.use_isa(name)
        assert _native.isa() == name
    _native.use_isa(before)
    with pytest.raises(ValueError, match="no kernels named 'avx1024'"):
        _native.use_isa("avx1024")
    assert _native.isa() == before and "baseline" in _native.isas()


def exp(x):
    y = x.clone()
    _native.exp(y.data_ptr(), y.numel())
    return y


def tanh(x):
    y, slope = x.clone(), torch.empty_like(x)
    _native.tanh(y.data_ptr(), slope.data_ptr(), y.numel())
    return y, slope


def bit_patterns(first, last, stride):
    """The fp32 numbers between two of the same sign, in steps of their bit patterns; the last one too."""
    bits = torch.tensor([first, last]).view(torch.int32).tolist()
    return torch.cat([torch.arange(*bits, stride, dtype=torch.int32).view(torch.float32), torch.tensor([last])])


def ulps(got, exact):
    """Errors in units of the last place that fp32 has at `exact`."""
    exponent = torch.frexp(exact)[1] - 1
    return (got.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent.clamp(min=-126) - 23)


def test_exp(isa):
    """At most 1.05 ulp (1.0192 over all of fp32), and 2 (0.7503) for subnormal results."""
    x = torch.cat([bit_patterns(0.0, 88.72283, 1009), bit_patterns(-0.0, -104.0, 1009)])
    exact = x.double().exp()
    assert (exact < 2**-126).sum() > 1000 and (
        exact < 2**-149
    ).any()  # subnormal results, the last of them 0 or the least
    error = ulps(exp(x), exact)
    assert error[exact >= 2**-126].max() <= 1.05 and error.max() <= 2
    assert error.max() > 0.7  # the ruler is not blind

    everything = torch.arange(-(2**31), 2**31, 2**16 + 1).int().view(torch.float32)  # every exponent, NaNs
    got, exact = exp(everything), everything.double().exp()
    assert torch.equal(got.isnan(), everything.isnan()) and everything.isnan().any()
    assert (got[everything > 88.722839] == torch.inf).all() and (everything > 88.722839).any()
    assert torch.equal(got[everything < -104], torch.zeros_like(got[everything < -104]))
    inside = (everything <= 88.72283) & (everything >= -104)
    assert ulps(got[inside], exact[inside]).max() <= 2
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 88.72284, -103.97, -103.98, 3e38, -3e38])
    expected = torch.tensor([torch.inf, 0, 1, 1, torch.inf, 1e-45, 0, torch.inf, 0])
    assert torch.equal(exp(special), expected)


def test_tanh(isa):
    """At most 2 ulp, and the slope 1 - tanh^2 at most 5 (1.9987 and 4.9809 over every number from 0.3 to 11)."""
    for sign in (1.0, -1.0):
        x = torch.cat([bit_patterns(0.0, 3.4e38, 1009), bit_patterns(0.3, 11.0, 101)]).mul_(sign)
        got, slope = tanh(x)
        exact, exact_slope = x.double().tanh(), x.double().cosh().pow(-2)
        assert ulps(got, exact).max() <= 2
        normal = exact_slope >= 2**-126
        assert ulps(slope, exact_slope)[normal].max() <= 5 and normal.any()
        assert (slope.double() - exact_slope)[~normal].abs().max() <= 3 * 2**-149
        assert ulps(got, exact).max() > 1.5 and ulps(slope, exact_slope).max() > 4
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, torch.nan])
    got, slope = tanh(special)
    assert got[:4].tolist() == [1, -1, 0, 0] and got.signbit()[:4].tolist() == [False, True, False, True]
    assert slope[:4].tolist() == [0, 0, 1, 1] and got[4].isnan() and slope[4].isnan()


def all_labelled(y):
    """Labels [n] of logits [1, n, V]."""
    return Labels(y[None], -100, len(y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_loaded_right(isa, dtype):
    """The sum of a row's logits, held in one number a lane and added in fp64, is exact where all of them are equal: a
    whole vector and one of three entries, and the label."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for v in (1, LANES[isa] + 4):
        logits = values[None, :, None].expand(1, 2**16, v).contiguous()
        y = torch.zeros(2**16, dtype=torch.int64)
        mean = native.logps_fwd(logits, all_labelled(y), stats=("mean_logit",))[2].flatten()
        torch.testing.assert_close(mean, values.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_stored_right(isa, dtype):
    """With logits 0 that sum to 1 and a label of probability 0 the gradient is g at the label and -g beside it: any
    fp32 number is rounded as PyTorch rounds it."""
    halves = torch.arange(2**15).to(torch.int16).view(dtype)
    halves = halves[halves.isfinite()].float()
    ties = (halves.double()[:-1] + halves.double()[1:]).div(2).float()  # between two neighbours: to the even one
    beside = [torch.nextafter(ties, torch.tensor(bound)) for bound in (torch.inf, -torch.inf)]
    # overflow: bf16's largest number is 255 * 2^120, and fp32 reaches beyond the middle to the next
    rest = torch.tensor(
        [torch.inf, torch.nan, 65519.996, 65520.0, 65536.0, 3.38e38, 3.3895314e38, 3.3961775e38, 3.4e38]
    )
    any_bits = torch.randint(-(2**31), 2**31, (100_000,), generator=seeded()).int().view(torch.float32)
    g = torch.cat([halves, ties, *beside, rest, any_bits])
    n, v = len(g), LANES[isa] + 4
    out = torch.zeros(1, n, v, dtype=dtype)
    label = torch.arange(n) % v
    norm, logp = torch.tensor([[0.0], [1.0]]).expand(2, n).contiguous(), torch.full((n,), -torch.inf)
    of = GradPositions(norm[:, None], logp[None], g[None])
    native.logps_bwd_(torch.zeros(1, n, v, dtype=dtype), all_labelled(label), of, out)
    is_label = torch.arange(v) == label[:, None]
    expected = torch.where(is_label, g[:, None], -g[:, None]).to(dtype)
    torch.testing.assert_close(out[0].float(), expected.float(), rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(out[0].view(torch.int16)[numbers], expected.view(torch.int16)[numbers])  # signs of 0


class TileCase:
    """Two tiles of n = V + 2 rows, with labels at every entry of the second one and on both sides of it."""

    def __init__(self, v, transform, with_bias, dtype, labels=None):
        generator = seeded(v)
        self.transform, self.start = transform, 3
        self.y = self.start + torch.arange(-1, v + 1) if labels is None else self.start + torch.tensor(labels)
        n = len(self.y)
        self.bias = torch.randn(v, generator=generator).to(dtype) if with_bias else None
        self.first, self.second = (torch.randn(n, w, generator=generator).mul_(3).to(dtype) for w in (self.start, v))
        self.norm = torch.stack([torch.full((n,), 2.5), torch.rand(n, generator=generator) + v]).to(dtype)
        self.logp = -torch.rand(n, generator=generator).mul(8).to(dtype)
        self.g = torch.randn(n, generator=generator).to(dtype)

    def run(self, impl, dtype):
        """Everything that the three tile kernels leave, by name."""
        rows, found = slice(0, len(self.y)), {}
        bias = None if self.bias is None else self.bias.to(dtype)
        before, here = Columns(0, None if bias is None else bias.new_ones(self.start)), Columns(self.start, bias)
        for name in ("fold", "fold_exp"):
            fold = impl.new_fold(self.y, dtype, STATS)
            for columns, tile in ((before, self.first), (here, self.second)):
                a = tile.to(dtype, copy=True)
                if name == "fold":
                    impl.fold_(fold, a, rows, columns, self.transform, keep=True)
                    assert torch.equal(a, tile.to(dtype))
                else:
                    found["sums"] = torch.ones(a.shape[0], 3, dtype=a.dtype)
                    impl.fold_exp_(fold, a, a, rows, columns, self.transform, found["sums"])
                    found["exp"] = a
                    found["label_slope"] = fold.label_slope
            for field in ("max", "target", "sum", "sum_z", "sum_ez", "sum_sq", "argmax"):
                found[f"{name}.{field}"] = getattr(fold, field)
        of_rows = GradRows(self.y, self.norm.to(dtype), self.logp.to(dtype), self.g.to(dtype))
        a, found["dlogits"] = self.second.to(dtype, copy=True), torch.full(self.second.shape, torch.nan, dtype=dtype)
        found["value"] = impl.dlogits(a, found["dlogits"], of_rows, here, self.transform)
        if impl is native:
            assert torch.equal(a, self.second.to(dtype))
            assert torch.equal(impl.dlogits(a, a, of_rows, here, self.transform), found["value"])
            assert torch.equal(a, found["dlogits"])  # in place
        return found


def assert_tiles_close(case, dtype):
    ours, exact = case.run(native, dtype), case.run(plain, torch.float64)
    # fp32: a logit of up to 10 is rounded four times to half an ulp of 4.8e-7, and exp makes that relative; sums of z
    # and of z exp(z) cancel, so their errors are those of their summands
    rtol, atol = (1e-12, 1e-12) if dtype == torch.float64 else (5e-6, 1e-6)
    scale = {"sum_z": case.second.shape[1], "sum_ez": case.second.shape[1]}
    for name, truth in exact.items():
        got = ours[name]
        if not truth.dtype.is_floating_point:
            assert torch.equal(got, truth), name
            continue
        atol_here = atol * scale.get(name.split(".")[-1], 1)
        message = f"{name}, V={case.second.shape[1]}: {{}}".format
        torch.testing.assert_close(got.double(), truth, rtol=rtol, atol=atol_here, msg=message)


@pytest.mark.parametrize("transform", ["plain", "all"])  # the others below
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tiles_of_every_tail_length(isa, dtype, transform):
    for v in range(1, 71):  # past four vectors of the widest kind and their rest
        assert_tiles_close(TileCase(v, *TRANSFORMS[transform], dtype), dtype)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("v", [2047, 2048, 2049, 2 * 2048 + 19])
def test_tiles_of_several_segments(isa, v, transform):
    labels = [i for i in (-1, 0, 1, 15, 16, 2046, 2047, 2048, 2049, 4095, 4096, 4114, v - 1, v) if i <= v]
    for dtype in (torch.float32, torch.float64):
        assert_tiles_close(TileCase(v, *transform, dtype, labels), dtype)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_top1_is_argmax_of_the_logits(isa, transform):
    """Also where different products give equal logits: the softcap bends the largest ones to the cap, and a factor
    rounds neighbours together."""
    transform, with_bias = transform
    n, v = 200, 40
    a = torch.randint(-3, 4, (n, v), generator=seeded()).float().mul_(40)
    a += torch.randint(0, 3, (n, v), generator=seeded(1)) * 2.0**-17
    bias = torch.zeros(v) if with_bias else None
    z, _ = plain._transform_(a.clone(), bias, transform)
    for y in (torch.arange(n) % v, z.argmax(1)):
        fold = native.new_fold(y, torch.float32, ("is_top1",))
        native.fold_(fold, a.clone(), slice(0, n), Columns(0, bias), transform, keep=True)
        _, _, stats = fold.finish(v, torch.float32)
        assert torch.equal(stats[0].bool(), z.argmax(1) == y)


def options(transform, bias):
    scale, softcap, temperature = transform
    return {"logit_scale": scale, "softcap": softcap, "temperature": temperature, "bias": bias}


def values_and_gradients(path, inputs, transform, with_bias, impl):
    """Of one of the paths A to E, by name. impl None: eagerly."""
    settings = options(transform, inputs.bias if with_bias else None)
    hidden, weight, labels = inputs[:3]
    if path == "B":
        weight = weight.detach()
        settings["bias"] = settings["bias"].detach() if with_bias else None
    operands = {"dhidden": hidden, "dweight": weight, "dbias": settings["bias"]}
    logits = eager_logits(hidden, weight, **settings).detach().requires_grad_() if path == "E" else None
    if path == "C":
        half = len(labels) // 2
        if impl is None:
            logps = eager_token_logps(eager_logits(hidden, weight, **settings), labels).sum(1)
            ref = inputs.ref_logps.to(logps.dtype)
            loss = dpo_loss(logps[:half], logps[half:], ref[:half], ref[half:]).losses.mean()
        else:
            out = linear_dpo_loss(hidden, weight, labels, inputs.ref_logps, impl=impl, **settings)
            loss, logps = out.loss, out.logps
        found = {"loss": loss[None], "logps": logps}
    else:
        if impl is None:
            token_logps = eager_token_logps(
                eager_logits(hidden, weight, **settings) if logits is None else logits, labels
            )
        elif path == "E":
            token_logps = sequence_logps(logits, labels, impl=impl).token_logps
        else:
            with torch.set_grad_enabled(path != "A"):
                token_logps = linear_sequence_logps(hidden, weight, labels, impl=impl, **settings).token_logps
        found = {"token_logps": token_logps}
        loss = (token_logps.sum(1) * SEQUENCE_WEIGHTS.to(token_logps.dtype)).sum()
    if path == "A":
        return {name: t.detach() for name, t in found.items()}
    wanted = {"dlogits": logits} if path == "E" else operands
    wanted = {name: t for name, t in wanted.items() if t is not None and t.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {**{n: t.detach() for n, t in found.items()}, **dict(zip(wanted, gradients, strict=True))}


def exact_values(path, inputs, transform, with_bias):
    """The same in fp64; of path E from the logits as they are rounded to the inputs' dtype."""
    if path != "E":
        return values_and_gradients(path, inputs.to(torch.float64), transform, with_bias, None)
    logits = eager_logits(inputs.hidden, inputs.weight, **options(transform, inputs.bias if with_bias else None))
    logits = logits.detach().double().requires_grad_()
    token_logps = eager_token_logps(logits, inputs.labels)
    (gradient,) = torch.autograd.grad((token_logps.sum(1) * SEQUENCE_WEIGHTS).sum(), logits)
    return {"token_logps": token_logps.detach(), "dlogits": gradient}


@pytest.mark.parametrize("path", "ABCDE")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_paths_within_the_error_budget(isa, path, transform, monkeypatch):
    monkeypatch.setattr(native, "TILE_BYTES", 16 * 1024)  # several tiles in both directions
    for shape, dtype in (
        ((4, 9, 31, 123), torch.float32),
        ((4, 50, 16, 699), torch.float32),
        ((4, 9, 31, 123), torch.bfloat16),
    ):
        inputs = head_inputs(*shape, dtype=dtype, confident=0.3)
        ours = values_and_gradients(path, inputs, *transform, "cpu")
        oracle = exact_values(path, inputs, *transform)
        eager = values_and_gradients(path, inputs.to(dtype), *transform, None)
        assert ours.keys() == oracle.keys()
        for name in ours:
            assert_within_budget(ours[name], eager[name], oracle[name], f"{path} {name} {shape} {dtype}", epsilon=2e-6)


@pytest.mark.parametrize("transform", ["plain", "all"])
def test_tiles_do_not_depend_on_the_number_of_threads(isa, set_threads, transform):
    for dtype in (torch.float32, torch.float64):
        for labels in (range(-1, 13), [5]):  # more rows than threads, and fewer
            case, runs = TileCase(333, *TRANSFORMS[transform], dtype, list(labels)), []
            for threads in (1, 2, 7):
                set_threads(threads)
                runs.append(case.run(native, dtype))
            for other in runs[1:]:
                for name, t in runs[0].items():
                    assert torch.equal(t, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_do_not_depend_on_the_number_of_threads(isa, set_threads, dtype):
    logits = torch.randn(3, 5, 2100, generator=seeded()).mul_(3).to(dtype)
    labels = torch.randint(2100, (3, 5), generator=seeded(1))
    labels[0, 2:] = -100
    runs = []
    for threads in (1, 2, 7, 64):  # 64: more threads than rows
        set_threads(threads)
        leaf = logits.clone().requires_grad_()
        out = sequence_logps(leaf, labels, stats=STATS, impl="cpu")
        runs.append((out.token_logps, *out.stats.values(), *torch.autograd.grad(out.logps.sum(), leaf)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("path", "ABCDE")
@pytest.mark.parametrize("threads", [1, 7])
def test_paths_give_the_same_bits_twice(path, threads, set_threads, monkeypatch):
    monkeypatch.setattr(native, "TILE_BYTES", 16 * 1024)
    set_threads(threads)
    inputs = head_inputs(4, 50, 16, 699, confident=0.3)
    transform = TRANSFORMS["all"]
    runs = [values_and_gradients(path, inputs, *transform, "cpu") for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    exact = exact_values(path, inputs, *transform)
    eager = values_and_gradients(path, inputs, *transform, None)
    for name in runs[0]:
        assert_within_budget(runs[0][name], eager[name], exact[name], name, epsilon=2e-6)


def test_no_rows(isa, set_threads):
    for threads in (1, 7):
        set_threads(threads)
        none = torch.empty(0, dtype=torch.int64)
        for dtype in (torch.float32, torch.float64):
            fold = native.new_fold(none, dtype, STATS)
            a, columns = torch.empty(0, 9, dtype=dtype), Columns(0, None)
            native.fold_(fold, a, slice(0, 0), columns, LogitTransform(), keep=False)
            native.fold_exp_(fold, a, a, slice(0, 0), columns, LogitTransform(), torch.empty(0, 4, dtype=dtype))
            norm, row = torch.empty(2, 0, dtype=dtype), torch.empty(0, dtype=dtype)
            assert native.dlogits(a, a, GradRows(none, norm, row, row), columns, LogitTransform()).shape == (0,)
        for labels in (torch.full((2, 3), -100), torch.empty(2, 0, dtype=torch.int64)):
            logits = torch.randn(*labels.shape, 9, requires_grad=True)
            out = sequence_logps(logits, labels, impl="cpu")
            assert out.logps.tolist() == [0, 0]
            assert torch.equal(torch.autograd.grad(out.logps.sum(), logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize("place", ["behind", pytest.param("before", marks=pytest.mark.full)])
def test_nothing_outside_the_tensors_is_touched(place, run_python, monkeypatch):
    """Tensors end, or begin, at a page that can be neither read nor written. The driver ends with one step over the
    edge for each kernel, which must kill it."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # threads that look for work take more time than the work
    assert "all kernels stayed inside, all oversteps were noticed" in run_python(HERE / "native" / "edges.py", place)


VIEWS = {
    "vocabulary apart": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "every second entry": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "wider rows": lambda t: torch.cat([t, t], dim=-1)[..., 3 : t.shape[-1] + 3].copy_(t),
    "positions before sequences": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "one sequence for all": lambda t: t[:1].expand_as(t),
    "one entry for all": lambda t: t[..., :1].expand_as(t),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("v", [37, 2 * 2048 + 5])  # strided entries go through a buffer of one segment
def test_strides_do_not_matter(isa, dtype, view, v):
    logits = view(torch.randn(3, 4, v, generator=seeded()).mul_(3).to(dtype))
    packed = logits.clone(memory_format=torch.contiguous_format)
    assert not logits.is_contiguous() and packed.is_contiguous()
    y = torch.tensor([[0, -1, -1, v - 1], [-1, 3, -1, -1], [17, -1, -1, 20]])
    labels = Labels(y, -1, None)
    expected = native.logps_fwd(packed, labels, stats=STATS)
    got = native.logps_fwd(logits, labels, stats=STATS)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    logp, norm, _ = expected
    of = GradPositions(norm, logp, torch.randn(3, 4, generator=seeded(1), dtype=logp.dtype))
    truth = torch.full_like(packed, 7.0)
    native.logps_bwd_(packed, labels, of, truth)
    assert torch.equal((truth == 0.0).all(-1), y == -1)
    for other in VIEWS.values():  # any stride in with any stride out
        out = other(torch.full_like(packed, 7.0))
        if 0 in out.stride():
            continue  # rows that share memory cannot all be written
        native.logps_bwd_(logits, labels, of, out)
        assert torch.equal(out, truth)
    if 0 not in logits.stride():
        native.logps_bwd_(logits, labels, of, logits)
        assert torch.equal(logits, truth)


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_transpose(isa, threads, set_threads):
    set_threads(threads)
    sizes = range(1, 41) if threads == 1 else (1, 7, 16, 40)
    everything = torch.randn(40 * 40, generator=seeded())
    for n in sizes:
        for v in sizes:
            a, out = everything[: n * v].view(n, v), torch.full((v, n), torch.nan)
            _native.transpose(a.data_ptr(), out.data_ptr(), n, v, threads)
            assert torch.equal(out, a.t()), (n, v)


class Operators(TorchDispatchMode):
    """The names of the operators that run. oneDNN's product must get operands that it has fast code for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        if "_linear_pointwise" in func.name():
            x, w, *_ = args
            assert x.is_contiguous() and (w.is_contiguous() or w.t().is_contiguous())
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["oneDNN", "torch.mm"])
def library(request, monkeypatch):
    if request.param == "oneDNN" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(native, "ONEDNN_IS_FASTER", request.param == "oneDNN")
    monkeypatch.setattr(native, "SMALL_PRODUCT", 0)
    assert native.products_by() == request.param
    return request.param


@pytest.mark.parametrize("path", "ABCD")
def test_paths_with_either_library_of_products(library, path, monkeypatch):
    monkeypatch.setattr(native, "TILE_BYTES", 16 * 1024)
    inputs, transform = head_inputs(4, 50, 16, 699, confident=0.3), TRANSFORMS["all"]
    ours = values_and_gradients(path, inputs, *transform, "cpu")
    exact = exact_values(path, inputs, *transform)
    eager = values_and_gradients(path, inputs, *transform, None)
    for name in ours:
        assert_within_budget(ours[name], eager[name], exact[name], name, epsilon=2e-6)


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # PyTorch's own, about its switch
@pytest.mark.parametrize("max_terms", [256, 12])
def test_product(library, max_terms, monkeypatch):
    """Whatever the operands' layout, with the library that was chosen and no other; PyTorch's switch is honoured."""
    monkeypatch.setattr(native, "MAX_TERMS", max_terms)
    a, b = torch.randn(9, 31, generator=seeded()), torch.randn(31, 17, generator=seeded(1))
    exact = a.double() @ b.double()
    for left in (a, a.t().contiguous().t(), torch.cat([a, a], 1)[:, :31]):
        for right in (
            b,
            b.t().contiguous().t(),
            torch.cat([b, b], 1)[:, :17],
            torch.cat([b.t(), b.t()], 1)[:, :31].t(),
        ):
            for enabled in (True, False):
                with torch.backends.mkldnn.flags(enabled=enabled), Operators() as operators:
                    used = native.products_by()
                    got = native.product(left, right, torch.full((9, 17), torch.nan))
                    added = native.product(left, right, out := torch.ones(9, 17), accumulate=True)
                assert used == (library if enabled else "torch.mm")
                assert any("_linear_pointwise" in name for name in operators.names) == (used == "oneDNN")
                assert added is out
                torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
                torch.testing.assert_close(added.double(), exact + 1, rtol=0, atol=1e-5)
    double = native.product(a.double(), b.double(), torch.empty(9, 17, dtype=torch.float64))
    torch.testing.assert_close(double, exact, rtol=1e-12, atol=1e-12)


def test_long_sums_of_logits_lose_little(library):
    """2048 terms in chains of 256 and not in one: 2.9e-7 rms with oneDNN's products, and not 5.7e-7."""
    x, w = torch.randn(64, 2048, generator=seeded()), torch.randn(500, 2048, generator=seeded(1)).div_(2048**0.5)
    error = native.product(x, w.t(), torch.empty(64, 500)).double() - x.double() @ w.double().t()
    assert error.square().mean().sqrt() < 4e-7


@pytest.mark.parametrize("frozen", [False, True])
def test_bias_and_weight_of_unusual_strides(frozen):
    hidden, weight, labels, bias, ref_logps = head_inputs(4, 9, 16, 60, logit_std=1.0)
    wide = torch.stack([weight.detach(), weight.detach()], 1).flatten(1)[:, :16].requires_grad_(not frozen)
    for b in (torch.stack([bias.detach()] * 2, 1)[:, 0], torch.ones(1).expand(60), torch._neg_view(bias.detach())):
        ours, theirs = (
            linear_dpo_loss(hidden, wide, labels, ref_logps, bias=b, impl=impl).loss for impl in ("cpu", "torch")
        )
        torch.testing.assert_close(ours, theirs)
        for mine, other in zip(torch.autograd.grad(ours, hidden), torch.autograd.grad(theirs, hidden), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_dlogits_of_strided_rows():
    """Copies that the kernel is given addresses of live until it has run."""
    generator = seeded()
    a, y = torch.randn(64, 50, generator=generator), torch.randint(50, (64, 2), generator=generator)
    norm = torch.stack([a.max(1).values, (a - a.max(1, keepdim=True).values).exp().sum(1)])
    logp, g = a.log_softmax(1).gather(1, y[:, :1])[:, 0], torch.rand(64, 2, generator=generator)
    strided_norm = torch.stack([norm, norm], 2)[..., 0]
    of = GradRows(y[:, 0], strided_norm, logp, g[:, 0])
    results = [
        (out := torch.empty_like(a), k.dlogits(a, out, of, Columns(0, None), LogitTransform())) for k in (native, plain)
    ]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
