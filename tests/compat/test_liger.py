"""Liger's classes: every output and gradient against eager code written here, and against Liger where it is there."""

import inspect
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_kernels import compat, dispatch, linear_dpo, logps
from dpo_kernels.compat import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
    scoring,
)
from dpo_kernels.losses import LISTWISE_LOSSES, LOSSES, SMOOTHED_LOSSES
from dpo_kernels.testing import Record, allocated, head_inputs

CLASSES = [name for name in compat.__all__ if name.startswith("Liger")]
LIGER_DPO_LOSSES = [
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
]  # what its DPO class accepts
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-10}, torch.float32: {"rtol": 5e-4, "atol": 1e-5}}
# S, T, H, V: Liger's own test shapes
LARGE, ODD = (16, 128, 1024, 4096), (6, 47, 31, 123)
SMALL = (6, 9, 31, 123)


class Given(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None

    @property
    def policy(self) -> tuple:
        return self.hidden, self.weight, self.bias

    @property
    def reference(self) -> tuple:
        return self.ref_hidden, self.ref_weight, self.ref_bias

    @property
    def wanted(self) -> list[Tensor]:
        return [t for t in self.policy if t is not None and t.requires_grad]


def make(shape=SMALL, dtype=torch.float64, *, bias=True, ref_bias=True, ignore_index=-100, logit_std=2.0, labelled=0.6):
    drawn = {"dtype": dtype, "logit_std": logit_std, "ignore_index": ignore_index, "labelled": labelled}
    policy, reference = head_inputs(*shape, **drawn), head_inputs(*shape, **drawn, seed=1)
    return Given(
        policy.hidden,
        policy.weight,
        policy.bias if bias else None,
        policy.labels,
        reference.hidden,
        reference.weight,
        reference.bias if ref_bias else None,
    )


def make_published(shape, **options):
    """As Liger's tests draw them: all of variance 1."""
    return make(shape, torch.float32, logit_std=shape[2] ** 0.5, **options)


def eager_scores(hidden, weight, bias, target, ignore_index):
    """Logits, and the sum and the mean of the labels' log-probabilities in each sequence."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    labelled = target != ignore_index
    tokens = logits.log_softmax(-1).gather(-1, target.where(labelled, 0)[..., None])[..., 0]
    sums = (tokens * labelled).sum(1)
    return logits, sums, sums / labelled.sum(1)


def eager_pairs(
    given, preference, *, ignore_index=-100, average=False, alpha=None, with_reference=False, nll_target=None
):
    """`preference(logps, ref_logps, sums, lengths)` gives losses [B], rewards [2B] and further outputs."""
    pairs = given.target.shape[0] // 2
    logits, sums, means = eager_scores(*given.policy, given.target, ignore_index)
    logps = means if average else sums
    ref_logps = torch.zeros_like(logps)
    if with_reference:
        with torch.no_grad():
            _, *ref_scores = eager_scores(*given.reference, given.target, ignore_index)
            ref_logps = ref_scores[average]
    lengths = (given.target != ignore_index).sum(1)
    nll = logps.new_zeros(())
    if alpha is not None and nll_target is None:
        nll = -sums[:pairs].sum() / lengths[:pairs].sum()
    elif alpha is not None:
        chosen = nll_target[:pairs]
        nll = -eager_scores(given.hidden[:pairs], *given.policy[1:], chosen, ignore_index)[1].sum()
        nll = nll / (chosen != ignore_index).sum()
    losses, rewards, further = preference(logps, ref_logps, sums, lengths)
    loss = losses.mean() + (0 if alpha is None else alpha) * nll
    logits_means = logits[:pairs].mean(), logits[pairs:].mean()
    return loss, (*logps.chunk(2), *logits_means, nll, *rewards.chunk(2), *further)


def dpo_terms(loss_type="sigmoid", beta=0.1, eps=0.0, tau=0.05, average=False):
    def preference(logps, ref_logps, sums, lengths):
        r = logps - ref_logps
        (r_w, r_l), (a_w, a_l) = r.chunk(2), (r if average else r / lengths).chunk(2)
        h, w, l_ = beta * (r_w - r_l), beta * r_w, beta * r_l
        policy, reference = (torch.sub(*x.chunk(2)).sort().values for x in (logps, ref_logps))
        aot, unpaired = beta * (policy - reference), beta * (r_w.sort().values - r_l.sort().values)
        losses = {
            "sigmoid": lambda: -logsigmoid(h),
            "cdpo": lambda: -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h),
            "robust": lambda: (-(1 - eps) * logsigmoid(h) + eps * logsigmoid(-h)) / (1 - 2 * eps),
            "hinge": lambda: (1 - h).clamp(min=0),
            "ipo": lambda: (a_w - a_l - 1 / (2 * beta)) ** 2,
            "exo_pair": lambda: (
                h.sigmoid() * (logsigmoid(h) - math.log(1 - eps)) + (-h).sigmoid() * (logsigmoid(-h) - math.log(eps))
            ),
            "nca_pair": lambda: -logsigmoid(w) - logsigmoid(-w) / 2 - logsigmoid(-l_) / 2,
            "bco_pair": lambda: -logsigmoid(w) - logsigmoid(-l_),
            "sppo_hard": lambda: (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2,
            "aot": lambda: -(1 - eps) * logsigmoid(aot) - eps * logsigmoid(-aot),
            "aot_unpaired": lambda: -(1 - eps) * logsigmoid(unpaired) - eps * logsigmoid(-unpaired),
            "apo_zero": lambda: 1 - w.sigmoid() + l_.sigmoid(),
            "apo_down": lambda: w.sigmoid() + 1 - h.sigmoid(),
            "discopop": lambda: -logsigmoid(h) * (1 - (h / tau).sigmoid()) + (-h).exp() * (h / tau).sigmoid(),
            "sft": lambda: -sums.chunk(2)[0] / lengths.chunk(2)[0].to(sums.dtype).mean(),
            "sigmoid_norm": lambda: -logsigmoid(beta * (a_w - a_l)),
        }[loss_type]()
        return losses, beta * r, ()

    return preference


def margin_terms(beta, eps=0.0, gamma=0.0):
    """CPO, and SimPO with gamma."""

    def preference(logps, ref_logps, sums, lengths):
        h = beta * torch.sub(*logps.chunk(2)) - gamma
        return -(1 - eps) * logsigmoid(h) - eps * logsigmoid(-h), beta * logps, ()

    return preference


def orpo_terms(beta):
    def preference(logps, ref_logps, sums, lengths):
        h = torch.sub(*(logps - torch.log1p(-logps.exp())).chunk(2))
        return -beta * logsigmoid(h), beta * logps, (logsigmoid(h).mean(), h.mean())

    return preference


def eager_kto(given, good, *, ignore_index=-100, beta=0.1, average=False, with_reference=False, kl=0.0):
    logits, *scores = eager_scores(*given.policy, given.target, ignore_index)
    logps = scores[average]
    r = logps
    if with_reference:
        with torch.no_grad():
            ref_logps = eager_scores(*given.reference, given.target, ignore_index)[1 + average]
        r = logps - ref_logps
    losses = 1 - torch.sigmoid(torch.where(good, beta * (r - kl), beta * (kl - r)))
    values = (logps, logits.sum((1, 2)), beta * r)
    return losses.mean(), tuple(v[of].sum() for v in values for of in (good, ~good))


def check(ours, expected, given, **tolerance):
    """Loss, outputs and gradients."""
    loss, outputs = ours
    tolerance = tolerance or TOLERANCE[loss.dtype]
    assert isinstance(outputs, tuple) and len(outputs) == len(expected[1])
    for i, (mine, other) in enumerate(zip((loss, *outputs), (expected[0], *expected[1]), strict=True)):
        assert mine.requires_grad == (i == 0)
        torch.testing.assert_close(mine, other.detach(), **tolerance, msg=lambda m, i=i: f"output {i}: {m}")
    factor = 3 if loss.dtype == torch.float64 else 1
    gradients = (torch.autograd.grad(x * factor, given.wanted) for x in (loss, expected[0]))
    for mine, other in zip(*gradients, strict=True):
        assert other.count_nonzero() > 0
        torch.testing.assert_close(mine, other, **tolerance)


def dpo(given, **options):
    return LigerFusedLinearDPOLoss(**options)(
        given.weight, given.hidden, given.target, given.bias, given.ref_hidden, given.ref_weight, given.ref_bias
    )


def without_reference(loss, given, *more):
    return loss(given.weight, given.hidden, given.target, given.bias, *more)


def kto(given, good, kl=None, **options):
    return LigerFusedLinearKTOLoss(**options)(
        given.hidden, given.weight, given.target, given.bias, good, *given.reference, kl
    )


def is_good(given):
    return torch.arange(given.target.shape[0], device=given.target.device) % 3 != 0


def nll_target_of(given, ignore_index=-100):
    """The target and some positions before, and one where the two want different tokens."""
    nll_target = given.target.clone()
    nll_target[:, ::3] = 7
    first = int((given.target[0] != ignore_index).nonzero()[0])
    nll_target[0, first] = (given.target[0, first] + 1) % 7
    assert {7} < set(nll_target[:2][given.target[:2] == ignore_index].tolist()), "positions that the target leaves out"
    return nll_target


PUBLISHED = [
    pytest.param(ODD, bias, nll, ignore_index, beta, id=f"{bias=}-{nll=}-{ignore_index}")
    for bias in (True, False)
    for nll in (True, False)
    for ignore_index, beta in ((-100, 0.1), (42, 0.2))
]
# A head of this size gives all losses of pairs the same log-probabilities: of one of them, and of KTO's.
AT_SIZE = pytest.param(LARGE, True, True, 42, 0.2, id="large", marks=pytest.mark.full)
PARAMETERS = ("shape", "bias", "nll", "ignore_index", "beta")
published = pytest.mark.parametrize(PARAMETERS, PUBLISHED)


@pytest.mark.parametrize(
    (*PARAMETERS, "ref_bias"),
    [
        pytest.param(*case.values, ref_bias, id=f"{case.id}-{ref_bias=}", marks=case.marks)
        for case in [*PUBLISHED, AT_SIZE]
        for ref_bias in ((True,) if case is AT_SIZE else (True, False))
    ],
)
def test_published_dpo(shape, bias, nll, ignore_index, beta, ref_bias):
    given = make_published(shape, bias=bias, ref_bias=ref_bias, ignore_index=ignore_index)
    expected = eager_pairs(
        given, dpo_terms(beta=beta), ignore_index=ignore_index, alpha=1.0 if nll else None, with_reference=True
    )
    check(dpo(given, ignore_index=ignore_index, beta=beta, compute_nll_loss=nll), expected, given)


@published
def test_published_cpo(shape, bias, nll, ignore_index, beta):
    given = make_published(shape, bias=bias, ignore_index=ignore_index)
    loss = LigerFusedLinearCPOLoss(ignore_index, beta, 0.7, 0.1 if nll else 0.0, nll)
    expected = eager_pairs(
        given, margin_terms(beta, 0.1 if nll else 0.0), ignore_index=ignore_index, alpha=0.7 if nll else None
    )
    check(without_reference(loss, given), expected, given)


@published
def test_published_simpo(shape, bias, nll, ignore_index, beta):
    given = make_published(shape, bias=bias, ignore_index=ignore_index)
    loss = LigerFusedLinearSimPOLoss(ignore_index, beta, 0.7, compute_nll_loss=nll, gamma=0.3)
    expected = eager_pairs(
        given, margin_terms(beta, gamma=0.3), ignore_index=ignore_index, average=True, alpha=0.7 if nll else None
    )
    check(without_reference(loss, given), expected, given)


@published
def test_published_orpo(shape, bias, nll, ignore_index, beta):
    given = make_published(shape, bias=bias, ignore_index=ignore_index)
    loss = LigerFusedLinearORPOLoss(ignore_index, beta, nll)
    expected = eager_pairs(given, orpo_terms(beta), ignore_index=ignore_index, average=True, alpha=1.0 if nll else None)
    check(without_reference(loss, given), expected, given)


@pytest.mark.parametrize(PARAMETERS, [*PUBLISHED, AT_SIZE])
def test_published_kto(shape, bias, nll, ignore_index, beta):
    # KTO has no NLL: the option stands for the bias of the reference
    given = make_published(shape, bias=bias, ref_bias=nll, ignore_index=ignore_index)
    options = {"ignore_index": ignore_index, "beta": beta}
    expected = eager_kto(given, is_good(given), kl=1.5, with_reference=True, **options)
    check(kto(given, is_good(given), torch.tensor(1.5), use_ref_model=True, **options), expected, given)


def test_a_loss_of_rankings_is_refused():
    with pytest.raises(ValueError, match="loss_type: expected a loss of pairs, got 'plackett_luce', which of pairs is"):
        LigerFusedLinearDPOLoss(loss_type="plackett_luce")


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss_type", sorted(LOSSES.keys() - LISTWISE_LOSSES))
def test_every_dpo_loss(loss_type, average):
    """Those that Liger refuses too; and an NLL with a weight that the loss must not share."""
    given = make()
    eps = 0.1 if loss_type in SMOOTHED_LOSSES else 0.0
    options = {"loss_type": loss_type, "beta": 0.3, "label_smoothing": eps, "discopop_tau": 0.4}
    ours = dpo(given, average_log_prob=average, compute_nll_loss=True, alpha=0.7, **options)
    terms = dpo_terms(loss_type, 0.3, eps, 0.4, average)
    check(ours, eager_pairs(given, terms, average=average, alpha=0.7, with_reference=True), given)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nll", [False, True])
def test_dpo_without_reference(average, nll):
    """What is given of a reference is not looked at."""
    given = make(bias=False)._replace(ref_hidden=None, ref_weight="nothing", ref_bias=None)
    ours = dpo(given, use_ref_model=False, average_log_prob=average, compute_nll_loss=nll)
    check(ours, eager_pairs(given, dpo_terms(), average=average, alpha=1.0 if nll else None), given)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_cpo_options(average, eps):
    given = make()
    loss = LigerFusedLinearCPOLoss(beta=0.3, alpha=0.5, label_smoothing=eps, average_log_prob=average)
    check(without_reference(loss, given), eager_pairs(given, margin_terms(0.3, eps), average=average, alpha=0.5), given)


@pytest.mark.parametrize("eps", [0.0, 0.2])
@pytest.mark.parametrize("gamma", [0.0, 1.4])
def test_simpo_options(eps, gamma):
    given = make()
    loss = LigerFusedLinearSimPOLoss(beta=2.0, gamma=gamma, alpha=0.5, label_smoothing=eps)
    terms = margin_terms(2.0, eps, gamma)
    check(without_reference(loss, given), eager_pairs(given, terms, average=True, alpha=0.5), given)


@pytest.mark.parametrize("ignore_index", [-100, 42])
@pytest.mark.parametrize("nll", [False, True])
def test_orpo_with_other_labels_for_the_nll(ignore_index, nll):
    given = make(ignore_index=ignore_index)
    nll_target = nll_target_of(given, ignore_index)
    loss = LigerFusedLinearORPOLoss(ignore_index, 0.3, nll)
    expected = eager_pairs(
        given,
        orpo_terms(0.3),
        ignore_index=ignore_index,
        average=True,
        alpha=1.0 if nll else None,
        nll_target=nll_target,
    )
    check(without_reference(loss, given, nll_target), expected, given)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("kl", ["none", "number", "scalar", "one", "each"])
def test_kto_options(average, with_reference, kl):
    """Five sequences: nothing is paired."""
    given = make((5, 9, 31, 123))
    each = torch.rand(5, dtype=torch.float64)
    baseline = {"none": None, "number": 0.8, "scalar": each[1], "one": each[1:2], "each": each}[kl]
    ours = kto(given, is_good(given), baseline, beta=0.3, average_log_prob=average, use_ref_model=with_reference)
    expected = eager_kto(
        given,
        is_good(given),
        beta=0.3,
        average=average,
        with_reference=with_reference,
        kl=0.0 if baseline is None else baseline,
    )
    check(ours, expected, given)


def test_the_baseline_of_kto_has_no_gradient():
    given, baseline = make((5, 9, 31, 123)), torch.rand(5, dtype=torch.float64, requires_grad=True)
    kto(given, is_good(given), baseline * 2)[0].backward()
    assert baseline.grad is None and given.hidden.grad is not None


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_frozen(name, trained):
    given = make()
    for part, tensor in (("hidden", given.hidden), ("weight", given.weight), ("bias", given.bias)):
        tensor.requires_grad_(part == trained)
    loss, outputs = call(name, given)
    expected, _ = eager(name, given)
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad == (trained != "nothing") and not any(t.requires_grad for t in outputs)
    if trained != "nothing":
        torch.testing.assert_close(*(torch.autograd.grad(x, given.wanted)[0] for x in (loss, expected)))


def call(name, given, **options):
    """With the defaults, and a reference where the class takes one."""
    if name == "LigerFusedLinearDPOLoss":
        return dpo(given, **options)
    if name == "LigerFusedLinearKTOLoss":
        return kto(given, is_good(given), use_ref_model=True, **options)
    return without_reference(getattr(compat, name)(**options), given)


def eager(name, given, ignore_index=-100):
    return {
        "LigerFusedLinearDPOLoss": lambda: eager_pairs(
            given, dpo_terms(), ignore_index=ignore_index, with_reference=True
        ),
        "LigerFusedLinearCPOLoss": lambda: eager_pairs(given, margin_terms(0.1), ignore_index=ignore_index, alpha=1.0),
        "LigerFusedLinearSimPOLoss": lambda: eager_pairs(
            given, margin_terms(0.1, gamma=0.5), ignore_index=ignore_index, average=True, alpha=1.0
        ),
        "LigerFusedLinearORPOLoss": lambda: eager_pairs(
            given, orpo_terms(0.1), ignore_index=ignore_index, average=True, alpha=1.0
        ),
        "LigerFusedLinearKTOLoss": lambda: eager_kto(
            given, is_good(given), ignore_index=ignore_index, with_reference=True
        ),
    }[name]()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_half_precision(name, autocast):
    """Operands are rounded and nothing else: results are those of the rounded operands in fp64, returned in fp32."""
    exact = make()
    leaves = make(dtype=torch.float32 if autocast else torch.bfloat16)
    rounded = Given(*(t.detach().bfloat16().double() if t.is_floating_point() else t for t in exact))
    rounded = rounded._replace(hidden=rounded.hidden.requires_grad_(), weight=rounded.weight.requires_grad_())
    with torch.autocast(leaves.hidden.device.type, torch.bfloat16, enabled=autocast):
        loss, outputs = call(name, leaves)
    expected, expected_outputs = eager(name, rounded)
    assert all(t.dtype == torch.float32 for t in (loss, *outputs))
    values = list(zip((loss, *outputs), (expected, *expected_outputs), strict=True))
    if autocast:  # the sums of all logits are of operands that are not rounded: they are no product
        values = values[:3]
    for mine, other in values:
        torch.testing.assert_close(mine.double(), other.detach(), rtol=1e-4, atol=1e-4)
    for mine, other in zip(
        torch.autograd.grad(loss, [leaves.hidden, leaves.weight]),
        torch.autograd.grad(expected, [rounded.hidden, rounded.weight]),
        strict=True,
    ):
        assert mine.dtype == leaves.hidden.dtype
        assert (mine.double() - other).norm() < 1e-2 * other.norm()


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_labelled(name):
    """All zeros and no NaN, where averages divide by the number of tokens; one response, or all of them."""
    given = make()
    given.target[1] = -100
    loss, outputs = call(name, given)
    gradients = torch.autograd.grad(loss, given.wanted)
    assert all(t.isfinite().all() for t in (loss, *outputs, *gradients))
    given.target[:] = -100
    loss, outputs = call(name, given)
    assert all(t.isfinite().all() for t in (loss, *outputs)) and outputs[0].count_nonzero() == 0
    assert all(t.count_nonzero() == 0 for t in torch.autograd.grad(loss, given.wanted))


def test_label_smoothing_without_effect_is_told():
    with pytest.warns(UserWarning, match=r"label_smoothing=0\.1 has no effect on loss_type 'sigmoid'.*'cdpo'"):
        loss = LigerFusedLinearDPOLoss(label_smoothing=0.1)
    given = make(bias=False)
    ours = loss(given.weight, given.hidden, given.target, None, *given.reference)
    check(ours, eager_pairs(given, dpo_terms(), with_reference=True), given)


@pytest.mark.parametrize("name", CLASSES)
def test_liger_signatures(name):
    """Argument names, their order and their defaults, in the constructor and in forward."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    for method in ("__init__", "forward"):
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(getattr(m, name), method)).parameters.values()]
            for m in (compat, liger)
        )
        assert ours == theirs


