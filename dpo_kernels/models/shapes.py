"""The shapes of models that people align, by name or from a `config.json`: what memory and work follow from."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder of the Llama kind: gated MLP, RMS norms, rotary positions, grouped queries."""

    hidden: int
    vocab: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    """Input and output embeddings are one matrix."""
    softcap: float | None = None
    """Of the final logits."""
    attention_softcap: float | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: str = ""
    """Norms of queries and keys: none, over each "head", or over "all" heads."""
    norms: int = 2
    """Norms of a whole hidden state in a layer."""
    wide_norms: bool = False
    """Norms multiply by their weight in fp32, as Gemma's do."""

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of a layer's matrices: queries, keys, values, output, gate, up, down."""
        h, i = self.hidden, self.intermediate
        return (h, self.queries), (h, self.keys), (h, self.keys), (self.queries, h), (h, i), (h, i), (i, h)

    @property
    def linear_parameters(self) -> int:
        """Numbers in the matrices of all layers."""
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        biases = self.qkv_bias * (self.queries + 2 * self.keys) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        qk_norm = {"": 0, "head": 2 * self.head_dim, "all": self.queries + self.keys}[self.qk_norm]
        other = self.layers * (biases + qk_norm + self.norms * self.hidden) + self.hidden
        return self.linear_parameters + other + self.head_parameters * (1 if self.tied else 2)


def _qwen2(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    tied = vocab == 151936
    return ModelShape(hidden, vocab, layers, intermediate, heads, kv_heads, hidden // heads, tied, qkv_bias=True)


def _qwen3(hidden: int, layers: int, intermediate: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape(hidden, 151936, layers, intermediate, heads, 8, 128, tied, qk_norm="head")


def _llama(
    hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int, *, tied: bool = False
) -> ModelShape:
    return ModelShape(hidden, vocab, layers, intermediate, heads, kv_heads, hidden // heads, tied)


def _gemma(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, **other: Any) -> ModelShape:
    common: dict[str, Any] = {"vocab": 256000, "head_dim": 256, "tied": True, "wide_norms": True}
    return ModelShape(
        hidden, layers=layers, intermediate=intermediate, heads=heads, kv_heads=kv_heads, **common | other
    )


GEMMA2: dict[str, Any] = {"softcap": 30.0, "attention_softcap": 50.0, "norms": 4}
GEMMA3: dict[str, Any] = {"vocab": 262144, "qk_norm": "head", "norms": 4}

_LLAMA_8B = _llama(4096, 32, 14336, 32, 8, 128256)
_LLAMA_70B = _llama(8192, 80, 28672, 64, 8, 128256)
_MISTRAL_7B = _llama(4096, 32, 14336, 32, 8, 32000)
_PHI3_MINI = _llama(3072, 32, 8192, 32, 32, 32064)

MODELS: dict[str, ModelShape] = {
    "Qwen/Qwen2-0.5B": _qwen2(896, 24, 4864, 14, 2, 151936),
    "Qwen/Qwen2-1.5B": _qwen2(1536, 28, 8960, 12, 2, 151936),
    "Qwen/Qwen2-7B": _qwen2(3584, 28, 18944, 28, 4, 152064),
    "Qwen/Qwen2-72B": _qwen2(8192, 80, 29568, 64, 8, 152064),
    "Qwen/Qwen2.5-0.5B": _qwen2(896, 24, 4864, 14, 2, 151936),
    "Qwen/Qwen2.5-1.5B": _qwen2(1536, 28, 8960, 12, 2, 151936),
    "Qwen/Qwen2.5-3B": _qwen2(2048, 36, 11008, 16, 2, 151936),
    "Qwen/Qwen2.5-7B": _qwen2(3584, 28, 18944, 28, 4, 152064),
    "Qwen/Qwen2.5-14B": _qwen2(5120, 48, 13824, 40, 8, 152064),
    "Qwen/Qwen2.5-32B": _qwen2(5120, 64, 27648, 40, 8, 152064),
    "Qwen/Qwen2.5-72B": _qwen2(8192, 80, 29568, 64, 8, 152064),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 3072, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 6144, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 9728, 32, True),
    "Qwen/Qwen3-8B": _qwen3(4096, 36, 12288, 32, False),
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 17408, 40, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 25600, 64, False),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 11008, 32, 32, 32000),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 13824, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 80, 28672, 64, 8, 32000),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 8192, 32, 8, 128256, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 8192, 24, 8, 128256, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": replace(_LLAMA_8B, vocab=128264),
    "allenai/OLMo-2-1124-7B": replace(_llama(4096, 32, 11008, 32, 32, 100352), qk_norm="all"),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(2048, 22, 5632, 32, 4, 32000),
    "google/gemma-2b": _gemma(2048, 18, 16384, 8, 1),
    "google/gemma-7b": _gemma(3072, 28, 24576, 16, 16),
    "google/gemma-2-2b": _gemma(2304, 26, 9216, 8, 4, **GEMMA2),
    "google/gemma-2-9b": _gemma(3584, 42, 14336, 16, 8, **GEMMA2),
    "google/gemma-2-27b": _gemma(4608, 46, 36864, 32, 16, **GEMMA2 | {"head_dim": 128}),
    "google/gemma-3-270m": _gemma(640, 18, 2048, 4, 1, **GEMMA3),
    "google/gemma-3-1b-pt": _gemma(1152, 26, 6912, 4, 1, **GEMMA3),
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": replace(_MISTRAL_7B, vocab=32768),
    "mistralai/Mistral-Nemo-Base-2407": ModelShape(5120, 131072, 40, 14336, 32, 8, 128),
    "mistralai/Mistral-Small-24B-Base-2501": ModelShape(5120, 131072, 40, 32768, 32, 8, 128),
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL_7B,
    "microsoft/Phi-3-mini-4k-instruct": _PHI3_MINI,
    "microsoft/Phi-3-mini-128k-instruct": _PHI3_MINI,
    "microsoft/Phi-3.5-mini-instruct": _PHI3_MINI,
    "microsoft/Phi-4-mini-instruct": ModelShape(3072, 200064, 32, 8192, 24, 8, 128, tied=True),
    "microsoft/phi-4": _llama(5120, 40, 17920, 40, 10, 100352),
    "HuggingFaceTB/SmolLM2-135M": _llama(576, 30, 1536, 9, 3, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-360M": _llama(960, 32, 2560, 15, 5, 49152, tied=True),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(2048, 24, 8192, 32, 32, 49152, tied=True),
    "HuggingFaceTB/SmolLM3-3B": _llama(2048, 36, 11008, 16, 4, 128256, tied=True),
}

# What a `model_type` of Hugging Face's implies, and which keys its `config.json` must have beside those of all.
_COMMON_KEYS = ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads")
_KV, _DIM = "num_key_value_heads", "head_dim"
_GEMMA = {"tied": True, "wide_norms": True}
_KINDS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": ((), {}),
    "mistral": ((_KV,), {}),
    "phi3": ((_KV,), {}),
    "qwen2": ((_KV,), {"qkv_bias": True}),
    "qwen3": ((_KV, _DIM), {"qk_norm": "head"}),
    "olmo2": ((_KV,), {"qk_norm": "all"}),
    "smollm3": ((_KV,), {"tied": True}),
    "gemma": ((_KV, _DIM), _GEMMA),
    "gemma2": ((_KV, _DIM), _GEMMA | GEMMA2),
    "gemma3_text": ((_KV, _DIM), _GEMMA | {"qk_norm": "head", "norms": 4}),
}
# Parts of a hub name that leave the shape as it is.
_SAME_SHAPE = {"meta", "base", "pt", "instruct", "it", "chat", "hf", "sft", "dpo"}


