"""Short runs of TRL's trainers on tiny models, and how the logs and weights of two of them are compared."""

from __future__ import annotations

import copy
import os
import random
from functools import cache

import torch
import trl
from accelerate.state import AcceleratorState
from datasets import Dataset
from heads import build
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROWS, STEPS, PAIRS, VOCAB = 20, 3, 4, 128
TOLERANCE = 1e-4
# Of the logs, what a clock says.
CLOCKS = ("runtime", "per_second", "total_flos", "epoch")
# TRL scores all of these with its own head as they are.
ARCHITECTURES = (
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "phi",
    "cohere",
    "granite",
    "hyperclovax",
    "mixtral",
    "gpt2",
    "falcon_h1",
    "opt",
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
# Every loss that both have, with the options that it asks for.
LOSS_OPTIONS = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.05},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.1},
    "sft": {},
    "sigmoid_norm": {},
}
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


@cache
def preferences() -> Dataset:
    """Pairs of word sequences of different lengths, from one word on."""
    words = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "an", "el", "in")]
    generator = random.Random(0)
    text = lambda most: " ".join(generator.choices(words, k=generator.randint(1, most)))  # noqa: E731
    rows = [{"prompt": text(6), "chosen": " " + text(12), "rejected": " " + text(12)} for _ in range(ROWS)]
    return Dataset.from_list(rows)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for row in preferences() for text in row.values() for word in text.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def trl_names(loss_type, f_divergence="reverse_kl", f_alpha=0.5, **shared):
    return {
        "loss_type": [loss_type] if isinstance(loss_type, str) else loss_type,
        "f_divergence_type": {"js": "js_divergence", "alpha": "alpha_divergence"}.get(f_divergence, f_divergence),
        "f_alpha_divergence_coef": f_alpha,
        **shared,
    }


def unpaired():
    """Of the first pairs of rows one is chosen alone, and one is rejected alone."""
    rows = []
    for number, row in enumerate(preferences()):
        side = "rejected" if number % 8 in (3, 4, 6, 7) else "chosen"
        rows.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"})
    return Dataset.from_list(rows)


@cache
def prototype(name):
    """Without dropout, even where it is a function's and TRL does not find it."""
    more = {"dropout": 0.0} if name == "opt" else {}
    return build(name, vocab_size=VOCAB, initializer_range=0.3, **more)


def settings(directory, **more):
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # which arguments set, and never take back
    return {
        "output_dir": str(directory),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "learning_rate": 2e-3,
        "adam_epsilon": 1e-5,
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS,
        "per_device_eval_batch_size": PAIRS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "max_length": 48,
        **more,
    }


def dpo(trainer_class, directory, model, *, lora=None, reference=None, evaluate=False, trainer_options=None, **more):
    """A trainer that has trained, and its logs."""
    model = copy.deepcopy(model)
    if lora is None and reference is None and not more.get("precompute_ref_log_probs"):
        reference = copy.deepcopy(model)
        with torch.no_grad():  # away from the policy: rewards are not 0 in the first step
            for number, weight in enumerate(reference.parameters()):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)), alpha=0.02)
    trainer = trainer_class(
        model,
        reference,
        args=trl.DPOConfig(**settings(directory, **more)),
        train_dataset=preferences(),
        eval_dataset=preferences().select(range(6)) if evaluate else None,  # its last batch is smaller
        processing_class=tokenizer(),
        peft_config=None if lora is None else lora_config(model, lora),
        **(trainer_options or {}),
    )
    trainer.train()
    if evaluate:
        trainer.evaluate()
    return trainer, logs_of(trainer)


def lora_config(model, options):
    if model.config.model_type == "falcon_h1" and options["target_modules"] == "all-linear":
        options = {**options, "target_modules": ["q_proj", "v_proj"]}  # PEFT refuses some of its others
    return LoraConfig(**options)


def logs_of(trainer):
    return [
        {name: value for name, value in log.items() if not any(clock in name for clock in CLOCKS)}
        for log in trainer.state.log_history
    ]


def assert_agree(mine, theirs, tolerance=TOLERANCE):
    assert len(mine) == len(theirs) >= STEPS
    for number, (own, other) in enumerate(zip(mine, theirs, strict=True), 1):
        assert own.keys() == other.keys()
        for name, value in other.items():
            if name.endswith("accuracies") and 0 < abs(other[name.replace("accuracies", "margins")]) < 1e-4:
                continue  # policy and reference are nearly the same: rounding decides
            limit = tolerance * max(1.0, abs(value))
            assert abs(own[name] - value) <= limit, f"log {number}: {name} is {own[name]:.9g}, TRL has {value:.9g}"


def weights_of(trainer):
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def assert_weights_agree(mine, theirs):
    """`weights_of` two trainers after the steps: no gradient went another way."""
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (mine[name] - value).abs().max() <= 1e-3 * value.abs().max(), name


def trained(trainer_class, config, model, data, lora=None, **more):
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=config,
        train_dataset=data,
        eval_dataset=data.select(range(5)),  # its last batch is smaller
        processing_class=tokenizer(),
        peft_config=None if lora is None else LoraConfig(**lora),
        **more,
    )
    trainer.train()
    trainer.evaluate()
    return trainer, logs_of(trainer)


def trainer_of(library, directory, model, *, data=None, reference=None, lora=None, kind="DPO", more=None, **options):
    """A trainer of a copy of the model, whose reference is another one, if it has no adapter."""
    model = copy.deepcopy(model)
    return getattr(library, f"{kind}Trainer")(
        model,
        None if lora else copy.deepcopy(model if reference is None else reference),
        args=getattr(trl, f"{kind}Config")(**settings(directory, **options)),
        train_dataset=(unpaired() if kind == "KTO" else preferences()) if data is None else data,
        processing_class=tokenizer(),
        peft_config=lora and lora_config(model, lora),
        **(more or {}),
    )


def batch_of(trainer, rows=range(PAIRS)):
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])
