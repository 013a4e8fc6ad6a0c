"""The shapes of models that people align, by name or from a `config.json`: what memory and work follow from.

Half of the file is the table of names.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Counted:
    """Numbers of parameters that do not follow from the other fields of a shape: of mixtures of experts, and of layers
    of another kind. Counted in transformers' own model."""

    parameters: int
    active: int
    """Those that one token goes through."""
    layer: int
    """Of the largest layer."""
    matrices: int
    """Of the matrices of all layers, experts included."""
    adapted: int
    """in + out of the linear modules of all layers: adapters have `r` times as many. Experts kept in one parameter have
    none."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama kind: gated MLP, RMS norms, rotary positions, grouped queries; or one with `counted`."""

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
    experts_per_token: int = 0
    """Of a mixture of experts: those that compute for a token; `intermediate` is the width of all of them."""
    eager_attention: bool = False
    """No fused attention takes it, since it has sinks."""
    rough: bool = False
    """Layers keep something else than those of the Llama kind do, so that activations are from half to twice the
    estimate."""
    counted: Counted | None = None

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
        if self.counted is not None:
            return self.counted.matrices
        return self.layers * sum(i * o for i, o in self.linears)

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def adapted(self) -> int:
        """in + out of all matrices that get an adapter."""
        if self.counted is not None:
            return self.counted.adapted
        return self.layers * sum(i + o for i, o in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Of one layer, the largest."""
        if self.counted is not None:
            return self.counted.layer
        biases = self.qkv_bias * (self.queries + 2 * self.keys) + self.output_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        qk_norm = {"": 0, "head": 2 * self.head_dim, "all": self.queries + self.keys}[self.qk_norm]
        return sum(i * o for i, o in self.linears) + biases + qk_norm + self.norms * self.hidden

    @property
    def parameters(self) -> int:
        if self.counted is not None:
            return self.counted.parameters
        return self.layers * self.layer_parameters + self.hidden + self.head_parameters * (1 if self.tied else 2)

    @property
    def active(self) -> int:
        """Parameters that one token goes through: all of them, but in a mixture of experts."""
        return self.parameters if self.counted is None else self.counted.active


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


def _gemma3(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, **other: Any) -> ModelShape:
    """Of a size that sees images, the part that reads text."""
    return _gemma(hidden, layers, intermediate, heads, kv_heads, **GEMMA3 | {"vocab": 262208} | other)


def _olmo(hidden: int, layers: int, intermediate: int, heads: int, kv_heads: int, vocab: int) -> ModelShape:
    return replace(_llama(hidden, layers, intermediate, heads, kv_heads, vocab), qk_norm="all")


def _falcon3(hidden: int, layers: int, intermediate: int, heads: int) -> ModelShape:
    return ModelShape(hidden, 131072, layers, intermediate, heads, 4, 256)


GEMMA2: dict[str, Any] = {"softcap": 30.0, "attention_softcap": 50.0, "norms": 4}
GEMMA3: dict[str, Any] = {"vocab": 262144, "qk_norm": "head", "norms": 4}

_LLAMA_8B = _llama(4096, 32, 14336, 32, 8, 128256)
_LLAMA_70B = _llama(8192, 80, 28672, 64, 8, 128256)
_MISTRAL_7B = _llama(4096, 32, 14336, 32, 8, 32000)
_MISTRAL_SMALL = ModelShape(5120, 131072, 40, 32768, 32, 8, 128)
_PHI3_MINI = _llama(3072, 32, 8192, 32, 32, 32064)
_PHI4 = _llama(5120, 40, 17920, 40, 10, 100352)
_PHI4_MINI = ModelShape(3072, 200064, 32, 8192, 24, 8, 128, tied=True)
_QWEN25 = {
    "0.5B": _qwen2(896, 24, 4864, 14, 2, 151936),
    "1.5B": _qwen2(1536, 28, 8960, 12, 2, 151936),
    "3B": _qwen2(2048, 36, 11008, 16, 2, 151936),
    "7B": _qwen2(3584, 28, 18944, 28, 4, 152064),
    "14B": _qwen2(5120, 48, 13824, 40, 8, 152064),
    "32B": _qwen2(5120, 64, 27648, 40, 8, 152064),
    "72B": _qwen2(8192, 80, 29568, 64, 8, 152064),
}
_QWEN3_8B = _qwen3(4096, 36, 12288, 32, False)
# Mixtures of experts, Gemma 3n and Gemma 4: the last five numbers are what `count_shape` finds.
_QWEN3_30B = ModelShape(
    2048, 151936, 48, 6144, 32, 4, 128, qk_norm="head", experts_per_token=8,
    counted=Counted(30_532_122_624, 3_353_032_704, 623_120_640, 29_909_581_824, 835_584),
)  # fmt: skip
_QWEN3_235B = ModelShape(
    4096, 151936, 94, 12288, 64, 4, 128, qk_norm="head", experts_per_token=8,
    counted=Counted(235_093_634_560, 22_190_763_520, 2_487_755_008, 233_848_176_640, 3_176_448),
)  # fmt: skip
_QWEN3_CODER_480B = ModelShape(
    6144, 151936, 62, 20480, 96, 8, 128, qk_norm="head", experts_per_token=8,
    counted=Counted(480_154_875_392, 35_474_765_312, 7_714_320_640, 478_287_101_952, 3_174_400),
)  # fmt: skip
_LLAMA4_SCOUT = ModelShape(
    5120, 202048, 48, 17 * 8192, 40, 8, 128, experts_per_token=16, rough=True,
    counted=Counted(107_769_861_120, 17_172_894_720, 2_202_101_760, 105_700_392_960, 3_736_320),
)  # fmt: skip
_LLAMA4_MAVERICK = ModelShape(
    5120, 202048, 48, 129 * 8192, 40, 8, 128, experts_per_token=128, rough=True,
    counted=Counted(400_711_848_960, 17_184_691_200, 16_295_536_640, 398_642_380_800, 4_205_568),
)  # fmt: skip
_GPT_OSS_20B = ModelShape(
    2880, 201088, 24, 11520, 64, 8, 64, experts_per_token=4, eager_attention=True, rough=True,
    counted=Counted(20_914_757_184, 4_187_440_704, 823_186_976, 19_756_154_880, 497_664),
)  # fmt: skip
_GPT_OSS_120B = ModelShape(
    2880, 201088, 36, 11520, 64, 8, 64, experts_per_token=4, eager_attention=True, rough=True,
    counted=Counted(116_829_156_672, 5_711_982_912, 3_213_080_192, 115_670_384_640, 746_496),
)  # fmt: skip
_DEEPSEEK_V3 = ModelShape(
    7168, 129280, 61, 18432, 128, 128, 192, experts_per_token=8, rough=True,
    counted=Counted(671_026_404_352, 37_552_282_624, 11_507_286_016, 669_172_039_680, 7_896_896),
)  # fmt: skip
_KIMI_K2 = ModelShape(
    7168, 163840, 61, 18432, 64, 64, 192, experts_per_token=8, rough=True,
    counted=Counted(1_026_408_209_408, 32_861_477_888, 17_059_364_864, 1_024_058_392_576, 5_549_888),
)  # fmt: skip
_GLM45 = ModelShape(
    5120, 151552, 92, 13824, 96, 8, 128, qk_norm="head", experts_per_token=8,
    counted=Counted(352_797_814_784, 33_632_251_904, 3_935_625_472, 351_243_632_640, 6_267_392),
)  # fmt: skip
_GLM45_AIR = ModelShape(
    4096, 151552, 46, 12672, 96, 8, 128, experts_per_token=8,
    counted=Counted(106_852_245_504, 13_424_123_904, 2_341_492_736, 105_609_691_136, 2_766_528),
)  # fmt: skip
_GEMMA3N_E2B = ModelShape(
    2048, 262400, 30, 8192, 8, 2, 256, tied=True, softcap=30.0, qk_norm="head", norms=7, rough=True,
    counted=Counted(4_435_182_688, 4_435_182_688, 62_153_296, 1_843_120_480, 1_631_424),
)  # fmt: skip
_GEMMA3N_E4B = ModelShape(
    2048, 262400, 35, 16384, 8, 2, 256, tied=True, softcap=30.0, qk_norm="head", norms=7, rough=True,
    counted=Counted(6_835_235_568, 6_835_235_568, 112_484_944, 3_904_924_400, 2_741_984),
)  # fmt: skip
_GEMMA4_E2B = ModelShape(
    1536, 262144, 35, 6144, 8, 1, 256, tied=True, softcap=30.0, qk_norm="head", norms=5, rough=True,
    counted=Counted(4_628_569_344, 4_628_569_344, 70_000_640, 1_863_057_408, 1_645_824),
)  # fmt: skip
_GEMMA4_E4B = ModelShape(
    2560, 262144, 42, 10240, 8, 2, 256, tied=True, softcap=30.0, qk_norm="head", norms=5, rough=True,
    counted=Counted(7_463_013_376, 7_463_013_376, 106_182_144, 3_945_267_200, 2_429_952),
)  # fmt: skip
_GEMMA4_12B = ModelShape(
    3840, 262144, 48, 15360, 16, 8, 256, tied=True, softcap=30.0, qk_norm="head", norms=4, rough=True,
    counted=Counted(11_907_350_272, 11_907_350_272, 241_844_224, 10_899_947_520, 4_098_048),
)  # fmt: skip
_GEMMA4_26B = ModelShape(
    2816, 262144, 30, 7744, 16, 8, 256, tied=True, softcap=30.0, qk_norm="head", norms=7, experts_per_token=8,
    rough=True, counted=Counted(25_233_141_760, 3_822_530_560, 828_513_408, 24_494_243_840, 1_249_920),
)  # fmt: skip
_GEMMA4_31B = ModelShape(
    5376, 262144, 60, 21504, 32, 16, 256, tied=True, softcap=30.0, qk_norm="head", norms=4, rough=True,
    counted=Counted(30_697_345_280, 30_697_345_280, 534_009_856, 29_286_727_680, 7_651_840),
)  # fmt: skip
_GRANITE_1B = ModelShape(
    1024, 49155, 24, 4096, 16, 8, 64, tied=True, experts_per_token=8, rough=True,
    counted=Counted(1_334_628_352, 428_658_688, 53_512_192, 1_284_243_456, 172_032),
)  # fmt: skip
_GRANITE_3B = ModelShape(
    1536, 49155, 32, 4096, 24, 8, 64, tied=True, experts_per_token=8, rough=True,
    counted=Counted(3_298_793_472, 882_874_368, 100_727_808, 3_223_191_552, 327_680),
)  # fmt: skip

MODELS: dict[str, ModelShape] = {
    "Qwen/Qwen2-0.5B": _qwen2(896, 24, 4864, 14, 2, 151936),
    "Qwen/Qwen2-1.5B": _qwen2(1536, 28, 8960, 12, 2, 151936),
    "Qwen/Qwen2-7B": _qwen2(3584, 28, 18944, 28, 4, 152064),
    "Qwen/Qwen2-72B": _qwen2(8192, 80, 29568, 64, 8, 152064),
    **{f"Qwen/Qwen2.5-{size}": shape for size, shape in _QWEN25.items()},
    **{f"Qwen/Qwen2.5-Coder-{size}": shape for size, shape in _QWEN25.items() if size != "72B"},
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 3072, 16, True),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 6144, 16, True),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 9728, 32, True),
    "Qwen/Qwen3-8B": _QWEN3_8B,
    "Qwen/Qwen3-14B": _qwen3(5120, 40, 17408, 40, False),
    "Qwen/Qwen3-32B": _qwen3(5120, 64, 25600, 64, False),
    "Qwen/Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _QWEN3_30B,
    "Qwen/Qwen3-235B-A22B": _QWEN3_235B,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": _QWEN3_CODER_480B,
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 11008, 32, 32, 32000),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 13824, 40, 40, 32000),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 80, 28672, 64, 8, 32000),
    "meta-llama/Meta-Llama-3-8B": _LLAMA_8B,
    "meta-llama/Meta-Llama-3-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-8B": _LLAMA_8B,
    "meta-llama/Llama-3.1-70B": _LLAMA_70B,
    "meta-llama/Llama-3.1-405B": _llama(16384, 126, 53248, 128, 8, 128256),
    "meta-llama/Llama-3.2-1B": _llama(2048, 16, 8192, 32, 8, 128256, tied=True),
    "meta-llama/Llama-3.2-3B": _llama(3072, 28, 8192, 24, 8, 128256, tied=True),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_70B,
    "allenai/Llama-3.1-Tulu-3-8B-SFT": replace(_LLAMA_8B, vocab=128264),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": _LLAMA4_SCOUT,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": _LLAMA4_MAVERICK,
    "allenai/OLMo-2-0425-1B": _olmo(2048, 16, 8192, 16, 16, 100352),
    "allenai/OLMo-2-1124-7B": _olmo(4096, 32, 11008, 32, 32, 100352),
    "allenai/OLMo-2-1124-13B": _olmo(5120, 40, 13824, 40, 40, 100352),
    "allenai/OLMo-2-0325-32B": _olmo(5120, 64, 27648, 40, 8, 100352),
    "allenai/Olmo-3-1025-7B": _olmo(4096, 32, 11008, 32, 32, 100278),
    "allenai/Olmo-3-7B": _olmo(4096, 32, 11008, 32, 32, 100278),
    "allenai/Olmo-3-1125-32B": _olmo(5120, 64, 27648, 40, 8, 100278),
    "allenai/Olmo-3-32B": _olmo(5120, 64, 27648, 40, 8, 100278),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(2048, 22, 5632, 32, 4, 32000),
    "google/gemma-2b": _gemma(2048, 18, 16384, 8, 1),
    "google/gemma-7b": _gemma(3072, 28, 24576, 16, 16),
    "google/gemma-2-2b": _gemma(2304, 26, 9216, 8, 4, **GEMMA2),
    "google/gemma-2-9b": _gemma(3584, 42, 14336, 16, 8, **GEMMA2),
    "google/gemma-2-27b": _gemma(4608, 46, 36864, 32, 16, **GEMMA2 | {"head_dim": 128}),
    "google/gemma-3-270m": _gemma(640, 18, 2048, 4, 1, **GEMMA3),
    "google/gemma-3-1b-pt": _gemma(1152, 26, 6912, 4, 1, **GEMMA3),
    "google/gemma-3-4b-pt": _gemma3(2560, 34, 10240, 8, 4),
    "google/gemma-3-12b-pt": _gemma3(3840, 48, 15360, 16, 8),
    "google/gemma-3-27b-pt": _gemma3(5376, 62, 21504, 32, 16, head_dim=128),
    "google/gemma-3n-E2B": _GEMMA3N_E2B,
    "google/gemma-3n-E4B": _GEMMA3N_E4B,
    "google/gemma-4-E2B": _GEMMA4_E2B,
    "google/gemma-4-E4B": _GEMMA4_E4B,
    "google/gemma-4-12B": _GEMMA4_12B,
    "google/gemma-4-26B-A4B": _GEMMA4_26B,
    "google/gemma-4-31B": _GEMMA4_31B,
    "mistralai/Mistral-7B-v0.1": _MISTRAL_7B,
    "mistralai/Mistral-7B-Instruct-v0.2": _MISTRAL_7B,
    "mistralai/Mistral-7B-v0.3": replace(_MISTRAL_7B, vocab=32768),
    "mistralai/Mistral-Nemo-Base-2407": ModelShape(5120, 131072, 40, 14336, 32, 8, 128),
    "mistralai/Ministral-8B-Instruct-2410": ModelShape(4096, 131072, 36, 12288, 32, 8, 128),
    "mistralai/Mistral-Small-24B-Base-2501": _MISTRAL_SMALL,
    "mistralai/Mistral-Small-3.1-24B-Base-2503": _MISTRAL_SMALL,
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": _MISTRAL_SMALL,
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL_7B,
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL_7B,
    "microsoft/Phi-3-mini-4k-instruct": _PHI3_MINI,
    "microsoft/Phi-3-mini-128k-instruct": _PHI3_MINI,
    "microsoft/Phi-3.5-mini-instruct": _PHI3_MINI,
    "microsoft/Phi-4-mini-instruct": _PHI4_MINI,
    "microsoft/Phi-4-mini-reasoning": _PHI4_MINI,
    "microsoft/phi-4": _PHI4,
    "microsoft/Phi-4-reasoning": _PHI4,
    "openai/gpt-oss-20b": _GPT_OSS_20B,
    "openai/gpt-oss-120b": _GPT_OSS_120B,
    "deepseek-ai/DeepSeek-V3": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-V3-0324": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-R1": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-R1-0528": _DEEPSEEK_V3,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": replace(_QWEN25["1.5B"], tied=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _QWEN25["7B"],
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _QWEN25["14B"],
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": _QWEN25["32B"],
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _LLAMA_8B,
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": _LLAMA_70B,
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": _QWEN3_8B,
    "moonshotai/Kimi-K2-Instruct": _KIMI_K2,
    "moonshotai/Kimi-K2-Instruct-0905": _KIMI_K2,
    "zai-org/GLM-4-9B-0414": ModelShape(4096, 151552, 40, 13696, 32, 2, 128, qkv_bias=True, norms=4),
    "zai-org/GLM-4-32B-0414": ModelShape(6144, 151552, 61, 23040, 48, 2, 128, norms=4),
    "zai-org/GLM-4.5": _GLM45,
    "zai-org/GLM-4.5-Air": _GLM45_AIR,
    "ibm-granite/granite-3.1-2b-instruct": _llama(2048, 40, 8192, 32, 8, 49155, tied=True),
    "ibm-granite/granite-3.1-8b-instruct": _llama(4096, 40, 12800, 32, 8, 49155, tied=True),
    "ibm-granite/granite-3.1-1b-a400m-instruct": _GRANITE_1B,
    "ibm-granite/granite-3.1-3b-a800m-instruct": _GRANITE_3B,
    "ibm-granite/granite-3.2-2b-instruct": _llama(2048, 40, 8192, 32, 8, 49155, tied=True),
    "ibm-granite/granite-3.2-8b-instruct": _llama(4096, 40, 12800, 32, 8, 49155, tied=True),
    "ibm-granite/granite-3.3-2b-instruct": _llama(2048, 40, 8192, 32, 8, 49159, tied=True),
    "ibm-granite/granite-3.3-8b-instruct": _llama(4096, 40, 12800, 32, 8, 49159, tied=True),
    "ibm-granite/granite-4.0-micro": _llama(2560, 40, 8192, 40, 8, 100352, tied=True),
    "tiiuae/Falcon3-1B-Base": _falcon3(2048, 18, 8192, 8),
    "tiiuae/Falcon3-3B-Base": _falcon3(3072, 22, 9216, 12),
    "tiiuae/Falcon3-7B-Base": _falcon3(3072, 28, 23040, 12),
    "tiiuae/Falcon3-10B-Base": _falcon3(3072, 40, 23040, 12),
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
    "olmo3": ((_KV,), {"qk_norm": "all"}),
    "granite": ((_KV,), {}),
    "smollm3": ((_KV,), {"tied": True}),
    "gemma": ((_KV, _DIM), _GEMMA),
    "gemma2": ((_KV, _DIM), _GEMMA | GEMMA2),
    "gemma3_text": ((_KV, _DIM), _GEMMA | {"qk_norm": "head", "norms": 4}),
}
# Parts of a hub name that leave the shape as it is.
_SAME_SHAPE = {"meta", "base", "pt", "instruct", "it", "chat", "hf", "sft", "dpo", "think", "thinking", "2507"}


def find_shape(name: str) -> ModelShape:
    """The shape of a model: a name of `MODELS`, or its last part, in any case, with or without parts such as "Meta",
    "Instruct" and "hf", and as short as it fits one shape alone; or a `config.json`, or the folder of one.

    Raises:
        ValueError: no such name, with those that are near; a `config.json` that lacks something, with what, or of which
            transformers makes no causal language model; one of a kind that needs transformers, where that is missing.
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
    raise ValueError(
        "model: expected a known name, a config.json or its folder, or --hidden and --vocab instead for a head alone, "
        f"got {name!r}{hint}"
    )


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
    config = whole = read_config(path)
    if config["model_type"] not in _KINDS and isinstance(config.get("text_config"), dict):
        config = config["text_config"]  # of a model that sees images, too
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"model: expected a model_type of {', '.join(_KINDS)} in {path}, got {kind!r}")
    if kind is None or kind not in _KINDS:
        return _by_transformers(path, whole)
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
    if kind not in ("mistral", "phi3", "qwen2") and config.get("attention_bias"):
        found |= {"qkv_bias": True, "output_bias": True}
    if kind in ("llama", "smollm3", "granite"):
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


