"""Holds attention in rows that share prompts against SDPA with a mask of everything, and models with it against padded
batches: forward and gradients.

    python benchmarks/attention.py --device cuda          # FlexAttention, and kernels for whole sequences
    python benchmarks/attention.py                        # the blocks of a CPU

A line for each comparison, with the rms of the difference over that of what is right; the exit status tells if one is
beyond its limit, or if something else computed than was to. Dimensions: R rows, T slots, h query heads, g of them for
a head of keys, d head size.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_kernels.data.batching import PairCollator
from dpo_kernels.data.lengths import real_lengths
from dpo_kernels.data.packing import PackedCollator
from dpo_kernels.models import segments
from dpo_kernels.models.head import LMHead
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.models.segments import hidden_of_responses
from dpo_kernels.testing import rms
from dpo_kernels.training.policy import hidden_of

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
SOFTCAP = 5.0
MODELS = ("qwen2", "gemma2", "gemma3", "mistral")
WAYS: dict[str, dict[str, Any]] = {
    "one row": {},
    "rows": {"packed": False},
    "whole sequences": {"shared_prefix": False},
}
VOCAB = 128


class Comparison(NamedTuple):
    name: str
    taken: str
    """What computed: "FlexAttention", kernels for "sequences" or "blocks", or why nothing did."""
    expected: str
    errors: dict[str, float]
    limit: float

    @property
    def problem(self) -> str:
        if self.taken != self.expected:
            return f"{self.name}: computed by {self.taken}, expected {self.expected}"
        off = {name: error for name, error in self.errors.items() if not error <= self.limit}  # NaN is off, too
        return f"{self.name}: {off}, more than {self.limit:g}" if off else ""


def taken_of(layout: Tensor) -> str:
    known = segments._known(layout)
    return "FlexAttention" if known.flex else "sequences" if any(known._sequences) else "blocks"


def expected_of(device: torch.device, dtype: torch.dtype, softcap: bool, shared: bool) -> str:
    if device.type != "cuda" or softcap:
        return "blocks"
    return "FlexAttention" if shared or dtype == torch.float32 else "sequences"


def relative(found: Tensor, right: Tensor) -> float:
    return rms(found.double() - right.double()) / max(rms(right.double()), 1e-30)


def pairs(count: int, longest: int) -> list[dict[str, Any]]:
    """With the lengths of real ones."""
    draw = torch.Generator().manual_seed(0)
    lengths = real_lengths(0, longest)[:count]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: torch.randint(3, VOCAB, (size,), generator=draw) for name, size in zip(names, sizes, strict=True)}
        for sizes in lengths
    ]


# The attention alone


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    """[R, T, h, d] of query [R, h, T, d], key and value [R, h / g, T, d], in fp64 by SDPA, or what it does by hand."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    if softcap is None:
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    else:
        scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 / softcap)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    return out.transpose(1, 2)


