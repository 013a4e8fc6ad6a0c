"""Normalized preference pairs to pairs of token ids, with every dropped or altered pair accounted for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import pyarrow as pa
from datasets import Dataset, Features, List, Value

from dpo_kernels.data import layouts, marks, rendering
from dpo_kernels.data.batching import whole_number
from dpo_kernels.data.loading import digest_of, file_digest, from_json_text, is_normalized, normalize_preferences
from dpo_kernels.data.rendering import EMPTY as EMPTY
from dpo_kernels.data.rendering import IDENTICAL as IDENTICAL
from dpo_kernels.data.rendering import NO_BOUNDARY as NO_BOUNDARY
from dpo_kernels.data.rendering import NO_PROMPT as NO_PROMPT
from dpo_kernels.data.rendering import OTHER_PROMPTS as OTHER_PROMPTS
from dpo_kernels.data.rendering import REDRAWN as REDRAWN
from dpo_kernels.data.rendering import REFUSED as REFUSED
from dpo_kernels.data.rendering import ChatTemplate, PairTexts, Response, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION = ("prompt_start", "response_end", "drop", "error")

_EXAMPLES = 5  # rows that a report names for each reason
_Ids = tuple[list[int], list[int], list[int]]

# Why pairs are dropped, and how they are altered, besides what rendering.py has for conversations
IDENTICAL_AFTER_CUT = "chosen and rejected are identical after cutting to max_length"
TOO_LONG = "longer than max_length"
PROMPT_TOO_LONG = "the prompt leaves no room for a response in max_length"
UNLABELLED = "no token of a response is labelled: all of its weights are 0"
PROMPT_CUT = "start of the prompt cut to fit max_length"
RESPONSE_CUT = "end of a response cut to fit max_length"
UNKNOWN = "text that the tokenizer does not know became its token for the unknown"

_WEIGHTS = ("weight", "chosen_token_weights", "rejected_token_weights")
_RANKING = ("group", "members")
_TOKENIZED = Features(
    {
        "index": Value("int64"),
        "prompt_ids": List(Value("int32")),
        "chosen_ids": List(Value("int32")),
        "rejected_ids": List(Value("int32")),
        "weight": Value("float64"),
        "chosen_token_weights": List(Value("float64")),
        "rejected_token_weights": List(Value("float64")),
        "group": Value("string"),
        "members": List(Value("int64")),
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
    train_on: str = "all",
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Token ids of preference pairs, and a report of every pair that was dropped or altered on the way.

    The boundary between prompt and response is exact: the prompt is tokenized by itself, as it is when the model
    generates, and each response by itself, as the continuation that it is; no token spans both, and both responses
    follow the very same prompt ids. Tokenizers that put a space before every text (SentencePiece) put none before a
    response.

    Plain text is used as it is, after the tokenizer's BOS, where it has one. Conversations go through the tokenizer's
    chat template: prompt turns with `add_generation_prompt=True`, and what the whole conversation's rendering adds to
    that is the response. Where that rendering does not start with the rendered prompt, the response begins after what
    both have between the prompt's last text and the response's first, and the row is reported as altered. A prompt
    that ends with an assistant turn is continued: the response follows its text, in the same turn. The template writes
    the special tokens; none is added before the prompt.

    The template is not trusted. A response whose text, reasoning or tool calls it leaves out, changes or repeats is
    dropped; what it does to a prompt, or to a turn that is not labelled, is reported. A pair that it refuses, with an
    error of any class, is dropped with what the error says. Arguments of tool calls are given as objects, and as JSON
    text to templates that cannot take objects.

    Labelled are the assistant's turns of a response, each from the end of its prompt for generation to the token that
    ends the turn; other turns and tool outputs between them are not. A message's `train` (bool) says whether it is
    labelled, its `weight` how much its tokens count; templates see neither. The columns `chosen_token_weights` and
    `rejected_token_weights` (one number a token of the response, with or without the EOS that is added here) multiply
    with that, and `weight` is passed on.

    Args:
        dataset: from `load_preferences`, or with columns of any known layout.
        max_length: most tokens of prompt and response together; None: no limit.
        truncation: what happens to pairs longer than that (both responses keep the same prompt in any case):
            `"prompt_start"` cuts the oldest prompt tokens but BOS, as many as the longer response needs, down to one;
            then the ends of responses that still do not fit. `"response_end"` keeps the prompt and cuts the ends of
            the responses. `"drop"` drops the pair. `"error"` raises.
        add_eos: end each response with EOS. A response that ends with it, as text or by its id, gets no second one, nor
            does a conversation whose template ends the turn with a special token of its own (`<|eot_id|>` and white
            space).
        chat_template_kwargs: passed to the chat template, such as `{"enable_thinking": False}`.
        train_on: which assistant turns of a response are labelled, `"all"` or `"last"`, where their messages have no
            `train`.
        num_proc: processes; by default one, in which fast tokenizers use all cores.

    Returns the dataset with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int) and `index`, the pair's number
    in `dataset`; where pairs share a ranking, `group` and `members`, as `load_preferences` gives them, for
    `group_rankings`; where pairs have weights, `weight` (float); where tokens of a response have weights other than 1,
    `chosen_token_weights` and `rejected_token_weights` (lists of float as long as the ids; 0: no label); and the
    `DataReport`. Results are cached on disk by the dataset's fingerprint, the tokenizer's
    contents, its template and the options. Warns with the report's summary where pairs are dropped.

    Raises `ValueError` for a tokenizer without EOS (with `add_eos`) or without a chat template (conversations), for
    options out of range or of another type, for token weights that are not as many as the tokens of their response
    (naming the row and both numbers), for pairs longer than `max_length` with `"error"`, and where no pair is left.
    """
    from transformers import PreTrainedTokenizerBase

    if not is_normalized(dataset):
        dataset = normalize_preferences(dataset)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            "tokenizer: expected a tokenizer of transformers, such as AutoTokenizer.from_pretrained gives, "
            f"got {tokenizer!r:.80}"
        )
    if max_length is not None:
        max_length = whole_number("max_length", max_length, "None or a whole number of at least 2", least=2)
    if truncation not in TRUNCATION:
        raise ValueError(f"truncation: expected one of {TRUNCATION}, got {truncation!r}")
    if train_on not in rendering.TRAIN_ON:
        raise ValueError(f"train_on: expected one of {rendering.TRAIN_ON}, got {train_on!r}")
    if not isinstance(add_eos, bool):
        raise ValueError(f"add_eos: expected True or False, got {add_eos!r:.80}")
    if num_proc is not None:
        num_proc = whole_number("num_proc", num_proc, "None or a whole number above 0", least=1)
    template_kwargs = _template_kwargs(chat_template_kwargs)
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} has no EOS token to end responses "
            "with: set tokenizer.eos_token, or pass add_eos=False"
        )
    conversational = not isinstance(dataset.features["prompt"], Value)
    if conversational and not (tokenizer.chat_template or template_kwargs.get("chat_template")):
        raise ValueError(
            f"tokenizer: {tokenizer.name_or_path or type(tokenizer).__name__!r} has no chat template, which "
            "conversations need: set tokenizer.chat_template, or take the tokenizer of the instruct model"
        )
    settings = {
        "max_length": max_length,
        "truncation": truncation,
        "add_eos": add_eos,
        "template_kwargs": template_kwargs,
        "train_on": train_on,
    }
    code = [file_digest(Path(str(file))) for file in (__file__, rendering.__file__, marks.__file__)]
    depends_on = (code, dataset._fingerprint, _tokenizer_digest(tokenizer), settings)
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
    return _with_weights(tokenized.remove_columns(["dropped", "altered"]), kept), report


