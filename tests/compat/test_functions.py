"""The original implementation's functions, and the losses of torchtune and OpenRLHF, against their formulas."""

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_kernels.compat import OpenRLHFDPOLoss, TorchtuneDPOLoss, get_batch_logps, preference_loss

# policy chosen, policy rejected, reference chosen, reference rejected
LOGPS = [[-31.5, -8.25, -60.0], [-30.0, -19.5, -41.0], [-33.0, -9.0, -55.5], [-29.0, -11.0, -44.0]]
BETA = 0.3


def vectors(dtype=torch.float64):
    return [torch.tensor(values, dtype=dtype, requires_grad=i < 2) for i, values in enumerate(LOGPS)]


def expected_losses(beta=BETA, eps=0.0, ipo=False, reference_free=False):
    """Pair by pair, in Python's floats."""
    losses = []
    for chosen, rejected, ref_chosen, ref_rejected in zip(*LOGPS, strict=True):
        h = chosen - rejected - (0.0 if reference_free else ref_chosen - ref_rejected)
        positive, negative = math.log1p(math.exp(-beta * h)), math.log1p(math.exp(beta * h))
        losses.append((h - 1 / (2 * beta)) ** 2 if ipo else (1 - eps) * positive + eps * negative)
    return torch.tensor(losses, dtype=torch.float64)


def expected_rewards(beta=BETA):
    return [beta * (vectors()[i] - vectors()[i + 2]).detach() for i in range(2)]


@pytest.mark.parametrize(
    ("eps", "ipo", "reference_free"), [*itertools.product([0.0, 0.2], [False, True], [False, True])]
)
def test_preference_loss(eps, ipo, reference_free):
    """IPO knows no label smoothing, and a reference that the loss leaves out stays in the rewards."""
    losses, *rewards = preference_loss(*vectors(), BETA, eps, ipo, reference_free)
    torch.testing.assert_close(losses, expected_losses(eps=eps, ipo=ipo, reference_free=reference_free))
    for mine, other in zip(rewards, expected_rewards(), strict=True):
        torch.testing.assert_close(mine, other)
        assert not mine.requires_grad


@pytest.mark.parametrize("ipo", [False, True])
@pytest.mark.parametrize("reference_free", [False, True])
def test_preference_loss_gradients(ipo, reference_free):
    given = vectors()

    def losses(*policy):
        return preference_loss(*policy, *given[2:], BETA, 0.0 if ipo else 0.1, ipo, reference_free).losses

    assert torch.autograd.gradcheck(losses, given[:2])


def test_preference_loss_signature():
    """Names and defaults of the original implementation."""
    names = [
        "policy_chosen_logps",
        "policy_rejected_logps",
        "reference_chosen_logps",
        "reference_rejected_logps",
        "beta",
    ]
    parameters = inspect.signature(preference_loss).parameters.values()
    given = [(p.name, p.default) for p in parameters]
    options = [("label_smoothing", 0.0), ("ipo", False), ("reference_free", False)]
    assert given == [(name, inspect.Parameter.empty) for name in names] + options


def test_half_precision_is_computed_in_fp32():
    losses, *rewards = preference_loss(*vectors(torch.bfloat16), BETA)
    rounded = [t.detach().double() for t in vectors(torch.bfloat16)]
    expected = preference_loss(*rounded, BETA)
    for mine, other in zip((losses, *rewards), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_get_batch_logps(average, dtype):
    generator = torch.Generator("cpu").manual_seed(0)
    logits = (3 * torch.randn(4, 7, 31, generator=generator, device="cpu")).to(dtype).requires_grad_()
    labels = torch.randint(31, (4, 7), generator=generator, device="cpu")
    labels[:, :3] = -100
    labels[1, 5:] = -100
    before = labels.clone()

    exact = logits.detach().double().requires_grad_()
    token_logps = exact[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    counts = labels[:, 1:] != -100
    expected = (token_logps * counts).sum(1)
    if average:
        expected = expected / counts.sum(1)

    logps = get_batch_logps(logits, labels, average)
    assert logps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(labels, before)
    seed = torch.arange(1.0, 5.0, device="cpu")
    (mine,), (other,) = (
        torch.autograd.grad((x * seed).sum(), leaf) for x, leaf in ((logps, logits), (expected, exact))
    )
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=1e-5)


def test_get_batch_logps_of_nothing():
    logits, labels = torch.randn(2, 5, 11), torch.full((2, 5), -100)
    assert get_batch_logps(logits, labels, average_log_prob=True).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("ipo", [False, True])
def test_openrlhf(ipo):
    """The mean, where the original implementation returns a loss for each pair."""
    eps = 0.0 if ipo else 0.1
    loss, *rewards = OpenRLHFDPOLoss(BETA, label_smoothing=eps, ipo=ipo)(*vectors())
    torch.testing.assert_close(loss, expected_losses(eps=eps, ipo=ipo).mean())
    torch.testing.assert_close(rewards, expected_rewards())
    assert loss.requires_grad and loss.dim() == 0


def test_torchtune():
    """Objects with any further attributes, or four tensors."""
    given = vectors()
    policy, reference = (
        SimpleNamespace(chosen_logps=chosen, rejected_logps=rejected, chosen_logits=None, rejected_logits=None)
        for chosen, rejected in (given[:2], given[2:])
    )
    expected = [expected_losses(0.1, 0.2), *expected_rewards(0.1)]
    for inputs in ((policy, reference), given):
        losses, *rewards = TorchtuneDPOLoss(label_smoothing=0.2)(*inputs)
        torch.testing.assert_close([losses, *rewards], expected)
        assert losses.requires_grad
    names = ["policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"]
    assert list(inspect.signature(TorchtuneDPOLoss().forward).parameters) == names
    torch.testing.assert_close(TorchtuneDPOLoss()(**dict(zip(names, given, strict=True)))[0], expected_losses(0.1))


def test_errors():
    given = vectors()
    for i, name in enumerate(["policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"], 1):
        wrong = [t[:2] if k == i else t for k, t in enumerate(given)]
        with pytest.raises(ValueError, match=rf"^{name} must have shape \(3,\) as policy_chosen_logps has, got \(2,\)"):
            preference_loss(*wrong, BETA)
    with pytest.raises(ValueError, match="beta must be a positive finite number, got 0"):
        preference_loss(*given, 0)
    with pytest.raises(ValueError, match=r"label_smoothing must be a number in \[0, 0.5\), got 0.5"):
        OpenRLHFDPOLoss(BETA, 0.5)(*given)
    with pytest.raises(ValueError, match=r"^labels: expected shape \(2, 5\) to fit logits, got \(2, 4\)"):
        get_batch_logps(torch.zeros(2, 5, 11), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(
        ValueError, match="^policy_chosen_logps, .*: expected four .*, got SimpleNamespace, Tensor, NoneType, NoneType"
    ):
        TorchtuneDPOLoss()(SimpleNamespace(chosen_logps=given[0], rejected_logps=given[1]), given[2])
    with pytest.raises(
        ValueError, match="^policy_chosen_logps, .*: expected four .*, got Tensor, Tensor, Tensor, NoneType"
    ):
        TorchtuneDPOLoss()(*given[:3])
    pair = SimpleNamespace(chosen_logps=given[0], rejected_logps=given[1])
    with pytest.raises(ValueError, match="expected four .*, got SimpleNamespace, SimpleNamespace, Tensor, NoneType"):
        TorchtuneDPOLoss()(pair, pair, given[2])  # which would go unnoticed
