"""Small models of the kinds that are planned for, and what a training step of one takes."""

import pytest
import torch

from dpo_kernels.models.shapes import ModelShape
from dpo_kernels.testing import allocated

SMALL = ModelShape(64, 128, 3, 160, 4, 2, 16)
KINDS = {
    "llama": ("LlamaConfig", {}, {}),
    "qwen2": ("Qwen2Config", {}, {"qkv_bias": True}),
    "qwen3": ("Qwen3Config", {}, {"qk_norm": "head"}),
    "gemma2": ("Gemma2Config", {}, {"norms": 4, "wide_norms": True, "softcap": 30.0, "attention_softcap": 50.0}),
    "gemma3": ("Gemma3TextConfig", {}, {"norms": 4, "wide_norms": True, "qk_norm": "head"}),
    "experts": (
        "Qwen3MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80},
        {"qk_norm": "head", "experts_per_token": 2},
    ),
}


def model_of(kind, shape, dtype):
    transformers = pytest.importorskip("transformers")
    name, options, _ = KINDS[kind]
    config = getattr(transformers, name)(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, tie_word_embeddings=shape.tied, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **options,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def adapted(model, step):
    """The model as `step` trains it."""
    if step.train == "frozen-head":
        model.get_output_embeddings().weight.requires_grad_(False)
    if step.train == "lora":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=step.lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    if step.checkpointing:
        model.gradient_checkpointing_enable()
        if step.train == "lora":
            model.enable_input_require_grads()
    return model


def measured_step(step, model, loss):
    """Bytes at the peak of a whole step of `adapted(...)`, after a first one; and what its last backward and its update
    allocate. `loss`: a function that computes it."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def micro_batch():
        with torch.autocast("cpu", torch.bfloat16, enabled=step.autocast is not None):
            value = loss()
        value.backward()

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    micro_batch()
    update()
    for _ in range(step.accumulation - 1):
        micro_batch()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    before = sum(t.nbytes for t in (*set(model.parameters()), *moments))
    earlier = sum(weight.grad.nbytes for weight in trained if weight.grad is not None)
    backward = allocated(micro_batch).peak
    gradients = sum(weight.grad.nbytes for weight in trained)
    updating = allocated(update).peak
    return before + max(earlier + backward, gradients + updating), backward, updating
