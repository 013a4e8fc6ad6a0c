"""Both ways to a head, on every class of transformers' for causal language modelling and for images and text to text.

    python tests/models/sweep.py [CLASS ...]

prints a line for each way and class, of all classes where none is named; `sweep.txt` has those of all. A class is built
tiny, with the defaults of its config shrunk, and is tried in a process of its own: one that hangs or crashes is a line.
"""

from __future__ import annotations

import collections
import faulthandler
import gc
import inspect
import multiprocessing
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import torch
import transformers
from heads import eager_logps, gradients, randomised
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto

from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead

WAYS = ("LMHead.from_model", "add_fused_lm_head")
VERDICTS = ("right", "refused", "not built", "WRONG", "unclear")
WIDTH, LAYERS, HEADS, KV_HEADS, VOCAB = 32, 2, 4, 2, 123
SECONDS, BYTES = 60, 16 * 2**30  # of processor time and of addresses, for a class
# What a field of a config is cut to, by the first of these that its name matches. All widths are the same, so that what
# leads from one tower of a model into another fits.
SIZES = {
    r"num_kv_shared_layers|num_nextn_predict_layers|first_k_dense_replace": 0,
    r"(\w+_)?(num|n)_(\w+_)?layers?(_per_stack)?|\w*(en|de)coder_layers|(resampler_)?depth|num_blocks|layers": LAYERS,
    r"indexer_kv_heads": 1,
    r"(\w+_)?(num_key_value_heads|num_kv_heads|kv_n_heads)": KV_HEADS,
    r"\w*(n|num)_shared_experts": 1,
    r"(\w+_)?(num|n)_(\w+_)?heads?|\w*attention_heads(_per_layer)?|resampler_heads": HEADS,
    r"qk_head_dim|attention_head_dim": 16,
    r"attention_hidden_size|hidden_size_global": 64,
    r"(\w+_)?head_?dim|dim_head|d_head|d_kv|kv_channels|attention_head_size|rotary_dim|mamba_d_head|d_rel": 8,
    r"(\w+_)?num_(local_|routed_)?experts|n_routed_experts|zero_expert_num|indexer_compress_ratio": 4,
    r"num_experts_per_tok(en)?|top_k_experts|moe_(topk|top_k|k)|index_topk(_blocks)?": 2,
    r"expand|mamba_expand|n_group|num_expert_group|topk_group|\w*n_groups|mamba_ngroups": 1,
    r"\w*vocab_size|vocab_size_per_layer_input|ngram_vocab_size_base|encoder_hash_byte_group_vocab": VOCAB,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions": 160,
    r"\w*(hidden|intermediate|embed|embedding|moe|ffn)\w*_(size|dim)|\w*_lora_rank|laurel_rank": WIDTH,
    r"hidden_size_\w+|intermediate_size_\w+|\w*expert_dim|feed_forward_size|adapter_(in|out)_dim": WIDTH,
    r"\w*(d_model|n_embd|emb_dim|embed_dim|d_ff|dff|dim_ff|d_inner|ffn_dim|mlp_dim|lru_width|mamba_d_ssm)": WIDTH,
    r"(\w+_)?(projection|output|input|text|projector_input|projector_output|vision_output)_(dim|size)": WIDTH,
    r"(mamba_)?(d_state|chunk_size)|(ssm_)?state_size|time_step_rank|mamba_dt_rank|indexer_budget": 8,
}
# What they leave open by default, and cannot do without.
NEEDED = (
    r"head_dim|num_key_value_heads|num_experts_per_tok|top_k_experts|n_\w+_experts|num_experts|moe_\w+_size|indexer_\w+"
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
# No default of theirs fits a model this small, or there is none.
MORE: dict[str, dict[str, Any]] = {
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": 122, "IMGIMGAA": 121, "IMGIMGBA": 120}},
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": ROPE}},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": {"full_attention": ROPE}},
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "DeepseekOcr2ForConditionalGeneration": {"text_config.mlp_layer_types": ["dense", "sparse"]},
    "Emu3ForConditionalGeneration": {"vocabulary_map": {"<image>": 122, "<|extra_200|>": 121}},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config.head_dim": 8,
        "text_config.rope_parameters": ROPE,
    },
    "Glm4vMoeForConditionalGeneration": {
        "text_config.rope_parameters": {**ROPE, "mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}
    },
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[0, 0], [1, 1]],
        "downsample_rate": "4/8",
    },
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "ReformerModelWithLMHead": {
        "axial_pos_shape": (10, 16),
        "axial_pos_embds_dim": (16, 16),
        "num_buckets": 4,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
    },
    "BltForCausalLM": {"global_config.hidden_size": 64, "global_config.head_dim": 16},
    "Qwen2_5OmniThinkerForConditionalGeneration": {"vision_start_token_id": 119},
    "Qwen3OmniMoeThinkerForConditionalGeneration": {"vision_start_token_id": 119},
    "RemBertForCausalLM": {"output_embedding_size": 24},
    "Step3p7ForConditionalGeneration": {"text_config.sliding_window": 4},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"num_hidden_layers": 3, "layers_block_type": ["hybrid", "linear_attention", "hybrid"]},
}


