"""Rows in which responses share a prompt: are log-probabilities, loss and gradients those of the padded batch, and is a
model refused of which they are not?"""

import random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("transformers")
import transformers
from heads import VOCAB, build

from dpo_kernels.data import PackedCollator, PairCollator
from dpo_kernels.models import LMHead, add_fused_lm_head, segments
from dpo_kernels.models.layouts import use_layouts
from dpo_kernels.models.segments import ATTENTION, attention_forward, block_mask, hidden_of_responses, laid_out, sees
from dpo_kernels.training.config import TrainConfig
from dpo_kernels.training.policy import disable_dropout
from dpo_kernels.training.setup import resolve_batching

WINDOW = {"sliding_window": 7}
BOTH_KINDS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": WINDOW,
    "gemma2": BOTH_KINDS,
    "gemma3": BOTH_KINDS,
    "phi": {},
    "granite": {},
    "mixtral": {"router_aux_loss_coef": 0.0},  # which is of tokens, of which there are fewer
    "cohere": {},
    "gpt2": {},
    "opt": {},
}
OTHERS = {
    "Olmo2": ("Olmo2ForCausalLM", {}),
    "Cohere2": ("Cohere2ForCausalLM", BOTH_KINDS),
    "GptOss": ("GptOssForCausalLM", BOTH_KINDS | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
WAYS = {
    "packed, shared prefix": {},
    "shared prefix": {"packed": False},
    "packed": {"shared_prefix": False},
    "padded rows": {"shared_prefix": False, "packed": False, "pad_to_multiple_of": 16},
}


def model_of(name, **more):
    if name not in OTHERS:
        return sound(build(name, initializer_range=0.3, **MODELS.get(name, {}) | more))
    cls, options = OTHERS[name]
    config = getattr(transformers, cls.replace("ForCausalLM", "Config"))(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return sound(getattr(transformers, cls)(config))


def sound(model):
    disable_dropout(model)
    return model.float()


def pairs(seed, count=4, longest=15):
    """Of all lengths, and where there are several, one without a prompt, and a response of one token."""
    draw = random.Random(seed)

    def tokens(least, most):
        return [draw.randrange(1, 97) for _ in range(draw.randint(least, most))]

    found = [
        {"prompt_ids": tokens(0, longest), "chosen_ids": tokens(1, longest), "rejected_ids": tokens(1, longest)}
        for _ in range(count)
    ]
    if count > 1:
        found[0]["prompt_ids"], found[1]["rejected_ids"] = [], found[1]["rejected_ids"][:1]
    return found


def loss_and_gradients(model, batch, **options):
    model.zero_grad()
    head = LMHead.from_model(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with laid_out(batch.get("layout")):
        hidden, _ = head.hidden_states(**inputs)
    if "layout" in batch:
        hidden = hidden_of_responses(hidden, batch["predictors"])
    ref_logps = torch.linspace(-40, -20, len(batch["labels"]))
    options |= {"shift": "layout" not in batch, "num_labelled": batch["num_labelled"]}
    options |= {name: batch[name] for name in ("token_weights", "pair_weights", "pairs") if name in batch}
    if options.get("loss_type") == "plackett_luce":
        options["pair_weights"] = batch["group_weights"]
    out = head.dpo_loss(hidden, batch["labels"], ref_logps, **options)
    out.loss.backward()
    return out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found, expected):
    (out, gradients), (right, right_gradients) = found, expected
    for name in ("logps", "losses"):
        ours, theirs = getattr(out, name), getattr(right, name)
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name
    assert out.num_tokens.tolist() == right.num_tokens.tolist()
    assert gradients.keys() == right_gradients.keys()
    largest = max(gradient.abs().max() for gradient in right_gradients.values())
    for name, gradient in right_gradients.items():  # a bias of keys has none but rounding
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-6 * largest, name


@pytest.mark.full(when=lambda name, way: way != next(iter(WAYS)) and name != "gemma3")
@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradients_are_those_of_the_padded_batch(name, way):
    model = model_of(name)
    examples = pairs(0)
    expected = loss_and_gradients(model, PairCollator(0)(examples))
    use_layouts(model)
    assert_equal(loss_and_gradients(model, PackedCollator(0, **WAYS[way])(examples)), expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "plackett_luce"])
@pytest.mark.parametrize("seed", range(6))
def test_of_rankings_of_any_lengths(seed, loss_type):
    """From 2 to 7 responses of a prompt, all their pairs or the best against each."""
    draw = random.Random(200 + seed)
    model = model_of(draw.choice(["mistral", "gemma3", "qwen2"]))
    examples = []
    for number, count in enumerate([2 + seed, draw.randint(2, 7), 7 - seed]):
        tokens = [[draw.randrange(1, 97) for _ in range(draw.randint(n > 0, 14))] for n in range(count + 1)]
        best = range(count) if draw.random() < 0.5 else range(1)
        found = [[i, j] for i in best for j in range(i + 1, count)]
        examples.append({"prompt_ids": tokens[0], "response_ids": tokens[1:], "pairs": found, "weight": 1.0 + number})
    expected = loss_and_gradients(model, PairCollator(0)(examples), loss_type=loss_type)
    use_layouts(model)
    for way in WAYS.values():
        assert_equal(loss_and_gradients(model, PackedCollator(0, **way)(examples), loss_type=loss_type), expected)


@pytest.mark.parametrize("seed", range(8))
def test_of_any_lengths(seed):
    """Responses longer than the window, one pair alone, prompts of nothing."""
    draw = random.Random(100 + seed)
    model = model_of(draw.choice(["mistral", "gemma3", "qwen2"]))
    examples = pairs(seed, count=draw.choice([1, 2, 5]), longest=draw.choice([3, 9, 24]))
    for example in examples:
        example["weight"] = draw.choice([0.5, 1.0, 2.0])
        example["chosen_token_weights"] = [draw.choice([0.0, 0.5, 1.0]) for _ in example["chosen_ids"]]
    expected = loss_and_gradients(model, PairCollator(0)(examples))
    use_layouts(model)
    for way in WAYS.values():
        assert_equal(loss_and_gradients(model, PackedCollator(0, **way)(examples)), expected)


@pytest.mark.parametrize(
    "loss", [{"loss_type": "ipo"}, {"ld_alpha": 0.5}, {"use_weighting": True}, {"rpo_alpha": 1.0}], ids=str
)
def test_of_losses_that_look_at_tokens(loss):
    model, examples = model_of("qwen2"), pairs(3)
    expected = loss_and_gradients(model, PairCollator(0)(examples), **loss)
    use_layouts(model)
    assert_equal(loss_and_gradients(model, PackedCollator(0)(examples), **loss), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_with_gradient_checkpointing(use_reentrant):
    """Layers are run again when the layout is no longer the current one."""
    model, examples = model_of("gemma3").train(), pairs(4)
    expected = loss_and_gradients(model, PairCollator(0)(examples))
    use_layouts(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_equal(loss_and_gradients(model, PackedCollator(0)(examples)), expected)


def test_a_model_with_layouts_is_as_before_elsewhere():
    """With padding, a cache, and a check of its head."""
    ids, mask = torch.randint(1, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    for name in ("llama", "gemma2", "mistral"):
        model = model_of(name).eval()
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits
            use_layouts(model)
            torch.testing.assert_close(model(ids, attention_mask=mask).logits, expected)
            LMHead.from_model(model)
        made = model.generate(ids[:1], max_new_tokens=3, do_sample=False, use_cache=True)
        assert torch.equal(made, model.generate(ids[:1], max_new_tokens=3, do_sample=False, use_cache=False))


# What is refused


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("falcon_h1", "FalconH1ForCausalLM has layers of hybrid"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM has layers of linear_attention"),
        ("Mamba", "MambaForCausalLM has layers of linear_attention"),
        ("Bloom", "BloomForCausalLM computes other hidden states .* they differ by 0"),
        ("Mpt", "MptForCausalLM computes other hidden states .* they differ by 0"),
    ],
)
def test_models_that_do_not_attend_by_positions_are_refused(name, reason):
    if name in ("Mamba", "Bloom", "Mpt"):
        sizes = {
            "hidden_size": 32,
            "d_model": 32,
            "n_layer": 2,
            "n_layers": 2,
            "num_hidden_layers": 2,
            "n_head": 4,
            "n_heads": 4,
        }
        config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **sizes)
        torch.manual_seed(0)
        model = sound(getattr(transformers, f"{name}ForCausalLM")(config))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    else:
        model = model_of(name)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=reason):
        use_layouts(model)
    assert model.config._attn_implementation == before


def test_a_window_that_the_attention_is_not_told_of_is_refused():
    """Longer than what is tried: only long rows would show it."""
    model = model_of("mistral", sliding_window=4096)
    use_layouts(model)
    model = model_of("llama")
    model.config.sliding_window = 4096
    with pytest.raises(ValueError, match="has 2 layers with a window of 4096, and says so to the attention of 0"):
        use_layouts(model)


def test_other_gradients_are_noticed(monkeypatch):
    """Of a prompt that responses see and do not teach."""
    joined = segments._joined
    monkeypatch.setattr(segments, "_joined", lambda prompt, own: joined(prompt.detach(), own))
    with pytest.raises(ValueError, match="computes other gradients"):
        use_layouts(model_of("llama"))


def test_positions_of_its_own_are_noticed(monkeypatch):
    model = model_of("llama")
    forward = model.model.forward

    def counted(*args, position_ids=None, **inputs):
        return forward(*args, **inputs)

    monkeypatch.setattr(model.model, "forward", counted)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="computes other hidden states"):
        use_layouts(model)
    assert model.config._attn_implementation == before


def test_a_loss_of_a_router_keeps_its_batches_unless_another_is_asked_for(caplog):
    """Since it counts every token that is computed."""
    model = model_of("mixtral", router_aux_loss_coef=0.5)
    assert not model.config.output_router_logits  # which the head turns on
    with caplog.at_level("WARNING"):
        assert resolve_batching(TrainConfig(batching="auto"), model) == "concatenated"
    assert "batching: concatenated, since MixtralForCausalLM has a loss of its router" in caplog.text
    assert model.config._attn_implementation != ATTENTION
    assert resolve_batching(TrainConfig(batching="padding_free"), model) == "padding_free"
    model = model_of("mixtral", router_aux_loss_coef=0.0, output_router_logits=True)
    assert resolve_batching(TrainConfig(batching="auto"), model) == "packed_shared_prefix"


def test_a_reference_that_does_not_allow_it_decides_too():
    reference = bloom(torch.float32)
    model = model_of("llama")
    before = model.config._attn_implementation
    assert resolve_batching(TrainConfig(batching="auto"), model, reference) == "concatenated"
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="batching: expected concatenated, got 'padding_free': BloomForCausalLM"):
        resolve_batching(TrainConfig(batching="padding_free"), model, reference)