def both(name, arguments, given, *args, **kwargs):
    """The same call of this package's class and of Liger's, compared."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    ours = getattr(compat, name)(**arguments)(*args, **kwargs)
    # in one chunk, where a KTO baseline for each sequence is one for each
    theirs = getattr(liger, name)(**arguments, compiled=False, chunk_size=given.target.shape[0])(*args, **kwargs)
    check(ours, theirs, given)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("loss_type", LIGER_DPO_LOSSES)
def test_liger_dpo(loss_type, average):
    given = make(ODD, torch.float32, ignore_index=42)
    arguments = {"ignore_index": 42, "beta": 0.2, "alpha": 0.7, "compute_nll_loss": average, "loss_type": loss_type}
    arguments |= {"label_smoothing": 0.1 if loss_type in SMOOTHED_LOSSES else 0.0, "average_log_prob": average}
    head = given.weight, given.hidden, given.target, given.bias
    both("LigerFusedLinearDPOLoss", arguments, given, *head, *given.reference)


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_liger_cpo(nll, average):
    given = make(ODD, torch.float32)
    arguments = {"beta": 0.2, "alpha": 0.7, "label_smoothing": 0.1, "compute_nll_loss": nll}
    head = given.weight, given.hidden, given.target, given.bias
    both("LigerFusedLinearCPOLoss", {**arguments, "average_log_prob": average}, given, *head)
    if average:
        both("LigerFusedLinearSimPOLoss", {**arguments, "gamma": 0.3}, given, *head)


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("with_nll_target", [False, True])
def test_liger_orpo(nll, with_nll_target):
    given = make(ODD, torch.float32, bias=nll)
    nll_target = nll_target_of(given) if with_nll_target else None
    head = given.weight, given.hidden, given.target, given.bias, nll_target
    both("LigerFusedLinearORPOLoss", {"beta": 0.2, "compute_nll_loss": nll}, given, *head)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kl", [None, 0.7, "each"])
def test_liger_kto(average, kl):
    given = make(ODD, torch.float32, ref_bias=average)
    baseline = torch.rand(len(given.target)) if kl == "each" else kl
    both(
        "LigerFusedLinearKTOLoss",
        {"beta": 0.2, "use_ref_model": average, "average_log_prob": average},
        given,
        *(given.hidden, given.weight, given.target, given.bias, is_good(given)),
        *given.reference,
        kl=baseline,
    )


TILE = 64 * 1024


@pytest.fixture
def small_tiles(monkeypatch):
    """The implementation in PyTorch's operators, which `Record` sees into."""
    module = dispatch.load("torch")
    choice = dispatch.Choice(torch.get_default_device().type, "torch", "this test")
    monkeypatch.setattr(dispatch, "CHOICES", (choice,))
    monkeypatch.setattr(module, "tile_bytes", lambda device: TILE)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "options", "reference", "policy"),
    [
        ("LigerFusedLinearDPOLoss", {}, 1, 3),
        ("LigerFusedLinearDPOLoss", {"use_ref_model": False, "compute_nll_loss": True}, 0, 3),
        ("LigerFusedLinearDPOLoss", {"average_log_prob": True}, 1, 3),
        ("LigerFusedLinearDPOLoss", {"average_log_prob": True, "loss_type": "hinge"}, 1, 4),
        ("LigerFusedLinearCPOLoss", {"label_smoothing": 0.1}, 0, 3),
        ("LigerFusedLinearCPOLoss", {"label_smoothing": 0.1, "average_log_prob": True}, 0, 4),
        ("LigerFusedLinearSimPOLoss", {}, 0, 3),
        ("LigerFusedLinearORPOLoss", {}, 0, 4),
        ("LigerFusedLinearKTOLoss", {}, 1, 4),
    ],
)
def test_products_and_memory(name, options, reference, policy, small_tiles):
    """Products of labelled positions alone, and no tensor of the size of their logits, let alone of all."""
    given = make((4, 50, 16, 4000), torch.float32, labelled=0.5)
    rows, row_bytes = int((given.target != -100).sum()), 4000 * 4
    a_pair_at_a_time = (rows // 2 + 8) * row_bytes
    small_tiles.setattr(linear_dpo, "DEFAULT_CHUNK_BYTES", a_pair_at_a_time)
    for products in (policy, 2):
        with Record() as record:
            loss, _ = call(name, given, **options)
            torch.autograd.grad(loss, given.wanted)
        assert record.multiplications / (rows * given.weight.numel()) == pytest.approx(reference + products)
        bound = a_pair_at_a_time if products == 3 else max(TILE, given.weight.nbytes)
        assert bound < 0.7 * rows * row_bytes, "the bound must tell the logits apart"
        assert record.largest[0] <= bound, record.largest
        given.weight.requires_grad_(False)
        given.bias.requires_grad_(False)


def test_orpo_scores_no_token_twice(small_tiles):
    """Labels of the NLL that the target has too cost nothing; the prompt's are its own."""
    given = make((4, 50, 16, 4000), torch.float32, labelled=0.5)
    nll_target = given.target.where(given.target != -100, 7)
    rows = int((given.target[2:] != -100).sum()) + 2 * 50
    with Record() as record:
        loss, _ = without_reference(LigerFusedLinearORPOLoss(), given, nll_target)
        torch.autograd.grad(loss, given.wanted)
    assert record.multiplications / (rows * given.weight.numel()) == pytest.approx(4)


def test_the_mean_of_logits_converts_the_head_in_pieces(monkeypatch):
    if torch.get_default_device().type != "cpu":
        pytest.skip("the allocator's record is of the CPU")
    given = make((4, 9, 512, 4001), torch.bfloat16)
    expected = (given.hidden.double() @ given.weight.double().T + given.bias.double()).sum((1, 2))
    piece = 2**16
    monkeypatch.setattr(logps, "SUMMED_AT_A_TIME", piece)
    made = allocated(lambda: scoring.logit_sums(*given.policy))
    torch.testing.assert_close(made.result.double(), expected.detach(), rtol=1e-5, atol=1e-2)
    sums_of_pieces = given.weight.numel() // piece * 512 * 4
    assert made.peak < 2 * (piece * 4 + sums_of_pieces) < given.weight.numel() * 4 / 2


def test_a_second_backward_is_refused_by_name():
    given = make()
    loss, _ = dpo(given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(6, 9)}, r"^_input: expected shape \[.*, T, H\], got \(6, 9\)"),
        ({"hidden": None}, "^_input: expected a tensor, got NoneType"),
        (
            {"target": torch.zeros(6, 8, dtype=torch.long)},
            r"^target: expected shape \(6, 9\) to fit _input, got \(6, 8\)",
        ),
        ({"target": torch.zeros(6, 9)}, "^target: expected an integer dtype, got torch.float32"),
        ({"weight": torch.zeros(123, 30)}, r"^lin_weight: expected shape \[V, 31\] to fit _input, got \(123, 30\)"),
        (
            {"weight": torch.zeros(123, 31), "bias": None},
            "^lin_weight: expected the dtype of _input, torch.float64, got torch.float32",
        ),
        ({"bias": torch.zeros(7)}, r"^bias: expected shape \[123\], got \(7,\)"),
        ({"target": torch.full((6, 9), 123)}, r"^target.*: expected values in \[0, 123\).*got 123 for sequence 0, pos"),
        ({"hidden": torch.full((6, 9, 31), torch.nan).double()}, "^_input: expected finite values at labelled"),
        (
            {"hidden": torch.zeros(0, 9, 31), "target": torch.zeros(0, 9, dtype=torch.long)},
            "^_input: expected .*, got 0",
        ),
    ],
)
def test_errors_of_the_policy(name, change, message):
    with pytest.raises(ValueError, match=message):
        given = make()._replace(**change)
        if name == "LigerFusedLinearKTOLoss":
            LigerFusedLinearKTOLoss()(
                given.hidden, given.weight, given.target, given.bias, torch.ones(len(given.target), dtype=torch.bool)
            )
        else:
            options = {"use_ref_model": False} if name == "LigerFusedLinearDPOLoss" else {}
            without_reference(getattr(compat, name)(**options), given)