def _template_kwargs(given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ValueError(
            "chat_template_kwargs: expected None or a mapping of names to values, such as "
            f'{{"enable_thinking": False}}, got {given!r:.80}'
        )
    ours = {"conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message"}
    ours |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"}
    if reserved := ours & set(given):
        raise ValueError(f"chat_template_kwargs: {', '.join(sorted(reserved))} are set by tokenize_preferences")
    for name, value in given.items():
        try:
            json.dumps(value, sort_keys=True)  # as in the fingerprint
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"chat_template_kwargs: {name}: expected a value as JSON has, got {value!r:.80}") from None
    return dict(given)


def _with_weights(tokenized: Dataset, kept: list[int]) -> Dataset:
    """The rows that are kept: without the columns of weights and rankings that none of them has, and with weights of 1
    where only some have them."""
    given = {name: int(tokenized.data.column(name).is_valid().to_numpy()[kept].sum()) for name in _WEIGHTS + _RANKING}
    tokenized = tokenized.remove_columns([name for name, count in given.items() if not count])
    if len(kept) < len(tokenized):
        tokenized = tokenized.select(kept)
    if any(0 < given[name] < len(kept) for name in _WEIGHTS):
        fingerprint = digest_of(tokenized._fingerprint, "weights of 1")
        tokenized = tokenized.map(_fill_weights, new_fingerprint=fingerprint, desc="Filling in weights of 1")
    return tokenized


def _fill_weights(row: dict[str, Any]) -> dict[str, Any]:
    ones = {"weight": 1.0, **{f"{key}_token_weights": [1.0] * len(row[f"{key}_ids"]) for key in ("chosen", "rejected")}}
    return {name: value if row[name] is None else row[name] for name, value in ones.items() if name in row}


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


