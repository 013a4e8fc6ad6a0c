"""TRL's trainers of KTO, CPO, SimPO and ORPO with this package's head, beside TRL's own; and of all, DPO too, what the
metrics of a step cost."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
pytest.importorskip("peft", reason="trains LoRA too, and peft is not installed")

import trl
from accelerate import Accelerator
from grids import each_value
from peft import LoraConfig
from torch.overrides import TorchFunctionMode
from trl_runs import (
    LORA,
    PAIRS,
    assert_agree,
    assert_weights_agree,
    preferences,
    prototype,
    settings,
    tokenizer,
    trained,
    unpaired,
    weights_of,
)

import dpo_kernels.trl as ours
from dpo_kernels.models import fused_forward

pytestmark = pytest.mark.usefixtures("process_left_as_it_was")
EXPERIMENTAL = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


KTO = [
    ({"loss_type": "kto"}, LORA),
    ({"loss_type": "apo_zero_unpaired", "gradient_accumulation_steps": 2}, None),
    ({"loss_type": "kto", "precompute_ref_log_probs": True}, LORA),
    ({"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}, None),
    ({"loss_type": "kto", "undesirable_weight": 1.5, "gradient_accumulation_steps": 2}, None),
    ({"loss_type": "kto", "desirable_weight": 0.5, "per_device_train_batch_size": 2, "max_steps": 4}, None),
    ({"loss_type": "kto", "logging_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}, LORA),
]


@pytest.mark.parametrize("options, lora", KTO, ids=lambda value: "LoRA" if value is LORA else str(value))
def test_kto(tmp_path, options, lora):
    found = []
    for trainer_class in (ours.KTOTrainer, trl.KTOTrainer):
        reference = None
        if lora is None and "precompute_ref_log_probs" not in options:
            reference = copy.deepcopy(prototype("mistral"))
        config = trl.KTOConfig(**settings(tmp_path / trainer_class.__module__, **options))
        found.append(trained(trainer_class, config, prototype("mistral"), unpaired(), lora, ref_model=reference))
    (mine, my_logs), (theirs, their_logs) = found
    assert_agree(my_logs, their_logs)
    assert_weights_agree(weights_of(mine), weights_of(theirs))
    assert any({"kl", "entropy", "rewards/margins", "logits/chosen", "num_tokens"} <= log.keys() for log in my_logs)
    assert {"eval_kl", "eval_rewards/margins"} <= my_logs[-1].keys()
    if options.get("per_device_train_batch_size") == 2:
        sides = [{name[6:] for name in log if name.startswith("logps/")} for log in my_logs if "kl" in log]
        assert sides == [{"chosen"}, {"chosen", "rejected"}, {"chosen", "rejected"}, {"rejected"}]


def test_kto_of_a_mixture_of_experts(tmp_path):
    model, found = copy.deepcopy(prototype("mixtral")), []
    model.config.output_router_logits = True
    for trainer_class in (ours.KTOTrainer, trl.KTOTrainer):
        reference, config = copy.deepcopy(prototype("mixtral")), trl.KTOConfig(**settings(tmp_path))
        found.append(trained(trainer_class, config, model, unpaired(), ref_model=reference))
    assert_agree(found[0][1], found[1][1])
    assert_weights_agree(weights_of(found[0][0]), weights_of(found[1][0]))
    assert found[0][1][0]["aux_loss"] > 0


def test_kto_trains_an_adapter_on_the_head(tmp_path):
    config = trl.KTOConfig(**settings(tmp_path, max_steps=2))
    lora = {**LORA, "target_modules": ["lm_head"]}
    with pytest.raises(ValueError, match="lm_head"):
        trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    once, _ = trained(ours.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    config = trl.KTOConfig(**settings(tmp_path, max_steps=4))
    twice, _ = trained(ours.KTOTrainer, config, prototype("mistral"), unpaired(), lora)
    weights = dict(once.model.named_parameters())
    moved = {name: w for name, w in twice.model.named_parameters() if "lm_head" in name and "lora" in name}
    assert len(moved) == 2 and not any(torch.equal(w, weights[name]) for name, w in moved.items())


def mean_prediction(prediction):
    return {"mean": float(prediction.predictions.mean())}


@pytest.mark.filterwarnings("ignore:.*return_outputs.*:FutureWarning")
def test_kto_patched_and_verified(tmp_path, monkeypatch):
    config = trl.KTOConfig(**settings(tmp_path))
    options = {"lora": LORA, "compute_metrics": mean_prediction}
    _, expected = trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), **options)
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    ours.patch()
    try:
        assert ours.is_patched() and ours.is_patched("KTOTrainer", "DPOTrainer") and not ours.is_patched("CPOTrainer")
        config = trl.KTOConfig(**settings(tmp_path))
        with pytest.warns(UserWarning, match="not with 1.99.0; on the first batch it agreed"):
            trainer, found = trained(trl.KTOTrainer, config, prototype("mistral"), unpaired(), **options)
        assert hasattr(trainer, "_dpo_kernels_head")
    finally:
        ours.unpatch()
    assert not ours.is_patched() and not ours.is_patched("KTOTrainer")
    assert_agree(found, expected)
    assert "eval_mean" in found[-1]
    right = ours._kto.losses_of_responses
    monkeypatch.setattr(
        ours._kto, "losses_of_responses", lambda *args, **options: right(*args, **options | {"beta": 0.2})
    )
    with pytest.raises(RuntimeError, match="does not fit 1.99.0: on the first batch loss"):
        trained(ours.KTOTrainer, config, prototype("mistral"), unpaired(), LORA)


@EXPERIMENTAL
@pytest.mark.parametrize("algorithm", ["ORPO", "CPO"])
def test_reference_free_is_verified(tmp_path, monkeypatch, algorithm):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    config = getattr(module, f"{algorithm}Config")(**settings(tmp_path))
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    with pytest.warns(UserWarning, match="not with 1.99.0; on the first batch it agreed"):
        trained(getattr(ours, f"{algorithm}Trainer"), config, prototype("llama"), preferences())
    right = ours._reference_free._everywhere
    monkeypatch.setattr(ours._reference_free, "_everywhere", lambda *args: right(*args) | {"nll_loss": torch.ones(())})
    with pytest.raises(RuntimeError, match=r"does not fit 1.99.0: on the first batch nll_loss 1, TRL's [\d.]+\. Use"):
        trained(getattr(ours, f"{algorithm}Trainer"), config, prototype("llama"), preferences())
    monkeypatch.setattr(ours._reference_free, "_everywhere", right)
    found = fused_forward.shift_labels
    monkeypatch.setattr(fused_forward, "shift_labels", lambda *args: found(*args).roll(1, 1))
    with pytest.raises(RuntimeError, match="does not fit 1.99.0: on the first batch .*logps/chosen"):
        trained(getattr(ours, f"{algorithm}Trainer"), config, prototype("llama"), preferences())


@EXPERIMENTAL
@pytest.mark.parametrize(
    "name, algorithm",
    each_value(
        ["llama", "gemma2", "cohere", "phi", "mixtral", "roberta"],
        [
            ("ORPO", {}),
            ("CPO", {"loss_type": "sigmoid"}),
            ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
            ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.5}),
            ("CPO", {"loss_type": "ipo"}),
            ("CPO", {"loss_type": "hinge"}),
        ],
    ),
    ids=str,
)
def test_reference_free(tmp_path, name, algorithm):
    algorithm, options = algorithm
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    theirs = getattr(module, f"{algorithm}Trainer")
    config_class = getattr(module, f"{algorithm}Config")
    found = []
    for trainer_class in (getattr(ours, f"{algorithm}Trainer"), theirs):
        config = config_class(**settings(tmp_path, **options))
        model = copy.deepcopy(prototype(name))
        if name == "mixtral":
            model.config.output_router_logits = True
        found.append(trained(trainer_class, config, model, preferences()))
    assert issubclass(getattr(ours, f"{algorithm}Trainer"), theirs)
    (mine, my_logs), (of_trl, their_logs) = found
    assert_agree(my_logs, their_logs)
    assert_weights_agree(weights_of(mine), weights_of(of_trl))
    assert {"nll_loss", "logits/chosen", "logps/rejected"} <= my_logs[0].keys()


@EXPERIMENTAL
@pytest.mark.parametrize("algorithm", ["ORPO", "CPO"])
def test_reference_free_lora_and_patch(tmp_path, algorithm):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    trainer_class, config_class = (getattr(module, algorithm + kind) for kind in ("Trainer", "Config"))
    more = {"gradient_accumulation_steps": 2, "logging_steps": 2, "max_steps": 6}
    config = config_class(**settings(tmp_path, **more))
    options = {"lora": LORA, "compute_metrics": mean_prediction}
    _, expected = trained(trainer_class, config, prototype("llama"), preferences(), **options)
    ours.patch(f"{algorithm}Trainer")
    try:
        trainer, found = trained(trainer_class, config, prototype("llama"), preferences(), **options)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
        assert trainer.concatenated_forward(trainer.model, batch)[2].dim() == 0  # no logits
    finally:
        ours.unpatch()
    assert_agree(found, expected)
    assert "eval_mean" in found[-1]


def unlike(parent, loss, changed):
    """A trainer with another loss and another forward."""

    def concatenated_forward(self, model, batch):
        first, *rest = parent.concatenated_forward(self, model, batch)
        return 0.9 * first, *rest

    methods = {
        loss: lambda self, *logps: changed(*getattr(parent, loss)(self, *logps)),
        "concatenated_forward": concatenated_forward,
    }
    return type("Unlike", (parent,), methods)


@EXPERIMENTAL
@pytest.mark.parametrize("algorithm, loss", [("ORPO", "odds_ratio_loss"), ("CPO", "cpo_loss")])
def test_losses_of_subclasses_are_theirs(tmp_path, algorithm, loss):
    module = __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    found = []
    for library in (ours, module, module):
        config = getattr(module, f"{algorithm}Config")(**settings(tmp_path))
        parent = getattr(library, f"{algorithm}Trainer")
        if len(found) < 2:
            parent = unlike(parent, loss, lambda losses, chosen, *others: (2 * losses, chosen - 3, *others))
        found.append(trained(parent, config, prototype("llama"), preferences())[1])
    mine, theirs, plain = found
    assert_agree(mine, theirs)
    assert abs(mine[0]["rewards/chosen"] - plain[0]["rewards/chosen"]) > 2


# What the metrics of a step cost


class Waits(TorchFunctionMode):
    """Notes what waits for a device, or would if the tensors were on one: copies to the host and from it, and shapes
    that depend on values."""

    NAMES = (
        *("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__"),
        *("nonzero", "argwhere", "masked_select", "unique", "equal"),
    )

    def __init__(self):
        super().__init__()
        self.found, self.outside = [], True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if self.outside and (name := self.wait(func.__name__, *args)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))

    def wait(self, name, first=None, *others):
        if name in ("tensor", "as_tensor") and not isinstance(first, torch.Tensor):
            of_tensors = isinstance(first, list) and any(isinstance(each, torch.Tensor) for each in first)
            return "tensor of tensors" if of_tensors else name
        if name in ("__getitem__", "__setitem__"):
            indices = others[0] if isinstance(others[0], tuple) else others[:1]
            masks = [each for each in indices if isinstance(each, torch.Tensor) and each.dtype == torch.bool]
            return f"{name} by a mask" if masks else None
        return name if name in self.NAMES else None


@EXPERIMENTAL
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    "algorithm, collectives, options",
    [
        ("DPO", 1, {}),
        ("KTO", 1, {}),
        ("KTO", 1, {"loss_type": "apo_zero_unpaired"}),
        ("CPO", 2, {}),
        ("CPO", 2, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("ORPO", 2, {}),
    ],
    ids=str,
)
def test_metrics_wait_once_a_log(tmp_path, monkeypatch, algorithm, collectives, options, lora):
    waits, gathered, gather, head = Waits(), [], Accelerator.gather, fused_forward._Fused.__call__

    def counted(self, tensors):
        gathered.extend(tensors if isinstance(tensors, tuple) else [tensors])
        return gather(self, tensors)

    def forward(self, *args, **inputs):  # which looks for the rows that have labels
        waits.outside = False
        try:
            return head(self, *args, **inputs)
        finally:
            waits.outside = True

    monkeypatch.setattr(Accelerator, "gather", counted)
    monkeypatch.setattr(fused_forward._Fused, "__call__", forward)
    is_paired = algorithm in ("DPO", "KTO")
    module = trl if is_paired else __import__(f"trl.experimental.{algorithm.lower()}", fromlist=["x"])
    data = unpaired() if algorithm == "KTO" else preferences()
    reference = {"ref_model": copy.deepcopy(prototype("llama"))} if is_paired and lora is None else {}
    trainer = getattr(ours, f"{algorithm}Trainer")(
        model=copy.deepcopy(prototype("llama")),
        args=getattr(module, f"{algorithm}Config")(**settings(tmp_path, **options)),
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=None if lora is None else LoraConfig(**lora),
        **reference,
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(PAIRS)])
    for train in (True, True, False):
        trainer.model.train(train)
        with waits:
            if train:
                trainer.compute_loss(trainer.model, dict(batch)).backward()
            else:
                trainer.prediction_step(trainer.model, dict(batch), prediction_loss_only=True)
        assert waits.found == [] and len(gathered) == collectives
        gathered.clear()
    for mode in ("train", "eval"):
        trainer.model.train(mode == "train")
        with waits:
            trainer.log({"loss": 0.0} if mode == "train" else {})
        by_trl = set() if is_paired else {"tensor", "item"}  # means of what is on the host
        assert waits.found[0] == "tolist" and set(waits.found[1:]) == by_trl and gathered == []
        waits.found.clear()
        logged = trainer.state.log_history[-1]
        assert len(logged) > 10 and {type(value) for value in logged.values()} <= {float, int}


def test_name_that_is_none():
    with pytest.raises(AttributeError, match="has no attribute 'GRPOTrainer'"):
        _ = ours.GRPOTrainer
