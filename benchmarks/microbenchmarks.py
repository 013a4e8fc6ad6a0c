"""Each public operator beside eager PyTorch, with pytest-benchmark:

    pytest benchmarks/microbenchmarks.py --benchmark-group-by=group

Before its time is taken, what a call returns and its gradients are held against eager in fp64: the error is at most
that of eager in the dtype of the inputs. The environment decides where and at which sizes:

    DPO_KERNELS_TEST_DEVICE     cpu, or cuda
    DPO_KERNELS_BENCH_IMPL      auto, or one of torch, cpu, triton, cuda
    DPO_KERNELS_BENCH_TOKENS    N, labelled positions in 8 sequences, a multiple of 8 (256)
    DPO_KERNELS_BENCH_HIDDEN    H (256)
    DPO_KERNELS_BENCH_VOCAB     V (8192)
    DPO_KERNELS_BENCH_PAIRS     B, of the losses on vectors (1024)
    DPO_KERNELS_BENCH_ROUNDS    timed calls after one that is not (5); of the losses, 100 times as many
"""

from __future__ import annotations

import os
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F

from dpo_kernels import cpo_loss, dispatch, dpo_loss, kto_loss, orpo_loss, simpo_loss
from dpo_kernels.bench import contenders
from dpo_kernels.bench.cases import SEQUENCES, HeadCase, LogitsCase, Result, sigmoid_loss
from dpo_kernels.bench.peers import eager, forward_only, frozen_head
from dpo_kernels.impl.reference import eager_token_logps
from dpo_kernels.measure import synchronize
from dpo_kernels.testing import assert_within_budget

DEVICE = torch.device(os.environ.get("DPO_KERNELS_TEST_DEVICE", "cpu"))
IMPL = dispatch.check_runs(os.environ.get("DPO_KERNELS_BENCH_IMPL") or dispatch.default(DEVICE), DEVICE)
TOKENS, HIDDEN, VOCAB, PAIRS, ROUNDS = (
    int(os.environ.get(f"DPO_KERNELS_BENCH_{name}", default))
    for name, default in (("TOKENS", 256), ("HIDDEN", 256), ("VOCAB", 8192), ("PAIRS", 1024), ("ROUNDS", 5))
)
if TOKENS % SEQUENCES:
    raise ValueError(f"DPO_KERNELS_BENCH_TOKENS: expected a multiple of {SEQUENCES}, got {TOKENS}")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
OURS_AND_EAGER = pytest.mark.parametrize("contender", ["ours", "eager"])

PATHS = contenders.paths(IMPL)
# What runs, by operator and what it differentiates: ours and eager, which scores the same positions.
FROM_HIDDEN = {
    "linear_sequence_logps, forward": (PATHS["A"].run, partial(forward_only, peer=eager)),
    "linear_sequence_logps, frozen head": (PATHS["B"].run, partial(frozen_head, peer=eager)),
    "linear_sequence_logps, trained head": (PATHS["D"].run, eager),
    "linear_dpo_loss, trained head": (PATHS["C"].run, eager),
}


@cache
def head_case(dtype):
    """Inputs, and what is right."""
    case = HeadCase(TOKENS, HIDDEN, VOCAB, dtype=dtype, device=str(DEVICE))
    inputs = case.inputs()
    return inputs, case.oracle(inputs, sigmoid_loss)


@cache
def logits_case(dtype):
    case = LogitsCase(TOKENS, VOCAB, dtype=dtype, device=str(DEVICE))
    inputs = case.inputs()
    return inputs, case.oracle(inputs, sigmoid_loss)


def run(call, inputs, overwrites=False):
    """One call, and copies of what it found."""
    inputs.prepare(overwrites)
    result = call(inputs)
    found = {name: getattr(result, name) for name in ("logps", "token_logps", "loss")}
    found |= {f"d{name}": gradient for name, gradient in result.gradients.items()}
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def check(found, expected, oracle: Result):
    """The error budget, for everything that was found."""
    right = {name: getattr(oracle, name) for name in ("logps", "token_logps", "loss")}
    right |= {f"d{name}": gradient for name, gradient in oracle.gradients.items()}
    for name, value in found.items():
        assert_within_budget(value, expected[name], right[name], name)


def time(benchmark, group, call, prepare, **repeated):
    def timed():
        result = call()
        synchronize(DEVICE)
        return result

    benchmark.group = group
    benchmark.pedantic(timed, setup=prepare, **{"rounds": ROUNDS, "warmup_rounds": 1} | repeated)


@DTYPES
@pytest.mark.parametrize("operator", FROM_HIDDEN)
@OURS_AND_EAGER
def test_from_hidden_states(benchmark, operator, contender, dtype):
    inputs, oracle = head_case(dtype)
    ours, theirs = FROM_HIDDEN[operator]
    call = ours if contender == "ours" else theirs
    found = run(call, inputs)
    assert set(found) >= {"logps"} | ({"dhidden"} if "forward" not in operator else set())
    assert ("dweight" in found) == ("trained" in operator)
    check(found, run(theirs, inputs), oracle)
    time(benchmark, f"{operator}, {dtype}", partial(call, inputs), lambda: inputs.prepare(False))


def eager_from_logits(inputs, *, backward):
    with torch.set_grad_enabled(backward):
        token_logps = eager_token_logps(inputs.logits, inputs.labels)
        return contenders.finish_logits(inputs, token_logps, token_logps.sum(1))


