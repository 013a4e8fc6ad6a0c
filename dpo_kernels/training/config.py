"""The settings of a training run: one dataclass, read from YAML, from command-line flags or from Python."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from dpo_kernels.training.values import FALSE_WORDS, TRUE_WORDS, coerce, nearest

REFERENCE_FREE = ("simpo", "orpo", "cpo")
# Flags that take several values: up to the next flag, or to a file of settings.
SEVERAL = ("dataset", "dataset_weights", "dataset_split", "dataset_config", "eval_dataset")
SETTINGS_FILES = (".yaml", ".yml")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    above: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    trajectory: bool = True,
) -> Any:
    """One setting. `trajectory=False` marks those that may change between a checkpoint and the run that resumes it,
    because weights and rows of metrics stay what they would have been."""
    metadata = {
        "help": help,
        "choices": tuple(choices),
        "above": above,
        "minimum": minimum,
        "maximum": maximum,
        "trajectory": trajectory,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Everything that `train` needs to know; every field is a key in YAML and a flag on the command line.

    Values are converted to the field's type on construction (`"5e-7"`, which YAML reads as a string, is a number here;
    `"sigmoid,sft"` is a list) and checked; what does not fit raises a `ValueError` that names the key, what was
    expected and what came.
    """

    # Model
    model: str = option(
        "demo", "hub name or path of the policy, config:FILE.json for random weights, or demo", trajectory=False
    )
    revision: str | None = option(None, "hub revision of the model: branch, tag or commit")
    tokenizer: str | None = option(
        None, "hub name or path, or train:SIZE for a byte-level BPE made from the dataset; default: the model's own"
    )
    trust_remote_code: bool = option(False, "run model code that comes with a hub repository")
    dtype: str = option("float32", "dtype of the weights", choices=("float32", "bfloat16", "float16"))
    attn_implementation: str | None = option(None, "attention implementation given to transformers, such as sdpa")
    disable_dropout: bool = option(True, "train without the model's own dropout; lora_dropout is the adapters'")

    # Data
    dataset: str | list[str] = option(
        "demo",
        "preference pairs: local jsonl, json, csv, tsv or parquet, a folder, a hub name, or demo; or several of these",
        trajectory=False,
    )
    dataset_weights: list[float] | None = option(
        None,
        "how often the pairs of each dataset are taken: 2 twice, 0.5 a random half of them; default: once",
        minimum=0,
    )
    dataset_config: str | list[str] | None = option(None, "configuration name of a hub dataset, or one a dataset")
    dataset_split: str | list[str] = option("train", "split to train on, or one a dataset")
    eval_dataset: str | list[str] | None = option(
        None, "held-out pairs, like dataset; default: eval_fraction of the dataset", trajectory=False
    )
    eval_split: str | None = option(None, "split of eval_dataset; default: train")
    eval_fraction: float = option(
        0.1, "share of the prompts held out when there is no eval_dataset; 0: no evaluation", minimum=0, maximum=0.9
    )
    max_length: int | None = option(1024, "most tokens in prompt and response together", minimum=2)
    truncation: str = option(
        "prompt_start",
        "what becomes of longer pairs: cut the oldest prompt tokens, cut the ends of the responses, or",
        choices=("prompt_start", "response_end", "drop", "error"),
    )
    add_eos: bool = option(True, "end each response with the end-of-sequence token")
    train_on: str = option("all", "which assistant turns of a response are labelled", choices=("all", "last"))
    chat_template: str | None = option(
        None, "file with a chat template (Jinja), or its text, instead of the tokenizer's own", trajectory=False
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        None, """what the chat template is given beside the conversation, such as {"enable_thinking": false}"""
    )
    ranked_pairs: str = option(
        "best_vs_worst",
        "how ranked answers become pairs; with several of a ranking each answer is computed once",
        choices=("best_vs_worst", "best_vs_each", "all_pairs"),
    )
    empty_response: str = option("error", "what becomes of rows with an empty response", choices=("error", "drop"))
    max_rows: int | None = option(None, "take only the first pairs of each dataset; a ranking is kept whole", minimum=1)
    num_proc: int | None = option(None, "processes that tokenize; default: one", minimum=1, trajectory=False)

    # Loss
    loss_type: list[str] = option(["sigmoid"], "loss, or several separated by commas; simpo, orpo, cpo stand alone")
    loss_weights: list[float] | None = option(None, "one weight a loss; default: all 1")
    beta: float = option(0.1, "strength of the pull towards the reference; usually 0.01 to 0.5", above=0)
    label_smoothing: float = option(0.0, "assumed share of flipped labels: cdpo, robust and others", minimum=0)
    f_divergence: str = option(
        "reverse_kl", "divergence from the reference", choices=("reverse_kl", "forward_kl", "js", "alpha")
    )
    f_alpha: float = option(0.5, "alpha of the alpha divergence", above=0)
    discopop_tau: float = option(0.05, "temperature of the discopop loss", above=0)
    rpo_alpha: float | None = option(
        None, "RPO: weight of the chosen response's negative log-likelihood a token, beside the loss"
    )
    ld_alpha: float | None = option(None, "length-desensitized DPO: weight of the tokens past the shorter response")
    use_weighting: bool = option(False, "weighted preference optimization (WPO)")
    simpo_gamma: float = option(0.5, "target margin of SimPO")
    cpo_alpha: float = option(1.0, "weight of the likelihood term of CPO", minimum=0)
    temperature: float = option(1.0, "divides the logits of policy and reference", above=0)

    # Reference
    reference: str = option(
        "auto",
        "copy: frozen copy of the policy; base: the model without its adapter; precompute: log-probabilities computed "
        "once and cached; or a hub name or path; auto: base with LoRA, else copy",
    )
    allow_different_reference: bool = option(False, "accept a reference that is not the policy's starting checkpoint")
    cache_dir: str = option("~/.cache/dpo_kernels", "where precomputed log-probabilities are kept", trajectory=False)

    # LoRA
    lora_r: int = option(0, "rank of the LoRA adapters; 0: train all weights", minimum=0)
    lora_alpha: int = option(16, "LoRA scale: updates are multiplied by lora_alpha / lora_r", minimum=1)
    lora_dropout: float = option(0.0, "dropout inside the adapters", minimum=0, maximum=0.99)
    lora_target_modules: list[str] = option(["all-linear"], "names of the layers that get adapters, or all-linear")

    # Optimisation
    learning_rate: float = option(1e-6, "peak learning rate of AdamW; DPO usually takes 1e-7 to 5e-6", above=0)
    schedule: str = option("linear", "decay after the warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = option(0.1, "share of the steps that warm up", minimum=0, maximum=1)
    warmup_steps: int | None = option(None, "steps that warm up, instead of warmup_ratio", minimum=0)
    weight_decay: float = option(0.0, "decoupled weight decay of matrices (none on biases and norms)", minimum=0)
    adam_beta1: float = option(0.9, "AdamW's first moment decay", minimum=0, maximum=0.9999999)
    adam_beta2: float = option(0.999, "AdamW's second moment decay", minimum=0, maximum=0.9999999)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", above=0)
    max_grad_norm: float = option(1.0, "clip the accumulated gradient to this norm; 0: no clipping", minimum=0)
    epochs: float = option(1.0, "passes over the data; 1 to 3 are usual", above=0)
    max_steps: int | None = option(None, "optimizer steps, instead of epochs", minimum=1)
    per_device_batch_size: int = option(4, "pairs, or rankings, in one forward pass on each device", minimum=1)
    max_tokens_per_batch: int | None = option(
        None,
        "as many pairs in one forward pass on each device as fit into so many tokens, padding included, instead of "
        "per_device_batch_size; a longer one is alone",
        minimum=2,
    )
    per_device_eval_batch_size: int | None = option(
        None, "pairs, or rankings, in one forward pass of an evaluation; default: as in training", minimum=1
    )
    gradient_accumulation_steps: int = option(1, "forward passes on each device in one optimizer step", minimum=1)
    batching: str = option(
        "auto",
        "how pairs go through the model: concatenated, chosen and rejected padded to one length; padding_free, all in "
        "one row; shared_prefix, each prompt once and a pair a row; packed_shared_prefix, both; auto: the last where "
        "the model allows it, else the first",
        choices=("auto", "concatenated", "padding_free", "shared_prefix", "packed_shared_prefix"),
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    mixed_precision: str = option("no", "autocast dtype", choices=("no", "bf16", "fp16"))
    sharding: str = option(
        "none",
        "what the processes of a run hold: all weights each, or their shards of weights, gradients and AdamW's moments "
        "(fsdp2, or zero3 by DeepSpeed), or all weights and shards of the rest (zero2)",
        choices=("none", "fsdp2", "zero2", "zero3"),
    )
    ddp_timeout: int = option(
        1800, "seconds that a process waits for others before the run ends with an error", minimum=1, trajectory=False
    )
    impl: str = option("auto", "implementation of the head", choices=("auto", "torch", "cpu", "triton", "cuda"))
    tune: bool = option(
        True, "try the kernels first, once, on a device that nothing has proven them on", trajectory=False
    )
    chunk_bytes: int | None = option(None, "memory for one chunk of logits in the fused loss, in bytes", minimum=1)
    seed: int = option(42, "seed of initial weights, held-out split, data order and dropout", minimum=0)
    deterministic: bool = option(
        True, "ask PyTorch for deterministic algorithms, for the same bits after a resume on a GPU; off may be faster"
    )

    # Output
    output_dir: str = option("dpo-output", "directory of everything that the run writes", trajectory=False)
    resume: str = option(
        "auto",
        "auto: from the newest checkpoint in output_dir, if there is one; never: afresh; or the path of a checkpoint",
        trajectory=False,
    )
    overwrite: bool = option(False, "replace the finished run that output_dir holds", trajectory=False)
    logging_steps: int = option(10, "optimizer steps between two rows of metrics", minimum=1, trajectory=False)
    eval_steps: int | None = option(None, "optimizer steps between evaluations; default: one an epoch", minimum=1)
    save_steps: int = option(500, "optimizer steps between checkpoints; 0: none", minimum=0, trajectory=False)
    save_total_limit: int | None = option(
        2, "newest checkpoints to keep, two at least: one may be damaged; none: all", minimum=2, trajectory=False
    )
    async_checkpoints: bool = option(
        False, "go on with training while a checkpoint in shards is written, of copies on the CPU", trajectory=False
    )
    metric_for_best: str = option(
        "loss",
        "held-out metric that picks the best weights",
        choices=("loss", "rewards/accuracies", "rewards/margins"),
    )
    load_best_model_at_end: bool = option(False, "final/ gets the best weights, not the last", trajectory=False)
    trackers: list[str] = option([], "accelerate trackers, such as tensorboard or wandb", trajectory=False)
    run_name: str = option("dpo", "name of the run for the trackers", trajectory=False)
    progress_bar: bool = option(True, "show a progress bar", trajectory=False)

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            value = coerce(name, getattr(self, name), kind, _options()[name])
            setattr(self, name, value)
        _check_losses(self)
        _check_unused(self)
        _check_datasets(self)
        if self.load_best_model_at_end and not self.evaluates:
            raise ValueError("load_best_model_at_end needs held-out pairs: give eval_dataset or an eval_fraction > 0")
        if self.reference in ("base", "adapter-free") and not self.lora_r:
            raise ValueError(f"reference {self.reference!r} needs a LoRA policy, got lora_r 0: use copy or precompute")
        if self.mixed_precision == "fp16" and self.dtype != "float32":
            raise ValueError(
                f"mixed_precision 'fp16' scales the gradients of float32 weights, got dtype {self.dtype!r}"
            )
        if self.mixed_precision == "fp16" and self.sharding != "none":
            raise ValueError(f"mixed_precision: expected bf16 or no beside sharding {self.sharding!r}, got 'fp16'")
        if self.by_deepspeed and self.dtype != "float32" and not self.lora_r:
            raise ValueError(
                f"dtype: expected float32 beside sharding {self.sharding!r} without LoRA, got {self.dtype!r}"
            )

    @property
    def timeout(self) -> timedelta:
        """What no default of accelerate's is equal to: it leaves those out, and gloo's is another than NCCL's."""
        return timedelta(seconds=self.ddp_timeout, microseconds=1)

    @property
    def evaluates(self) -> bool:
        return self.eval_dataset is not None or self.eval_fraction > 0

    @property
    def reference_free(self) -> bool:
        return self.loss_type[0] in REFERENCE_FREE

    @property
    def listwise(self) -> bool:
        """Whether a ranking has one loss, and not one a pair."""
        from dpo_kernels.losses import LISTWISE_LOSSES

        return not LISTWISE_LOSSES.isdisjoint(self.loss_type)

    @property
    def by_deepspeed(self) -> bool:
        return self.sharding in ("zero2", "zero3")

    @property
    def random_weights(self) -> bool:
        return self.model == "demo" or self.model.startswith("config:")


# What `dpo-kernels train` does without a configuration: a tiny random model learns the embedded preferences.
DEMO: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "learning_rate": 2e-3,
    "epochs": 2,
    "per_device_batch_size": 8,
    "eval_steps": 34,
    "output_dir": "dpo-demo",
}


def load_config(
    path: str | Path | None,
    overrides: Mapping[str, Any] | None = None,
    required: Sequence[str] = ("model", "dataset"),
) -> TrainConfig:
    """Reads a configuration and puts `overrides` (the flags, as strings or values) on top.

    Without a path, and unless the overrides name a model or a dataset, it is the embedded demo. Files that `model` and
    `chat_template` name are looked for beside the configuration too.
    Raises `ValueError`, which names the file, for unreadable YAML, for unknown keys (with the nearest known one) and
    for values that do not fit; `FileNotFoundError` when there is no such file.
    """
    overrides = dict(overrides or {})
    if path is not None:
        values = read_yaml(Path(path))
        folder = Path(path).parent
        if _lies_in(folder, file := str(values.get("model")).partition("config:")[2]):
            values["model"] = f"config:{folder / file}"
        if _lies_in(folder, file := str(values.get("chat_template") or "")):
            values["chat_template"] = str(folder / file)
    else:
        values = {} if "model" in overrides or "dataset" in overrides else dict(DEMO)
    if "max_tokens_per_batch" in overrides:  # a flag comes before the file, or the demo
        values.pop("per_device_batch_size", None)
    from_file = {key for key in values if key not in overrides}
    values.update(overrides)
    for key in required:
        if key not in values:
            raise ValueError(f"{key} is missing: put it into {path or 'a YAML file'} or give --{key}")
    try:
        return TrainConfig(**values)
    except ValueError as error:
        if path is not None and re.split(r"\W", str(error), maxsplit=1)[0] in from_file:
            raise ValueError(f"{path}: {error}") from None
        raise


def _lies_in(folder: Path, file: str) -> bool:
    return is_name(file) and (folder / file).is_file()


def is_name(text: str) -> bool:
    """Whether this may be the name of a file, and not the text of a template."""
    return 0 < len(text) < 1000 and not set(text) & set("\n{}")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a configuration needs PyYAML: pip install 'dpo_kernels[train]'") from error

    class Loader(yaml.SafeLoader):
        """Of two lines with one key YAML takes the last, without a word."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := {key for key in keys if isinstance(key, str) and keys.count(key) > 1}:
                raise yaml.YAMLError(f"{', '.join(sorted(twice))}: there twice")
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader)  # as safe as safe_load
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold 'key: value' lines, got a {type(values).__name__}")
    for key in values:
        if key not in _kinds():
            raise ValueError(f"unknown key {key!r} in {path}{nearest(str(key), _kinds())}")
    return values


def _check_losses(config: TrainConfig) -> None:
    """The names here, so that those of the losses without a reference are known too; the rest as `dpo_loss` does."""
    from dpo_kernels.losses import LISTWISE_LOSSES, LOSSES, validate_dpo_options

    known = (*LOSSES, *REFERENCE_FREE)
    if not config.loss_type:
        raise ValueError("loss_type: expected at least one loss, got an empty list")
    for name in config.loss_type:
        if name not in known:
            raise ValueError(f"loss_type: unknown loss {name!r}{nearest(name, known)}")
    alone = {*REFERENCE_FREE, *LISTWISE_LOSSES}.intersection(config.loss_type)
    if len(config.loss_type) > 1 and alone:
        raise ValueError(f"loss_type: {min(alone)} stands alone, got {','.join(config.loss_type)}")
    if not config.reference_free:
        validate_dpo_options(**dpo_options(config))
        for name, default in {"rpo_alpha": None, "use_weighting": False}.items():
            if config.listwise and getattr(config, name) != default:
                raise ValueError(f"{name}: loss_type {config.loss_type[0]!r} has none, got {getattr(config, name)!r}")
        return
    unused: dict[str, Any] = {
        "loss_weights": None,
        "ld_alpha": None,
        "rpo_alpha": None,
        "use_weighting": False,
        "f_divergence": "reverse_kl",
        "reference": "auto",
    }
    if config.loss_type == ["orpo"]:
        unused["label_smoothing"] = 0.0
    for name, value in unused.items():
        if getattr(config, name) != value:
            raise ValueError(f"{name}: loss_type {config.loss_type[0]!r} has none, got {getattr(config, name)!r}")


def _check_unused(config: TrainConfig) -> None:
    """A setting without effect is a misunderstanding: it is refused, with the setting that it belongs to."""
    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainConfig)}
    belongs = {
        "eval_split": (config.eval_dataset is not None, "eval_dataset"),
        "lora_alpha": (config.lora_r > 0, "lora_r above 0"),
        "lora_dropout": (config.lora_r > 0, "lora_r above 0"),
        "f_alpha": (config.f_divergence == "alpha", "f_divergence alpha"),
        "discopop_tau": ("discopop" in config.loss_type, "loss_type discopop"),
        "simpo_gamma": (config.loss_type == ["simpo"], "loss_type simpo"),
        "cpo_alpha": (config.loss_type == ["cpo"], "loss_type cpo"),
        "async_checkpoints": (
            config.sharding == "fsdp2",
            "sharding fsdp2 (said here even if accelerate is set up for it)",
        ),
    }
    for name, (used, what) in belongs.items():
        if not used and getattr(config, name) != defaults[name]:
            raise ValueError(f"{name}: has an effect only with {what}, got {getattr(config, name)!r} without it")
    size, budget = config.per_device_batch_size, config.max_tokens_per_batch
    if budget is not None and size != defaults["per_device_batch_size"]:
        raise ValueError(f"per_device_batch_size: has no effect beside max_tokens_per_batch {budget}, got {size}")


def _check_datasets(config: TrainConfig) -> None:
    count = 1 if isinstance(config.dataset, str) else len(config.dataset)
    for name in ("dataset_weights", "dataset_split", "dataset_config"):
        values = getattr(config, name)
        if isinstance(values, list) and len(values) != count:
            raise ValueError(f"{name}: expected one for each of {count} datasets, got {len(values)}: {values!r}")
    if config.dataset_weights is not None and not any(config.dataset_weights):
        raise ValueError(f"dataset_weights: expected one above 0, got {config.dataset_weights}")


def dpo_options(config: TrainConfig) -> dict[str, Any]:
    """The settings that are options of `linear_dpo_loss` and say which loss it is."""
    names = ("beta", "loss_type", "loss_weights", "label_smoothing", "f_divergence", "f_alpha", "discopop_tau")
    return {name: getattr(config, name) for name in (*names, "rpo_alpha", "ld_alpha", "use_weighting")}


def _options() -> dict[str, Mapping[str, Any]]:
    return {entry.name: entry.metadata for entry in dataclasses.fields(TrainConfig)}


def _kinds() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def trajectory_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a checkpoint and the run that resumes it must share."""
    return {name: getattr(config, name) for name, metadata in _options().items() if metadata["trajectory"]}


def practice_warnings(config: TrainConfig) -> list[str]:
    """What practice says about settings that work but usually hurt."""
    messages = []
    fresh = " (this model starts from random weights, where such values are usual)" if config.random_weights else ""
    if config.learning_rate > 1e-5:
        usual = "adapters stand about ten times that" if config.lora_r else "higher rates soon break the model"
        messages.append(
            f"learning_rate {config.learning_rate:g} is above 1e-5: DPO usually takes 1e-7 to 5e-6; {usual}{fresh}"
        )
    if config.dtype != "float32" and not config.lora_r:
        messages.append(
            f"dtype {config.dtype!r} without LoRA: most updates at these learning rates are lost when they are rounded "
            "into the weights; take dtype float32 with mixed_precision bf16"
        )
    if config.max_steps is None and config.epochs > 3:
        messages.append(f"epochs {config.epochs:g} is more than 3: DPO overfits faster than supervised training{fresh}")
    if not 0.01 <= config.beta <= 0.5 and not config.reference_free:
        effect = "hardly holds the policy to the reference" if config.beta < 0.01 else "hardly lets the policy move"
        messages.append(f"beta {config.beta:g} is outside 0.01 to 0.5: it {effect}")
    if config.loss_type == ["simpo"] and config.beta < 1:
        messages.append(f"beta {config.beta:g} is below 1: SimPO, which averages over tokens, usually takes 2 to 10")
    return messages


def require_packages(config: TrainConfig, data_alone: bool = False) -> None:
    """Raises `ImportError` that says what a run with these settings needs and is not installed, or its data alone."""
    needed = ["numpy", "transformers", "datasets", "regex"]
    if not data_alone:
        needed += ["accelerate", "safetensors", "matplotlib", "yaml"]
    missing = [
        name
        for name in needed + ["peft"] * bool(config.lora_r and not data_alone)
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise ImportError(f"training needs {', '.join(missing)}: pip install 'dpo_kernels[train]'")
    if config.by_deepspeed and not data_alone and importlib.util.find_spec("deepspeed") is None:
        raise ImportError(f"sharding: {config.sharding!r} needs DeepSpeed, which is missing: pip install deepspeed")
    if config.trackers and not data_alone:
        from accelerate.tracking import get_available_trackers

        available = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
        for tracker in set(config.trackers) - available - {"all"}:
            raise ImportError(f"trackers: {tracker!r} is not installed; found: {sorted(available) or 'none'}")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, in kebab case; the values stay strings, which `TrainConfig` converts."""
    defaults = TrainConfig()
    for name, kind in _kinds().items():
        default, choices = getattr(defaults, name), _options()[name]["choices"]
        shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
        about = _options()[name]["help"] + (f": {', '.join(choices)}" if choices else "")
        about += f" (default: {shown.lower() if kind is bool else shown})" if default not in (None, []) else ""
        arguments: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": about.replace("%", "%%")}
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, metavar="true|false", **arguments)
            arguments["help"] = argparse.SUPPRESS
            parser.add_argument(f"--no-{flag[2:]}", action="store_const", const="false", **arguments)
        else:
            parser.add_argument(flag, metavar=_metavar(kind), **arguments)


def normalize_flags(arguments: Sequence[str], besides: Sequence[str] = ()) -> list[str]:
    """Flags in kebab case, and booleans in one piece: a value may follow them, but the next argument may be another's.

    What follows a flag of `SEVERAL`, up to the next flag or file of settings, are its values, one a line.
    Raises `ValueError` with the nearest name for a flag that is neither a field nor in `besides`.
    """
    kinds, normalized, rest = _kinds(), [], list(arguments)
    several: set[str] = set()
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name in besides:
            normalized.append(argument)
            continue
        negated = name.startswith("no_") and kinds.get(name[3:]) is bool
        if name not in kinds and not negated:
            known = [f"--{known.replace('_', '-')}" for known in (*kinds, *besides)]
            raise ValueError(f"unknown flag {argument!r}{nearest('--' + name.replace('_', '-'), known)}")
        if kinds.get(name) is bool and not equals:
            equals, value = "=", rest.pop(0) if rest and rest[0].lower() in TRUE_WORDS + FALSE_WORDS else "true"
        if name in SEVERAL:
            if name in several:
                raise ValueError(f"{argument!r} is there twice: expected all its values after one flag")
            several.add(name)
            values = [value] if equals else []
            while rest and not rest[0].startswith("-") and not (values and rest[0].endswith(SETTINGS_FILES)):
                values.append(rest.pop(0))
            if values:
                equals, value = "=", "\n".join(values)
        normalized.append(f"--{name.replace('_', '-')}{equals}{value}")
    return normalized


def _metavar(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        kinds = typing.get_args(kind)
        if list[str] in kinds:
            return "STR ..."
        kind = kinds[0]
    if typing.get_origin(kind) is dict:
        return "JSON"
    if typing.get_origin(kind) is list:
        return f"{typing.get_args(kind)[0].__name__.upper()},..."
    return str(kind.__name__.upper())
