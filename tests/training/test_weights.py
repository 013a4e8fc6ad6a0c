"""Pairs and tokens that count more than others, through the loop."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from short_runs import TINY, assert_close_weights, run, write_rows
from two_processes import run_in_two

from dpo_kernels.data.demo import demo_model, demo_tokenizer
from dpo_kernels.data.tokenization import Rows
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.pairs import WEIGHTLESS, load_data, load_parts
from dpo_kernels.training.schedule import divided, shares
from dpo_kernels.training.sizes import Sizes, data_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

WORDS = ["red", "green", "blue", "one", "two", "three", "four", "five", "six", "seven"]
# AdamW's steps are proportional to the gradient where epsilon is large.
LEARNING = {"learning_rate": 0.5, "adam_epsilon": 1.0, "warmup_steps": 0, "max_rows": None, "max_grad_norm": 0}


def pair(number, **more):
    """A pair whose responses have lengths of their own."""
    chosen = " ".join(WORDS[(number * 3 + i) % 10] for i in range(2 + number))
    return {
        "prompt": f"Say {WORDS[number]}: ",
        "chosen": chosen,
        "rejected": WORDS[-number - 1] * (3 - number % 3),
        **more,
    }


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One for all datasets; where it comes from the dataset, pairs that are there twice would change it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    demo_tokenizer((text for n in range(8) for text in pair(n).values()), 300).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def start(tokenizer):
    from transformers import AutoTokenizer

    return demo_model(len(AutoTokenizer.from_pretrained(tokenizer)), seed=TrainConfig().seed).state_dict()


def config(file, tokenizer, **settings):
    return TrainConfig(**TINY | {"max_rows": None, "dataset": file, "tokenizer": tokenizer} | settings)


@pytest.mark.parametrize(
    "loss",
    [
        {"loss_type": "sigmoid,sft"},  # sft divides by the mean length, in which pairs count by their weights too
        {"loss_type": "ipo", "reference": "precompute"},
        {"loss_type": "cpo"},
        {"loss_type": "simpo", "beta": 2.0, "lora_r": 2},
    ],
    ids=lambda loss: loss["loss_type"],
)
def test_weight_2_is_the_pair_twice_and_weight_0_no_pair(tmp_path, tokenizer, start, loss):
    weighted = [pair(0, weight=1), pair(1, weight=2), pair(2, weight=0), pair(3, weight=1.0)]
    repeated = [pair(0), pair(1), pair(1), pair(3)]
    settings = LEARNING | {"tokenizer": tokenizer, "eval_fraction": 0, "max_steps": 2} | loss
    found = []
    for name, rows in (("weighted", weighted), ("repeated", repeated)):
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        found.append(run(tmp_path / name, dataset=file, **settings)[1])
    if "lora_r" not in loss:
        assert_close_weights(tmp_path / "weighted", tmp_path / "repeated", start)
    for row, expected in zip(*found, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name
    plain = write_rows(tmp_path / "plain.jsonl", [pair(n) for n in (0, 1, 3)])
    _, rows = run(tmp_path / "plain", dataset=plain, **settings | {"max_steps": 1})
    assert rows[0]["grad_norm"] != pytest.approx(found[0][0]["grad_norm"], rel=1e-3)
    # what is no loss is a plain mean over the pairs
    for name in ("rewards/chosen", "logps/chosen", "logps/rejected"):
        assert found[0][0][name] == pytest.approx(rows[0][name], rel=1e-5, abs=1e-6)


def weighted_rows(tokenizer, count, tokens=True):
    """Pairs with weights, of which some give their tokens weights too."""
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer).encode
    rows = [pair(n, weight=[0.5, 3, 1, 2, 0.25][n % 5]) for n in range(count)]
    for row in rows[:: 2 if tokens else count + 1]:
        for key in ("chosen", "rejected"):
            weights = np.linspace(0, 2, len(encode(row[key], add_special_tokens=False)))
            row[f"{key}_token_weights"] = weights.round(2).tolist()
    return rows


@pytest.mark.parametrize(
    "loss",
    [{"loss_type": "sigmoid,sft,ipo", "ld_alpha": 0.5}, {"loss_type": "cpo"}],
    ids=lambda loss: loss["loss_type"],
)
def test_accumulation_takes_the_same_steps(tmp_path, tokenizer, start, loss):
    """Micro-batches of four pairs, and of one; 7 pairs, so that the last step has three."""
    file = write_rows(tmp_path / "pairs.jsonl", weighted_rows(tokenizer, 7))
    settings = LEARNING | {"dataset": file, "tokenizer": tokenizer, "eval_fraction": 0, "epochs": 2} | loss
    _, rows = run(tmp_path / "whole", **settings)
    settings |= {"per_device_batch_size": 1, "gradient_accumulation_steps": 4}
    _, single = run(tmp_path / "single", **settings)
    assert_close_weights(tmp_path / "whole", tmp_path / "single", start)
    assert len(rows) == 4
    for row, expected in zip(single, rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_shares_of_all_processes_make_the_weighted_mean(processes, size):
    """Of four pairs, so that of three processes two have one pair and one has two; and of one pair."""
    weight, losses = np.array([0.5, 3, 1, 2, 0.25]), np.array([5.0, 7, 11, 13, 17])
    for rows in (np.array([4, 0, 3, 1]), np.array([2])):
        gradient = 0.0
        for rank in range(processes):
            micro_batches = list(shares(divided(rows, size, processes), rank, weight))
            assert [is_last for _, _, is_last in micro_batches] == [False] * (len(micro_batches) - 1) + [True]
            mine = sum(np.average(losses[micro], weights=weight[micro]) * share for micro, share, _ in micro_batches)
            gradient += mine / processes  # as DDP has it
        assert gradient == pytest.approx(np.average(losses[rows], weights=weight[rows]), rel=1e-12)


@pytest.mark.full
def test_two_processes_take_the_steps_of_one(tmp_path, tokenizer):
    """Five pairs in steps of four: in the second step one process has no pair."""
    file = write_rows(tmp_path / "pairs.jsonl", weighted_rows(tokenizer, 5))
    held_out = write_rows(tmp_path / "eval.jsonl", weighted_rows(tokenizer, 3, tokens=False))
    settings = LEARNING | {
        "dataset": file,
        "eval_dataset": held_out,
        "tokenizer": tokenizer,
        "loss_type": "sigmoid,sft",
    }
    _, rows = run(tmp_path / "one", **settings)
    settings |= TINY | settings | {"per_device_batch_size": 1, "gradient_accumulation_steps": 2}
    settings |= {"output_dir": str(tmp_path / "two")}
    script = tmp_path / "two.py"
    script.write_text(f"from dpo_kernels.training import *\ntrain(TrainConfig(**{settings!r}))\n")
    run_in_two(script, ACCELERATE_USE_CPU="true")
    two = [json.loads(line) for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert len(two) == len(rows) == 4
    for row, expected in zip(two, rows, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_held_out_losses_are_weighted_and_rewards_are_not(tmp_path, tokenizer):
    found = []
    for number, (first, second) in enumerate([(1, 1), (1, 3), (3, 1)]):
        rows = [pair(0, weight=first), pair(4, weight=second)]
        settings = {"dataset": "demo", "eval_dataset": write_rows(tmp_path / f"{number}.jsonl", rows), "max_steps": 1}
        settings |= {"max_rows": 8, "tokenizer": tokenizer, "loss_type": "simpo", "beta": 2.0}
        found.append(run(tmp_path / str(number), **settings)[1][0])
    plain, second, first = (row["eval/loss"] for row in found)
    assert first + second == pytest.approx(2 * plain, rel=1e-6) and abs(first - second) > 1e-3
    for name in ("eval/rewards/chosen", "eval/rewards/margins", "eval/logps/rejected"):
        assert len({row[name] for row in found}) == 1


def test_all_references_see_the_token_weights(tmp_path, tokenizer):
    file = write_rows(tmp_path / "pairs.jsonl", weighted_rows(tokenizer, 6))
    settings = {"dataset": file, "tokenizer": tokenizer, "max_rows": None, "max_steps": 2, "eval_fraction": 0.3}
    rows = [run(tmp_path / name, reference=name, **settings)[1] for name in ("copy", "precompute")]
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert rows[0][0]["eval/loss"] == pytest.approx(np.log(2), rel=1e-6)  # policy and reference weigh alike
    assert rows[0][0]["eval/rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_pairs_without_weight_are_dropped_and_reported(tmp_path, tokenizer):
    rows = [pair(n, weight=weight) for n, weight in enumerate([1, 0, 2.5, 0.0])]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    _, (part,) = load_parts(config(file, tokenizer, eval_fraction=0))
    assert part.report.rows == 4 and part.report.kept == 2 == len(part.pairs)
    assert part.report.dropped == {WEIGHTLESS: Rows(2, (f"{file}, row 2", f"{file}, row 4"))}
    assert part.pairs["weight"][:] == [0.4, 1.0] and part.source(1) == f"{file}, row 3"
    with pytest.warns(
        UserWarning, match=r"(?s)train: 2 of 4 preference pairs kept.*dropped 2: weight 0 .*row 2, row 4"
    ):
        load_data(config(file, tokenizer, eval_fraction=0))
    nothing = write_rows(tmp_path / "nothing.jsonl", [pair(n, weight=0) for n in range(3)])
    with pytest.raises(ValueError, match="(?s)the training pairs: no preference pair is left.*dropped 3: weight 0"):
        load_data(config(nothing, tokenizer, eval_fraction=0))
    with pytest.raises(ValueError, match="(?s)the held-out pairs: no preference pair is left.*dropped 3: weight 0"):
        load_data(config(file, tokenizer, eval_dataset=nothing))


@pytest.mark.parametrize(
    ("weights", "ratios"),
    [
        ([1, 1, 1], None),
        ([0.25, 0.25, 0.25], None),
        ([7, 1, 7], [1, 1 / 7, 1]),
        ([1e-60, 2e-60, 4e-60], [0.25, 0.5, 1]),  # all 0 in fp32
        ([1e300, 2e300, 4e300], [0.25, 0.5, 1]),  # all infinite
    ],
)
def test_only_the_ratios_matter(tmp_path, tokenizer, weights, ratios):
    rows = [pair(n, weight=weight) for n, weight in enumerate(weights)]
    _, pairs, _ = load_data(config(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, eval_fraction=0))
    assert ("weight" in pairs.column_names) == (ratios is not None)
    assert Sizes.of(pairs).weight.tolist() == pytest.approx(ratios or [1, 1, 1])


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "sigmoid,aot"])
def test_losses_that_sort_the_batch_take_no_weights(tmp_path, tokenizer, loss):
    file = write_rows(tmp_path / "pairs.jsonl", [pair(n, weight=1 + n) for n in range(4)])
    with pytest.raises(ValueError, match="loss_type: 'aot.*sorts the pairs of a batch.*the train pairs have different"):
        load_data(config(file, tokenizer, loss_type=loss, eval_fraction=0))
    alike = write_rows(tmp_path / "alike.jsonl", [pair(n, weight=2) for n in range(4)])
    load_data(config(alike, tokenizer, loss_type=loss, eval_fraction=0))
    with pytest.raises(ValueError, match="the eval pairs have different weights"):
        load_data(config(alike, tokenizer, loss_type=loss, eval_dataset=file))


def test_tokens_without_weight_are_no_labels(tmp_path, tokenizer):
    rows = weighted_rows(tokenizer, 3)
    _, pairs, _ = load_data(config(write_rows(tmp_path / "pairs.jsonl", rows), tokenizer, eval_fraction=0))
    sizes, labelled = Sizes.of(pairs), {"chosen": [], "rejected": []}
    for example in pairs:
        for key in ("chosen", "rejected"):
            weights = torch.tensor(example[f"{key}_token_weights"])
            labelled[key].append(int((weights != 0).sum()))
            assert len(weights) == len(example[f"{key}_ids"])
    assert sizes.chosen.tolist() == labelled["chosen"]
    assert sizes.labelled.tolist() == [a + b for a, b in zip(*labelled.values(), strict=True)]
    assert sizes.chosen[0] == len(pairs[0]["chosen_ids"]) - 1 and sizes.chosen[1] == len(pairs[1]["chosen_ids"])
    assert sizes.mean_chosen_length() == pytest.approx(np.average(sizes.chosen, weights=[0.5, 3, 1]))
    assert sizes.mean_chosen_length(np.array([1])) == sizes.chosen[1]


def test_a_fingerprint_is_of_the_weights_too(tmp_path, tokenizer):
    rows, prints = weighted_rows(tokenizer, 3), []
    changed = [rows, [row | {"weight": 1 + n} for n, row in enumerate(rows)]]
    changed.append([rows[0] | {"chosen_token_weights": [1.5] * len(rows[0]["chosen_token_weights"])}, *rows[1:]])
    for number, each in enumerate(changed):
        _, pairs, _ = load_data(config(write_rows(tmp_path / f"{number}.jsonl", each), tokenizer, eval_fraction=0))
        prints.append((data_fingerprint(pairs), data_fingerprint(pairs, weighted=False)))
    assert len({whole for whole, _ in prints}) == 3
    assert prints[0][1] == prints[1][1] != prints[2][1]  # weights of pairs change no log-probability