def classes() -> list[str]:
    mappings = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    found = [each for mapping in mappings for each in mapping.values()]
    return sorted({name for each in found for name in ([each] if isinstance(each, str) else each)})


def shrink(config: PreTrainedConfig, special: list[int]) -> None:
    """In place. `special`: the ids that stand for something else than text, in this config or another of the model."""
    fields = vars(config)
    depths = [value for name, value in fields.items() if matched(name) == LAYERS and type(value) is int]
    heads = fields.get("num_attention_heads")
    for name, value in fields.items():
        size = matched(name)
        if isinstance(value, PreTrainedConfig):
            fields[name] = without_timm(value)
            shrink(fields[name], special)
        elif size is None and re.fullmatch(r"\w+_(token|token_ids?|token_index|id|index)", name):
            fields[name] = token_ids(value, special)
        elif name.startswith("rope_parameters"):
            fields[name] = plain_rope(value)
        elif name == "is_decoder":
            fields[name] = True
        elif (
            name == "num_key_value_heads" and value == heads
        ):  # where keys and values are computed as one, it has to be
            fields[name] = HEADS
        elif size is not None and type(value) is int:
            fields[name] = min(value, size)
        elif value is None and re.fullmatch(NEEDED, name):
            fields[name] = size
        elif isinstance(value, list | tuple) and len(value) in depths:
            kinds = [value[0], next((kind for kind in value if kind != value[0]), value[0])]
            fields[name] = type(value)(min(each, size) if size and type(each) is int else each for each in kinds)
        elif isinstance(value, list | tuple) and re.search("index|idx|layer|indic", name):
            fields[name] = type(value)(each % LAYERS if type(each) is int else each for each in value)


def matched(name: str) -> Any:
    return next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, name)), None)


def without_timm(config: PreTrainedConfig) -> PreTrainedConfig:
    """Another tower of vision in the place of one from that library."""
    if config.model_type != "timm_wrapper" and not hasattr(config, "model_args"):
        return config
    other = transformers.SiglipVisionConfig()
    for name, value in vars(config).items():
        vars(other).setdefault(name, value)
    other.model_args = {"embed_dim": WIDTH}
    return other


