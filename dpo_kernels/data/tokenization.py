"""Normalized preference pairs to pairs of token ids, with every dropped or altered pair accounted for."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from dpo_kernels.data import layouts
from dpo_kernels.data.loading import digest_of, file_digest, from_json_text, is_normalized, normalize_preferences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION = ("prompt_start", "response_end", "drop", "error")

_EXAMPLES = 5  # rows that a report names for each reason
_Ids = tuple[list[int], list[int], list[int]]

# Why pairs are dropped
IDENTICAL = "chosen and rejected are identical"
IDENTICAL_AFTER_CUT = "chosen and rejected are identical after cutting to max_length"
EMPTY = "empty response"
NO_PROMPT = "no prompt: nothing predicts the first token of a response"
OTHER_PROMPTS = "chosen and rejected continue different prompts: they part before an assistant turn"
TOO_LONG = "longer than max_length"
PROMPT_TOO_LONG = "the prompt leaves no room for a response in max_length"
NO_BOUNDARY = "the tokenizer has no exact boundary between prompt and response"
REFUSED = "the chat template refuses the conversation: "  # and what it says
# How pairs are altered
PROMPT_CUT = "start of the prompt cut to fit max_length"
RESPONSE_CUT = "end of a response cut to fit max_length"
REDRAWN = "the chat template renders the prompt otherwise before a response: boundary moved to where they part"

_TOKENIZED = Features(
    {
        "index": Value("int64"),
        "prompt_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),
        "dropped": Value("string"),
        "altered": List(Value("string")),
    }
)


@dataclass(frozen=True)
class Rows:
    """How many rows something happened to, and the sources of the first few."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """What became of `rows` pairs: `kept` of them are trained on; `dropped` and `altered` give rows by reason.

    `altered` counts kept pairs only; a pair altered in two ways counts for both.
    """

    rows: int
    kept: int
    dropped: dict[str, Rows]
    altered: dict[str, Rows]

    def summary(self) -> str:
        lines = [f"{self.kept} of {self.rows} preference pairs kept"]
        for what, reasons in (("dropped", self.dropped), ("altered", self.altered)):
            for reason, rows in reasons.items():
                more = ", ..." if rows.count > len(rows.examples) else ""
                lines.append(f"  {what} {rows.count}: {reason} ({_places(rows.examples)}{more})")
        return "\n".join(lines)


def _places(sources: Sequence[str]) -> str:
    """Sources with each file named once: `"a.jsonl, row 3, row 7; b.jsonl, row 1"`."""
    rows: dict[str, list[str]] = {}
    for source in sources:
        file, _, row = source.rpartition(", ")
        rows.setdefault(file, []).append(row)
    return "; ".join(", ".join([file, *found]) for file, found in rows.items())


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation: str = "prompt_start",
    add_eos: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Token ids of preference pairs, and a report of every pair that was dropped or altered on the way.

    The boundary between prompt and response is exact: the prompt is tokenized by itself, as it is when the model
    generates, and each response by itself, as the continuation that it is; no token spans both, and both responses
    follow the very same prompt ids. Tokenizers that put a space before every text (SentencePiece) put none before a
    response.

    Plain text is used as it is, after the tokenizer's BOS, where it has one. Conversations go through the tokenizer's
    chat template: prompt turns with `add_generation_prompt=True`, and what the whole conversation's rendering adds to
    that is the response. Where that rendering does not start with the rendered prompt, the boundary moves back to
    where the three renderings part (and not into a special token), and the row is reported as altered. The template
    writes the special tokens; none is added before the prompt. All turns of a response are labelled, tool results
    included.

    Args:
        dataset: from `load_preferences`, or with columns of any known layout.
        max_length: most tokens of prompt and response together; None: no limit.
        truncation: what happens to pairs longer than that (both responses keep the same prompt in any case):
            `"prompt_start"` cuts the oldest prompt tokens but BOS, as many as the longer response needs, down to one;
            then the ends of responses that still do not fit. `"response_end"` keeps the prompt and cuts the ends of
            the responses. `"drop"` drops the pair. `"error"` raises.
        add_eos: end each response with EOS. A plain-text response that ends with it gets no second one, nor does a
            conversation whose template ends the turn with a special token of its own (`<|im_end|>` and white space).
        chat_template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.
        num_proc: processes; by default one, in which fast tokenizers use all cores.

    Returns the dataset with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int) and `index`, the pair's number
    in `dataset`; and the `DataReport`. Results are cached on disk by the dataset's fingerprint, the tokenizer's
    contents, its template and the options. Warns with the report's summary where pairs are dropped.

    Raises `ValueError` for a tokenizer without EOS (with `add_eos`) or without a chat template (conversations), for
    options out of range, for pairs longer than `max_length` with `"error"`, and where no pair is left.
    """
    if not is_normalized(dataset):
        dataset = normalize_preferences(dataset)
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length: expected None or at least 2, got {max_length}")
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation: expected one of {TRUNCATION}, got {truncation!r}")
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} has no EOS token to end responses "
            "with: set tokenizer.eos_token, or pass add_eos=False"
        )
    if not isinstance(dataset.features["prompt"], Value) and not tokenizer.chat_template:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template, which "
            "conversations need: set tokenizer.chat_template, or take the tokenizer of the instruct model"
        )
    template_kwargs = dict(chat_template_kwargs or {})
    if reserved := {"tools", "tokenize", "add_generation_prompt"} & set(template_kwargs):
        raise ValueError(f"chat_template_kwargs: {', '.join(sorted(reserved))} are set by tokenize_preferences")
    settings = {
        "max_length": max_length,
        "truncation": truncation,
        "add_eos": add_eos,
        "template_kwargs": template_kwargs,
    }
    depends_on = (file_digest(Path(__file__)), dataset._fingerprint, _tokenizer_digest(tokenizer), settings)
    tokenized = dataset.with_format("arrow").map(  # the stored JSON text, see _as_json_text
        _tokenize_batch,
        batched=True,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, **settings},
        remove_columns=dataset.column_names,
        features=_TOKENIZED,
        num_proc=num_proc,
        new_fingerprint=digest_of(*depends_on),
        desc="Tokenizing preference pairs",
    )
    tokenized = tokenized.with_format(None)
    dropped, altered = tokenized["dropped"][:], tokenized["altered"][:]
    kept = [number for number, reason in enumerate(dropped) if not reason]
    report = DataReport(
        rows=len(dataset),
        kept=len(kept),
        dropped=_by_reason(dataset, [(number, reason) for number, reason in enumerate(dropped) if reason]),
        altered=_by_reason(dataset, [(number, reason) for number in kept for reason in altered[number]]),
    )
    if truncation == "error" and TOO_LONG in report.dropped:
        raise ValueError(f"truncation 'error': pairs are longer than max_length {max_length}\n{report.summary()}")
    if not kept:
        raise ValueError(f"dataset: no preference pair is left\n{report.summary()}")
    if report.dropped:
        warnings.warn(report.summary(), stacklevel=2)
    if len(kept) < len(dataset):
        tokenized = tokenized.select(kept)
    return tokenized.remove_columns(["dropped", "altered"]), report