@pytest.mark.parametrize("name", ["LigerFusedLinearDPOLoss", "LigerFusedLinearKTOLoss"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": None}, "^ref_input: expected a tensor, got NoneType"),
        ({"ref_weight": None}, "^ref_weight: expected a tensor, got NoneType"),
        ({"ref_hidden": torch.zeros(6, 8, 31).double()}, r"^target: expected shape \(6, 8\) to fit ref_input"),
        ({"ref_bias": torch.zeros(7)}, r"^ref_bias: expected shape \[123\], got \(7,\)"),
        ({"ref_weight": torch.zeros(123, 30)}, r"^ref_weight: expected shape \[V, 31\] to fit ref_input"),
    ],
)
def test_errors_of_the_reference(name, change, message):
    with pytest.raises(ValueError, match=message):
        call(name, make()._replace(**change))


def test_errors_of_pairs_and_labels():
    given = make((5, 9, 31, 123))
    for name in CLASSES:
        if name != "LigerFusedLinearKTOLoss":
            with pytest.raises(ValueError, match="^_input: expected an even number of sequences, .*, got 5"):
                call(name, given)
    for good, got in ((None, "None"), (torch.ones(5), "torch.float32 of shape"), (is_good(given)[:4], r".* \[4\]")):
        with pytest.raises(ValueError, match=rf"^preference_labels: expected torch.bool of shape \[5\], got {got}"):
            kto(given, good)
    with pytest.raises(ValueError, match=r"^kl: expected a scalar or shape \[5\], got torch.float32 of shape \[4\]"):
        kto(given, is_good(given), torch.ones(4))
    given = make()
    orpo = LigerFusedLinearORPOLoss()
    with pytest.raises(ValueError, match=r"^nll_target: expected shape \(6, 9\) to fit _input, got \(3, 9\)"):
        without_reference(orpo, given, given.target[:3])
    with pytest.raises(ValueError, match=r"^target \(from sequence 6 on, nll_target\): .*for sequence 6, position 4"):
        without_reference(orpo, given, given.target.where(torch.arange(9) != 4, 123))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"loss_type": "simpo"}, "loss_type must be one of .*, got 'simpo'"),
        ("DPO", {"beta": 0.0}, "beta must be a positive finite number, got 0.0"),
        ("DPO", {"alpha": math.inf}, "alpha must be finite numbers, got inf"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing must be above 0"),
        ("DPO", {"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be a number in \[0, 0.5\)"),
        ("CPO", {"beta": -1.0}, "beta must be"),
        ("CPO", {"label_smoothing": 0.6}, "label_smoothing must be"),
        ("SimPO", {"gamma": math.nan}, "gamma must be a finite number, got nan"),
        ("SimPO", {"beta": 0.0}, "beta must be"),
        ("ORPO", {"beta": 0.0}, "beta must be"),
        ("KTO", {"beta": "0.1"}, "beta must be"),
    ],
)
def test_errors_of_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(compat, f"LigerFusedLinear{name}Loss")(**options)
