"""Runs on rankings: each answer once in a batch, and the same losses as of pairs that are written out."""

import itertools
import json
import math
import shutil

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
from datasets import Dataset
from short_runs import run, write_rows

from dpo_kernels.data.demo import demo_model
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.pairs import Pairs, load_data
from dpo_kernels.training.sizes import check_fits, data_fingerprint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WAYS = ["concatenated", "padding_free", "shared_prefix", "packed_shared_prefix"]


def ranking(n, count):
    answers = [{"answer": " ".join(WORDS[(n + i) % 12 :][: 2 + i]) + f" {n}", "rank": i + 1} for i in range(count)]
    return {"prompt": f"Say {WORDS[n % 12]} and {n}:", "answers": answers}


RANKINGS = [ranking(n, count) for n, count in enumerate([4, 3, 2, 7, 3, 4, 2, 3])]


def turn(role, content):
    return [{"role": role, "content": content}]


def written_out(ranked_pairs):
    """The same, each pair a row of its own."""
    rows = []
    for each in RANKINGS:
        answers = [answer["answer"] for answer in each["answers"]]
        chosen = answers[:1] if ranked_pairs == "best_vs_each" else answers
        rows += [
            {
                "prompt": turn("user", each["prompt"]),
                "chosen": turn("assistant", better),
                "rejected": turn("assistant", worse),
            }
            for better, worse in itertools.combinations(answers, 2)
            if better in chosen
        ]
    return rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rankings")
    found = {way: write_rows(folder / f"{way}.jsonl", written_out(way)) for way in ("best_vs_each", "all_pairs")}
    return found | {"rankings": write_rows(folder / "rankings.jsonl", RANKINGS)}


# One batch holds all the data, so that a step of pairs and one of rankings are on the same.
WHOLE = {"max_steps": 3, "per_device_batch_size": 99, "eval_fraction": 0, "tokenizer": "train:300", "max_rows": None}


def assert_same(rows, expected, tolerance=1e-4):
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, row["step"])


@pytest.mark.parametrize("ranked_pairs", ["best_vs_each", "all_pairs"])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_on_rankings_is_one_on_their_pairs(tmp_path, files, way, ranked_pairs):
    more = {"tokenizer": train_tokenizer(files)}
    _, expected = run(tmp_path / "pairs", **WHOLE | more, dataset=files[ranked_pairs], batching="concatenated")
    _, rows = run(tmp_path / "own", **WHOLE | more, dataset=files["rankings"], ranked_pairs=ranked_pairs, batching=way)
    assert_same(rows, expected)


def train_tokenizer(files):
    """The same for both, whose texts differ in how often they are there."""
    from dpo_kernels.data.demo import demo_tokenizer

    folder = files["rankings"].replace("rankings.jsonl", "tokenizer")
    demo_tokenizer([json.dumps(each) for each in RANKINGS], 300).save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "ipo"},
        {"loss_type": "sigmoid,sft"},
        {"loss_type": "aot"},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "orpo"},
        {"loss_type": "cpo"},
        {"rpo_alpha": 0.5},
        {"use_weighting": True},
        {"reference": "precompute"},
        {"lora_r": 4},
    ],
    ids=str,
)
def test_with_everything_else(tmp_path, files, settings):
    settings = WHOLE | {"tokenizer": train_tokenizer(files)} | settings
    _, expected = run(tmp_path / "pairs", **settings, dataset=files["all_pairs"], batching="concatenated")
    _, rows = run(tmp_path / "own", **settings, dataset=files["rankings"], ranked_pairs="all_pairs")
    assert_same(rows, expected, tolerance=1e-3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce", "sigmoid,sft"])
@pytest.mark.parametrize("way", ["concatenated", "packed_shared_prefix"])
def test_micro_batches_do_not_matter(tmp_path, files, loss_type, way):
    """Nor whether they are of so many rankings, or of so many tokens: the mean is over pairs, or over rankings."""
    settings = {"loss_type": loss_type, "batching": way, "dataset": files["rankings"], "ranked_pairs": "all_pairs"}
    settings |= {"eval_fraction": 0.3, "max_rows": None, "max_steps": 2}
    _, expected = run(tmp_path / "whole", **settings | {"per_device_batch_size": 8})
    one = {"per_device_batch_size": 1, "gradient_accumulation_steps": 8}
    _, rows = run(tmp_path / "one", **settings | one)
    assert_same(rows, expected)
    tokens = {"per_device_batch_size": 4, "max_tokens_per_batch": 200, "gradient_accumulation_steps": 8}
    _, rows = run(tmp_path / "tokens", **settings | tokens)
    assert_same(rows, expected)


def test_weighted_rankings(tmp_path, files):
    """Weight 2 is the ranking twice, in the loss."""
    rows = {
        "weighted": [RANKINGS[0] | {"weight": 2}, RANKINGS[1] | {"weight": 1}],
        "twice": [RANKINGS[0], RANKINGS[0], RANKINGS[1]],
    }
    for loss_type in ("sigmoid", "plackett_luce"):
        found = []
        for name, each in rows.items():
            file = write_rows(tmp_path / f"{name}.jsonl", each)
            settings = WHOLE | {
                "tokenizer": train_tokenizer(files),
                "loss_type": loss_type,
                "max_steps": 2,
                "dataset": file,
            }
            _, logged = run(tmp_path / f"{name} {loss_type}", **settings, ranked_pairs="all_pairs")
            found.append([row[name] for row in logged for name in ("loss", "grad_norm")])
        assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_plackett_luce_starts_at_the_number_of_orders(tmp_path, files):
    """Policy and reference are alike, so that every order of K answers has the probability 1 / K!."""
    settings = WHOLE | {"loss_type": "plackett_luce", "max_steps": 1, "dataset": files["rankings"]}
    _, rows = run(tmp_path, **settings, ranked_pairs="all_pairs")
    expected = sum(math.log(math.factorial(len(each["answers"]))) for each in RANKINGS) / len(RANKINGS)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["rewards/margins"] == 0


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, files):
    settings = {"dataset": files["rankings"], "ranked_pairs": "all_pairs", "loss_type": "plackett_luce"}
    settings |= {"max_steps": 4, "save_steps": 2, "eval_fraction": 0, "max_rows": None, "reference": "precompute"}
    settings |= {"max_tokens_per_batch": 150, "per_device_batch_size": 4, "cache_dir": str(tmp_path / "cache")}
    _, straight = run(tmp_path / "straight", **settings)
    killed = tmp_path / "killed"
    run(killed, **settings)
    for later in (killed / "checkpoint-4", killed / "final"):
        shutil.rmtree(later)
    _, resumed = run(killed, **settings)
    assert resumed == straight


