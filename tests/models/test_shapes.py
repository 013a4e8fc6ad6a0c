"""That the table of models is right: parameters against published totals, and against transformers' own models."""

import json
import sys

import pytest

from dpo_kernels.models.shapes import MODELS, ModelShape, find_shape

# What the hub's pages say of the safetensors files, `safetensors.total`. (Those of Qwen3 with a tied head store it
# twice: 751,632,384 for Qwen3-0.6B is 596,049,920 and a head of 155,582,464.) Mixtures of experts are below.
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
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "allenai/OLMo-2-0425-1B": 1_484_916_736,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/OLMo-2-1124-13B": 13_716_198_400,
    "allenai/OLMo-2-0325-32B": 32_234_279_936,
    "allenai/Olmo-3-1025-7B": 7_298_011_136,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": 1_777_088_000,
    "mistralai/Ministral-8B-Instruct-2410": 8_019_808_256,
    "tiiuae/Falcon3-1B-Base": 1_669_408_768,
    "tiiuae/Falcon3-3B-Base": 3_227_655_168,
    "tiiuae/Falcon3-7B-Base": 7_455_550_464,
    "tiiuae/Falcon3-10B-Base": 10_305_653_760,
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
    "Gemma3TextConfig": ("google/gemma-3-270m", "google/gemma-3-1b-pt", "google/gemma-3-27b-pt"),
    "Phi3Config": ("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct"),
    "Olmo2Config": ("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-0325-32B"),
    "Olmo3Config": ("allenai/Olmo-3-1125-32B",),
    "GraniteConfig": ("ibm-granite/granite-3.3-8b-instruct",),
    "SmolLM3Config": ("HuggingFaceTB/SmolLM3-3B",),
}


def hugging_face_config(family, shape):
    transformers = pytest.importorskip("transformers")
    options = {"head_dim": shape.head_dim}
    if shape.softcap is not None:
        options |= {"final_logit_softcapping": shape.softcap, "attn_logit_softcapping": shape.attention_softcap}
    if family in ("Phi3Config", "GraniteConfig"):
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


