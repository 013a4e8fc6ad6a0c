import re
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers
from heads import (
    ADAPTERS,
    ATTENTION,
    HEAD,
    MODELS,
    SIZES,
    VOCAB,
    adapt,
    assert_agrees,
    assert_close,
    assert_same_gradients,
    batch,
    build,
    eager_logps,
    gradients,
    logits_of,
    randomised,
)

from dpo_kernels import linear_dpo_loss, linear_sequence_logps
from dpo_kernels.models.head import LMHead


@pytest.mark.parametrize("name", MODELS)
def test_operands_give_the_models_logits(name):
    _, _, scale, softcap, has_bias, has_transform = MODELS[name]
    model = build(name)
    if name == "inkling":
        scale = 1 / model.config.logits_mup_width_multiplier
        assert scale != 1
    unchecked = LMHead.from_model(model, check=False)
    assert (unchecked.logit_scale, unchecked.softcap) == (scale, softcap)  # read right, not only found by the check
    head = LMHead.from_model(model)
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert (head._transform() is not None) == has_transform
    with torch.no_grad():
        hidden, aux_loss = head.hidden_states(**batch())
        logits = model(**batch()).logits
        assert_close(logits_of(head, hidden), logits)
        assert_close(logits_of(head, hidden[0, 2:4]), logits[0, 2:4])  # rows [N, H] will do
    assert aux_loss is None
    assert (head.operands(hidden).bias is not None) == has_bias


# a tied head; a bias and partial rotary; a softcap; a transform; a scale that multiplies
@pytest.mark.parametrize("name", ["qwen2", "phi", "gemma2", "modernbert_decoder", "roberta", "falcon_h1"])
def test_gradients_are_those_of_the_model(name):
    model = build(name)
    assert_agrees(model, LMHead.from_model(model))


def test_a_vision_language_model_goes_through_its_whole_base_model():
    torch.manual_seed(0)
    text = {k: v for k, v in SIZES.items() if not k.startswith("n_")}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**text, "final_logit_softcapping": None},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=100,
        boi_token_index=98,
        eoi_token_index=99,
    )
    model = randomised(transformers.Gemma3ForConditionalGeneration(config))
    inputs = batch(width=8)
    inputs["input_ids"][:, 1:5] = 100
    inputs["token_type_ids"] = (inputs["input_ids"] == 100).long()
    head = LMHead.from_model(model)
    hidden = []
    for seed in (1, 2):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            hidden.append(head.hidden_states(**inputs)[0])
            assert_close(logits_of(head, hidden[-1]), model(**inputs).logits)
    assert not torch.equal(*hidden)  # the image reached the hidden states


def test_losses_take_scale_softcap_and_bias_from_the_head():
    model = build("phi")
    head = LMHead.from_model(model)
    head.logit_scale, head.softcap = 0.5, 3.0  # all three options at once
    hidden = torch.randn(4, 6, 32)
    labels = torch.randint(0, VOCAB, (4, 6))
    options = {"bias": model.lm_head.bias, "logit_scale": 0.5, "softcap": 3.0, "shift": True}
    ref_logps = torch.zeros(4)
    logps = head.sequence_logps(hidden, labels, shift=True, reduction="mean", stats=("entropy",))
    expected = linear_sequence_logps(
        hidden, model.lm_head.weight, labels, reduction="mean", stats=("entropy",), **options
    )
    assert torch.equal(logps.logps, expected.logps) and torch.equal(logps.stats["entropy"], expected.stats["entropy"])
    loss = head.dpo_loss(hidden, labels, ref_logps, shift=True, beta=0.3).loss
    expected = linear_dpo_loss(hidden, model.lm_head.weight, labels, ref_logps, beta=0.3, **options).loss
    assert torch.equal(loss, expected)


def test_hidden_states_compute_no_logits_and_keep_no_cache():
    model = build("qwen2")
    head = LMHead.from_model(model, check=False)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.numel()))
    model.model.register_forward_hook(lambda _, args, output: seen.append(output.past_key_values))
    hidden, _ = head.hidden_states(**batch())
    assert seen == [None, 0]
    assert torch.equal(hidden, model.model(**batch()).last_hidden_state)