def attention_alone(args: argparse.Namespace) -> Iterator[Comparison]:
    device = torch.device(args.device)
    module = nn.Module()  # which has no dropout
    grid = itertools.product(LIMITS, (1, 4), (None, args.longest // 4), (None, SOFTCAP), WAYS)
    for dtype, groups, window, softcap, way in grid:
        batch = PackedCollator(0, **WAYS[way])(pairs(args.pairs, args.longest))
        layout = batch["layout"].to(device)
        rows, slots = batch["input_ids"].shape
        draw: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        heads = (args.heads, args.heads // groups, args.heads // groups)
        q, k, v = (torch.randn(rows, h, slots, args.head_dim, **draw).to(dtype).requires_grad_() for h in heads)
        given = torch.randn(rows, slots, args.heads, args.head_dim, **draw).to(dtype)
        options: dict[str, Any] = {} if softcap is None else {"softcap": softcap}
        out, _ = segments.attention_forward(module, q, k, v, layout, sliding_window=window, **options)
        found = [out, *torch.autograd.grad(out, (q, k, v), given)]
        q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
        right_out = masked_attention(q, k, v, segments.sees(layout, window), softcap)
        right = [right_out, *torch.autograd.grad(right_out, (q, k, v), given.double())]
        named = {"dtype": str(dtype).removeprefix("torch."), "g": groups, "window": window, "softcap": softcap}
        name = ", ".join(f"{key} {value}" for key, value in named.items()) + f", {way}"
        errors = {key: relative(a, b) for key, a, b in zip(("out", "dq", "dk", "dv"), found, right, strict=True)}
        expected = expected_of(device, dtype, softcap is not None, way != "whole sequences")
        yield Comparison(name, taken_of(layout), expected, errors, LIMITS[dtype])


# In models


def model_of(kind: str, args: argparse.Namespace) -> Any:
    """Two layers, of which one has a window where the kind has one, with the attention that transformers gives it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {} if kind == "qwen2" else {"sliding_window": args.longest // 4}
    if kind.startswith("gemma"):
        options["layer_types"] = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3_text" if kind == "gemma3" else kind,
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=args.head_dim, max_position_embeddings=2 * args.longest, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device).train()
    for name, weight in model.named_parameters():  # scores far apart, so that what is seen makes a difference
        if weight.ndim == 2 and "proj" in name:
            nn.init.normal_(weight, std=2 * weight.shape[1] ** -0.5)
    return model


def of_model(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """Hidden states that predict a label, sequence by sequence, and the gradient of every matrix."""
    hidden, _ = hidden_of(LMHead.from_model(model), batch)
    labels = batch["labels"]
    if "layout" in batch:
        hidden = hidden_of_responses(hidden, batch["predictors"])
    else:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    found = hidden[labels != -100]
    given = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    weights = [weight for name, weight in model.named_parameters() if "proj" in name]
    return [found, torch.cat([dweight.flatten() for dweight in torch.autograd.grad(found, weights, given)])]


def in_models(args: argparse.Namespace) -> Iterator[Comparison]:
    device = torch.device(args.device)
    for kind, way in itertools.product(args.models, WAYS):
        model = model_of(kind, args)
        made = [
            collate(pairs(args.pairs, args.longest)) for collate in (PairCollator(0), PackedCollator(0, **WAYS[way]))
        ]
        padded, shared = (
            {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
            for batch in made
        )
        capped = getattr(model.config, "attn_logit_softcapping", None) is not None
        right = of_model(model, padded)
        name = f"{kind}, {way}"
        expected = expected_of(device, torch.float32, capped, way != "whole sequences")
        try:
            use_layouts(model)
        except ValueError as error:
            yield Comparison(name, f"nothing, since {error}", expected, {}, 0.0)
            continue
        found = of_model(model, shared)
        errors = {key: relative(a, b) for key, a, b in zip(("hidden", "dweights"), found, right, strict=True)}
        yield Comparison(name, taken_of(shared["layout"]), expected, errors, LIMITS[torch.float32])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cuda or cpu (default: %(default)s)")
    add("--pairs", type=int, default=3, help="in a batch, 4 at most (default: %(default)s)")
    add("--longest", type=int, default=384, help="tokens at which they are cut (default: %(default)s)")
    add("--heads", type=int, default=4, help="query heads, a multiple of 4 (default: %(default)s)")
    add("--head-dim", type=int, default=64, help="default: %(default)s")
    add("--models", nargs="*", choices=MODELS, default=MODELS, help="default: all; none: the attention alone")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    problems = []
    for comparison in itertools.chain(attention_alone(args), in_models(args)):
        errors = ", ".join(f"{name} {error:.1e}" for name, error in comparison.errors.items())
        print(f"{comparison.name}: {comparison.taken}: {errors}", flush=True)
        problems += [comparison.problem] if comparison.problem else []
    if problems:
        sys.exit("\n".join(problems))
    print("all within their limits")


if __name__ == "__main__":
    main()