def _by_reason(dataset: Dataset, rows: list[tuple[int, str]]) -> dict[str, Rows]:
    sources = dataset.select_columns("source")
    numbers: dict[str, list[int]] = {}
    for number, reason in rows:
        numbers.setdefault(reason, []).append(number)
    return {
        reason: Rows(len(found), tuple(sources[number]["source"] for number in found[:_EXAMPLES]))
        for reason, found in numbers.items()
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what decides the ids. Truncation and padding, which calls leave behind in the backend, do not."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        contents: Any = datasets.fingerprint.Hasher.hash(tokenizer)
    else:
        contents = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_of(type(tokenizer).__name__, contents, special, tokenizer.chat_template)


class _Texts(NamedTuple):
    """A pair's text, once it is known where the prompt ends."""

    prompt: str
    chosen: str
    rejected: str
    altered: bool = False


def _tokenize_batch(
    batch: pa.Table,
    numbers: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    add_eos: bool,
    template_kwargs: dict[str, Any],
) -> dict[str, list[Any]]:
    added = tokenizer.added_tokens_decoder.values()
    special = tuple({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)} - {""})
    unsplit = [*special, *(token.content for token in added)]
    bos = _ids_before_text(tokenizer)

    rows = [from_json_text(row) for row in batch.to_pylist()]
    texts = [_texts(row, tokenizer, template_kwargs, unsplit) for row in rows]
    usable = [text for text in texts if isinstance(text, _Texts)]
    prompts = iter(_encode(tokenizer, [text.prompt for text in usable]))
    responses = iter(
        _encode_continuations(tokenizer, [part for text in usable for part in (text.chosen, text.rejected)])
    )

    columns: dict[str, list[Any]] = {name: [] for name in _TOKENIZED}
    for number, row, text in zip(numbers, rows, texts, strict=True):
        ids: _Ids = ([], [], [])
        altered: list[str] = []
        if isinstance(text, str):
            dropped = text
        else:
            prompt, chosen, rejected = next(prompts), next(responses), next(responses)
            if isinstance(row["prompt"], str) and prompt[: len(bos)] != bos:
                prompt = bos + prompt
            if chosen is None or rejected is None:
                dropped = NO_BOUNDARY
            elif not chosen or not rejected:
                dropped = EMPTY
            elif not prompt:
                dropped = NO_PROMPT
            elif chosen == rejected:
                dropped = IDENTICAL
            else:
                if add_eos:
                    eos = [tokenizer.eos_token_id]
                    chosen = chosen if text.chosen.rstrip().endswith(special) else chosen + eos
                    rejected = rejected if text.rejected.rstrip().endswith(special) else rejected + eos
                ids, altered, dropped = _fit(
                    (prompt, chosen, rejected), bool(prompt[0] == tokenizer.bos_token_id), max_length, truncation
                )
                if text.altered:
                    altered.append(REDRAWN)
        for name, value in zip(columns, (number, *ids, dropped, altered), strict=True):
            columns[name].append(value)
    return columns


