"""One trainer after another of the same models: a notebook's cell run again, a sweep, KTO and then DPO, adapters that
are merged and begun anew, TRL's own trainer before or between."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import trl
from datasets import Dataset
from grids import each_value
from peft import LoraConfig
from transformers import TrainerCallback
from trl_runs import (
    LORA,
    assert_agree,
    assert_weights_agree,
    logs_of,
    preferences,
    prototype,
    settings,
    tokenizer,
    unpaired,
)

import dpo_kernels.trl as ours

pytestmark = [
    pytest.mark.usefixtures("process_left_as_it_was"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
TOKENS = torch.arange(3, 11).view(2, 4)


def trainer_of(what, directory, model, reference=None, lora=None, evaluate=False, **options):
    """`what` is "DPO", "TRL's KTO" and the like, with "bf16" at the end or not."""
    kind, library = what.removeprefix("TRL's ").removesuffix(" bf16"), ours
    module = trl if hasattr(trl, f"{kind}Trainer") else __import__(f"trl.experimental.{kind.lower()}", fromlist=["x"])
    if what.startswith("TRL's "):
        library = module
    data = unpaired() if kind == "KTO" else preferences()
    references = {"ref_model": reference} if reference is not None and module is trl else {}
    return getattr(library, f"{kind}Trainer")(
        model=model,
        args=getattr(module, f"{kind}Config")(**settings(directory, bf16=what.endswith(" bf16"), **options)),
        train_dataset=data,
        eval_dataset=data.select(range(5)) if evaluate else None,
        processing_class=tokenizer(),
        peft_config=lora and LoraConfig(**lora),
        **references,
    )


def another():
    """A reference that is not the policy."""
    reference = copy.deepcopy(prototype("llama"))
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.2)
    return reference


def ran(what, directory, model, **options):
    trainer = trainer_of(what, directory, model, **options)
    trainer.train()
    if options.get("evaluate"):
        trainer.evaluate()
    return logs_of(trainer)


def assert_generates_as_before(model):
    plain = copy.deepcopy(prototype("llama"))
    plain.load_state_dict(model.state_dict())
    model.eval()
    generated = [each.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0) for each in (model, plain)]
    assert torch.equal(*generated)
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


@pytest.mark.parametrize(
    "before, last",
    [
        (["DPO"], "DPO"),
        pytest.param(["DPO", "DPO", "DPO"], "DPO", marks=pytest.mark.full),
        (["KTO"], "DPO"),
        (["DPO"], "KTO"),
        pytest.param(["CPO"], "DPO", marks=pytest.mark.full),
        (["DPO"], "ORPO"),
        (["CPO", "KTO"], "CPO"),
        pytest.param(["TRL's DPO"], "DPO", marks=pytest.mark.full),
        pytest.param(["DPO", "TRL's DPO"], "DPO", marks=pytest.mark.full),
        (["DPO", "TRL's KTO", "DPO", "TRL's DPO"], "KTO"),
        pytest.param(["DPO"], "TRL's DPO", marks=pytest.mark.full),
        (["TRL's KTO", "KTO"], "TRL's DPO"),
    ],
    ids=str,
)
def test_another_trainer_of_the_same_models(tmp_path, before, last):
    """The last one's logs are those of fresh models, to the digit."""
    model, reference = copy.deepcopy(prototype("llama")), another()
    fresh = copy.deepcopy((model, reference))
    for what in before:
        ran(what, tmp_path, model, reference=reference, learning_rate=0.0, max_steps=1)
    found = ran(last, tmp_path, model, reference=reference, evaluate=True)
    assert found == ran(last, tmp_path, fresh[0], reference=fresh[1], evaluate=True)
    assert_generates_as_before(model)


@pytest.mark.parametrize(
    "first, last",
    [
        ("DPO bf16", "DPO"),
        ("DPO bf16", "DPO bf16"),
        pytest.param("KTO bf16", "DPO bf16", marks=pytest.mark.full),
        ("TRL's DPO bf16", "DPO bf16"),
        ("DPO", "KTO bf16"),
        ("CPO bf16", "ORPO bf16"),
    ],
)
def test_precision_is_that_of_each_trainer(tmp_path, first, last):
    """accelerate puts autocast around a model's forward for the first of its trainers, and never again."""
    model, reference = copy.deepcopy(prototype("llama")), another()
    fresh = copy.deepcopy((model, reference))
    ran(first, tmp_path, model, reference=reference, learning_rate=0.0, max_steps=1)
    assert ran(last, tmp_path, model, reference=reference) == ran(last, tmp_path, fresh[0], reference=fresh[1])
    assert not torch.is_autocast_enabled("cpu")


def test_a_sweep_with_one_reference(tmp_path):
    reference, found = another(), []
    for beta in (0.05, 0.1, 0.5):
        found.append(ran("DPO", tmp_path, copy.deepcopy(prototype("llama")), reference=reference, beta=beta))
        assert found[-1] == ran("DPO", tmp_path, copy.deepcopy(prototype("llama")), reference=another(), beta=beta)
    assert len({logs[0]["loss"] for logs in found}) == 3


def test_the_policy_becomes_the_reference(tmp_path):
    """Of the next round, as those do who collect new pairs in between."""
    found = []
    for who in ("", "TRL's "):
        model, rounds = copy.deepcopy(prototype("llama")), []
        for _ in range(3):
            policy = copy.deepcopy(model)
            rounds += ran(f"{who}DPO", tmp_path, policy, reference=model)
            model = policy
        found.append((rounds, dict(model.named_parameters())))
    assert_agree(found[0][0], found[1][0])
    assert_weights_agree(*(each[1] for each in found))


