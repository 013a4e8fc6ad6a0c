"""What a run is set up with, and what it leaves of the process it ran in."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="the loop needs accelerate, which is not installed")

from datasets import Dataset

from dpo_kernels.data.demo import demo_model
from dpo_kernels.losses import validate_dpo_options
from dpo_kernels.training.config import TrainConfig, dpo_options
from dpo_kernels.training.reference_model import frozen_copy
from dpo_kernels.training.schedule import Schedule
from dpo_kernels.training.setup import deterministic_algorithms, make_optimizer
from dpo_kernels.training.sizes import check_fits


@pytest.mark.parametrize(("enabled", "warn_only"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("wanted", [True, False])
def test_the_process_keeps_its_deterministic_algorithms(enabled, warn_only, wanted):
    """Also where the run fails."""

    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        )

    before = state()
    try:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        outside = state()
        with pytest.raises(RuntimeError, match="in the run"), deterministic_algorithms(wanted):
            assert torch.are_deterministic_algorithms_enabled() == (wanted or enabled)
            raise RuntimeError("in the run")
        assert state() == outside
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_the_frozen_copy_has_no_dropout_and_no_gradient():
    """The policy is in training when it is copied, and stays so."""
    policy = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    reference = frozen_copy(policy)
    x = torch.ones(8, 4)
    assert torch.equal(reference(x), reference(x)) and not reference(x).requires_grad
    assert policy.training and policy[0].weight.requires_grad
    with torch.no_grad():
        policy[0].weight.add_(1.0)
    assert not torch.equal(reference[0].weight, policy[0].weight)


def settings(tmp_path, **changes):
    return TrainConfig(model="demo", dataset="demo", output_dir=str(tmp_path), **changes)


def test_biases_and_norms_do_not_decay(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    config = settings(tmp_path, weight_decay=0.3)
    optimizer = make_optimizer(list(model.parameters()), config, torch.device("cpu"))
    decay = {id(weight): group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]}
    assert [decay[id(weight)] for weight in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"warmup_ratio": 0.25}, 3),  # of 10 steps: rounded up
        ({"warmup_ratio": 0.25, "warmup_steps": 0}, 0),
        ({"warmup_ratio": 0.25, "warmup_steps": 7}, 7),
        ({"warmup_ratio": 0.0}, 0),
    ],
)
def test_steps_of_the_warm_up(tmp_path, changes, expected):
    """A number of steps comes before a share of them, also where it is 0."""
    config = settings(tmp_path, max_steps=10, **changes)
    assert Schedule.of(config, SimpleNamespace(tokens=[9] * 64), processes=1).warmup_steps == expected


@pytest.mark.parametrize("longest", ["chosen_ids", "rejected_ids"])
def test_a_pair_is_as_long_as_its_longer_response(longest):
    row = {"prompt_ids": [5] * 3, "chosen_ids": [6], "rejected_ids": [7]} | {longest: [8] * 6}
    pairs = Dataset.from_list([row | {longest: [9]}, row])
    check_fits(pairs, demo_model(300, max_positions=9), "m")
    with pytest.raises(ValueError, match="max_length: a pair has 9 tokens, but the model 'm' has 8 positions"):
        check_fits(pairs, demo_model(300, max_positions=8), "m")


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "discopop", "discopop_tau": 0.3},
        {"f_divergence": "alpha", "f_alpha": 0.7},
        {"loss_type": "cdpo", "label_smoothing": 0.2},
        {"loss_type": "sigmoid,sft", "loss_weights": "1,0.5"},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"beta": 0.3},
    ],
)
def test_every_setting_of_the_loss_reaches_it(tmp_path, changes):
    config = settings(tmp_path, **changes)
    options = dpo_options(config)
    validate_dpo_options(**options)
    assert {name: options[name] for name in changes} == {name: getattr(config, name) for name in changes}


def test_responses_end_with_eos_unless_told_otherwise(tmp_path):
    assert settings(tmp_path).add_eos and not settings(tmp_path, add_eos="false").add_eos