GLM = {
    "model_type": "glm4_moe", "vocab_size": 151552, "num_attention_heads": 96, "num_key_value_heads": 8,
    "head_dim": 128, "num_experts_per_tok": 8, "n_shared_experts": 1, "attention_bias": True,
}  # fmt: skip
QWEN3 = {"model_type": "qwen3_moe", "num_key_value_heads": 4, "head_dim": 128, "num_experts_per_tok": 8}
QWEN3 |= {"num_experts": 128, "vocab_size": 151936}
OSS = {
    "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088, "head_dim": 64,
    "num_attention_heads": 64, "num_key_value_heads": 8, "num_experts_per_tok": 4,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
    "num_hidden_layers": 61, "q_lora_rank": 1536, "kv_lora_rank": 512, "n_shared_experts": 1, "num_experts_per_tok": 8,
}  # fmt: skip
LLAMA4 = {
    "model_type": "llama4_text", "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 202048, "num_experts_per_tok": 1,
}  # fmt: skip
GEMMA3N = {"model_type": "gemma3n_text", "hidden_size": 2048, "vocab_size": 262400}
GEMMA4 = {"model_type": "gemma4_text", "final_logit_softcapping": 30.0}
GEMMA4_LARGE = GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True}
GRANITE = {
    "model_type": "granitemoe", "vocab_size": 49155, "num_key_value_heads": 8, "intermediate_size": 512,
    "num_experts_per_tok": 8, "tie_word_embeddings": True,
}  # fmt: skip
# What decides the shape in the config.json of each, beside what transformers' class has anyway.
COUNTED = {
    "Qwen/Qwen3-30B-A3B": QWEN3
    | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768},
    "Qwen/Qwen3-235B-A22B": QWEN3
    | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536},
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": QWEN3
    | {"hidden_size": 6144, "num_hidden_layers": 62, "num_attention_heads": 96, "num_key_value_heads": 8}
    | {"num_experts": 160, "moe_intermediate_size": 2560},
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": LLAMA4 | {"num_local_experts": 16, "interleave_moe_layer_step": 1},
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": LLAMA4
    | {"num_local_experts": 128, "interleave_moe_layer_step": 2},
    "openai/gpt-oss-20b": OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "openai/gpt-oss-120b": OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    "deepseek-ai/DeepSeek-V3": DEEPSEEK
    | {"vocab_size": 129280, "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 256},
    "moonshotai/Kimi-K2-Instruct": DEEPSEEK
    | {"vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64, "n_routed_experts": 384}
    | {"first_k_dense_replace": 1},
    "zai-org/GLM-4.5": GLM
    | {"hidden_size": 5120, "num_hidden_layers": 92, "intermediate_size": 12288, "moe_intermediate_size": 1536}
    | {"n_routed_experts": 160, "first_k_dense_replace": 3, "use_qk_norm": True},
    "zai-org/GLM-4.5-Air": GLM
    | {"hidden_size": 4096, "num_hidden_layers": 46, "intermediate_size": 10944, "moe_intermediate_size": 1408}
    | {"n_routed_experts": 128, "first_k_dense_replace": 1},
    "google/gemma-3n-E2B": GEMMA3N
    | {"num_hidden_layers": 30, "intermediate_size": 8192, "num_kv_shared_layers": 10}
    | {"activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20},
    "google/gemma-3n-E4B": GEMMA3N | {"num_hidden_layers": 35, "intermediate_size": 16384, "num_kv_shared_layers": 15},
    "google/gemma-4-E2B": GEMMA4
    | {"hidden_size": 1536, "num_hidden_layers": 35, "intermediate_size": 6144, "num_key_value_heads": 1}
    | {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}
    | {"layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7},
    "google/gemma-4-E4B": GEMMA4
    | {"hidden_size": 2560, "num_hidden_layers": 42, "intermediate_size": 10240, "num_key_value_heads": 2}
    | {"num_kv_shared_layers": 18},
    "google/gemma-4-12B": GEMMA4_LARGE
    | {"model_type": "gemma4_unified_text", "hidden_size": 3840, "num_hidden_layers": 48, "intermediate_size": 15360}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 1},
    "google/gemma-4-26B-A4B": GEMMA4_LARGE
    | {"hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112, "moe_intermediate_size": 704}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2}
    | {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8},
    "google/gemma-4-31B": GEMMA4_LARGE
    | {"hidden_size": 5376, "num_hidden_layers": 60, "intermediate_size": 21504}
    | {"num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4},
    "ibm-granite/granite-3.1-1b-a400m-instruct": GRANITE
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_local_experts": 32},
    "ibm-granite/granite-3.1-3b-a800m-instruct": GRANITE
    | {"hidden_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 24, "num_local_experts": 40},
}
# In billions, as their makers say: all, and those active for a token. OpenAI counts the head of these, not the
# embeddings. What sees and hears, which is no part of these, is 0.47 of Gemma 4 E2B and E4B, and 0.05 of 12B.
SAID = {
    "Qwen/Qwen3-30B-A3B": (30.5, 3.3),
    "Qwen/Qwen3-235B-A22B": (235, 22),
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": (480, 35),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": (109, 17),
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": (400, 17),
    "openai/gpt-oss-20b": (20.9, 3.6 + 0.58),
    "openai/gpt-oss-120b": (116.8, 5.1 + 0.58),
    "deepseek-ai/DeepSeek-V3": (671, 37),
    "moonshotai/Kimi-K2-Instruct": (1026, 32),
    "zai-org/GLM-4.5": (355, 32),
    "zai-org/GLM-4.5-Air": (106, 12),
    "zai-org/GLM-4-32B-0414": (32, 32),
    "google/gemma-4-E2B": (5.1 - 0.47, 5.1 - 0.47),
    "google/gemma-4-E4B": (8 - 0.47, 8 - 0.47),
    "google/gemma-4-12B": (11.95 - 0.05, 11.95 - 0.05),
    "google/gemma-4-26B-A4B": (25.2, 3.8),
    "google/gemma-4-31B": (30.7, 30.7),
    "ibm-granite/granite-3.1-1b-a400m-instruct": (1.3, 0.4),
    "ibm-granite/granite-3.1-3b-a800m-instruct": (3.3, 0.8),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_transformers_counts(name, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(COUNTED[name]))
    assert find_shape(str(tmp_path)) == MODELS[name]


@pytest.mark.parametrize("name", SAID)
def test_all_and_active_parameters_as_their_makers_say(name):
    shape, (said, active) = MODELS[name], SAID[name]
    assert shape.parameters / 1e9 == pytest.approx(said, rel=0.03)  # IBM rounds 1.335 to 1.3, Z.ai 32.6 to 32
    assert shape.active / 1e9 == pytest.approx(active, rel=0.15)  # who counts embeddings, and who does not
    assert shape.layers * shape.layer_parameters < 2.1 * shape.parameters


# Of kinds that transformers counts, known by name as shapes that are computed
DENSE = {
    "zai-org/GLM-4-9B-0414": {"model_type": "glm4", "attention_bias": True},
    "zai-org/GLM-4-32B-0414": {"model_type": "glm4", "attention_bias": False},
    "ibm-granite/granite-4.0-micro": {
        "model_type": "granitemoehybrid", "shared_intermediate_size": 8192, "num_local_experts": 0,
        "num_experts_per_tok": 0, "layer_types": ["attention"] * 40, "tie_word_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_of_kinds_that_transformers_counts(name, tmp_path):
    pytest.importorskip("transformers")
    shape = MODELS[name]
    config = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers}
    config |= {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocab}
    (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": shape.head_dim} | DENSE[name]))
    found = find_shape(str(tmp_path))
    assert found.parameters == found.active == shape.parameters
    assert (found.layer_parameters, found.linear_parameters) == (shape.layer_parameters, shape.linear_parameters)
    assert (found.norms, found.head_dim, found.tied) == (shape.norms, shape.head_dim, shape.tied)


SIZES = {"hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
# Kinds that are not known here: with names of their own, an expert in two dimensions of three, no attention, values
# that differ from layer to layer, and what sees images
OTHER = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
    "opt": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": SIZES | {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": SIZES | {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"hidden_size": 64, "vocab_size": 100, "num_hidden_layers": 2, "state_size": 8},
    "gemma4_text": SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "mistral3": {"text_config": SIZES | {"model_type": "ministral3", "intermediate_size": 96}},
}


@pytest.mark.parametrize("kind", OTHER)
def test_any_config_of_transformers(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    given = {"model_type": kind, "auto_map": {"AutoModelForCausalLM": "elsewhere.Model"}} | OTHER[kind]
    (tmp_path / "config.json").write_text(json.dumps(given))
    shape = find_shape(str(tmp_path))
    assert (shape.hidden, shape.vocab, shape.layers) == (64, 100, 2)
    config = transformers.AutoConfig.for_model(kind, **OTHER[kind]).get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert shape.parameters == model.num_parameters()
    assert shape.counted.layer * 2 <= shape.parameters
    if "moe" in kind or kind == "mixtral":  # two of four experts of [2 96, 64] and [64, 96], in two layers
        assert shape.parameters - shape.active == 2 * 2 * 3 * 64 * 96
        assert (shape.intermediate, shape.experts_per_token) == (2 * 96, 2)
    else:
        assert (shape.active, shape.experts_per_token) == (shape.parameters, 0)


def test_a_model_that_sees_images_whose_text_part_is_none_by_itself(tmp_path):
    transformers = pytest.importorskip("transformers")
    import torch

    text = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
    given = {"text_config": text, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(given | {"model_type": "qwen3_vl"}))
    shape = find_shape(str(tmp_path))
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model("qwen3_vl", **given)
        model = transformers.AutoModelForImageTextToText.from_config(config)
    assert shape.parameters == model.num_parameters()
    assert (shape.hidden, shape.vocab, shape.layers, shape.intermediate, shape.heads) == (64, 100, 2, 96, 4)
    # queries, keys, values, output; gate, up, down; norms of two hidden states, and of queries and keys
    assert shape.layer_parameters == 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64 + 2 * 16


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"} | OTHER["gpt2"]))
    with pytest.raises(ValueError, match=r"config.json is of model_type 'gpt2'.*pip install transformers.*llama"):
        find_shape(str(tmp_path))
    assert find_shape("gpt-oss-120b").experts_per_token == 4


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
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B"),
        ("Qwen/Qwen3-235B-A22B-Thinking-2507", "Qwen/Qwen3-235B-A22B"),
        ("allenai/Olmo-3-7B-Think", "allenai/Olmo-3-1025-7B"),
        ("google/gemma-3-27b-it", "google/gemma-3-27b-pt"),
        ("google/gemma-3n-E4B-it", "google/gemma-3n-E4B"),
        ("google/gemma-4-26B-A4B-it", "google/gemma-4-26B-A4B"),
        ("gemma-4-26b", "google/gemma-4-26B-A4B"),
        ("THUDM/GLM-4-32B-0414", "zai-org/GLM-4-32B-0414"),
        ("ibm-granite/granite-3.1-1b-a400m-base", "ibm-granite/granite-3.1-1b-a400m-instruct"),
        ("llama-4-scout", "meta-llama/Llama-4-Scout-17B-16E-Instruct"),
        ("deepseek-r1", "deepseek-ai/DeepSeek-V3"),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "meta-llama/Llama-3.1-8B"),
        ("mistral-small-3.2", "mistralai/Mistral-Small-24B-Base-2501"),
    ],
)
def test_aliases(alias, name):
    assert find_shape(alias) == MODELS[name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama-3-9b", "got 'llama-3-9b'; near it are .*llama-3-8b"),
        ("llama-3.1", "near it are llama-3.1-8b, llama-3.1-70b"),  # of two shapes
        ("qwen3-2507", "near it are qwen3-0.6b, .*qwen3-4b, .*qwen3-30b-a3b, .*qwen3-235b-a22b"),
        ("completely different", "got 'completely different'$"),
        ("missing.json", "found no file missing.json"),
        ("my-own", "a config.json or its folder, or --hidden and --vocab instead"),
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
        ({"model_type": "llava", "text_config": {"model_type": 3}}, "model_type of .*got 3"),
        ({"hidden_size": 64}, "must be an object with a model_type"),
        ({**GIVEN, "vocab_size": None}, "lacks vocab_size"),
        (GIVEN | {"model_type": "qwen3"}, "lacks num_key_value_heads, head_dim"),
    ]:
        with pytest.raises(ValueError, match=message):
            find(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no-such-kind"}, "makes no causal language model of .*config.json: .*no-such-kind"),
        ({"model_type": "vit"}, "makes no causal language model of .*config.json: "),
        ({"model_type": "gpt2", "n_embd": "wide"}, "makes no causal language model of .*config.json: "),
    ],
)
def test_what_transformers_cannot_make(config, message, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as caught:
        find_shape(str(tmp_path))
    assert "\n" not in str(caught.value)