def bloom(dtype, std=0.3):
    config = transformers.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = sound(transformers.BloomForCausalLM(config))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model.to(dtype)


def test_an_attention_of_its_own_is_noticed_where_it_makes_no_difference_to_speak_of():
    """Of small weights in bf16."""
    with pytest.raises(ValueError, match="BloomForCausalLM has 2 layers, and 0 of them take an attention from outside"):
        use_layouts(bloom(torch.bfloat16, std=0.02))


def test_a_model_without_room_for_what_is_tried_is_refused():
    model = build("gpt2", max_position_embeddings=16)
    with pytest.raises(ValueError, match="GPT2LMHeadModel raised IndexError"):
        use_layouts(model)


# What is forgotten in a loop of one's own


def test_layouts_that_nobody_reads():
    batch = PackedCollator(0)(pairs(0))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    model = model_of("llama")
    head = LMHead.from_model(model)
    with pytest.raises(ValueError, match="laid_out: expected a model that reads the layout"), laid_out(batch["layout"]):
        head.hidden_states(**inputs)
    use_layouts(model)
    with laid_out(batch["layout"]):
        hidden, _ = head.hidden_states(**inputs)
    with pytest.raises(ValueError, match="position_ids: expected those of one sequence a row"):
        head.hidden_states(**inputs)
    padded = PairCollator(0)(pairs(0))
    head.hidden_states(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"])
    add_fused_lm_head(model)
    more = {"shift_labels": batch["labels"], "predictors": batch["predictors"], "fused_lm_head": True}
    with pytest.raises(ValueError, match="position_ids: expected those of one sequence a row"):
        model(**inputs, **more)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="laid_out: expected a model that reads the layout"), laid_out(batch["layout"]):
        head.hidden_states(**inputs)
    with pytest.raises(RuntimeError, match="of the caller"), laid_out(batch["layout"]):
        raise RuntimeError("of the caller")


