"""That the table of models is right: parameters against published totals, and against transformers' own models."""

import json

import pytest

from dpo_kernels.models.shapes import MODELS, ModelShape, find_shape

# What the hub's pages say of the safetensors files, `safetensors.total`. (Those of Qwen3 with a tied head store it
# twice: 751,632,384 for Qwen3-0.6B is 596,049,920 and a head of 155,582,464.)
PUBLISHED = {
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 751_632_384 - 155_582_464,
    "Qwen/Qwen3-1.7B": 2_031_739_904 - 311_164_928,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-70b-hf": 68_976_648_192,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": 8_030_326_784,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "mistralai/Mistral-Nemo-Base-2407": 12_247_782_400,
    "mistralai/Mistral-Small-24B-Base-2501": 23_572_403_200,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
    "microsoft/phi-4": 14_659_507_200,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    assert MODELS[name].parameters == PUBLISHED[name]


# transformers' class for a family, and members of it
FAMILIES = {
    "Qwen2Config": ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B"),
    "Qwen3Config": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-32B"),
    "LlamaConfig": ("meta-llama/Llama-3.2-3B", "meta-llama/Meta-Llama-3-70B", "HuggingFaceTB/SmolLM2-360M"),
    "MistralConfig": ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-Nemo-Base-2407"),
    "GemmaConfig": ("google/gemma-2b",),
    "Gemma2Config": ("google/gemma-2-9b", "google/gemma-2-27b"),
    "Gemma3TextConfig": ("google/gemma-3-270m", "google/gemma-3-1b-pt"),
    "Phi3Config": ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct"),
    "Olmo2Config": ("allenai/OLMo-2-1124-7B",),
    "SmolLM3Config": ("HuggingFaceTB/SmolLM3-3B",),
}


def hugging_face_config(family, shape):
    transformers = pytest.importorskip("transformers")
    options = {"head_dim": shape.head_dim}
    if shape.softcap is not None:
        options |= {"final_logit_softcapping": shape.softcap, "attn_logit_softcapping": shape.attention_softcap}
    if family == "Phi3Config":
        del options["head_dim"]
    return getattr(transformers, family)(
        hidden_size=shape.hidden, vocab_size=shape.vocab, num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in FAMILIES.items() for name in names])
def test_transformers_builds_as_many_parameters(family, name, tmp_path):
    """A model on a device without memory; and its config.json gives the same shape back."""
    import torch

    config = hugging_face_config(family, MODELS[name])
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == MODELS[name].parameters
    assert model.get_output_embeddings().weight.numel() == MODELS[name].head_parameters
    config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json")) == MODELS[name]


def test_biases_of_a_config(tmp_path):
    """The only ones that no model of the table has."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=100, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    assert find_shape(str(tmp_path)).parameters == model.num_parameters()


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_found(name):
    shape = MODELS[name]
    last = name.rpartition("/")[2]
    assert find_shape(name) == find_shape(last) == find_shape(last.lower()) == shape
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("LLAMA-2-7B-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Base-2407"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),  # two models of one shape
    ],
)
def test_aliases(alias, name):
    assert find_shape(alias) == MODELS[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3-9b", "got 'llama-3-9b'; near it are .*llama-3-8b"),
        ("llama-3.1", "near it are llama-3.1-8b, llama-3.1-70b"),  # of two shapes
        ("completely different", "got 'completely different'$"),
        ("missing.json", "found no file missing.json"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        find_shape(name)


GIVEN = {
    "model_type": "llama",
    "hidden_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 2,
    "intermediate_size": 160,
    "num_attention_heads": 4,
}


def test_configs(tmp_path):
    def find(config):
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return find_shape(str(tmp_path))

    assert find(GIVEN) == ModelShape(64, 100, 2, 160, 4, 4, 16)
    assert find(GIVEN | {"tie_word_embeddings": True, "head_dim": None}).tied
    assert find({"model_type": "llava", "text_config": GIVEN}).hidden == 64
    for config, message in [
        ("{", "no valid JSON"),
        ("[]", "an object"),
        (GIVEN | {"model_type": "mamba"}, "model_type of .*got 'mamba'"),
        ({"hidden_size": 64}, "must be an object with a model_type"),
        ({**GIVEN, "vocab_size": None}, "lacks vocab_size"),
        (GIVEN | {"model_type": "qwen3"}, "lacks num_key_value_heads, head_dim"),
    ]:
        with pytest.raises(ValueError, match=message):
            find(config)
