"""The tokenizer of a run, and its chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kernels.training.config import TrainConfig, is_name
from dpo_kernels.training.values import in_one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: TrainConfig, dataset: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer that `config` names, with the chat template that it names, if any."""
    tokenizer = _load_tokenizer(config, dataset)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
        _check_syntax(tokenizer, config.chat_template)
    return tokenizer


def read_chat_template(setting: str) -> str:
    """The text of a chat template: the setting itself, or the file that it names, which may also be the
    `chat_template.json` or `tokenizer_config.json` that has it.

    Raises `ValueError` that names the file, if it is not there, no UTF-8 text, or without a template.
    """
    if not is_name(setting) and setting.strip():
        return setting
    file = Path(setting).expanduser()
    if not file.is_file():
        raise ValueError(
            f"chat_template: expected a file with a template or the text of one, got {setting!r}, and there is no such "
            f"file in {Path.cwd()}"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"chat_template: {file} is not UTF-8 text: {error}") from None
    if text.lstrip().startswith('{"') or file.suffix == ".json":
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"chat_template: {file} is no valid JSON: {error}") from None
        if not isinstance(found, dict) or not isinstance(found.get("chat_template"), str):
            raise ValueError(f"chat_template: {file} has no text named chat_template")
        text = found["chat_template"]
    if not text.strip():
        raise ValueError(f"chat_template: {file} is empty")
    return text


def _check_syntax(tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """An error now, with its line, rather than one in every row."""
    from jinja2.exceptions import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except TemplateSyntaxError as error:
        where = setting if is_name(setting) else "its text"
        raise ValueError(f"chat_template: {where}, line {error.lineno}: {error.message}") from None
    except Exception:  # of any class: what a template says of this conversation it may not say of others
        return


def _load_tokenizer(config: TrainConfig, dataset: Dataset) -> PreTrainedTokenizerBase:
    """`train:SIZE` makes one from the dataset's texts."""
    from transformers import AutoTokenizer

    from dpo_kernels.data.demo import demo_tokenizer

    name = config.tokenizer or ("train:512" if config.model == "demo" else config.model)
    if name.startswith("config:"):
        raise ValueError(f"tokenizer: model {config.model!r} has none of its own: name one, or train:SIZE")
    if name.startswith("train:"):
        if not name.removeprefix("train:").isdigit():
            raise ValueError(f"tokenizer: expected train:SIZE with a number of entries, got {name!r}")
        columns = [column for column in ("prompt", "chosen", "rejected") if column in dataset.column_names]
        texts = (text for row in dataset.select_columns(columns) for value in row.values() for text in _texts(value))
        return demo_tokenizer(texts, int(name.removeprefix("train:")))
    try:
        return AutoTokenizer.from_pretrained(name, **hub_options(config, name))
    except OSError as error:
        key = "tokenizer" if config.tokenizer else "model"
        raise ValueError(f"{key}: {name!r} cannot be had: {in_one_line(error)}") from error


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(message.get("content") or "") for message in value or []]


def hub_options(config: TrainConfig, name: str) -> dict[str, Any]:
    revision = config.revision if name == config.model else None
    return {"revision": revision, "trust_remote_code": config.trust_remote_code}
