"""The embedded demo: deterministic, lossless, and learnable within seconds."""

import datasets
import pytest
import torch
from transformers import AutoTokenizer

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.demo import demo_model, demo_preferences, demo_tokenizer
from dpo_kernels.data.loading import split_train_eval
from dpo_kernels.data.tokenization import tokenize_preferences


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def preferences():
    return demo_preferences()


@pytest.fixture(scope="module")
def tokenizer(preferences):
    return demo_tokenizer(message["content"] for row in preferences for part in row.values() for message in part)


def test_preferences_are_deterministic_and_varied(preferences):
    rows = list(preferences)
    assert rows == list(demo_preferences())
    assert rows != list(demo_preferences(seed=1))
    assert len(rows) == 600
    assert len({row["prompt"][0]["content"] for row in rows}) == 600
    assert all(row["chosen"] != row["rejected"] for row in rows)
    words = [set(w for row in rows for w in row[part][0]["content"].lower().split()) for part in ("chosen", "rejected")]
    assert len(words[0] & words[1]) / len(words[0] | words[1]) > 0.5  # no single word gives the answer away


def test_preferences_refuse_more_rows_than_there_are_prompts():
    with pytest.raises(ValueError, match="num_rows.*got 100000"):
        demo_preferences(100000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 0}, "num_rows: expected 1 to 9[0-9]+, got 0"),
        ({"num_rows": "10"}, "num_rows: expected 1 to 9[0-9]+, got '10'"),
        ({"num_rows": True}, "num_rows: expected 1 to 9[0-9]+, got True"),
        ({"num_rows": 10.0}, "num_rows: expected 1 to 9[0-9]+, got 10.0"),
        ({"seed": None}, "seed: expected a whole number .*, got None"),
    ],
)
def test_preferences_name_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        demo_preferences(**options)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["a"], 258, "vocab_size: expected a whole number of at least 259, got 258"),
        (["a"], "300", "vocab_size: expected a whole number of at least 259, got '300'"),
        ("abc", 300, "texts: expected a list of texts, got 'abc'"),
        (None, 300, "texts: expected a list of texts, got None"),
    ],
)
def test_tokenizer_names_the_option(texts, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        demo_tokenizer(texts, vocab_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": "300"}, "vocab_size: expected a whole number above 0, got '300'"),
        ({"hidden_size": 0}, "hidden_size: expected a whole number above 0, got 0"),
        ({"hidden_size": 30}, "hidden_size: expected a multiple of 2 \\* heads = 8, got 30"),
        ({"layers": 0}, "layers: expected a whole number above 0, got 0"),
        ({"layers": True}, "layers: expected a whole number above 0, got True"),
        ({"heads": 0}, "heads: expected a whole number above 0, got 0"),
        ({"max_positions": None}, "max_positions: expected a whole number above 0, got None"),
        ({"tied": "no"}, "tied: expected True or False, got 'no'"),
        ({"eos_token_id": -1}, "eos_token_id: expected None or a token id, got -1"),
        ({"seed": "a"}, "seed: expected a whole number .*, got 'a'"),
        ({"seed": 2**64}, "seed: expected a whole number .*, got 18446744073709551616"),
    ],
)
def test_model_names_the_option(options, message):
    with pytest.raises(ValueError, match=message):
        demo_model(**{"vocab_size": 300, **options})


def test_tokenizer_is_lossless_and_deterministic(preferences, tokenizer):
    text = "Grüße, 日本語 \x00 tabs\t and  spaces \n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 512
    assert len({tokenizer.eos_token_id, tokenizer.pad_token_id}) == 2 and tokenizer.bos_token_id is None
    again = demo_tokenizer(message["content"] for row in preferences for part in row.values() for message in part)
    assert again.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="vocab_size.*at least 259, got 258"):
        demo_tokenizer(["x"], 258)


def test_tokenizer_comes_back_the_same_from_beside_a_model(tokenizer, tmp_path):
    """AutoTokenizer goes by the model's type, not by the class that was saved."""
    demo_model(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "It's 12+30, naïve café: déjà vu!\n\n<|im_end|>\n  日本語"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"] and len(again) == len(tokenizer)
    for name in ("eos_token_id", "pad_token_id", "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_model_follows_its_seed_and_leaves_the_global_random_state_alone():
    state = torch.random.get_rng_state()
    models = [demo_model(300, seed=seed, hidden_size=16, layers=1, heads=2) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.random.get_rng_state())
    weights = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32
    assert models[0].lm_head.weight.shape == (300, 16)
    assert models[0].lm_head.weight is not models[0].model.embed_tokens.weight
    tied = demo_model(300, hidden_size=16, layers=1, heads=2, tied=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"hidden_size.*multiple of 2 \* heads = 8, got 20"):
        demo_model(300, hidden_size=20)


def test_eager_dpo_learns_held_out_preferences(preferences, tokenizer):
    """One epoch over 200 pairs: the whole demo is three over more of them."""
    dataset, report = tokenize_preferences(preferences.select(range(280)), tokenizer)
    assert report.kept == 280 and not report.dropped and not report.altered
    train, held_out = (list(part) for part in split_train_eval(dataset, eval_rows=80))
    collate = PairCollator(tokenizer.pad_token_id)
    policy, reference = (demo_model(len(tokenizer), hidden_size=32) for _ in range(2))

    def margins(pairs):
        batch = collate(pairs)
        labels = batch["labels"][:, 1:]

        def logps(model):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            return (picked * (labels != -100)).sum(-1)

        with torch.no_grad():
            start = logps(reference)
        ratios = logps(policy) - start
        return ratios[: len(pairs)] - ratios[len(pairs) :]

    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    for start in range(0, len(train), 4):
        loss = -torch.nn.functional.logsigmoid(0.1 * margins(train[start : start + 4])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (margins(held_out) > 0).float().mean().item()
    assert accuracy > 0.7
