"""Ranked answers as pairs: which of them make one, and which are ranked in a tree of messages."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dpo_kernels.data.messages import (
    Message,
    Messages,
    canonical_role,
    field,
    is_blank,
    is_null,
    located,
    number,
    several_responses,
    text,
)
from dpo_kernels.data.structured_text import from_json

Row = dict[str, Any]
Answer = TypeVar("Answer")

RANKED_PAIRS = ("best_vs_worst", "best_vs_each", "all_pairs")

_EXAMPLES = 5  # rankings without a pair that a note names


def pairs(ranked: Iterable[tuple[float, Answer]], ranked_pairs: str) -> list[tuple[Answer, Answer, Row]]:
    """(better, worse, members) of answers with ranks, of which the smallest is the best; equal ranks make no pair.

    `members` are the places of both among the answers from best to worst, those of one rank in the order given, as
    `{"members": [better, worse]}`; empty where the ranking is one pair.
    """
    ranked = sorted(ranked, key=lambda item: item[0])
    ranks, answers = [rank for rank, _ in ranked], [answer for _, answer in ranked]
    places = _places(ranks, ranked_pairs)
    return [
        (answers[better], answers[worse], {"members": [better, worse]} if len(places) > 1 else {})
        for better, worse in places
    ]


def _places(ranks: Sequence[float], ranked_pairs: str) -> list[tuple[int, int]]:
    betters = range(len(ranks)) if ranked_pairs == "all_pairs" else range(min(1, len(ranks)))
    found = [(i, j) for i in betters for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
    return found[-1:] if ranked_pairs == "best_vs_worst" else found


def one_rejected_each(row: Mapping[str, Any], ranked_pairs: str) -> tuple[list[tuple[Mapping[str, Any], Row]], int]:
    """A row for each of several rejected responses that make a pair, and the pair's members; and how many of the
    responses make none."""
    responses = several_responses(row.get("rejected"))
    if responses is None:
        return [(row, {})], 0
    weights = row.get("rejected_token_weights")
    weights = [None] * len(responses) if is_blank(weights) else from_json(weights, "rejected_token_weights")
    if not isinstance(weights, list | tuple) or len(weights) != len(responses):
        raise ValueError(
            "the field 'rejected_token_weights': expected a list for each of the rejected responses, "
            f"{len(responses)}, got {weights!r:.80}"
        )
    places = pairs([(0, 0), *((1, place) for place in range(1, len(responses) + 1))], ranked_pairs)
    rows: list[tuple[Mapping[str, Any], Row]] = [
        ({**row, "rejected": responses[place - 1], "rejected_token_weights": weights[place - 1]}, members)
        for _, place, members in places
    ]
    return rows, len(responses) - len(rows)


def tied_note(tied: Sequence[str]) -> str:
    """A sentence about rankings without a pair, or nothing."""
    some = ", ".join(map(repr, tied[:_EXAMPLES])) + ", ..." * (len(tied) > _EXAMPLES)
    return f"{len(tied)} rankings have no two answers of different rank, and no pair ({some})" if tied else ""


def unpaired_note(unpaired: Sequence[str]) -> str:
    """A sentence about rejected responses in no pair, or nothing."""
    responses = f"{len(unpaired)} rejected " + ("responses are" if len(unpaired) > 1 else "response is")
    why = "best_vs_worst takes the last of several; best_vs_each takes all"
    return f"{responses} in no pair: {why}" if unpaired else ""


def from_message_tree(
    rows: Iterable[tuple[str, Mapping[str, Any]]], ranked_pairs: str, tied: list[str]
) -> Iterator[list[tuple[str, Row]]]:
    """The pairs among each OpenAssistant message's ranked assistant replies; the prompt is the chain of its ancestors.

    Deleted replies, and replies without a rank, are in no pair: they are not preferences. A pair's source is that of
    the better reply. Messages whose replies have all the same rank go into `tied`.
    """
    messages: dict[Hashable, tuple[Message, Hashable]] = {}
    sources: dict[Hashable, str] = {}
    replies: dict[Hashable, list[tuple[float, tuple[str, Message]]]] = {}
    for source, row in rows:
        name, parent, message, rank = located(source, _tree_message, row)
        if name in messages:
            raise ValueError(f"{source}: the message_id {name!r} has been there before: expected each once")
        messages[name], sources[name] = (message, parent), source
        if message["role"] == "assistant" and parent is not None and rank is not None:
            replies.setdefault(parent, []).append((rank, (source, message)))

    for parent, ranked in replies.items():
        found = pairs(ranked, ranked_pairs)
        if len(ranked) > 1 and not found:
            tied.append(_ranking(sources, parent, ranked[0][1][0]))
        ranking: list[tuple[str, Row]] = []
        for (source, better), (_, worse), members in found:
            prompt: Messages = []
            seen: set[Hashable] = set()
            ancestor: Hashable = parent
            while ancestor is not None:
                if ancestor not in messages:
                    raise ValueError(f"{source}: the message {ancestor!r}, which it answers, is not in the data")
                if ancestor in seen:
                    raise ValueError(f"{source}: the message {ancestor!r} is among its own ancestors (parent_id)")
                seen.add(ancestor)
                message, ancestor = messages[ancestor]
                prompt.insert(0, message)
            group = {"group": _ranking(sources, parent, source)} if members else {}
            ranking.append((source, {"prompt": prompt, "chosen": [better], "rejected": [worse], **members, **group}))
        yield ranking


def _ranking(sources: Mapping[Hashable, str], parent: Hashable, reply: str) -> str:
    """The name of a message's ranking: with the file of the message, in which its id is unique."""
    return f"{sources.get(parent, reply).rpartition(', ')[0]}, message {parent!r}"


def _tree_message(row: Mapping[str, Any]) -> tuple[Hashable, Hashable, Message, float | None]:
    """Id, parent's id, message, and the rank of one that is ranked and not deleted."""
    for name in ("message_id", "parent_id"):
        if not isinstance(row.get(name), Hashable):
            raise ValueError(f"the field {name!r}: expected text or a number, got {row[name]!r:.80}")
    parent = None if is_blank(row.get("parent_id")) else row["parent_id"]
    role = canonical_role(text(field(row, "role"), "role"))
    message = {"role": role, "content": text(field(row, "text"), "text")}
    rank = None if is_blank(row.get("rank")) else number(row["rank"], "rank")
    deleted = row.get("deleted")
    if isinstance(deleted, str):
        deleted = deleted.strip().lower() not in ("", "0", "false", "no")
    return field(row, "message_id"), parent, message, None if deleted and not is_null(deleted) else rank