@DTYPES
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("contender", ["ours", "ours in place", "eager"])
def test_from_logits(benchmark, contender, backward, dtype):
    """ "ours in place" is sequence_logps with inplace_backward."""
    in_place = contender == "ours in place"
    if in_place and not backward:
        pytest.skip("nothing to do in place")
    inputs, oracle = logits_case(dtype)
    ours = partial(contenders.ours_from_logits, impl=IMPL, backward=backward, inplace=in_place)
    theirs = partial(eager_from_logits, backward=backward)
    call = theirs if contender == "eager" else ours
    expected = run(theirs, inputs)
    found = run(call, inputs, overwrites=in_place)
    assert ("dlogits" in found) == backward
    check(found, expected, oracle)
    group = f"sequence_logps, forward{' and backward' * backward}, {dtype}"
    time(benchmark, group, partial(call, inputs), lambda: inputs.prepare(in_place))


def pairs(dtype):
    """Chosen and rejected log-probabilities under the policy, then the reference, and lengths: [B] each."""
    drawn = {"generator": torch.Generator().manual_seed(0)}
    lengths = torch.randint(20, 400, (2, PAIRS), **drawn)
    reference = -lengths * (1 + torch.rand(2, PAIRS, **drawn))
    policy = reference + 5 * torch.randn(2, PAIRS, **drawn)
    policy = policy.to(DEVICE, dtype).requires_grad_()
    return policy, reference.to(DEVICE, dtype), lengths.to(DEVICE)


def eager_dpo(loss_type, policy, reference, lengths, beta=0.1, epsilon=0.0):
    chosen, rejected = policy - reference
    h = beta * (chosen - rejected)
    if loss_type == "sigmoid":
        return -F.logsigmoid(h)
    if loss_type == "hinge":
        return torch.relu(1 - h)
    if loss_type == "ipo":
        return (chosen / lengths[0] - rejected / lengths[1] - 1 / (2 * beta)) ** 2
    return (-(1 - epsilon) * F.logsigmoid(h) + epsilon * F.logsigmoid(-h)) / (1 - 2 * epsilon)  # robust


def our_dpo(loss_type, policy, reference, lengths, epsilon=0.0):
    return dpo_loss(
        *policy,
        *reference,
        loss_type=loss_type,
        label_smoothing=epsilon,
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    ).losses


def our_simpo(policy, reference, lengths):
    return simpo_loss(*policy, chosen_lengths=lengths[0], rejected_lengths=lengths[1]).losses


def eager_simpo(policy, reference, lengths, beta=2.0, gamma=0.5):
    chosen, rejected = policy / lengths
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def our_orpo(policy, reference, lengths):
    return orpo_loss(*policy, chosen_lengths=lengths[0], rejected_lengths=lengths[1]).losses


def eager_orpo(policy, reference, lengths, beta=0.1):
    chosen, rejected = policy / lengths
    log_odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen - beta * F.logsigmoid(log_odds)


def our_cpo(policy, reference, lengths):
    return cpo_loss(*policy, chosen_lengths=lengths[0]).losses


def eager_cpo(policy, reference, lengths, beta=0.1):
    chosen, rejected = policy
    return -F.logsigmoid(beta * (chosen - rejected)) - chosen / lengths[0].to(chosen.dtype).mean()


def good(policy):
    return torch.arange(policy.numel(), device=policy.device) % 2 == 0


def our_kto(policy, reference, lengths):
    return kto_loss(policy.flatten(), reference.flatten(), good(policy), kl=0.5).losses


def eager_kto(policy, reference, lengths, beta=0.1, kl=0.5):
    logratios = (policy - reference).flatten()
    desirable, undesirable = 1 - torch.sigmoid(beta * (logratios - kl)), 1 - torch.sigmoid(beta * (kl - logratios))
    return torch.where(good(policy), desirable, undesirable)


LOSSES = {
    f"dpo_loss, {name}": (partial(our_dpo, name), partial(eager_dpo, name)) for name in ("sigmoid", "hinge", "ipo")
}
LOSSES["dpo_loss, robust"] = partial(our_dpo, "robust", epsilon=0.1), partial(eager_dpo, "robust", epsilon=0.1)
LOSSES |= {
    "simpo_loss": (our_simpo, eager_simpo),
    "orpo_loss": (our_orpo, eager_orpo),
    "cpo_loss": (our_cpo, eager_cpo),
    "kto_loss": (our_kto, eager_kto),
}


def loss_and_gradient(formula, policy, reference, lengths):
    losses = formula(policy, reference, lengths)
    return losses, torch.autograd.grad(losses.mean(), policy)[0]


@pytest.mark.parametrize("name", LOSSES)
@OURS_AND_EAGER
def test_loss(benchmark, name, contender):
    """On vectors of log-probabilities in fp32, forward and backward."""
    inputs = pairs(torch.float32)
    exact = [t.detach().double() if t.is_floating_point() else t for t in inputs]
    ours, theirs = LOSSES[name]
    formula = ours if contender == "ours" else theirs
    right = loss_and_gradient(theirs, exact[0].requires_grad_(), *exact[1:])
    found, expected = (loss_and_gradient(each, *inputs) for each in (formula, theirs))
    for what, *values in zip(("losses", "gradient"), found, expected, right, strict=True):
        assert_within_budget(*values, what)
    time(benchmark, name, partial(loss_and_gradient, formula, *inputs), None, rounds=10 * ROUNDS, iterations=10)