def test_hidden_states_of_a_model_without_logits_to_keep():
    class Older(transformers.Qwen2ForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            return super().forward(input_ids, attention_mask, use_cache=use_cache)

    model = randomised(Older(build("qwen2").config))
    assert_agrees(model, LMHead.from_model(model))
    with pytest.raises(ValueError, match="Older inside Wrapper.*no logits_to_keep"):
        LMHead.from_model(Wrapper(model)).hidden_states(**batch())


@pytest.mark.parametrize("wrong", [{"labels": torch.zeros(2, 7)}, {"logits_to_keep": 1}, {"input_ids": None}])
def test_hidden_states_refuse_what_they_cannot_serve(wrong):
    with pytest.raises(ValueError, match="input_ids or inputs_embeds.*not labels or logits_to_keep"):
        LMHead.from_model(build("qwen2")).hidden_states(**{**batch(), **wrong})


def test_auxiliary_loss_is_the_models_own():
    model = build("mixtral", router_aux_loss_coef=0.02)
    head = LMHead.from_model(model)
    assert head.aux_loss_coef == 0.02
    assert head.hidden_states(**batch())[1] is None
    model.train()
    _, aux_loss = head.hidden_states(**batch())
    aux_loss.backward()
    actual = gradients(model)
    expected = model(**batch(), output_router_logits=True).aux_loss
    expected.backward()
    assert torch.equal(aux_loss, expected)
    assert_same_gradients(actual, gradients(model))
    assert head.hidden_states(**batch(), output_router_logits=False)[1] is None
    model.eval()
    model.config.output_router_logits = True
    assert torch.equal(head.hidden_states(**batch())[1], expected)


def test_no_auxiliary_loss_without_a_coefficient():
    model = build("mixtral", router_aux_loss_coef=0.0).train()
    head = LMHead.from_model(model)
    assert head.aux_loss_coef == 0.0 and head.hidden_states(**batch())[1] is None


class Wrapper(nn.Module):
    """As DistributedDataParallel does, holds the model as `module` and must see the forward of a training step."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


def test_wrapped_models_are_called_through_the_wrapper():
    model = build("qwen2")
    wrapper = Wrapper(model)
    head = LMHead.from_model(wrapper)
    assert head.model is model and wrapper.calls == 0
    hidden, _ = head.hidden_states(**batch())
    assert wrapper.calls == 1
    assert_close(logits_of(head, hidden), model(**batch()).logits)
    assert LMHead.from_model(Wrapper(torch.compile(model))).model is model


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Linear(2, 2), "must be a transformers causal language model.*got Linear"),
        (lambda: build("qwen2").model, "no base model found on Qwen2Model.*base_model_prefix 'model'"),
        (
            lambda: transformers.Qwen2ForSequenceClassification(build("qwen2").config),
            "no language-model head found on Qwen2ForSequenceClassification: tried get_output_embeddings.*'lm_head'",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "decoder-only, got the encoder-decoder T5ForConditionalGeneration",
        ),
    ],
)
def test_models_without_a_head_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        LMHead.from_model(make())


# as 4-bit and 8-bit quantisation, sharding by rows of a flat buffer, and offloading leave it
@pytest.mark.parametrize(
    "weight, found",
    [
        (torch.zeros(VOCAB * 16, 1, dtype=torch.uint8), r"\[1616, 1\] of torch.uint8"),
        (torch.zeros(VOCAB, 32, dtype=torch.int8), r"\[101, 32\] of torch.int8"),
        (torch.zeros(VOCAB * 16), r"\[1616\] of torch.float32"),
        (torch.zeros(VOCAB, 32, device="meta"), r"\[101, 32\] of torch.float32 on meta"),
    ],
)
def test_a_weight_that_is_no_matrix_of_floats_is_refused(weight, found):
    model = build("llama")
    head = LMHead.from_model(model)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match=r"\[V, 32\] in one piece.*Linear is a Parameter " + found):
        head.operands(torch.zeros(1, 32))


def test_importing_the_package_imports_neither_transformers_nor_peft():
    code = "import sys, dpo_kernels.models.head; print({'transformers', 'peft'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_a_plain_model_needs_no_peft(monkeypatch):
    class NoPeft:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name.split(".")[0] == "peft":
                raise ModuleNotFoundError(name)

    model = build("llama")
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoPeft, *sys.meta_path])
    LMHead.from_model(model).operands(torch.zeros(1, 32))


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights and of merging with a bias
@pytest.mark.parametrize("name", ADAPTERS)
# without a bias and with one; PEFT's layer for the trainable tokens of a tied head leaves its bias out
@pytest.mark.parametrize("base", ["qwen2", "phi"])
@pytest.mark.parametrize("tied", [True, False])
def test_adapters(base, tied, name):
    model = build(base, tie_word_embeddings=tied)
    hidden = torch.randn(3, 32)
    before = logits_of(LMHead.from_model(model), hidden)
    model = adapt(model, name)
    head = LMHead.from_model(model)
    assert_agrees(model, head)
    on_the_head = name not in ("attention", "embeddings") and (tied or name != "trainable_tokens")
    assert torch.equal(logits_of(head, hidden), before) != on_the_head
    with model.disable_adapter():
        assert torch.equal(logits_of(head, hidden), before)
        assert_close(logits_of(head, head.hidden_states(**batch())[0]), model(**batch()).logits)
    model.train()
    assert_agrees(model, head)


def test_dropout_of_lora_on_the_head():
    model = adapt(build("qwen2"), "head", lora_dropout=0.5).train()
    head = LMHead.from_model(model)
    hidden = torch.randn(2, 5, 32)
    torch.manual_seed(4)
    logits = logits_of(head, hidden)
    torch.manual_seed(4)
    assert_close(logits, model.base_model.model.lm_head(hidden))
    torch.manual_seed(5)
    assert not torch.allclose(logits, logits_of(head, hidden), rtol=1e-2)
    assert_agrees(model, head)


def test_several_adapters_switching_and_merging():
    peft = pytest.importorskip("peft")
    model = adapt(build("phi"), "head", lora_alpha=16)
    model.add_adapter("second", peft.LoraConfig(**{**HEAD, "r": 3, "lora_alpha": 2}))
    model.add_adapter("attention", peft.LoraConfig(**ATTENTION))
    head = LMHead.from_model(model)
    hidden = torch.randn(3, 32)
    seen = []
    for active in ("default", "second", ["default", "second"], "attention"):
        model.base_model.set_adapter(active)
        assert_agrees(model, head)
        seen.append(logits_of(head, hidden))
    assert all(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(seen, seen[1:], strict=False))
    assert head.operands(hidden).weight is model.base_model.model.lm_head.base_layer.weight  # no copy without need

    model.base_model.set_adapter("default")
    before, merged_head = logits_of(head, hidden), model.base_model.model.lm_head
    model.merge_adapter()
    assert_close(logits_of(head, hidden), before)
    assert head.operands(hidden).weight is merged_head.base_layer.weight
    with model.disable_adapter():
        assert_close(logits_of(head, hidden), merged_head(hidden))
        assert not torch.allclose(logits_of(head, hidden), before, rtol=1e-3)


def test_modules_to_save_of_another_adapter():
    peft = pytest.importorskip("peft")
    model = adapt(build("llama"), "modules_to_save")
    model.add_adapter("second", peft.LoraConfig(**ATTENTION))
    head = LMHead.from_model(model)
    wrapper = model.base_model.model.lm_head
    hidden = torch.zeros(1, 32)
    assert head.operands(hidden).weight is wrapper.modules_to_save["default"].weight
    model.set_adapter("second")
    assert head.operands(hidden).weight is wrapper.original_module.weight
    assert_agrees(model, head)


@pytest.mark.parametrize(
    "name, options",
    [
        ("head_loha", {"rank_dropout": 0.2}),
        ("head_loha", {"module_dropout": 0.2}),
        ("head_dora", {"lora_dropout": 0.2}),
    ],
)
def test_other_adapters_with_dropout_are_refused_in_training(name, options):
    model = adapt(build("llama"), name, **options)
    head = LMHead.from_model(model)
    assert_agrees(model, head)
    model.train()
    with pytest.raises(ValueError, match="with dropout on the head is not supported.*Set the adapter's dropout to 0"):
        head.operands(torch.zeros(1, 32))


def test_adapters_that_depend_on_the_position_are_refused():
    with pytest.raises(ValueError, match="ALoraLinearVariant on the head is not supported"):
        LMHead.from_model(adapt(build("llama"), "head", alora_invocation_tokens=[5]))


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"hidden states for \[2, 10\] positions, expected \[2, 7\]"):
        LMHead.from_model(model).hidden_states(**batch())


def test_half_precision_adapter_keeps_the_weights_dtype():
    model = adapt(build("llama").to(torch.bfloat16), "head")  # PEFT holds the factors in fp32
    head = LMHead.from_model(model)
    hidden = torch.randn(3, 32, dtype=torch.bfloat16)
    operands = head.operands(hidden)
    assert operands.hidden.dtype == operands.weight.dtype == torch.bfloat16
    assert operands.hidden.shape == (3, 36) and operands.weight.shape == (VOCAB, 36)
    assert_close(logits_of(head, hidden), model.base_model.model.lm_head(hidden), tolerance=2**-7)
    logits_of(head, hidden).sum().backward()
    assert model.base_model.model.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


def test_a_static_graph_of_distributed_data_parallel_is_refused(tmp_path):
    """It would reduce the gradients of the model's outputs only, and ours come from hidden states inside."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2), static_graph=True)
        with pytest.raises(ValueError, match="static_graph"):
            LMHead.from_model(wrapped)
    finally:
        torch.distributed.destroy_process_group()


# How it is called


def test_labels_are_those_of_hugging_face():
    model, inputs = build("qwen2"), batch()
    head, labels = LMHead.from_model(model), inputs["input_ids"]
    hidden, _ = head.hidden_states(labels, attention_mask=inputs["attention_mask"])
    assert torch.equal(hidden, head.hidden_states(**inputs)[0])
    shifted = head.sequence_logps(hidden, labels)
    expected = eager_logps(model(**inputs).logits, labels)
    assert_close(shifted.logps, expected, 1e-5)
    aligned = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(shifted.logps, head.sequence_logps(hidden, aligned, shift=False).logps)
    loss = head.dpo_loss(hidden, labels, torch.zeros(2)).loss
    assert torch.equal(loss, head.dpo_loss(hidden, aligned, torch.zeros(2), shift=False).loss)


def test_a_sequence_group_is_passed_on():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        inputs, group = batch(), {"sequence_group": torch.distributed.group.WORLD}
        head, labels = LMHead.from_model(build("qwen2")), inputs["input_ids"]
        hidden, _ = head.hidden_states(**inputs)
        for call in (head.sequence_logps, lambda *given, **more: head.dpo_loss(*given, torch.zeros(2), **more)):
            assert torch.equal(call(hidden, labels, shift=False, **group)[0], call(hidden, labels, shift=False)[0])
            with pytest.raises(ValueError, match="shift: expected False with sequence_group"):
                call(hidden, labels, **group)
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_head_is_given_by_mistake_is_named():
    head = LMHead.from_model(build("qwen2"))
    hidden, _ = head.hidden_states(**batch())
    labels, ref = batch()["input_ids"], torch.zeros(2)
    logits = hidden @ head.operands(hidden).weight.T
    cases = [
        (
            lambda: head.sequence_logps((hidden, None), labels),
            "hidden: expected a tensor.*hidden_states gives two things",
        ),
        (lambda: head.sequence_logps(hidden.detach().numpy(), labels), "hidden: expected a tensor .* got ndarray"),
        (lambda: head.sequence_logps(logits, labels), r"hidden: .* which are logits: .*dpo_kernels.sequence_logps"),
        (lambda: head.dpo_loss(logits, labels, ref), r"hidden: .* which are logits"),
        (lambda: head.dpo_loss(labels, hidden, ref), "hidden: expected floating-point .* of torch.int64"),
        (lambda: head.dpo_loss(hidden[0], labels[0], ref), r"hidden: expected floating-point \[S, T, H\]"),
        (lambda: head.dpo_loss(hidden, labels, None), "ref_logps: expected a tensor .*without a reference, zeros"),
        (lambda: head.hidden_states([[1, 2]]), "input_ids: expected a tensor .* got list"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (
            lambda: head.dpo_loss(hidden, labels, ref, betta=1),
            "LMHead.dpo_loss: no argument 'betta'; did you mean 'beta'?",
        ),
        (lambda: head.dpo_loss(hidden, labels, ref, softcap=1.0), "LMHead.dpo_loss: no argument 'softcap'"),
        (lambda: head.sequence_logps(hidden, labels, average_log_prob=True), "no argument 'average_log_prob': .*mean"),
    ):
        with pytest.raises(TypeError, match=message):
            call()


@torch.no_grad()
def test_inputs_that_are_refused_and_those_that_are_not():
    head, tokens = LMHead.from_model(build("qwen2")), batch()["input_ids"]
    with pytest.raises(ValueError, match="attn_mask: expected an input of Qwen2.* did you mean 'attention_mask'"):
        head.hidden_states(tokens, attn_mask=torch.ones_like(tokens))
    for wrong in (-1, 5000):
        with pytest.raises(ValueError, match=rf"input_ids: expected ids in \[0, 101\), got \[{wrong}\]"):
            head.hidden_states(tokens.masked_fill(tokens == tokens[0, 0], wrong))
    more = {"token_type_ids": None, "mm_token_type_ids": None, "pixel_values_videos": None, "labels": None}
    positions = {"position_ids": torch.arange(7)[None], "position_ids_3d": None}  # the latter is no misspelt other
    more |= {"decoder_attention_mask": None, "cache_position": None}
    hidden, _ = head.hidden_states(tokens, **more, **positions, output_hidden_states=True)
    head.model.get_input_embeddings = lambda: None  # a model that does not say what it has
    assert torch.equal(head.hidden_states(tokens, **more)[0], hidden)
    head.model.get_input_embeddings = lambda: torch.nn.Embedding(0, 4)  # nor one that has them in pieces
    assert torch.equal(head.hidden_states(tokens, **more)[0], hidden)
    head.model.get_input_embeddings = lambda: torch.nn.Embedding(97, 4)
    with pytest.raises(ValueError, match=r"input_ids: expected ids in \[0, 97\), got \[97\]"):
        head.hidden_states(tokens.masked_fill(tokens == tokens[0, 0], 97))
    del head.model.get_input_embeddings
    head.model.config.image_token_id = 5000  # which a model of images takes out before it looks for embeddings
    with pytest.raises(IndexError):
        head.hidden_states(tokens.masked_fill(tokens == tokens[0, 0], 5000))
    with pytest.raises(ValueError, match=r"input_ids: expected ids in \[0, 101\), got \[5000, 6000\]"):
        head.hidden_states(tokens.masked_fill(tokens == tokens[0, 0], 5000).masked_fill(tokens == tokens[0, 1], 6000))


def test_a_head_says_what_it_is():
    head = LMHead.from_model(build("gemma2"))
    assert re.fullmatch(
        r"LMHead\(Gemma2ForCausalLM, Linear \[\d+, \d+\], logit_scale=1, softcap=[\d.]+, checked\)", repr(head)
    )
    assert "not checked" in repr(LMHead.from_model(build("qwen2"), check=False))