# The attention by itself


def layouts():
    """Of two rows with groups of K responses each, and padding."""
    rows = []
    for groups in ([(4, 3, 5), (0, 2, 1, 6)], [(7, 1, 1, 1, 2), (2, 3)]):
        row = []
        for prompt, *responses in groups:
            start = len(row)
            row += [(start, start, start, n) for n in range(prompt)]
            for response in responses:
                begin = len(row)
                row += [(start, start + prompt, begin, prompt + n) for n in range(response)]
        rows.append(row)
    slots = max(map(len, rows)) + 2
    rows = [row + [(slot, slot, slot, 0) for slot in range(len(row), slots)] for row in rows]
    return torch.tensor(rows, dtype=torch.int32)[:, None]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_blocks_are_the_whole_mask(window, groups):
    layout, module = layouts(), torch.nn.Module()
    rows, slots = layout.shape[0], layout.shape[2]
    leaves = [
        torch.randn(rows, heads, slots, 8, dtype=torch.float64, requires_grad=True)
        for heads in (4, 4 // groups, 4 // groups)
    ]
    query, key, value = leaves
    found, _ = attention_forward(module, query, key, value, layout, sliding_window=window)
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    expected = scaled_dot_product_attention(query, key, value, sees(layout, window)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    gradients = (torch.autograd.grad((out * weights).sum(), leaves) for out in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 3])
def test_what_is_seen(window):
    """By the definition, slot by slot."""
    layout = layouts()
    found = sees(layout, window)[:, 0]
    for row, fields in enumerate(layout[:, 0].tolist()):
        for q, (prompt_begin, prompt_end, begin, position) in enumerate(fields):
            for k in range(len(fields)):
                own = begin <= k <= q
                of_prompt = prompt_begin <= k < prompt_end
                near = window is None or position - fields[k][3] < window
                assert found[row, q, k] == ((own or of_prompt) and near), (row, q, k)


@pytest.mark.parametrize("window", [None, 3])
def test_the_mask_of_flex_attention(window):
    """Which is for GPUs; compiled for none here."""
    from torch.nn.attention.flex_attention import create_mask, flex_attention

    layout = layouts()
    mask, slots = block_mask(layout, window), layout.shape[2]
    whole = create_mask(mask.mask_mod, layout.shape[0], 1, slots, slots, device="cpu")
    assert torch.equal(whole, sees(layout, window))
    query, key, value = torch.randn(3, layout.shape[0], 2, slots, 16)
    found = flex_attention(query, key, value, block_mask=mask)
    torch.testing.assert_close(found, scaled_dot_product_attention(query, key, value, sees(layout, window)))


def unshared_layouts():
    """Of rows of 30 slots, sequences of 11, 1, 12 and 6, and of 17 and 13; the last two slots are padding."""
    layout = torch.zeros(2, 1, 30, 4, dtype=torch.int32)
    for row, sizes in enumerate(((11, 1, 12, 6), (17, 11, 1, 1))):
        begin = 0
        for size in sizes:
            here = slice(begin, begin + size)
            layout[row, 0, here, :3], layout[row, 0, here, 3] = begin, torch.arange(size, dtype=torch.int32)
            begin += size
    return layout


def eager_varlen(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What `torch.nn.attention.varlen` computes on a GPU; of its window the first number is how far it looks."""
    assert torch.equal(cu_q, cu_k) and max_q == max_k == cu_q.diff().max() and cu_q.dtype == torch.int32
    behind, ahead = window_size
    assert ahead == 0 and cu_q[-1] == len(query)
    found = []
    for q, k, v in zip(*(t.split(cu_q.diff().tolist()) for t in (query, key, value)), strict=True):
        place = torch.arange(len(q))
        distance = place[:, None] - place
        allowed = (distance >= 0) & ((distance <= behind) | (behind < 0))
        heads = (t.transpose(0, 1) for t in (q, k, v))
        found.append(scaled_dot_product_attention(*heads, allowed, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("window", [None, 1, 3, 12])
@pytest.mark.parametrize("takes_groups", [True, False])
def test_rows_of_whole_sequences_on_a_gpu(monkeypatch, window, takes_groups):
    """Go through kernels for sequences of any lengths, which are for GPUs; here something stands for them."""
    layout = unshared_layouts()
    sequences = segments._Known(layout).sequences(layout)
    assert sequences.bounds.tolist() == [0, 11, 12, 24, 30, 47, 58, 59, 60] and sequences.longest == 17
    query, key, value = torch.randn(2, 4, 30, 8), *torch.randn(2, 2, 2, 30, 8)
    monkeypatch.setattr(segments, "_varlen", lambda: (eager_varlen, takes_groups))
    found = segments._by_sequences(query, key, value, sequences, window, 0.3)
    options = {"scaling": 0.3, "sliding_window": window}
    expected, _ = attention_forward(torch.nn.Module(), query, key, value, layout, **options)
    torch.testing.assert_close(found, expected)
    assert segments._Known(layouts()).sequences(layouts()) is None, "responses of these share a prompt"


def test_what_goes_through_kernels_for_sequences():
    assert segments.takes_sequences(torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16))
    assert not segments.takes_sequences(torch.zeros(1, 1, 4, 64))
    assert not segments.takes_sequences(torch.zeros(1, 1, 4, 12, dtype=torch.bfloat16))
    assert not segments.takes_sequences(torch.zeros(1, 1, 4, 264, dtype=torch.bfloat16))


def test_pytorch_takes_the_call_for_sequences():
    """Its kernels are not run, but what they are called with is what it expects."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 4, 30, 64, dtype=torch.bfloat16, device="cuda")
        key = torch.empty(2, 2, 30, 64, dtype=torch.bfloat16, device="cuda")
        bounds = torch.empty(9, dtype=torch.int32, device="cuda")
        out = segments._by_sequences(query, key, key, segments.Sequences(bounds, 17), 3, 0.1)
    assert out.shape == (2, 30, 4, 64) and out.dtype == torch.bfloat16 and out.device.type == "cuda"


def test_whole_sequences_are_compared_too(monkeypatch):
    """On a GPU other kernels compute them than rows that share prompts."""
    in_blocks = segments._in_blocks

    def wrong(query, key, value, layout, *given, **options):
        found = in_blocks(query, key, value, layout, *given, **options)
        return found if segments._Known(layout).sequences(layout) is None else found * 1.1

    monkeypatch.setattr(segments, "_in_blocks", wrong)
    model = model_of("llama")
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="computes other hidden states where several sequences are in one row"):
        use_layouts(model)
    assert model.config._attn_implementation == before


def test_a_cache_is_refused():
    layout, (query, key) = layouts(), torch.randn(2, 2, 4, 30, 8)
    with pytest.raises(ValueError, match="expected a layout of the 30 slots that are computed"):
        attention_forward(torch.nn.Module(), query, key, key, layout)


def test_implementation_is_registered_once():
    from dpo_kernels.models.segments import register

    register()
    register()
    model = model_of("llama")
    model.set_attn_implementation(ATTENTION)
    assert model(torch.ones(1, 3, dtype=torch.int64)).logits.isfinite().all()
