"""What accelerate is set up to shard with, as the loop's own setting."""

import os

import pytest

from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.launched import as_launched

FSDP2 = {  # what `accelerate launch --use_fsdp --fsdp_version 2` leaves
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_SHARDING_STRATEGY": "FULL_SHARD",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_MIN_NUM_PARAMS": "100000000",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_FORWARD_PREFETCH": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_SYNC_MODULE_STATES": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
}
ZERO = {  # and `--use_deepspeed`
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
}


@pytest.fixture
def launched(monkeypatch):
    def launched(environment, **changed):
        for name, value in (environment | changed).items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("environment", "changed", "expected"),
    [
        (FSDP2, {}, "fsdp2"),
        (ZERO, {}, "zero3"),
        (ZERO, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2", "ACCELERATE_GRADIENT_CLIPPING": "none"}, "zero2"),
        (ZERO, {"ACCELERATE_MIXED_PRECISION": "no"}, "zero3"),
    ],
)
@pytest.mark.parametrize("given", ["none", None])
def test_it_is_taken_for_the_setting(launched, environment, changed, expected, given):
    launched(environment, **changed)
    switch = next(iter(environment))
    with as_launched(TrainConfig(sharding=given or expected)) as config:
        assert config.sharding == expected
        assert switch not in os.environ  # else accelerate and transformers would act on it too
    assert os.environ[switch] == "true"


def test_without_it_the_settings_stay_as_they_are():
    config = TrainConfig(sharding="fsdp2")
    with as_launched(config) as same:
        assert same is config


@pytest.mark.parametrize(
    ("environment", "changed", "settings", "message"),
    [
        (FSDP2, {"FSDP_VERSION": "1"}, {}, "fsdp_version: accelerate is set up for 1, and the loop knows 2 alone"),
        (FSDP2, {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params: accelerate is set up for 'true', which"),
        (
            FSDP2,
            {"FSDP_RESHARD_AFTER_FORWARD": "false"},
            {},
            "fsdp_reshard_after_forward: .*'false'.*again for the back",
        ),
        (FSDP2, {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "fsdp_auto_wrap_policy: .*'SIZE_BASED_WRAP'"),
        (FSDP2, {"FSDP_TRANSFORMER_CLS_TO_WRAP": "Layer"}, {}, "fsdp_transformer_cls_to_wrap: .*'Layer'.*names itself"),
        (
            FSDP2,
            {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
            {},
            "fsdp_activation_checkpointing: .*gradient_checkpointing",
        ),
        (FSDP2, {}, {"sharding": "zero3"}, "sharding: accelerate is set up for fsdp2, got 'zero3'"),
        (ZERO, {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, {}, "zero_stage: accelerate is set up for 1.*knows 2 and 3"),
        (
            ZERO,
            {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
            {},
            "offload_param_device: .*'cpu'.*stay on their",
        ),
        (ZERO, {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, "offload_optimizer_device: .*'nvme'"),
        (ZERO, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "config_file: accelerate is set up for 'ds.json'"),
        (ZERO, {}, {"max_grad_norm": 0.5}, "gradient_clipping: .*'1.0'.*the loop's max_grad_norm is 0.5"),
        (ZERO, {}, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: .*'1'.*steps is 4: give both"),
        (FSDP2, {"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision: .*'bf16'.*mixed_precision is no: give"),
        (ZERO, {}, {"sharding": "fsdp2"}, "sharding: accelerate is set up for zero3, got 'fsdp2'"),
    ],
)
def test_what_the_loop_does_otherwise_is_named(launched, environment, changed, settings, message):
    launched(environment, **changed)
    with pytest.raises(ValueError, match=message), as_launched(TrainConfig(**settings)):
        raise AssertionError("not refused")
    assert os.environ[next(iter(environment))] == "true"
