"""Runs whose prompts go through the model once: the same curve, and what is refused."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from short_runs import run

from dpo_kernels.training.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WAYS = ["padding_free", "shared_prefix", "packed_shared_prefix", "auto"]


@pytest.fixture(scope="module")
def concatenated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("concatenated")
    return run(directory, max_steps=6, gradient_accumulation_steps=2, batching="concatenated")[1]


def assert_same_curve(rows, expected, tolerance=1e-4):
    assert len(rows) == len(expected) > 6
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, row["step"])


@pytest.mark.parametrize("way", WAYS)
def test_the_curve_is_that_of_concatenated_batches(tmp_path, concatenated, way):
    _, rows = run(tmp_path, max_steps=6, gradient_accumulation_steps=2, batching=way)
    assert_same_curve(rows, concatenated)
    assert [rows[0][f"eval/rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]  # to the bit


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_r": 4, "learning_rate": 1e-3},
        {"gradient_checkpointing": True},
        {"reference": "precompute"},
        {"loss_type": "simpo"},
        {"loss_type": "orpo"},
        {"loss_type": "cpo"},
        {"loss_type": "ipo"},
        {"rpo_alpha": 1.0},
    ],
    ids=str,
)
def test_with_everything_else(tmp_path, settings):
    rows = {}
    for way in ("concatenated", "packed_shared_prefix"):
        _, rows[way] = run(tmp_path / way, max_steps=6, batching=way, **settings)
    assert_same_curve(rows["packed_shared_prefix"], rows["concatenated"], tolerance=1e-3)


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    import shutil

    settings = {"max_steps": 4, "save_steps": 2, "batching": "packed_shared_prefix", "eval_fraction": 0}
    _, straight = run(tmp_path / "straight", **settings)
    killed = tmp_path / "killed"
    run(killed, **settings)
    for later in (killed / "checkpoint-4", killed / "final"):
        shutil.rmtree(later)
    _, resumed = run(killed, **settings)
    assert resumed == straight
    with pytest.raises(ValueError, match="batching \\(was 'packed_shared_prefix', is 'concatenated'\\)"):
        shutil.rmtree(killed / "final")
        run(killed, **settings | {"batching": "concatenated"})


def test_a_model_that_does_not_allow_it(tmp_path, caplog):
    """ "auto" says so once and goes on; what was asked for by name is an error."""
    config = {"model_type": "bloom", "vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    file = tmp_path / "bloom.json"
    file.write_text(json.dumps(config | {"initializer_range": 0.3}))
    settings = {"model": f"config:{file}", "max_steps": 1, "eval_fraction": 0}
    with pytest.raises(
        ValueError, match="batching: expected concatenated, got 'shared_prefix': BloomForCausalLM computes"
    ):
        run(tmp_path / "named", batching="shared_prefix", **settings)
    with caplog.at_level("INFO", "dpo_kernels"):
        run(tmp_path / "auto", batching="auto", **settings)
    assert caplog.text.count("batching: concatenated, since BloomForCausalLM computes other hidden states") == 1


def test_an_attention_of_ones_own_is_refused(tmp_path):
    with pytest.raises(ValueError, match="attn_implementation: expected none beside batching 'padding_free'"):
        run(tmp_path, batching="padding_free", attn_implementation="eager")


def test_names_are_checked():
    with pytest.raises(ValueError, match="batching"):
        TrainConfig(batching="packed")


def test_a_reference_of_its_own_has_layouts_too(tmp_path):
    """Another model than the policy, whose log-probabilities are those of padded batches."""
    run(tmp_path / "other", max_steps=1, seed=7, eval_fraction=0)
    settings = {"reference": str(tmp_path / "other" / "final"), "allow_different_reference": True, "max_steps": 3}
    settings["tokenizer"] = settings["reference"]
    _, expected = run(tmp_path / "padded", batching="concatenated", **settings)
    _, rows = run(tmp_path / "packed", batching="packed_shared_prefix", **settings)
    assert abs(expected[0]["eval/rewards/margins"]) > 1e-2
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_what_auto_came_to_belongs_to_the_run(tmp_path):
    """Another machine's attention may not allow it."""
    import shutil

    settings = {"max_steps": 2, "save_steps": 1, "eval_fraction": 0}
    run(tmp_path, **settings)
    for later in ("checkpoint-2", "final"):
        shutil.rmtree(tmp_path / later)
    with pytest.raises(ValueError, match=r"batching \(was 'packed_shared_prefix', is 'concatenated'\)"):
        run(tmp_path, **settings, batching="concatenated")
    run(tmp_path, **settings, batching="packed_shared_prefix")
