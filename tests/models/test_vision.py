"""Models of vision and language with images: the head of `LMHead`, and that in the forward, against the models' own
logits, in values and gradients."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

import transformers
from heads import SIZES, assert_agrees, assert_close, assert_same_gradients, eager_logps, gradients, randomised

from dpo_kernels.models.check import CheckFailed
from dpo_kernels.models.fused_forward import add_fused_lm_head
from dpo_kernels.models.head import LMHead

IMAGE, START, END = 100, 98, 99  # ids of tokens
TEXT = {name: size for name, size in SIZES.items() if not name.startswith("n_")}
SIGHT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGHT |= {"image_size": 16, "patch_size": 8}
QWEN = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 97}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
QWENS_SIGHT = {**SIGHT, "out_hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4}
# class: its config, and the images of two sequences, of four tokens each if nothing else is said
MODELS = {
    "LlavaForConditionalGeneration": (
        {"vision_config": {"model_type": "clip_vision_model", **SIGHT}, "text_config": {"model_type": "llama", **TEXT}},
        {"image_token_index": IMAGE},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "PaliGemmaForConditionalGeneration": (
        {"vision_config": {**SIGHT, "projection_dim": 32}, "text_config": {"model_type": "gemma", **TEXT}},
        {"image_token_index": IMAGE, "projection_dim": 32},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "Gemma3ForConditionalGeneration": (
        {"vision_config": SIGHT, "text_config": {**TEXT, "final_logit_softcapping": 0.7}},
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "SmolVLMForConditionalGeneration": (
        {"vision_config": {**SIGHT, "patch_size": 4}, "text_config": {"model_type": "llama", **TEXT}},
        {"image_token_id": IMAGE, "scale_factor": 2},
        {"pixel_values": (2, 1, 3, 16, 16)},
    ),
    "Idefics3ForConditionalGeneration": (
        {"vision_config": {**SIGHT, "patch_size": 4}, "text_config": {"model_type": "llama", **TEXT}},
        {"image_token_id": IMAGE, "scale_factor": 2},
        {"pixel_values": (2, 1, 3, 16, 16)},
    ),
    "InternVLForConditionalGeneration": (
        {
            "vision_config": {**SIGHT, "image_size": [16, 16], "patch_size": [4, 4]},
            "text_config": {"model_type": "qwen2", **TEXT},
        },
        {"image_token_id": IMAGE, "downsample_ratio": 0.5},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "Qwen2VLForConditionalGeneration": (
        {
            "vision_config": {"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": 4},
            "text_config": {**TEXT, "rope_parameters": ROPE},
        },
        QWEN,
        {"pixel_values": (32, 96), "image_grid_thw": (1, 4, 4)},
    ),
    "Qwen2_5_VLForConditionalGeneration": (
        {"vision_config": QWENS_SIGHT, "text_config": {**TEXT, "rope_parameters": ROPE}},
        QWEN,
        {"pixel_values": (32, 96), "image_grid_thw": (1, 4, 4)},
    ),
    "Qwen3VLForConditionalGeneration": (
        {
            "vision_config": {**QWENS_SIGHT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            "text_config": {**TEXT, "rope_parameters": ROPE},
        },
        QWEN,
        {"pixel_values": (32, 96), "image_grid_thw": (1, 4, 4)},
    ),
    # its forward takes no logits_to_keep, and puts the image into the text before it calls the base model
    "Qwen2_5OmniThinkerForConditionalGeneration": (
        {
            "vision_config": QWENS_SIGHT,
            "text_config": {**TEXT, "rope_parameters": ROPE},
            "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
        },
        {"image_token_index": IMAGE, "video_token_index": 97, "audio_token_index": 96, "vision_start_token_id": START},
        {"pixel_values": (32, 96), "image_grid_thw": (1, 4, 4)},
    ),
}


NARROW = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 101,
}
OF_KOSMOS = {"embed_dim": 32, "ffn_dim": 32, "layers": 1, "attention_heads": 2, "vocab_size": 101}
OF_OPT = {"model_type": "opt", "word_embed_proj_dim": 32, "ffn_dim": 32, "max_position_embeddings": 64, **NARROW}
# models that do not run on text alone, and whose base model is not found
NEEDY = {
    "Blip2ForConditionalGeneration": (
        {"vision_config": SIGHT, "text_config": OF_OPT, "qformer_config": {**NARROW, "encoder_hidden_size": 16}},
        {"num_query_tokens": 4, "image_token_index": IMAGE},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "InstructBlipForConditionalGeneration": (
        {"vision_config": SIGHT, "text_config": OF_OPT, "qformer_config": {**NARROW, "encoder_hidden_size": 16}},
        {"num_query_tokens": 4, "image_token_index": IMAGE},
        {"pixel_values": (2, 3, 16, 16), "qformer_input_ids": (2, 5)},
    ),
    "BlipForConditionalGeneration": (
        {"vision_config": SIGHT, "text_config": {**NARROW, "encoder_hidden_size": 16}},
        {"image_text_hidden_size": 16},
        {"pixel_values": (2, 3, 16, 16)},
    ),
    "Kosmos2ForConditionalGeneration": (
        {"vision_config": SIGHT, "text_config": OF_KOSMOS},
        {"latent_query_num": 4},
        {"pixel_values": (2, 3, 16, 16), "image_embeds_position_mask": (2, 12)},
    ),
}


def built(name):
    configs, more, images = (MODELS | NEEDY)[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = randomised(model_class(model_class.config_class(**configs, **more)))
    input_ids = torch.randint(3, 95, (2, 12))
    input_ids[:, 2:6] = IMAGE
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    inputs["attention_mask"][1, 10:] = 0
    for argument, shape in images.items():
        inputs[argument] = torch.tensor([shape, shape]) if argument == "image_grid_thw" else torch.randn(shape)
        if argument in ("qformer_input_ids", "image_embeds_position_mask"):
            inputs[argument] = input_ids[:, : shape[1]] if argument.endswith("ids") else (input_ids == IMAGE).long()
    for argument in inspect.signature(model.forward).parameters:
        if argument.endswith("token_type_ids"):
            inputs[argument] = (input_ids == IMAGE).long()
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_images_reach_the_head(name):
    model, inputs = built(name)
    head = LMHead.from_model(model)
    assert_agrees(model, head, inputs)
    assert_agrees(model.train(), head, inputs)
    with torch.no_grad():
        before, _ = head.hidden_states(**inputs)
        after, _ = head.hidden_states(**inputs | {"pixel_values": inputs["pixel_values"] + 1})
    assert (before[:, 5:] - after[:, 5:]).abs().max() > 0.1


@pytest.mark.parametrize("name", [*MODELS, *NEEDY])
def test_images_reach_the_fused_forward(name):
    model, inputs = built(name)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :6] = -100
    coefficients = torch.tensor([0.7, -0.4])
    torch.manual_seed(3)  # some have dropout
    expected = eager_logps(model.train()(**inputs).logits, labels)
    (expected * coefficients).sum().backward()
    expected_gradients = gradients(model)
    add_fused_lm_head(model)
    torch.manual_seed(3)
    found = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    (found * coefficients).sum().backward()
    assert_close(found, expected)
    assert_same_gradients(gradients(model), expected_gradients)
    assert any("vis" in name and float(each.abs().max()) > 0 for name, each in expected_gradients.items())


@pytest.mark.parametrize("name", NEEDY)
def test_a_model_that_needs_images_is_checked_with_those_that_it_is_given(name):
    model, inputs = built(name)
    head = LMHead(model, at_output_layer=True)
    with pytest.raises(CheckFailed, match="runs it on text alone"):
        head.check()
    head.check(inputs=inputs)
    forward = type(model).forward

    class Peculiar(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = 1.02 * output.logits
            return output

    model.__class__ = Peculiar
    with pytest.raises(CheckFailed, match="Peculiar does not give the model's own logits"):
        head.check(inputs=inputs)
