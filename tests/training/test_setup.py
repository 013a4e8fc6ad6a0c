"""What a run is made of: a model without dropout and without damage, and a schedule whose every step learns."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import transformers
from safetensors.torch import load_file, save_file
from short_runs import run

from dpo_kernels import dispatch
from dpo_kernels.data.demo import demo_model, demo_tokenizer
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import damaged_weights, disable_dropout, load_model
from dpo_kernels.training.schedule import ByExamples, Schedule
from dpo_kernels.training.state import RunState

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

GPT2 = {"model_type": "gpt2", "vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Which drops a tenth of its embeddings, attention and residuals unless told otherwise."""
    file = tmp_path_factory.mktemp("gpt2") / "gpt2.json"
    file.write_text(json.dumps(GPT2))
    return f"config:{file}"


# A learning rate that changes no weight
STILL = {"learning_rate": 1e-30, "max_steps": 3, "eval_fraction": 0}


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_r": 2, "lora_target_modules": "c_attn"}, {"reference": "precompute"}, {"mixed_precision": "bf16"}],
    ids=str,
)
def test_a_model_with_dropout_is_its_own_reference(tmp_path, gpt2, settings):
    _, rows = run(tmp_path, model=gpt2, **STILL, **settings)
    assert len(rows) == 3
    for row in rows:
        assert row["loss"] == pytest.approx(math.log(2), rel=1e-7)
        assert [row[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")] == [0, 0, 0, 0]


def test_policy_and_reference_are_summed_alike(tmp_path, monkeypatch):
    """In tiles and groups of different sizes, as large vocabularies and long responses have them: 0 to the bit there
    too."""
    impl = dispatch.load(dispatch.default(torch.device("cpu")))
    monkeypatch.setattr(impl, "tile_bytes", lambda device: 2**18)
    (tmp_path / "wide.json").write_text(json.dumps(GPT2 | {"n_embd": 128}))
    more = {"per_device_batch_size": 8, "max_rows": 16, "max_steps": 2, "chunk_bytes": 200_000}
    _, rows = run(tmp_path, model=f"config:{tmp_path / 'wide.json'}", **STILL | more)
    for row in rows:
        assert [row[f"rewards/{name}"] for name in ("chosen", "rejected", "margins")] == [0, 0, 0]


def test_dropout_is_there_when_asked_for(tmp_path, gpt2):
    for name, settings in (("model", {"disable_dropout": False}), ("adapters", {"lora_r": 2, "lora_dropout": 0.5})):
        more = {"learning_rate": 1e-2} if "lora_r" in settings else {}  # adapters change nothing before they learned
        targets = {"lora_target_modules": "c_attn"} if "lora_r" in settings else {}
        _, rows = run(tmp_path / name, model=gpt2, **STILL | settings | more | targets)
        assert rows[-1]["rewards/margins"] != 0
        quiet = {"disable_dropout": True} if name == "model" else {"lora_r": 2, "lora_dropout": 0.0} | targets
        _, others = run(tmp_path / f"{name} without", model=gpt2, **STILL | more | quiet)
        assert rows[-1]["rewards/margins"] != others[-1]["rewards/margins"]


SMALL = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
MODELS = {
    "qwen2": SMALL | {"intermediate_size": 16, "num_key_value_heads": 2, "attention_dropout": 0.5},
    "opt": SMALL | {"ffn_dim": 16, "word_embed_proj_dim": 16, "dropout": 0.5, "layerdrop": 0.5},
    "bloom": SMALL | {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": SMALL | {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "biogpt": SMALL | {"intermediate_size": 16, "layerdrop": 0.5, "hidden_dropout_prob": 0.5},
    "gpt_neox": SMALL | {"intermediate_size": 16, "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "starcoder2": SMALL | {"intermediate_size": 16, "num_key_value_heads": 2, "residual_dropout": 0.5},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 99, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_dropout_is_left(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    tokens = torch.arange(1, 13).view(2, 6)

    def logits(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(input_ids=tokens).logits

    assert not torch.equal(logits(1), logits(2))
    disable_dropout(model)
    assert torch.equal(logits(1), logits(2))
    torch.testing.assert_close(logits(1), model.eval()(input_ids=tokens).logits)


class Odd(torch.nn.Module):
    """Rates under other names, and numbers that are no rates."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(resid_pdrop=0.1, drop_tokens=True, p=0.3)
        self.config.deeper = {"attn_dropout": 0.2, "drop_policy": "random", "itself": self.config}
        self.layers = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Dropout1d(0.4), torch.nn.AlphaDropout(0.3))
        self.attention = torch.nn.MultiheadAttention(8, 2, dropout=0.5)
        self.recurrent = torch.nn.LSTM(4, 4, num_layers=2, dropout=0.5)
        self.p, self.drop_path, self.drop_last, self.rate = 0.7, 1, True, 0.6


def test_what_is_a_rate_of_dropout():
    odd = Odd()
    disable_dropout(odd)
    assert [layer.p for layer in odd.layers] == [0, 0, 0] and odd.attention.dropout == odd.recurrent.dropout == 0
    assert (odd.p, odd.drop_path, odd.drop_last, odd.rate) == (0.7, 0, True, 0.6)
    assert (odd.config.resid_pdrop, odd.config.drop_tokens, odd.config.p) == (0, True, 0.3)
    assert odd.config.deeper["attn_dropout"] == 0 and odd.config.deeper["drop_policy"] == "random"


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 1), (10, 3), (10, 10), (10, 0), (5, 50)])
def test_every_step_learns(decay, steps, warmup):
    schedule = Schedule(ByExamples(1, 1, 1, 1, seed=0), steps, warmup)
    rates = [schedule.rate(decay, step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == [(step + 1) / (warmup + 1) for step in range(min(steps, warmup))]
    if warmup < steps:  # after the warm-up it is transformers' own
        name = "constant_with_warmup" if decay == "constant" else decay
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = transformers.get_scheduler(name, optimizer, warmup, steps)
        for step in range(steps):
            assert step < warmup or rates[step] == theirs.get_last_lr()[0]
            optimizer.step()
            theirs.step()
        assert rates[warmup] == 1


@pytest.fixture
def saved(tmp_path):
    """A model on disk, and a function that puts a value into one of its weights."""
    directory = tmp_path / "model"
    tokenizer = demo_tokenizer(["Hello there"], 300)
    tokenizer.save_pretrained(directory)
    model = demo_model(len(tokenizer), seed=1)
    model.save_pretrained(directory)

    def put(name, value):
        with torch.no_grad():
            model.get_parameter(name).view(-1)[3] = value
        model.save_pretrained(directory)

    return directory, put


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lm_head.weight", math.nan),
        ("model.layers.1.mlp.up_proj.weight", math.nan),
        ("model.layers.0.input_layernorm.weight", math.inf),
        ("model.layers.0.self_attn.q_proj.bias", -math.inf),
        ("model.embed_tokens.weight", math.nan),
    ],
)
@pytest.mark.parametrize("lora", [{}, {"lora_r": 2}], ids=["full", "lora"])
def test_weights_that_are_no_numbers_are_named(tmp_path, saved, name, value, lora):
    directory, put = saved
    put(name, value)
    with pytest.raises(
        ValueError, match=f"model: the weights of '{directory}' are damaged: NaN or infinity in 1 of"
    ) as e:
        run(tmp_path / "run", model=str(directory), tokenizer=str(directory), max_steps=1, **lora)
    assert str(e.value).endswith(f"the first is {name}") and "hidden" not in str(e.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_huge_weight_is_named_when_nothing_comes_of_it(tmp_path, saved):
    """As after a bit of an exponent flipped: a number, but no weight."""
    directory, put = saved
    put("model.layers.1.mlp.up_proj.weight", 3e38)
    put("model.layers.1.mlp.down_proj.weight", 2e38)
    settings = {"model": str(directory), "tokenizer": str(directory), "max_steps": 1}
    named = r"'s weights are finite; the largest number is 3e\+38, in model.layers.1.mlp.up_proj.weight"
    for reference in ("copy", "precompute"):
        with pytest.raises(FloatingPointError, match=f"states of the reference are not finite .*The reference{named}"):
            run(tmp_path / reference, reference=reference, **settings)
    with pytest.raises(FloatingPointError, match=f"stopped at step 0: the hidden states of the .*The policy{named}"):
        run(tmp_path / "none", loss_type="simpo", beta=2.0, **settings)


@pytest.mark.parametrize("size", [0, 4, 100, -1000])
def test_a_cut_file_of_weights_is_named(saved, size):
    directory, _ = saved
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"model: the weights of '{directory}' are damaged: "):
        load_model(TrainConfig(), str(directory), demo_tokenizer(["Hello"], 300))


def test_an_index_of_weights_that_was_cut_is_named(saved):
    directory, _ = saved
    demo_model(300, seed=1).save_pretrained(directory, max_shard_size="100KB")
    (directory / "model.safetensors").unlink()
    index = directory / "model.safetensors.index.json"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"model: the weights of '{directory}' are damaged: "):
        load_model(TrainConfig(), str(directory), demo_tokenizer(["Hello"], 300))


def leave_out_a_tensor(directory):
    file = directory / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, {"format": "pt"})


def change_a_shape(directory):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 8}))


def as_bin(contents):
    def change(directory):
        file = directory / "model.safetensors"
        weights = load_file(file)
        file.unlink()
        torch.save(weights, directory / "pytorch_model.bin")
        whole = (directory / "pytorch_model.bin").read_bytes()
        (directory / "pytorch_model.bin").write_bytes(contents(whole))

    return change


def sharded(change):
    def change_shards(directory):
        demo_model(300, seed=1).save_pretrained(directory, max_shard_size="100KB")
        (directory / "model.safetensors").unlink()
        change(directory)

    return change_shards


WRONG_WEIGHTS = {
    "a tensor less": (
        leave_out_a_tensor,
        "of another model: 1 of its .* missing.*layers.1.mlp.up_proj",
    ),
    "another shape": (change_a_shape, "or do not fit its config.json: "),
    "a cut bin": (as_bin(lambda whole: whole[:-100]), ": "),
    "half a bin": (as_bin(lambda whole: whole[: len(whole) // 2]), ": "),
    "text as bin": (as_bin(lambda whole: b"hello, this is no model"), ": "),
    "an empty bin": (as_bin(lambda whole: b""), ": EOFError"),
    "an index that is a list": (sharded(lambda d: (d / "model.safetensors.index.json").write_text("[]")), ": "),
    "an index of nothing": (sharded(lambda d: (d / "model.safetensors.index.json").write_text("{}")), ": "),
    "a shard less": (sharded(lambda d: next(d.glob("model-00002*")).unlink()), ": .*model-00002"),
}


@pytest.mark.parametrize("change, says", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_weights_that_are_not_the_models_are_named(saved, change, says):
    directory, _ = saved
    change(directory)
    with pytest.raises(ValueError, match=f"model: the weights of '{directory}' are damaged.*{says}") as caught:
        load_model(TrainConfig(), str(directory), demo_tokenizer(["Hello"], 300))
    assert "\n" not in str(caught.value)


TINY = {"model_type": "qwen2", "hidden_size": 64, "vocab_size": 300, "num_hidden_layers": 1, "intermediate_size": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_size": "64"},
        {"hidden_size": -64},
        {"vocab_size": [1]},
        {"hidden_act": "zzz"},
        {"model_type": "qwen99"},
        {"model_type": ["qwen2"]},
    ],
    ids=str,
)
def test_a_config_that_makes_no_model_is_named(tmp_path, change):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY | change))
    with pytest.raises(ValueError, match=f"model: {tmp_path}/tiny.json (makes no model|must be an object)") as caught:
        load_model(TrainConfig(), f"config:{tmp_path}/tiny.json", demo_tokenizer(["Hello"], 300))
    assert "\n" not in str(caught.value)


def test_a_reference_is_looked_at_too(tmp_path, saved):
    directory, put = saved
    put("lm_head.weight", math.nan)
    with pytest.raises(ValueError, match=f"model: the weights of '{directory}' are damaged"):
        run(tmp_path / "run", reference=str(directory), allow_different_reference=True, max_steps=1, eval_fraction=0)


def test_no_checkpoint_is_made_of_damaged_weights(tmp_path, monkeypatch):
    def overflow(self):
        with torch.no_grad():
            next(iter(self.run.weights.values())).view(-1)[0] = math.inf
        save(self)

    save = RunState.save
    monkeypatch.setattr(RunState, "save", overflow)
    with pytest.raises(
        FloatingPointError, match="stopped at step 2: .*no checkpoint is made of them: NaN or infinity in 1"
    ):
        run(tmp_path, max_steps=3, save_steps=2, eval_fraction=0)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_is_damaged():
    fine = [("a", torch.ones(3)), ("b", torch.zeros(0)), ("c", torch.ones(2, dtype=torch.int64))]
    assert damaged_weights(fine) == ""
    odd = [("d", torch.tensor([1.0, math.nan])), ("e", torch.tensor(-math.inf)), ("f", torch.tensor([65504.0]).half())]
    assert damaged_weights([*fine, *odd]) == "NaN or infinity in 2 of them, the first is d"
    assert damaged_weights([("g", torch.zeros(4, dtype=torch.float8_e4m3fn)), ("h", torch.ones(2).bool())]) == ""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert "is x" in damaged_weights([("x", torch.full((2, 2), math.inf, dtype=dtype))])