def _texts(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any],
    unsplit: Sequence[str],
) -> _Texts | str:
    """The pair's text, or the reason for dropping it."""
    from jinja2.exceptions import TemplateError

    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if layouts.is_empty(chosen) or layouts.is_empty(rejected):
        return EMPTY
    if chosen == rejected:
        return IDENTICAL
    if isinstance(prompt, str):
        return _Texts(prompt, chosen, rejected)
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        return OTHER_PROMPTS
    if not prompt:
        return NO_PROMPT

    def render(messages: layouts.Messages, add_generation_prompt: bool) -> str:
        rendered = tokenizer.apply_chat_template(
            messages,
            tools=row["tools"],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **template_kwargs,
        )
        return str(rendered)

    try:
        opening = render(prompt, True)
        whole = render(prompt + chosen, False), render(prompt + rejected, False)
    except (TemplateError, TypeError) as error:
        return f"{REFUSED}{str(error) or type(error).__name__:.120}"
    exact = whole[0].startswith(opening) and whole[1].startswith(opening)
    end = len(opening) if exact else _shared_length((opening, *whole), unsplit)
    return _Texts(opening[:end], whole[0][end:], whole[1][end:], altered=not exact)


def _shared_length(texts: Sequence[str], unsplit: Sequence[str]) -> int:
    """Length of what all texts begin with, less the beginning of a special token that not all of them have."""
    shared = len(os.path.commonprefix(list(texts)))
    for token in unsplit:
        for start in range(max(0, shared - len(token) + 1), shared):
            if any(text.startswith(token, start) for text in texts):
                return start
    return shared


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: no warning about the model's length, which max_length takes care of.
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _encode_continuations(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int] | None]:
    """Ids of texts that follow another one: without the space that some tokenizers put before every text.

    Such a tokenizer gets the text behind an anchor, a character that it does not merge with the text, and the
    anchor's ids are taken off again. None where no anchor stays unmerged.
    """
    anchor, single, joined = _encode(tokenizer, ["\n", "x", "\nx"])
    if joined == anchor + single:
        return list(_encode(tokenizer, texts))
    ids: list[list[int] | None] = [None] * len(texts)
    for mark in ("\n", ".", "x"):
        (anchor,) = _encode(tokenizer, [mark])
        left = [number for number, found in enumerate(ids) if found is None]
        for number, joined in zip(left, _encode(tokenizer, [mark + texts[n] for n in left]), strict=True):
            if anchor and joined[: len(anchor)] == anchor:
                ids[number] = joined[len(anchor) :]
    return ids


def _ids_before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself: BOS, or nothing."""
    plain, full = _encode(tokenizer, ["x"])[0], list(tokenizer("x")["input_ids"])
    starts = [start for start in range(len(full)) if full[start : start + len(plain)] == plain]
    return full[: starts[0]] if plain and starts else []


def _fit(ids: _Ids, has_bos: bool, max_length: int | None, truncation: str) -> tuple[_Ids, list[str], str]:
    """The pair within `max_length`, how it was altered, and why it is dropped, if it is."""
    prompt, chosen, rejected = ids
    longest = max(len(chosen), len(rejected))
    if max_length is None or len(prompt) + longest <= max_length:
        return ids, [], ""
    if truncation in ("drop", "error"):
        return ([], [], []), [], TOO_LONG
    altered = []
    if truncation == "prompt_start":
        room = max(1, max_length - longest)
        if room < len(prompt):
            # The newest tokens stay, and BOS, without which some models lose their way.
            prompt = prompt[:1] + prompt[len(prompt) - room + 1 :] if has_bos and room > 1 else prompt[-room:]
            altered.append(PROMPT_CUT)
    room = max_length - len(prompt)
    if room < 1:
        return ([], [], []), [], PROMPT_TOO_LONG
    if longest > room:
        chosen, rejected = chosen[:room], rejected[:room]
        altered.append(RESPONSE_CUT)
    if chosen == rejected:
        return ([], [], []), [], IDENTICAL_AFTER_CUT
    return (prompt, chosen, rejected), altered, ""