def test_fine_tuning_before_and_after(tmp_path):
    """TRL's `SFTTrainer` has a head of TRL's, too."""
    data = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in preferences()])

    def tuned(model):
        args = trl.SFTConfig(**settings(tmp_path, max_steps=2))
        trainer = trl.SFTTrainer(model, args=args, train_dataset=data, processing_class=tokenizer())
        trainer.train()
        return logs_of(trainer)

    model = copy.deepcopy(prototype("llama"))
    tuned(model)
    fresh = copy.deepcopy(prototype("llama"))
    fresh.load_state_dict(model.state_dict())
    assert ran("DPO", tmp_path, model, reference=another()) == ran("DPO", tmp_path, fresh, reference=another())
    fresh = copy.deepcopy(prototype("llama"))
    fresh.load_state_dict(model.state_dict())
    assert tuned(model) == tuned(fresh)


def test_trainers_that_take_turns(tmp_path):
    """All are made, and then each trains and evaluates, with what it needs of each position."""
    model, reference = copy.deepcopy(prototype("llama")), another()
    options = {"reference": reference, "evaluate": True, "learning_rate": 0.0, "max_steps": 1}
    kinds = ["DPO", "KTO", "TRL's KTO", "DPO", "CPO"]
    trainers = [trainer_of(kind, tmp_path, model, **options) for kind in kinds]
    for kind, trainer in [*zip(kinds, trainers, strict=True), *zip(kinds, trainers, strict=True)]:
        trainer.state.log_history.clear()
        trainer._total_train_tokens = 0
        trainer.train()
        trainer.evaluate()
        assert_agree(logs_of(trainer), ran(kind, tmp_path, copy.deepcopy(prototype("llama")), **options))


@pytest.mark.parametrize("targets, kind", each_value(["all-linear", ["q_proj", "lm_head"]], ["DPO", "KTO"]))
def test_adapters_that_are_merged_and_begun_anew(tmp_path, kind, targets):
    if targets != "all-linear" and kind == "KTO":
        targets = ["lm_head"]
    found = []
    for who in ("", "TRL's "):
        if who and targets != "all-linear":
            break  # TRL refuses adapters on the head
        model, logs = copy.deepcopy(prototype("llama")), []
        for _ in range(2):
            trainer = trainer_of(f"{who}{kind}", tmp_path, model, lora={**LORA, "target_modules": targets})
            trainer.train()
            logs.append(logs_of(trainer))
            model = trainer.model.merge_and_unload()
        found.append([log for of_round in logs for log in of_round])
    if len(found) == 2:
        assert_agree(*found)
    assert len({log["loss"] for log in found[0] if "loss" in log}) > 4
    assert_generates_as_before(model)


def test_the_same_adapter_again(tmp_path):
    """A PEFT model that a trainer has made goes into the next, with the adapter that it had as its reference."""
    found = []
    for who in ("", "TRL's "):
        first = trainer_of(f"{who}DPO", tmp_path, copy.deepcopy(prototype("llama")), lora=LORA)
        first.train()
        again = trainer_of(f"{who}DPO", tmp_path, first.model)
        again.train()
        found.append([*logs_of(first), *logs_of(again)])
        assert again.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert_agree(*found)


def test_a_copy_of_a_trained_model(tmp_path):
    """After a trainer in bf16, whose accelerate has wrapped its forward, and one of TRL's over it."""
    model = copy.deepcopy(prototype("llama"))
    for what in ("DPO bf16", "TRL's DPO", "KTO"):
        ran(what, tmp_path, model, reference=copy.deepcopy(prototype("llama")), max_steps=1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    for each in (model, other):
        plain = copy.deepcopy(prototype("llama"))
        plain.load_state_dict(each.state_dict())
        expected = plain(TOKENS).logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None])[..., 0]
        found = each(input_ids=TOKENS, labels=TOKENS, fused_lm_head=True).log_probs
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found = ran("DPO", tmp_path, other, reference=model)
    assert found[0]["rewards/chosen"] != 0


# patch() and unpatch()


@pytest.mark.parametrize("kind", ["DPO", "KTO", "CPO", pytest.param("ORPO", marks=pytest.mark.full)])
def test_trainers_made_before_patch_stay_as_they_are(tmp_path, kind):
    options = {"evaluate": True, "reference": another()}
    expected = ran(f"TRL's {kind}", tmp_path, copy.deepcopy(prototype("llama")), **options)
    trainer = trainer_of(f"TRL's {kind}", tmp_path, copy.deepcopy(prototype("llama")), **options)
    ours.patch(f"{kind}Trainer")
    try:
        trainer.train()
        trainer.evaluate()
        assert logs_of(trainer) == expected
        made_between = trainer_of(f"TRL's {kind}", tmp_path, copy.deepcopy(prototype("llama")), **options)
        assert hasattr(made_between, "_dpo_kernels_head")
    finally:
        ours.unpatch()
    trainer.evaluate()
    made_between.train()
    made_between.evaluate()
    assert_agree(logs_of(made_between), expected)


def test_unpatched_in_the_middle(tmp_path):
    """No token is lost that was counted before."""
    options = {"evaluate": True, "reference": another()}
    expected = ran("TRL's DPO", tmp_path, copy.deepcopy(prototype("llama")), **options)
    ours.patch()
    try:
        trainer = trainer_of("TRL's DPO", tmp_path, copy.deepcopy(prototype("llama")), logging_steps=3, **options)

        class Unpatches(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                ours.unpatch()

        trainer.add_callback(Unpatches())
        trainer.train()
    finally:
        ours.unpatch()
    logged = [log for log in logs_of(trainer) if "num_tokens" in log]
    assert logged[0]["num_tokens"] == [log for log in expected if "num_tokens" in log][2]["num_tokens"]
