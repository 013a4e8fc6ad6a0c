"""TRL's trainers with this package's head where TRL's do something that is not obvious: what a token counts, odd
precisions and settings, numbers that are no numbers, what subclasses find, and rewards of a model against itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import transformers
import trl
from datasets import Dataset
from grids import covering, each_value
from heads import build
from trl_runs import (
    LORA,
    assert_agree,
    batch_of,
    dpo,
    logs_of,
    preferences,
    prototype,
    settings,
    tokenizer,
    trainer_of,
    trl_names,
    unpaired,
)

import dpo_kernels.trl as ours

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")
QUIET = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def logs(library, directory, model, **options):
    trainer = trainer_of(library, directory, model, **options)
    trainer.train()
    return logs_of(trainer)


def compare(directory, model, tolerance=1e-4, **options):
    found = [logs(library, directory, model, **options) for library in (ours, trl)]
    assert_agree(*found, tolerance)
    return found[0]


# What counts as a token


def without_prompts(kind):
    rows = []
    for number, row in enumerate(preferences()):
        if kind == "none" or (kind == "some" and number % 2):
            row = {**row, "prompt": ""}
        elif kind == "implicit":  # and nothing shared
            row = {"chosen": "ba " + row["chosen"], "rejected": "de " + row["rejected"]}
        elif kind == "implicit, some shared" and number % 2:
            row = {**row, "prompt": "", "rejected": "de" + row["rejected"]}
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("none", {"loss_type": "ipo"}),
        ("some", {"loss_type": "sigmoid_norm"}),
        ("implicit", {"loss_type": "ipo", "ld_alpha": 0.3}),
        ("implicit, some shared", {"loss_type": ["ipo", "sigmoid_norm", "sigmoid"], "use_weighting": True}),
        ("none", {"loss_type": ["sft", "ipo"], "precompute_ref_log_probs": True}),
        ("some", {"loss_type": "ipo", "max_length": 3, "truncation_mode": "keep_end"}),
        ("none", {"loss_type": "ipo", "f_divergence": "js", "gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_first_token_counts_where_there_is_no_prompt(tmp_path, kind, options):
    """TRL divides by it, though nothing scores it: `grad_norm` and loss show that from the first step on."""
    reference = copy.deepcopy(prototype("llama"))
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.3)
    data = without_prompts(kind)
    mine = compare(tmp_path, prototype("llama"), data=data, reference=reference, **trl_names(**options))
    assert {"grad_norm", "loss"} <= mine[0].keys()


# Precisions


def in_parts(**dtypes):
    """A model in bf16 but for these modules."""
    model = copy.deepcopy(prototype("llama")).bfloat16()
    for name, module in model.named_modules():
        for part, dtype in dtypes.items():
            if name.endswith(part):
                module.to(dtype)
    return model


PARTS = {
    "head": {"lm_head": torch.float32},
    "head and last norm": {"lm_head": torch.float32, "model.norm": torch.float32},
    "norms, embeddings and head": {"lm_head": torch.float32, "norm": torch.float32, "embed_tokens": torch.float32},
    "all but head": {"model": torch.float32},
    "nothing": {},
}


@QUIET
@pytest.mark.parametrize("part, kind, autocast", covering(list(PARTS), ["DPO", "KTO"], [False, True]))
def test_model_of_several_precisions(tmp_path, part, kind, autocast):
    if part == "norms, embeddings and head" and not autocast:  # its first layer takes no such input, in any trainer
        with pytest.raises(RuntimeError, match="dtype"):
            logs(ours, tmp_path, in_parts(**PARTS[part]), kind=kind)
        return
    options = {"bf16": True} if autocast else {}
    model = in_parts(**PARTS[part])
    found = [logs(lib, tmp_path, model, kind=kind, max_steps=1, **options) for lib in (ours, trl)]
    assert_agree([found[0][0]] * 3, [found[1][0]] * 3, 1e-2)
    if kind == "DPO":
        assert found[0][0]["loss"] == found[1][0]["loss"]


# What is not finite


def with_damage(where):
    model = copy.deepcopy(prototype("llama"))
    weight, index, value = {
        "an embedding": (model.model.embed_tokens.weight, 10, math.nan),
        "the last norm": (model.model.norm.weight, 3, math.inf),
        "a weight of the head": (model.lm_head.weight, (5, 2), math.nan),
        "a row of the head": (model.lm_head.weight, 7, -math.inf),
        "a layer": (model.model.layers[1].mlp.down_proj.weight, (0, 0), math.inf),
    }[where]
    with torch.no_grad():
        weight[index] = value
    return model


def same(a, b):
    return a == pytest.approx(b, rel=1e-4, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    "where, kind, lora",
    [
        ("an embedding", "DPO", None),
        ("an embedding", "KTO", None),
        ("an embedding", "DPO", LORA),
        ("the last norm", "DPO", None),
        ("a weight of the head", "DPO", None),
        ("a row of the head", "DPO", LORA),
        ("a layer", "KTO", LORA),
    ],
    ids=str,
)
def test_what_is_not_finite_is_logged(tmp_path, where, kind, lora):
    options = {"kind": kind, "lora": lora, "logging_nan_inf_filter": False, "max_steps": 2}
    mine, theirs = (logs(library, tmp_path, with_damage(where), **options) for library in (ours, trl))
    assert len(mine) == len(theirs) == 3
    for own, other in zip(mine, theirs, strict=True):
        assert own.keys() == other.keys()
        assert all(same(own[name], value) for name, value in other.items()), (own, other)
    assert any(math.isnan(log.get("loss", 0.0)) and math.isnan(log["grad_norm"]) for log in mine)


# Settings that only TRL takes


@pytest.mark.parametrize(
    "kind, options, named",
    [
        pytest.param("DPO", {"beta": -0.1}, "beta", marks=pytest.mark.full),
        ("DPO", {"beta": 0.0}, "beta"),
        ("DPO", {"beta": 0.0, "loss_type": ["sft"]}, "beta"),
        pytest.param("DPO", {"ld_alpha": 1.5}, "ld_alpha", marks=pytest.mark.full),
        ("DPO", {"ld_alpha": -0.5, "precompute_ref_log_probs": True}, "ld_alpha"),
        ("DPO", {"loss_type": ["robust"], "label_smoothing": 0.7}, "label_smoothing"),
        ("DPO", {"loss_type": ["aot"], "label_smoothing": 1.0}, "label_smoothing"),
        pytest.param(
            "DPO", {"loss_type": ["exo_pair"], "label_smoothing": 0.6}, "label_smoothing", marks=pytest.mark.full
        ),
        ("DPO", {"loss_type": ["discopop"], "discopop_tau": -0.05}, "discopop_tau"),
        ("KTO", {"beta": -0.1}, "beta"),
        pytest.param("KTO", {"desirable_weight": -1.0}, "desirable_weight", marks=pytest.mark.full),
        ("KTO", {"beta": 0.0, "loss_type": "apo_zero_unpaired"}, "beta"),
    ],
    ids=str,
)
def test_settings_that_only_trl_takes(tmp_path, kind, options, named):
    reference = copy.deepcopy(prototype("llama"))
    with torch.no_grad():
        reference.lm_head.weight.mul_(1.3)
    if options.get("precompute_ref_log_probs"):
        reference = None
    with pytest.warns(UserWarning, match=f"{named}.*TRL takes this") as caught:
        mine = logs(ours, tmp_path, prototype("llama"), kind=kind, reference=reference, **options)
    assert sum("TRL takes this" in str(each.message) for each in caught) == 1
    assert_agree(mine, logs(trl, tmp_path, prototype("llama"), kind=kind, reference=reference, **options))


class Scheduled(transformers.TrainerCallback):
    """Sets an attribute of the trainer before each step."""

    def __init__(self, name, values):
        self.name, self.values, self.trainer = name, values, None

    def on_step_begin(self, args, state, control, **kwargs):
        setattr(self.trainer, self.name, self.values[state.global_step])


@pytest.mark.parametrize(
    "kind, name, values",
    [
        ("DPO", "beta", (0.1, -0.1, 0.2)),
        ("DPO", "ld_alpha", (0.5, 2.0, None)),
        ("DPO", "beta", (0.0, 0.1, 0.1)),
        ("KTO", "beta", (0.1, 0.0, 0.2)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*TRL takes this")
def test_settings_that_change_while_training(tmp_path, kind, name, values):
    found = []
    for library in (ours, trl):
        trainer = trainer_of(library, tmp_path, prototype("llama"), kind=kind, max_steps=3)
        callback = Scheduled(name, values)
        callback.trainer = trainer
        trainer.add_callback(callback)
        trainer.train()
        found.append(logs_of(trainer))
    assert_agree(*found)


def test_losses_that_nobody_knows_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"loss_type: expected some of .*'sigmoid'.*got \['sigmoidal'\]"):
        trainer_of(ours, tmp_path, prototype("llama"), loss_type=["sigmoid", "sigmoidal"])


# A model against itself


def long_pairs(words=40):
    rows = [{"prompt": row["prompt"], "chosen": row["chosen"] * words, "rejected": row["rejected"] * words}
            for row in preferences()]  # fmt: skip
    return Dataset.from_list(rows)


OWN = [
    {},
    {"lora": {**LORA, "init_lora_weights": True}},
    {"loss_type": ["aot"]},  # four products
    {"ld_alpha": 0.3},
    {"bf16": True},
    {"kind": "KTO", "lora": {**LORA, "init_lora_weights": True}},
    {"kind": "KTO"},
    {"gradient_checkpointing": True},
    {
        "precompute_ref_log_probs": True,
        "lora": {**LORA, "init_lora_weights": True},
        "per_device_train_batch_size": 1,
    },
]


@pytest.mark.parametrize("options, vocab", each_value(OWN, [None, 5000]), ids=str)
def test_a_model_is_its_own_reference_to_the_bit(tmp_path, options, vocab):
    """Thousands of tokens, and a vocabulary wider than what is folded at a time."""
    model = prototype("llama") if vocab is None else build("llama", vocab_size=vocab, initializer_range=0.3)
    kind = options.get("kind", "DPO")
    data = {} if kind == "KTO" else {"data": long_pairs()}
    found = logs(ours, tmp_path, model, max_length=None, learning_rate=0.0, max_steps=2, **options, **data)
    for log in found[:2]:
        assert {log[f"rewards/{side}"] for side in ("chosen", "rejected") if f"rewards/{side}" in log} == {0.0}, log
        if kind == "DPO":
            assert log["loss"] == pytest.approx(math.log(2), abs=1e-7) and log["rewards/margins"] == 0.0
            assert abs(log["logps/chosen"]) > 100
        else:
            assert log["kl"] == 0.0


@pytest.mark.parametrize("evaluated", [False, True])
def test_groups_of_pairs_are_summed_alike(tmp_path, monkeypatch, evaluated):
    """Where the logits of all pairs do not fit, and where there is no gradient."""
    from dpo_kernels import linear_dpo, linear_reference

    for module in (linear_dpo, linear_reference):
        monkeypatch.setattr(module, "DEFAULT_CHUNK_BYTES", 2**16)
    trainer = trainer_of(ours, tmp_path, prototype("llama"), data=long_pairs(2), max_length=None)
    trainer.model.train(not evaluated)
    with torch.set_grad_enabled(not evaluated):
        loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(8)))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    metrics = trainer._metrics["eval" if evaluated else "train"]
    assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == [0.0]


# What subclasses find


def reading(parent, seen):
    """A trainer that looks at what TRL leaves after each micro-batch, and when it logs."""

    class Reading(parent):
        def _compute_loss(self, model, inputs, return_outputs):
            before = dict(self._metrics)
            result = super()._compute_loss(model, inputs, return_outputs)
            mode = "train" if self.model.training else "eval"
            assert self._metrics[mode] is before[mode]  # who took it earlier has it still
            latest = {name: values[-1] for name, values in self._metrics[mode].items()}
            seen.append((mode, latest, self._total_train_tokens))
            self._metrics[mode]["mine"].append(2.0 * self._metrics[mode]["rewards/chosen"][-1])
            return result

        def log(self, logs, *args, **kwargs):
            mode = "train" if self.model.training else "eval"
            seen.append((f"log {mode}", {name: list(values) for name, values in self._metrics[mode].items()}, None))
            super().log(logs, *args, **kwargs)

    return Reading


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_subclasses_find_what_trl_leaves(tmp_path, kind):
    found = []
    for library in (ours, trl):
        seen, data = [], unpaired() if kind == "KTO" else preferences()
        trainer = reading(getattr(library, f"{kind}Trainer"), seen)(
            copy.deepcopy(prototype("llama")),
            copy.deepcopy(prototype("llama")),
            args=getattr(trl, f"{kind}Config")(
                **settings(tmp_path, gradient_accumulation_steps=2, logging_steps=2, max_steps=4)
            ),
            train_dataset=data,
            eval_dataset=data.select(range(6)),
            processing_class=tokenizer(),
        )
        trainer.train()
        trainer.evaluate()
        found.append((seen, logs_of(trainer), trainer._total_train_tokens))
    (mine, my_logs, my_tokens), (theirs, their_logs, their_tokens) = found
    assert_agree(my_logs, their_logs)
    assert my_tokens == their_tokens > 0 and type(my_tokens) is int
    assert [each[0] for each in mine] == [each[0] for each in theirs]
    for (_, own, tokens), (_, other, count) in zip(mine, theirs, strict=True):
        assert own.keys() == other.keys() and tokens == count
        for name, value in other.items():
            if isinstance(value, list):
                assert type(own[name]) is list
            if not name.endswith("accuracies"):
                assert own[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
            assert type(own[name]) is type(value), name


READERS = {
    "a name": lambda metrics: metrics["rewards/chosen"],
    "get": lambda metrics: metrics.get("rewards/chosen"),
    "contains": lambda metrics: "rewards/chosen" in metrics,
    "length": len,
    "truth": bool,
    "keys": lambda metrics: sorted(metrics.keys()),
    "iteration": sorted,
    "copy": lambda metrics: copy.copy(metrics)["rewards/chosen"],
    "deepcopy": lambda metrics: copy.deepcopy(metrics)["rewards/chosen"],
    "pickled": lambda metrics: pickle.loads(pickle.dumps(dict(metrics)))["rewards/chosen"],
    "unpacked": lambda metrics: {**metrics}["rewards/chosen"],
    "merged": lambda metrics: ({} | metrics)["rewards/chosen"],
    "text": lambda metrics: "rewards/chosen" in repr(metrics),
    "json": lambda metrics: sorted(json.loads(json.dumps({"all": dict(metrics)}))["all"]),
    "json of itself": lambda metrics: sorted(json.loads(json.dumps(metrics))),
    "pop": lambda metrics: metrics.pop("rewards/chosen"),
    "setdefault": lambda metrics: metrics.setdefault("rewards/chosen", []),
    "equality": lambda metrics: metrics == {name: list(values) for name, values in metrics.items()},
    "missing": lambda metrics: metrics["nobody's"],
    "reversed": lambda metrics: sorted(reversed(metrics)),
}


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """One of each library, in training mode."""
    made = [trainer_of(library, tmp_path_factory.mktemp("trainer"), prototype("qwen2")) for library in (ours, trl)]
    for trainer in made:
        trainer.model.train()
    return made


@pytest.mark.parametrize("reader", READERS)
def test_metrics_read_in_every_way(trainers, reader):
    found = []
    for trainer in trainers:
        trainer._metrics["train"].clear()
        for _ in range(2):
            trainer.compute_loss(trainer.model, batch_of(trainer))
        found.append(READERS[reader](trainer._metrics["train"]))
    assert found[0] == found[1]  # the rewards of a model against itself
    assert isinstance(trainers[0]._metrics["train"], dict)


def test_metrics_that_are_thrown_away_unread(trainers):
    trainer = trainers[0]
    before = trainer._total_train_tokens
    trainer.compute_loss(trainer.model, batch_of(trainer))
    trainer._metrics["train"].clear()
    assert len(trainer._metrics["train"]) == 0
    trainer.compute_loss(trainer.model, batch_of(trainer))
    trainer._metrics = {"train": copy.copy(trainer._metrics["eval"]), "eval": trainer._metrics["eval"]}
    assert trainer._total_train_tokens == before + 2 * int(batch_of(trainer)["attention_mask"].sum())
    trainer._total_train_tokens += 5
    assert trainer._total_train_tokens == before + 2 * int(batch_of(trainer)["attention_mask"].sum()) + 5


@QUIET
@pytest.mark.parametrize("algorithm", ["CPO", "ORPO"])
def test_metrics_of_the_reference_free_are_numbers(tmp_path, algorithm):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    found = []
    for library in (ours, module):
        seen = []

        class Reading(getattr(library, f"{algorithm}Trainer")):
            def get_batch_loss_metrics(self, *args, seen=seen, **kwargs):
                loss, metrics = super().get_batch_loss_metrics(*args, **kwargs)
                seen.append(dict(metrics))
                metrics["mine"] = 2 * metrics["rewards/chosen"]
                return loss, metrics

            def log(self, logs, *args, seen=seen, **kwargs):
                seen.append({name: values[-1] for name, values in self._stored_metrics["train"].items()})
                super().log(logs, *args, **kwargs)

        trainer = Reading(
            copy.deepcopy(prototype("llama")),
            args=getattr(module, f"{algorithm}Config")(**settings(tmp_path)),
            train_dataset=preferences(),
            processing_class=tokenizer(),
        )
        trainer.train()
        found.append((seen, logs_of(trainer)))
    assert_agree(found[0][1], found[1][1])
    for own, other in zip(found[0][0], found[1][0], strict=True):
        assert own == pytest.approx(other, rel=1e-4, abs=1e-4)
        assert {type(value) for value in own.values()} <= {float}


def test_no_warning_where_all_is_usual(tmp_path):
    """A smoothing that TRL's loss takes no notice of among it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dpo(ours.DPOTrainer, tmp_path, prototype("llama"), max_steps=1, label_smoothing=0.1)
    assert not [each for each in caught if "TRL takes this" in str(each.message)]