def find_shape(name: str) -> ModelShape:
    """The shape of a model: a name of `MODELS`, or its last part, in any case, with or without parts such as "Meta",
    "Instruct" and "hf", and as short as it fits one shape alone; or a `config.json`, or the folder of one.

    Raises:
        ValueError: no such name, with those that are near; a `config.json` that is no description of a known kind of
            model, with what is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir() or path.suffix == ".json":
        return _from_config(path / "config.json" if path.is_dir() else path)
    known = {_short(full): shape for full, shape in MODELS.items()}
    short = _short(name)
    if short in known:
        return known[short]
    fitting = {shape for alias, shape in known.items() if alias.startswith(short + "-")}
    if len(fitting) == 1:
        return fitting.pop()
    near = [alias for alias in known if alias.startswith(short + "-")] or difflib.get_close_matches(
        short, known, 5, 0.5
    )
    hint = f"; near it are {', '.join(near)}" if near else ""
    raise ValueError(f"model: expected a known name, or a config.json or its folder, got {name!r}{hint}")


def _short(name: str) -> str:
    parts = name.rstrip("/").rpartition("/")[2].lower().split("-")
    return "-".join(part for part in parts if part not in _SAME_SHAPE)


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json holds.

    Raises:
        ValueError: there is no such file, or it is no JSON object with a model_type; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"model: expected a config.json, found no file {path} in {Path.cwd()}")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # what is no JSON, what is no text, and what is nested without end
        raise ValueError(f"model: {path} is no valid JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f'model: {path} must be an object with a model_type, such as "qwen2"')
    return config


def _from_config(path: Path) -> ModelShape:
    config = read_config(path)
    if config["model_type"] not in _KINDS and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a model that sees images, too
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"model: expected a model_type of {', '.join(_KINDS)} in {path}, got {kind!r}")
    needed, implied = _KINDS[kind]
    missing = [key for key in (*_COMMON_KEYS, *needed) if config.get(key) is None]
    if missing:
        raise ValueError(f"model: {path} lacks {', '.join(missing)}")

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**40:
            raise ValueError(f"model: {path}: expected a whole number above 0 as {key}, got {value!r}")
        return value

    heads = count("num_attention_heads")
    kv_heads = count(_KV, heads)
    if heads % kv_heads:
        raise ValueError(f"model: {path}: expected a divisor of {heads} heads as {_KV}, got {kv_heads}")
    found: dict[str, Any] = {
        "hidden": count("hidden_size"),
        "vocab": count("vocab_size"),
        "layers": count("num_hidden_layers"),
        "intermediate": count("intermediate_size"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": count(_DIM, max(1, count("hidden_size") // heads)),
    }
    if kind in ("llama", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "smollm3") and config.get(
        "attention_bias"
    ):
        found |= {"qkv_bias": True, "output_bias": True}
    if kind in ("llama", "smollm3"):
        found["mlp_bias"] = bool(config.get("mlp_bias"))
    if "tie_word_embeddings" in config:
        found["tied"] = config["tie_word_embeddings"]
        if type(found["tied"]) is not bool:
            raise ValueError(f"model: {path}: expected true or false as tie_word_embeddings, got {found['tied']!r}")
    for key, field in {"final_logit_softcapping": "softcap", "attn_logit_softcapping": "attention_softcap"}.items():
        if key in config:
            found[field] = cap = config[key]
            if cap is not None and not (type(cap) in (int, float) and 0 < cap < float("inf")):
                raise ValueError(f"model: {path}: expected a number above 0 or null as {key}, got {cap!r}")
    return ModelShape(**implied | found)