# Kinds that transformers counts, of which it was measured that they keep what those of the Llama kind do
_MEASURED = ("qwen3_moe", "glm4_moe")
# Of a config.json: where code and weights come from, and how they are stored.
_NOT_THE_SHAPE = ("auto_map", "quantization_config", "transformers_version", "_name_or_path")


def _by_transformers(path: Path, config: dict[str, Any]) -> ModelShape:
    """The shape of a model of any kind that transformers knows, counted in the model that it makes without memory. Of a
    model that sees images, of the part that reads text, if that is a model by itself."""
    kind = config["model_type"]
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    except ImportError:
        raise ValueError(
            f"model: {path} is of model_type {kind!r}, whose parameters transformers counts: pip install transformers; "
            f"without it {', '.join(_KINDS)} are known"
        ) from None
    try:
        given = AutoConfig.for_model(**{key: value for key, value in config.items() if key not in _NOT_THE_SHAPE})
        text = given.get_text_config(decoder=True)
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(text)
            except ValueError:
                if text is given:
                    raise
                model = AutoModelForImageTextToText.from_config(given)
        return count_shape(model, text)
    except Exception as error:  # whatever a class of transformers makes of odd values
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"model: transformers makes no causal language model of {path}: {reason}") from error


def count_shape(model: Any, config: Any) -> ModelShape:
    """The shape of a causal language model of transformers with this text configuration."""
    import torch

    head = model.get_output_embeddings().weight
    vocab, hidden = head.shape

    def of(*names: str, default: Any) -> Any:
        for name in names:
            try:
                value = getattr(config, name, None)
            except Exception:  # one that differs from layer to layer: that of most
                values = [getattr(layer, name, None) for layer in getattr(config, "per_layer_config", ())]
                value = max(values, key=values.count, default=None)
            if value is not None:
                return max(value) if isinstance(value, (list, tuple)) else value
        return default

    layers, heads = of("num_hidden_layers", default=1), of("num_attention_heads", default=1)
    head_dim = of("qk_head_dim", "head_dim", default=max(1, hidden // heads))
    width = of("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    experts = of("num_local_experts", "num_experts", "n_routed_experts", default=0)
    taken = of("num_experts_per_tok", "num_experts_per_token", "top_k_experts", default=0) if experts else 0

    # Llama 4 is written so that every token goes to every expert, and counts where it was sent
    computing = experts if config.model_type == "llama4_text" else taken
    idle, mixture = 0, None
    for name, parameter in model.named_parameters():
        if taken and parameter.shape[0] == experts and (".experts." in name or parameter.ndim == 3):
            idle += parameter.numel() // experts * (experts - taken)
            mixture = name.partition(".experts.")[0] if ".experts." in name else name.rsplit(".", 2)[0]
    if mixture is not None:  # that of a gated MLP of the matrices a token goes through, the router apart
        named = model.get_submodule(mixture).named_parameters()  # a whole layer, where experts are no part of the MLP
        matrices = [p for name, p in named if p.ndim > 1 and not name.startswith("self_attn.")]
        routed = sum(p.numel() // experts * computing for p in matrices if p.ndim == 3)
        width = (routed + sum(p.numel() for p in matrices if p.ndim == 2 and len(p) != experts)) // (3 * hidden)

    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    blocks = max((each for each in lists if len(each) == layers), key=_numel, default=[model])
    q_norms = (module.weight for name, module in model.named_modules() if name.endswith(".q_norm"))
    q_norm = next((weight.numel() for weight in q_norms if weight is not None), 0)
    return ModelShape(
        hidden=hidden,
        vocab=vocab,
        layers=layers,
        intermediate=width,
        heads=heads,
        kv_heads=of("num_key_value_heads", default=heads),
        head_dim=head_dim,
        tied=model.get_input_embeddings().weight is head,
        softcap=of("final_logit_softcapping", default=None),
        attention_softcap=of("attn_logit_softcapping", default=None),
        qk_norm="" if not q_norm else "head" if q_norm == head_dim else "all",
        norms=sum(name.endswith("weight") and p.shape == (hidden,) for name, p in blocks[-1].named_parameters()),
        experts_per_token=computing,
        eager_attention=not getattr(model, "_supports_sdpa", True),
        rough=config.model_type not in _MEASURED,
        counted=Counted(
            parameters=_numel(model),
            active=_numel(model) - idle,
            layer=max(map(_numel, blocks)) if len(blocks) == layers else _numel(model) // layers,
            matrices=sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1),
            adapted=sum(
                sum(module.weight.shape)
                for module in model.modules()
                if (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
                and module.weight is not head
            ),
        ),
    )


def _numel(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