def _tokenize_batch(
    batch: pa.Table,
    numbers: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation: str,
    add_eos: bool,
    template_kwargs: dict[str, Any],
    train_on: str = "all",
) -> dict[str, list[Any]]:
    template = ChatTemplate(tokenizer, template_kwargs, train_on)
    bos = _ids_before_text(tokenizer)
    eos = tokenizer.eos_token_id if add_eos else None

    rows = [from_json_text(row) for row in batch.to_pylist()]
    texts = [_plain(row, template) if isinstance(row["prompt"], str) else template.texts(row) for row in rows]
    usable = [text for text in texts if isinstance(text, PairTexts)]
    prompts = iter(_encode(tokenizer, [text.prompt for text in usable]))
    responses = [response for text in usable for response in (text.chosen, text.rejected)]
    parts = iter(_encode_continuations(tokenizer, [part.text for response in responses for part in response.segments]))

    columns: dict[str, list[Any]] = {name: [] for name in _TOKENIZED}
    for number, row, text in zip(numbers, rows, texts, strict=True):
        ids: _Ids = ([], [], [])
        weights: tuple[list[float], list[float]] | tuple[None, None] = (None, None)
        altered: list[str] = list(row.get("altered") or ())
        if isinstance(text, str):
            dropped = text
        else:
            prompt = next(prompts)
            if isinstance(row["prompt"], str) and prompt[: len(bos)] != bos:
                prompt = bos + prompt
            chosen = _joined(text.chosen, parts, eos, row, "chosen_token_weights")
            rejected = _joined(text.rejected, parts, eos, row, "rejected_token_weights")
            if chosen is None or rejected is None:
                dropped = NO_BOUNDARY
            elif not chosen.ids or not rejected.ids:
                dropped = EMPTY
            elif not prompt:
                dropped = NO_PROMPT
            elif chosen.ids == rejected.ids:
                dropped = IDENTICAL
            else:
                ids, cuts, dropped = _fit(
                    (prompt, chosen.ids, rejected.ids),
                    bool(prompt[0] == tokenizer.bos_token_id),
                    max_length,
                    truncation,
                )
                weights = (chosen.weights[: len(ids[1])], rejected.weights[: len(ids[2])])
                if not dropped and not all(map(any, weights)):
                    ids, weights, dropped = ([], [], []), (None, None), UNLABELLED
                elif all(weight == 1 for part in weights for weight in part):
                    weights = (None, None)
                unknown = [UNKNOWN] if _has_unknown(tokenizer, text, ids) else []
                altered = list(dict.fromkeys([*altered, *text.altered, *cuts, *unknown]))
        ranking = (row.get(name) for name in _RANKING)
        values = (number, *ids, row.get("weight"), *weights, *ranking, dropped, altered)
        for name, value in zip(columns, values, strict=True):
            columns[name].append(value)
    return columns


def _plain(row: Mapping[str, Any], template: ChatTemplate) -> PairTexts | str:
    chosen, rejected = row["chosen"], row["rejected"]
    if layouts.is_empty(chosen) or layouts.is_empty(rejected):
        return EMPTY
    if chosen == rejected:
        return IDENTICAL
    answers = [Response([Segment(text, 1.0)], template.ends(text)) for text in (chosen, rejected)]
    return PairTexts(row["prompt"], answers[0], answers[1], [])


class _Tokens(NamedTuple):
    ids: list[int]
    weights: list[float]


def _joined(
    response: Response, parts: Iterator[list[int] | None], eos: int | None, row: Mapping[str, Any], column: str
) -> _Tokens | None:
    """The tokens of a response, of which `parts` gives those of the next segments; None if one has no boundary.

    EOS comes last, with the weight of the last segment, unless the response ends with it or is closed.
    """
    found = [(next(parts), segment.weight) for segment in response.segments]
    ids = [token for part, _ in found for token in part or ()]
    weights = [weight for part, weight in found for _ in part or ()]
    if any(part is None for part, _ in found):
        return None
    length = len(ids)
    if ids and eos is not None and ids[-1] != eos and not response.closed:
        ids, weights = [*ids, eos], [*weights, response.segments[-1].weight]
    if (given := row.get(column)) is not None:
        if len(given) not in (length, len(ids)):
            lengths = f"{length}" if length == len(ids) else f"{length}, or {len(ids)} with EOS"
            raise ValueError(
                f"{row['source']}: {column}: expected a number for each token of the response, {lengths}, "
                f"got {len(given)}"
            )
        weights = [a * b for a, b in zip(weights, [*given, 1.0][: len(ids)], strict=True)]
    return _Tokens(ids, weights)


def _has_unknown(tokenizer: PreTrainedTokenizerBase, text: PairTexts, ids: _Ids) -> bool:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return False
    parts = [text.prompt, *(segment.text for response in (text.chosen, text.rejected) for segment in response.segments)]
    return any(unknown in part for part in ids) and not any(str(tokenizer.unk_token) in part for part in parts)


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