def token_ids(value: Any, special: list[int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(token_ids(each, special) for each in value)
    if type(value) is not int:
        return value
    special.append(value if value < VOCAB else VOCAB - 1 - len(special))
    return special[-1]


def plain_rope(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if any(isinstance(each, dict) for each in value.values()):  # of each type of layer
        return {kind: plain_rope(each) for kind, each in value.items()}
    if value.get("rope_type") in ("axial", "proportional"):
        return value
    kept = ("partial_rotary_factor", "llama_4_scaling_beta", "original_max_position_embeddings")
    return ROPE | {name: value[name] for name in kept if name in value}


def built(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of that class, and a batch for it."""
    model_class = getattr(transformers, name)
    config = model_class.config_class()
    special: list[int] = []
    shrink(config, special)
    for prefix, fields in MORE.items():
        for path, value in fields.items() if name.startswith(prefix) else ():
            *parents, field = path.split(".")
            owner = config
            for parent in parents:
                owner = getattr(owner, parent)
            setattr(owner, field, value)
    torch.manual_seed(0)
    model = randomised(model_class(config))
    usable = torch.tensor(sorted(set(range(3, 96)) - set(special)))
    input_ids = usable[torch.randint(len(usable), (2, 7))]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return model, {k: v for k, v in inputs.items() if k in parameters or open_ended}


def verdicts(name: str) -> Iterator[str]:
    """A line for each of `WAYS`."""
    expected: Any = None
    try:
        model, inputs = built(name)
        try:
            expected = scored(model, inputs, lambda labels: eager_logps(model(**inputs).logits, labels))
        except Exception as error:
            expected = error
    except Exception as error:
        yield from (line(name, way, "not built", error) for way in WAYS)
        return
    for way, logps in zip(WAYS, (by_head, by_forward), strict=True):
        try:
            found = scored(model, inputs, logps(model, inputs))
        except ValueError as error:
            yield line(name, way, "refused", error)
        except Exception as error:
            alike = (type(error), str(error)) == (type(expected), str(expected))
            yield line(name, way, "not built" if alike else "unclear", error)
        else:
            yield line(name, way, *compared(found, expected))


def by_head(model: Any, inputs: dict[str, Any]) -> Callable[..., Any]:
    head = LMHead.from_model(model)

    def logps(labels: Any) -> Any:
        return head.sequence_logps(head.hidden_states(**inputs)[0], labels, shift=True).logps

    return logps


def by_forward(model: Any, inputs: dict[str, Any]) -> Callable[..., Any]:
    add_fused_lm_head(model)
    return lambda labels: model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)


def scored(model: Any, inputs: dict[str, Any], logps: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The log-probabilities of both sequences, and the gradient of every parameter."""
    labels = inputs["input_ids"].masked_fill(torch.tensor([[False] * 7, [False] * 5 + [True] * 2]), -100)
    torch.manual_seed(3)
    found = logps(labels=labels)
    (found * torch.tensor([0.7, -0.4])).sum().backward()
    return found.detach(), gradients(model)


def compared(found: Any, expected: Any) -> tuple[str, Any]:
    if isinstance(expected, Exception):
        return "not built", expected  # of text alone the model gives no logits to compare with
    (logps, slopes), (expected_logps, expected_slopes) = found, expected
    size, slope_size = expected_logps.abs().max(), max(each.abs().max() for each in expected_slopes.values())
    off = float((logps - expected_logps).abs().max() / size)
    slopes_off = [(slopes[each] - expected_slopes[each]).abs().max() / slope_size for each in expected_slopes]
    if slopes.keys() == expected_slopes.keys() and off <= 2e-5 and max(slopes_off) <= 1e-4:
        return "right", ""
    return "WRONG", f"log-probabilities by {off:.1e}, gradients by {float(max(slopes_off)):.1e}"


def line(name: str, way: str, verdict: str, why: Any = "") -> str:
    if isinstance(why, Exception):
        kind = "" if verdict == "refused" else f"{type(why).__name__}: "
        why = kind + " ".join(str(why).split())
    return f"{name:44} {way:18} {verdict:9} {str(why)[:200]}".rstrip()


def tried(name: str) -> list[str]:
    """The same from a process of its own."""
    read, write = os.pipe()
    if (process := os.fork()) == 0:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3 * SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with os.fdopen(write, "w") as file:
            for each in verdicts(name):
                print(each, file=file, flush=True)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        lines = file.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return lines + [line(name, way, "unclear", f"the process ended with {status}") for way in WAYS[len(lines) :]]


def sweep(names: Iterable[str]) -> list[str]:
    torch.set_num_threads(1)  # forks have no others
    by_head(*built("LlamaForCausalLM"))  # imports what most of them need; a gradient would leave threads
    gc.freeze()  # nobody has to look through all imports for garbage
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        return [each for lines in pool.map(tried, names) for each in lines]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    lines = sweep(sys.argv[1:] or classes())
    print(f"# transformers {transformers.__version__}")
    print(*lines, sep="\n")
    count = collections.Counter(next(each for each in VERDICTS if f" {each}" in line[:75]) for line in lines)
    print(*(f"# {verdict}: {count[verdict]}" for verdict in VERDICTS), sep="\n")
