"""The forward that gives log-probabilities and losses instead of logits, against the model's own logits."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref

import pytest
import torch

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")


from heads import ADAPTERS, MODELS, adapt, assert_close, assert_same_gradients, batch, build, eager_logps, gradients

from dpo_kernels.models.fused_forward import STATS, Preference, Reference, add_fused_lm_head
from dpo_kernels.models.head import LMHead, unwrap
from dpo_kernels.models.layered_forward import layers_of
from dpo_kernels.models.through_wrappers import split


def labels_of(inputs):
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def assert_as_eager(model):
    """Log-probabilities, and the gradient of every trainable parameter."""
    inputs, coefficients = batch(), torch.tensor([0.7, -0.4])
    labels = labels_of(inputs)
    torch.manual_seed(3)
    expected = eager_logps(model(**inputs).logits, labels)
    (expected * coefficients).sum().backward()
    expected_gradients = gradients(model)
    torch.manual_seed(3)
    found = model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    (found * coefficients).sum().backward()
    assert_close(found, expected)
    assert_same_gradients(gradients(model), expected_gradients)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_head(name):
    model = build(name)
    add_fused_lm_head(model)
    assert_as_eager(model)
    assert not vars(unwrap(model).get_output_embeddings()).keys() & {"forward"}


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied weights
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("base", ["qwen2", "phi"])
def test_every_adapter(base, name):
    model = adapt(build(base), name)
    add_fused_lm_head(unwrap(model))
    assert_as_eager(model)
    assert_as_eager(model.train())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    add_fused_lm_head(model)
    assert_as_eager(model)


def test_what_goes_wrong_leaves_the_model_as_it_was():
    model = build("llama")
    add_fused_lm_head(model)
    inputs = batch()
    expected = model(**inputs).logits
    assert_as_eager(model)
    hooks = len(model.lm_head._forward_hooks)
    with pytest.raises(ValueError, match="labels"):
        model(**inputs, labels=labels_of(inputs)[:, :3], fused_lm_head=True)
    assert len(model.lm_head._forward_hooks) == hooks and "forward" not in vars(model.lm_head)
    assert torch.equal(model(**inputs).logits, expected)


def test_a_forward_of_the_output_layers_own_comes_back():
    """As accelerate gives one to layers that it moves between devices."""
    model = build("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden)
    installed = model.lm_head.forward
    add_fused_lm_head(model)
    assert_as_eager(model)
    assert model.lm_head.forward is installed


def test_an_output_layer_that_runs_twice_is_refused():
    class Twice(type(build("qwen2"))):
        def forward(self, *args, **kwargs):
            super().forward(*args, **kwargs)
            return super().forward(*args, **kwargs)

    model = Twice(build("qwen2").config)
    add_fused_lm_head(model)
    with pytest.raises(ValueError, match="Twice runs its output layer 2 times in a forward, expected once"):
        model(**batch(), labels=batch()["input_ids"], fused_lm_head=True)


@pytest.mark.parametrize(
    "compiled",
    [
        lambda model, **options: model.compile(**options) or model,
        pytest.param(torch.compile, marks=pytest.mark.full),
    ],
    ids=["method", "function"],
)
def test_a_model_that_is_compiled_as_a_whole(compiled):
    model = build("llama", num_hidden_layers=1)
    add_fused_lm_head(model)
    inputs = batch()
    labels = labels_of(inputs)
    expected = eager_logps(model(**inputs).logits, labels)
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    compiled_model = compiled(model, backend=backend)
    assert_close(compiled_model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1), expected)
    assert_close(compiled_model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1), expected)
    before = len(graphs)
    assert_close(compiled_model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(-1), expected)
    assert before == len(graphs) > 0


def test_values_go_around_a_cast_and_gradients_through_it():
    value = torch.tensor([1.001, -3.003], requires_grad=True)
    (given,), join = split({"a": value * 1.0, "b": 5})
    found = join([given.bfloat16()])
    assert found["a"].dtype == torch.float32 and torch.equal(found["a"], value) and found["b"] == 5
    found["a"].backward(torch.tensor([0.5, -2.0]))
    assert torch.equal(value.grad, torch.tensor([0.5, -2.0]))


def test_nothing_is_kept_from_one_forward_to_the_next():
    model = build("llama")
    add_fused_lm_head(model)
    inputs = batch()
    kept = []
    model.model.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output.last_hidden_state)))
    preference = Preference(torch.zeros(2), beta=0.1)
    found = model(**inputs, labels=labels_of(inputs), fused_lm_head=True, preference=preference)
    found.preference.loss.backward()
    del found
    gc.collect()
    assert kept and all(each() is None for each in kept)


def test_what_is_not_asked_for_is_not_there():
    model = build("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    found = model(**batch(), labels=batch()["input_ids"], fused_lm_head=True)
    assert torch.equal(found["entropy"], found.entropy)
    assert found.entropy.shape == found.log_probs.shape == (2, 6) and found.aux_loss is None
    with pytest.raises(AttributeError, match="has .*'entropy'.*and no 'preference'"):
        _ = found.preference


def test_statistics_are_of_the_labels_positions():
    model = build("llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits"))
    inputs = batch()
    with torch.no_grad():
        found = model(**inputs, labels=labels_of(inputs), fused_lm_head=True)
        logits, scored = model(**inputs).logits[:, :-1], labels_of(inputs)[:, 1:] != -100
    assert_close(found.entropy[scored], torch.special.entr(logits.softmax(-1)).sum(-1)[scored])
    assert_close(found.mean_logits[scored], logits.mean(-1)[scored])


def test_the_head_is_checked_once():
    """A check is a forward of the model: the first call has two, the next has one."""
    model = build("llama")
    add_fused_lm_head(model)
    counted = []
    model.model.register_forward_hook(lambda *_: counted.append(1))
    for _ in range(2):
        model(**batch(), labels=labels_of(batch()), fused_lm_head=True)
    first, counted[:] = len(counted), []
    model(**batch(), labels=labels_of(batch()), fused_lm_head=True)
    assert len(counted) == 1 and first > 2


def test_forward_without_the_flag_is_the_models_own():
    model, plain = build("qwen2"), build("qwen2")
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    tokens = torch.arange(3, 11).view(2, 4)
    assert torch.equal(model(input_ids=tokens, labels=tokens).loss, plain(input_ids=tokens, labels=tokens).loss)
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    generated = [each.generate(tokens, max_new_tokens=3, do_sample=False) for each in (model, plain)]
    assert torch.equal(*generated)
    for problem, args, inputs in (
        (r"got labels, 1 input\(s\) by position", (tokens,), {"labels": tokens}),
        (r"got no labels, 0 input\(s\) by position, and by keyword \['input_ids'\]", (), {"input_ids": tokens}),
    ):
        with pytest.raises(ValueError, match=f"fused_lm_head: expected labels or shift_labels.*{problem}"):
            model(*args, **inputs, fused_lm_head=True)
    with pytest.raises(ValueError, match=r"outputs: expected some of .*got \['logits'\]"):
        add_fused_lm_head(model, outputs=("log_probs", "logits"))


def test_copy_of_a_model_has_a_head_of_its_own():
    model = build("qwen2")
    add_fused_lm_head(model)
    other = copy.deepcopy(model)
    tokens = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
        plain = build("qwen2")
        for each, factor in ((model, 1), (other, 1.5)):
            for weight, first in zip(plain.parameters(), model.parameters(), strict=True):
                weight.copy_(first * factor)
            logits = plain(input_ids=tokens).logits[:, :-1]
            assert torch.equal(each(input_ids=tokens).logits[:, :-1], logits)
            expected = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            found = each(input_ids=tokens, labels=tokens, fused_lm_head=True).log_probs
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_mean_logits_of_all_positions(name):
    model = build(name)
    add_fused_lm_head(model)
    tokens = torch.arange(3, 15).view(2, 6)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    expected = model(**inputs).logits.mean(-1)
    found = model(**inputs, labels=tokens, fused_lm_head=True, all_mean_logits=True).all_mean_logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.autocast("cpu", torch.bfloat16):  # hidden states in bf16; their sums over the vocabulary stay in fp32
        found = model(**inputs, labels=tokens, fused_lm_head=True, all_mean_logits=True).all_mean_logits
    assert found.dtype == torch.float32


def test_a_head_at_the_output_layer_gives_no_hidden_states():
    with pytest.raises(ValueError, match="at_output_layer: expected False for hidden_states"):
        LMHead(build("llama"), at_output_layer=True).hidden_states(**batch())


# Hooks


def scales_logits(module, args, output):
    return output * 2


class Scales:
    def __call__(self, module, args, output):
        return output / 3

    def hook(self, module, args, output):
        return output / 3


def scales_in_place(module, args, output):
    output.mul_(1.05)


HOOKS = {
    "scales_logits": scales_logits,
    "Scales": Scales(),
    "Scales.hook": Scales().hook,
    "scales_in_place": scales_in_place,
    "<lambda>": lambda module, args, output: output.tanh(),
    "partial": functools.partial(lambda factor, module, args, output: output * factor, 0.5),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", HOOKS)
def test_hook_that_changes_logits_is_refused(name, late):
    model, inputs = build("cohere"), batch()
    add_fused_lm_head(model)
    if late:  # after a call that was right
        assert_as_eager(model)
    handle = model.lm_head.register_forward_hook(HOOKS[name])
    named = "lambda" if name == "partial" else name
    with pytest.raises(ValueError, match=f"(?s)does not give the model's own logits.*{named}"):
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    handle.remove()
    assert_as_eager(model)


def test_hooks_that_watch_and_hooks_on_what_goes_in():
    """The first see logits where there are some, the second take part."""
    model, seen = build("llama"), []
    add_fused_lm_head(model)
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    model.lm_head.register_forward_pre_hook(lambda module, args: (1.5 * args[0],))
    hooks = list(model.lm_head._forward_hooks)
    assert_as_eager(model)
    assert len(seen) == 2 and hooks == list(model.lm_head._forward_hooks)  # the check, and the model's own forward


# Numbers that are none


@pytest.mark.parametrize("where", ["hidden states", "head", "bias"])
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_not_finite_goes_on(where, trained):
    """So that a gradient scaler skips the step, and the next one is checked and right."""
    model, inputs = build("phi"), batch()
    add_fused_lm_head(model)
    model.lm_head.requires_grad_(trained)
    weight = {
        "hidden states": model.model.embed_tokens.weight,
        "head": model.lm_head.weight,
        "bias": model.lm_head.bias,
    }
    with torch.no_grad():
        before = weight[where][inputs["input_ids"][0, 1]].clone()
        weight[where][inputs["input_ids"][0, 1]] = math.nan
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    preference = Preference(torch.zeros(2), beta=0.1)
    found = model(**inputs, labels=labels_of(inputs), fused_lm_head=True, preference=preference)
    assert found.loss.isnan()
    kept = copy.deepcopy(model.state_dict())
    scaler.scale(found.loss).backward()
    scaler.step(optimizer)
    assert all(torch.equal(value, model.state_dict()[name]) or value.isnan().any() for name, value in kept.items())
    with torch.no_grad():
        weight[where][inputs["input_ids"][0, 1]] = before
    optimizer.zero_grad()
    assert_as_eager(model)
    assert layers_of(model)[-1].head._checked


def test_functions_keep_their_error():
    head = LMHead(build("llama"))
    hidden = torch.full((2, 3, 32), math.nan)
    labels = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="hidden: expected finite values"):
        head.sequence_logps(hidden, labels)
    with pytest.raises(ValueError, match="hidden: expected finite values"):
        head.dpo_loss(hidden, labels, torch.zeros(2))
    assert head.sequence_logps(hidden, labels, check_hidden=False).logps.isnan().all()
    assert head.dpo_loss(hidden, labels, torch.zeros(2), check_hidden=False).loss.isnan()


# What TRL's output has


def trls_head(model):
    utils = pytest.importorskip("trl.trainer.utils", reason="puts TRL's head over ours, and TRL is not installed")
    utils.add_fused_lm_head(model, outputs=("log_probs", *STATS))


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
@pytest.mark.parametrize("items", [None, 20])
@pytest.mark.parametrize("shifted", [False, True])
def test_output_is_as_trls(name, items, shifted):
    model = build(name)
    if name == "mixtral":
        model.config.output_router_logits = True
        model.train()
    theirs = copy.deepcopy(model)
    trls_head(theirs)
    add_fused_lm_head(model, outputs=("log_probs", *STATS))
    inputs = batch()
    labels = labels_of(inputs)
    if shifted:
        asked = {"shift_labels": torch.cat([labels[:, 1:], labels.new_full((2, 1), 8)], 1)}
    else:
        asked = {"labels": labels}
    asked |= {"fused_lm_head": True} | ({} if items is None else {"num_items_in_batch": items})
    found, expected = (each(**inputs, **asked) for each in (model, theirs))
    for key in ("loss", "log_probs", "label_mask", *STATS):
        assert key in found
        scored = expected["label_mask"] if key in STATS else ...
        torch.testing.assert_close(getattr(found, key)[scored], getattr(expected, key)[scored], rtol=1e-4, atol=1e-5)
        assert getattr(found, key).shape == getattr(expected, key).shape
    found.loss.backward()
    expected.loss.backward()
    assert_same_gradients(gradients(model), gradients(theirs))


def test_loss_of_a_preference_is_its_loss():
    model = build("llama")
    add_fused_lm_head(model)
    preference = Preference(torch.zeros(2), beta=0.1)
    found = model(**batch(), labels=labels_of(batch()), fused_lm_head=True, preference=preference)
    assert found.loss is found["loss"] is found.get("loss") is found.preference.loss and found.get("logits") is None


# References, and weights


@pytest.mark.parametrize("trained", ["all", "layers", "bias", "nothing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_policy_to_the_bit(trained, dtype):
    """In the tiles of whatever gradients the policy forms; with a vocabulary that takes more than one fold."""
    model = build("phi", vocab_size=5003).to(dtype)
    for name, weight in model.named_parameters():
        of_head = name.startswith("lm_head")
        weight.requires_grad_({"all": True, "layers": not of_head, "bias": name == "lm_head.bias"}.get(trained, False))
    add_fused_lm_head(model)
    tokens = torch.randint(3, 5000, (4, 60), generator=torch.Generator().manual_seed(0))
    weights = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1))
    options = {"beta": 0.1, "ld_alpha": 0.3, "token_weights": weights}
    inputs = {"input_ids": tokens, "labels": tokens, "fused_lm_head": True}
    reference = Reference.of(model, options)
    expected = {"all": ("hidden", "bias", "weight"), "layers": ("hidden",), "bias": ("hidden", "bias")}
    assert reference.gradients == expected.get(trained, ("hidden",))
    if trained == "nothing":  # of hidden states neither
        reference.gradients = ()
    with torch.no_grad():
        ref_logps = model(**inputs, reference=reference).logps
    found = model(**inputs, preference=Preference(ref_logps, **options)).preference
    assert (found.logps - ref_logps == 0).all() and (found.chosen_rewards == 0).all()
    assert found.loss.item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("shifted", [False, True])
def test_token_weights_belong_to_the_labels_of_the_call(shifted):
    model, inputs = build("llama"), batch()
    add_fused_lm_head(model)
    labels = labels_of(inputs)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    log_probs = model(**inputs, labels=labels, fused_lm_head=True).log_probs
    expected = (log_probs * weights[:, 1:]).sum(1)
    if shifted:
        labels, weights = (
            torch.cat([each[:, 1:], torch.full_like(each[:, :1], -100)], 1) for each in (labels, weights)
        )
        weights = weights.clamp(min=0)
    preference = Preference(torch.zeros(2), token_weights=weights, pair_weights=torch.tensor([3.0]))
    asked = {"shift_labels" if shifted else "labels": labels}
    found = model(**inputs, **asked, fused_lm_head=True, preference=preference).preference
    torch.testing.assert_close(found.logps, expected.detach())


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "Preference: no argument 'betta'; did you mean 'beta'", {"betta": 0.1}),
        (TypeError, "Preference: no argument 'shift'", {"shift": True}),
        (TypeError, "Preference: no argument 'reference_free': .* zeros", {"reference_free": True}),
        (ValueError, "beta must be a positive finite number, got -1", {"beta": -1}),
        (ValueError, "loss_type must be one of .*did you mean 'sigmoid'", {"loss_type": "sigmod"}),
        (ValueError, "pair_weights: expected a tensor or None, got list", {"pair_weights": [1.0]}),
        (ValueError, "lengths: expected a tensor or None, got list", {"lengths": [1.0, 1.0]}),
        (ValueError, "num_labelled: expected None or a count of at least 0, got -1", {"num_labelled": -1}),
        (ValueError, "differentiable: expected some of .* got 'logps'", {"differentiable": "logps"}),
    ],
    ids=str,
)
def test_a_preference_is_checked_where_it_is_made(error, message, arguments):
    with pytest.raises(error, match=message):
        Preference(torch.zeros(2), **arguments)


def test_a_reference_is_checked_where_it_is_made():
    with pytest.raises(ValueError, match=r"gradients: expected some of .* got \['logits'\]"):
        Reference(["logits"], {})
    with pytest.raises(ValueError, match="options: expected a dictionary of some of .* got {'beta': 0.1}"):
        Reference(["hidden"], {"beta": 0.1})


def test_a_reference_takes_what_matters_of_the_policys_call():
    model = build("llama")
    add_fused_lm_head(model)
    options = {"loss_type": "ipo", "ld_alpha": 0.3, "chunk_bytes": 0, "token_weights": None}
    assert Reference.of(model, options | {"beta": 0.1, "temperature": 2.0}).options == options
    with torch.no_grad():
        assert Reference.of(model, options).gradients == ()


@pytest.mark.parametrize("reference", [None, 0.0, torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), [0.0, 0.0]])
def test_a_preference_needs_log_probabilities(reference):
    with pytest.raises(ValueError, match=r"ref_logps: expected a floating-point tensor \[S\], got"):
        Preference(reference, beta=0.1)
