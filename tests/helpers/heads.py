"""Tiny models of every kind of head, adapters for them, and what they are compared with: the logits of the model."""

import pytest
import torch
import transformers

from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead

VOCAB = 101
# The names that different config classes have for the same sizes; a config is given those that it has.
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "n_embd": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
INKLING = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "swa_head_dim": 8}
INKLING |= {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2}
# name: (classes' prefix or model class name, more of the config, logit_scale, softcap, bias?, dense transform?)
MODELS = {
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, 1.0, None, False, False),
    "qwen3": ("Qwen3ForCausalLM", {}, 1.0, None, False, False),
    "llama": ("LlamaForCausalLM", {}, 1.0, None, False, False),
    "mistral": ("MistralForCausalLM", {}, 1.0, None, False, False),
    "gemma2": ("Gemma2ForCausalLM", {"final_logit_softcapping": 0.8}, 1.0, 0.8, False, False),
    "gemma3": ("Gemma3ForCausalLM", {"final_logit_softcapping": 0.7}, 1.0, 0.7, False, False),
    "phi": ("PhiForCausalLM", {}, 1.0, None, True, False),
    "cohere": ("CohereForCausalLM", {"logit_scale": 0.37}, 0.37, None, False, False),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 3.0}, 1 / 3, None, False, False),
    "hyperclovax": ("HyperCLOVAXForCausalLM", {"logits_scaling": 3.0}, 3.0, None, False, False),
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}, 1.0, None, False, False),
    "recurrent_gemma": (
        "RecurrentGemmaForCausalLM",
        {"logits_soft_cap": 0.9, "lru_width": 32, "num_hidden_layers": 3, "attention_window_size": 8},
        1.0,
        0.9,
        False,
        False,
    ),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM", {}, 1.0, None, True, True),
    "gpt2": ("GPT2LMHeadModel", {}, 1.0, None, False, False),
    "falcon_h1": ("FalconH1ForCausalLM", {"lm_head_multiplier": 0.4, **FALCON_H1}, 0.4, None, False, False),
    "roberta": ("RobertaForCausalLM", {"is_decoder": True}, 1.0, None, True, True),
    "bert": ("BertLMHeadModel", {"is_decoder": True}, 1.0, None, True, True),
    "electra": ("ElectraForCausalLM", {"is_decoder": True, "embedding_size": 16}, 1.0, None, True, True),
    # its forward calls the decoder inside its base model, past the base model's own forward
    "opt": ("OPTForCausalLM", {"ffn_dim": 40, "word_embed_proj_dim": 16}, 1.0, None, False, False),
    # the config value divides the hidden states, and the head has entries that the model drops
    "inkling": ("InklingForCausalLM", {"unpadded_vocab_size": 97, **INKLING}, None, None, False, False),
}


def build(name, seed=0, **config):
    """A tiny model with nothing at a value that could hide an omission: biases are not zero, nor norm weights one."""
    torch.manual_seed(seed)
    class_name, more, *_ = MODELS[name]
    model_class = getattr(transformers, class_name)
    defaults = model_class.config_class()
    sizes = {key: value for key, value in SIZES.items() if hasattr(defaults, key)}
    return randomised(model_class(model_class.config_class(**{**sizes, **more, **config})))


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def batch(width=7):
    """Two sequences, the second with padding on the right."""
    input_ids = torch.randint(3, 95, (2, width), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def logits_of(head, hidden):
    hidden, weight, bias = head.operands(hidden)
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = head.logit_scale * logits
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance * expected.abs().max().item()


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual, expected):
    assert expected and actual.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((actual[name] - gradient).abs().max()) <= 2e-5 * largest, name


def eager_logps(logits, labels):
    logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps.masked_fill(labels[:, 1:] == -100, 0.0).sum(-1)


def assert_agrees(model, head, inputs=None):
    """Logits, and the gradient of every trainable parameter, against the model's own."""
    inputs = inputs or batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    torch.manual_seed(3)
    hidden, _ = head.hidden_states(**inputs)
    with torch.random.fork_rng():  # operands draw dropout, as would the call below
        logits = logits_of(head, hidden)
    logps = head.sequence_logps(hidden, labels, shift=True).logps
    coefficients = torch.tensor([0.7, -0.4])
    (logps * coefficients).sum().backward()
    actual = gradients(model)
    torch.manual_seed(3)
    expected_logits = model(**inputs).logits
    assert_close(logits, expected_logits)
    expected = eager_logps(expected_logits, labels)
    assert_close(logps, expected)
    (expected * coefficients).sum().backward()
    assert_same_gradients(actual, gradients(model))


def by_head(model, inputs):
    """The log-probabilities of both sequences by `LMHead`."""
    head = LMHead.from_model(model)
    torch.manual_seed(3)
    return head.sequence_logps(head.hidden_states(**inputs)[0], inputs["input_ids"], shift=True).logps


def by_forward(model, inputs):
    """The same by `add_fused_lm_head`."""
    add_fused_lm_head(model)
    torch.manual_seed(3)
    return model(**inputs, labels=inputs["input_ids"], fused_lm_head=True).log_probs.sum(-1)


def assert_same_logps(way, model, inputs=None, tolerance=1e-5):
    """Those of `by_head` or `by_forward` against the model's own logits."""
    inputs = inputs or batch()
    torch.manual_seed(3)
    with torch.no_grad():
        expected = eager_logps(model(**inputs).logits.float(), inputs["input_ids"])
        assert_close(way(model, inputs), expected, tolerance)


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
HEAD = {"target_modules": ["q_proj", "lm_head"], "r": 4, "init_lora_weights": False}
ADAPTERS = {
    "attention": ("LoraConfig", {**ATTENTION, "init_lora_weights": False}),
    "head": ("LoraConfig", HEAD),
    "head_rslora": ("LoraConfig", {**HEAD, "use_rslora": True}),
    "head_bias": ("LoraConfig", {**HEAD, "lora_bias": True}),
    "head_dora": ("LoraConfig", {**HEAD, "use_dora": True}),
    "head_loha": ("LoHaConfig", {"target_modules": ["lm_head"], "r": 4, "init_weights": False}),
    "head_ia3": (
        "IA3Config",
        {"target_modules": ["lm_head"], "feedforward_modules": ["lm_head"], "init_ia3_weights": False},
    ),
    "embeddings": ("LoraConfig", {**HEAD, "target_modules": ["embed_tokens"]}),
    "embeddings_and_tied_head": (
        "LoraConfig",
        {**HEAD, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "modules_to_save": ("LoraConfig", {**ATTENTION, "modules_to_save": ["lm_head"]}),
    "trainable_tokens": ("LoraConfig", {**ATTENTION, "trainable_token_indices": [1, 8, 40]}),
}


def adapt(model, name, **config):
    """The model with an adapter; what begins as zeros or a copy is moved away from there."""
    peft = pytest.importorskip("peft")
    config_class, options = ADAPTERS[name]
    model = peft.get_peft_model(model, getattr(peft, config_class)(**{**options, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()
