"""Weights of tokens and of pairs that a batch carries into `DPOTrainer`, which TRL's own has not."""

from __future__ import annotations

import copy
import math

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="is imported by what the tests share, and is not installed")

import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_runs import LOSS_OPTIONS, PAIRS, batch_of, logs_of, preferences, prototype, settings, tokenizer, trainer_of

import dpo_kernels.trl as ours

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class WithWeights:
    """A collator that adds what the examples weigh, as a user's would."""

    def __init__(self, collator, token_weights=None, pair_weights=None):
        self.collator, self.token_weights, self.pair_weights = collator, token_weights, pair_weights

    def __call__(self, examples):
        batch = self.collator(examples)
        if self.token_weights is not None:
            batch["token_weights"] = self.token_weights(batch)
        if self.pair_weights is not None:
            batch["pair_weights"] = torch.tensor([self.pair_weights(example) for example in examples])
        return batch


def last_half(batch):
    """Each completion's second half counts, the first not."""
    mask = batch["completion_mask"]
    return (mask.cumsum(1) * 2 > mask.sum(1, keepdim=True)).float() * mask


def weighted(directory, loss_type="sigmoid", options=None, **weights):
    trainer = trainer_of(ours, directory, prototype("llama"), loss_type=[loss_type], **(options or {}))
    with torch.no_grad():
        trainer.ref_model.lm_head.weight.mul_(1.3)
    trainer.data_collator = WithWeights(trainer.data_collator, **weights)
    trainer.model.train()
    return trainer


def loss_and_gradient(trainer, rows):
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
    loss.backward()
    gradient = trainer.model.lm_head.weight.grad.clone()
    trainer.model.zero_grad()
    return loss.item(), gradient


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sft", "hinge"])
def test_a_pair_of_weight_two_is_there_twice(tmp_path, loss_type):
    heavy = weighted(tmp_path, loss_type, pair_weights=lambda example: [2.0, 1.0, 0.0][len(example["chosen_ids"]) % 3])
    rows = list(range(6))
    repeats = [[2, 1, 0][len(heavy.train_dataset[i]["chosen_ids"]) % 3] for i in rows]
    assert set(repeats) == {0, 1, 2}
    loss, gradient = loss_and_gradient(heavy, rows)
    plain = weighted(tmp_path, loss_type)
    expected, wanted = loss_and_gradient(plain, [i for i, n in zip(rows, repeats, strict=True) for _ in range(n)])
    assert loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm"])
def test_a_token_without_weight_is_as_good_as_prompt(tmp_path, loss_type):
    masked = weighted(tmp_path, loss_type)
    inner = masked.data_collator.collator

    def cut(examples):
        batch = inner(examples)
        batch["completion_mask"] = last_half(batch).long()
        return batch

    masked.data_collator = cut
    half = weighted(tmp_path, loss_type, token_weights=last_half)
    (loss, gradient), (expected, wanted) = (loss_and_gradient(each, range(PAIRS)) for each in (half, masked))
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, wanted)
    for name in ("entropy", "logps/chosen", "rewards/chosen", "logits/chosen"):
        assert half._metrics["train"][name] == pytest.approx(masked._metrics["train"][name], rel=1e-6)


def test_token_weights_scale_policy_and_reference(tmp_path):
    """All of 0.5 are half of beta."""
    half = weighted(tmp_path, token_weights=lambda batch: torch.full(batch["input_ids"].shape, 0.5))
    loss, _ = loss_and_gradient(half, range(PAIRS))
    plain = weighted(tmp_path)
    plain.beta /= 2
    assert loss == pytest.approx(loss_and_gradient(plain, range(PAIRS))[0], rel=1e-5)


def test_a_run_with_weights_from_columns(tmp_path):
    """From the columns of a data set, as the recipe has it, with a reference that is computed before."""

    class Collator(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            batch["pair_weights"] = torch.tensor([example["weight"] for example in examples])
            return batch

    data = preferences().add_column("weight", [float(number % 3) for number in range(len(preferences()))])
    options = settings(tmp_path, remove_unused_columns=False, precompute_ref_log_probs=True, max_steps=5)
    trainer = ours.DPOTrainer(
        copy.deepcopy(prototype("llama")),
        args=trl.DPOConfig(**options),
        train_dataset=data,
        processing_class=tokenizer(),
        data_collator=Collator(pad_token_id=tokenizer().pad_token_id, max_length=48),
    )
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in logs_of(trainer)[:5])


@QUIET
@pytest.mark.parametrize("kind", ["KTO", "CPO", "ORPO", "TRL's"])
@pytest.mark.parametrize("name", ["token_weights", "pair_weights"])
def test_trainers_without_weights_refuse_them(tmp_path, kind, name):
    if kind in ("KTO", "TRL's"):
        more = {"kind": "KTO"} if kind == "KTO" else {"beta": 0.0}
        trainer = trainer_of(ours, tmp_path, prototype("llama"), **more)
    else:
        config = getattr(__import__(f"trl.experimental.{kind.lower()}", fromlist=["x"]), f"{kind}Config")
        trainer = getattr(ours, f"{kind}Trainer")(
            copy.deepcopy(prototype("llama")), args=config(**settings(tmp_path)), train_dataset=preferences(),
            processing_class=tokenizer(),
        )  # fmt: skip
    batch = batch_of(trainer) | {name: torch.ones(1)}
    with pytest.raises(ValueError, match=f"takes no weights of tokens or pairs: expected a batch without {name}"):
        trainer.compute_loss(trainer.model, batch)


def test_weights_of_the_wrong_shape_are_named(tmp_path):
    trainer = weighted(tmp_path, token_weights=lambda batch: torch.ones(batch["input_ids"].shape[0], 2))
    with pytest.raises(
        ValueError, match=r"token_weights: expected the shape \[8, \d+\] of completion_mask, got \[8, 2"
    ):
        trainer.compute_loss(trainer.model, batch_of(trainer))


@pytest.mark.parametrize("loss_type", sorted(set(LOSS_OPTIONS) - {"aot", "aot_unpaired"}))
@pytest.mark.full
def test_every_loss_with_pair_weights_of_one(tmp_path, loss_type):
    found = []
    for weights in ({}, {"pair_weights": lambda example: 1.0}):
        trainer = weighted(tmp_path, loss_type, LOSS_OPTIONS[loss_type], **weights)
        found.append(loss_and_gradient(trainer, range(PAIRS))[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