def test_every_answer_is_there_once(files):
    config = TrainConfig(model="demo", dataset=files["rankings"], ranked_pairs="all_pairs", tokenizer="train:300")
    from accelerate import Accelerator

    pairs = Pairs.load(config, Accelerator(cpu=True))
    counts = sorted(len(row) for row in pairs.train["response_ids"])
    held_out = sorted(len(row) for row in pairs.held_out["response_ids"])
    assert sorted(counts + held_out) == [2, 2, 3, 3, 3, 4, 4, 7]
    assert "one" in pairs.example(0) or "Say" in pairs.example(0)
    batch = pairs.batch(pairs.train, [0])
    assert len(batch["labels"]) == len(pairs.train[0]["response_ids"])
    assert batch["pairs"] == [tuple(pair) for pair in pairs.train[0]["pairs"]]
    _, train, _ = load_data(config)
    assert "group" in train.column_names


def test_what_rankings_do_not_have(tmp_path, files):
    settings = {"dataset": files["rankings"], "ranked_pairs": "all_pairs", "max_steps": 1, "max_rows": None}
    with pytest.raises(ValueError, match="ld_alpha: expected none beside ranked_pairs 'all_pairs'"):
        run(tmp_path, **settings, ld_alpha=0.5)
    with pytest.raises(ValueError, match="loss_type: plackett_luce stands alone, got plackett_luce,sft"):
        run(tmp_path, **settings, loss_type="plackett_luce,sft")
    with pytest.raises(ValueError, match="rpo_alpha: loss_type 'plackett_luce' has none"):
        run(tmp_path, **settings, loss_type="plackett_luce", rpo_alpha=1.0)
    with pytest.raises(ValueError, match="per_device_batch_size: has no effect beside max_tokens_per_batch 100, got 8"):
        run(tmp_path, **settings, max_tokens_per_batch=100, per_device_batch_size=8)


ROW = {"prompt_ids": [1, 2], "response_ids": [[3, 4], [5], [6]], "pairs": [[0, 1], [0, 2]], "weight": 1.0}
ROW |= {"response_token_weights": [[1.0, 1.0], [1.0], [1.0]]}


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": [1, 7]},
        {"response_ids": [[3, 4], [5], [7]]},
        {"response_ids": [[3], [4, 5], [6]], "response_token_weights": [[1.0], [1.0, 1.0], [1.0]]},
        {"pairs": [[0, 1], [1, 2]]},
        {"weight": 2.0},
        {"response_token_weights": [[1.0, 1.0], [1.0], [0.5]]},
    ],
    ids=str,
)
def test_other_rankings_are_other_data(change):
    same, again, other = (data_fingerprint(Dataset.from_list([ROW, row])) for row in (ROW, ROW, ROW | change))
    assert same == again != other


def test_rankings_that_do_not_fit_the_model():
    rankings = Dataset.from_list([ROW, ROW | {"response_ids": [[3, 4], [300], [6]]}])
    check_fits(rankings, demo_model(301, max_positions=4), "m")
    with pytest.raises(ValueError, match="tokenizer: token id 300 is outside the vocabulary of the model 'm'"):
        check_fits(rankings, demo_model(300, max_positions=4), "m")
    with pytest.raises(ValueError, match="max_length: a pair has 4 tokens, but the model 'm' has 3 positions"):
        check_fits(rankings, demo_model(301, max_positions=3), "m")
