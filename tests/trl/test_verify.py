"""What is compared on the first batch under a TRL that was not tested."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from dpo_kernels.trl import _verify


def trainer(dtype=torch.float32, bf16=False):
    return SimpleNamespace(args=SimpleNamespace(bf16=bf16, fp16=False), model=SimpleNamespace(dtype=dtype))


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ({"loss": 0.7}, {"loss": 0.7}, None),
        ({"loss": 0.7}, {"loss": 0.7, "num_tokens": 5.0}, None),  # a count that goes on from batch to batch
        ({"loss": 0.7}, {"loss": 0.702}, "loss 0.7, TRL's 0.702"),
        ({"loss": float("nan")}, {"loss": 0.7}, "loss nan, TRL's 0.7"),
        ({"loss": 0.7}, {"loss": float("nan")}, "loss 0.7, TRL's nan"),
        ({"loss": 0.7}, {"loss": 0.7, "new/metric": 1.0}, "new/metric is not known"),
    ],
)
def test_what_differs_is_an_error_that_names_it(ours, theirs, says):
    if says is None:
        with pytest.warns(UserWarning, match="is tested with TRL"):
            _verify._compare(trainer(), ours, theirs)
    else:
        with pytest.raises(RuntimeError, match=says):
            _verify._compare(trainer(), ours, theirs)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_half_precision_has_a_wider_tolerance():
    for changes in ({"dtype": torch.bfloat16}, {"bf16": True}):
        _verify._compare(trainer(**changes), {"loss": 0.7}, {"loss": 0.74})
        with pytest.raises(RuntimeError, match="loss"):
            _verify._compare(trainer(**changes), {"loss": 0.7}, {"loss": 0.76})


def test_where_both_are_nan_the_next_batch_is_compared():
    undecided = trainer()
    _verify._compare(undecided, {"loss": float("nan")}, {"loss": float("nan")})
    assert not hasattr(undecided, "_dpo_kernels_verified")
    with pytest.warns(UserWarning, match="is tested with TRL"):
        _verify._compare(undecided, {"loss": 0.7}, {"loss": 0.7})
    assert undecided._dpo_kernels_verified
