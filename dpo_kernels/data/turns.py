"""Where a pair's prompt ends: turns or text that chosen and rejected share, with each other or with a prompt."""

from __future__ import annotations

import re
import unicodedata

from dpo_kernels.data.messages import Message, Messages, is_transcript, same_turns, says_nothing, transcript

# What is noticed about a row
REPEATED_TEXT = "both responses begin with the prompt's text, which is no part of an answer: taken off"
OTHER_SYSTEM = "system turns that differ were given: that of the conversation kept"
OTHER_TURNS = "chosen and rejected repeat the prompt with other turns: theirs kept"


def prompt_turns(prompt: str | Messages) -> Messages:
    """Text as the turns of a transcript, up to the turn that the assistant is yet to begin, or as a user's turn."""
    if isinstance(prompt, str):
        return _asked(transcript(prompt)) if is_transcript(prompt) else [{"role": "user", "content": prompt}]
    return prompt


def _asked(prompt: Messages) -> Messages:
    """A prompt without a last turn of the assistant that is empty."""
    *before, last = prompt
    return before if before and last["role"] == "assistant" and says_nothing(last) else prompt


def response_turns(response: str | Messages) -> Messages:
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def with_system(prompt: Messages, system: Messages, altered: list[str]) -> Messages:
    """The system turn of a column put before a prompt that has none of its own."""
    own, _ = _system_and_rest(prompt)
    if own and system and _words(own) != _words(system):
        altered.append(OTHER_SYSTEM)
    return prompt if own else [*system, *prompt]


def split_shared_turns(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Shared first turns, and the rest of both: at least one turn each, so that equal conversations stay a pair."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if not same_turns(chosen[i : i + 1], rejected[i : i + 1])), most)
    return chosen[:shared], chosen[shared:], rejected[shared:]


def repeats_prompt(prompt: str, transcripts: tuple[str, str]) -> bool:
    """Whether two texts are transcripts that begin with a prompt, which may be text by itself."""
    turns = prompt_turns(prompt)
    return all(is_transcript(given) and _repeated_turns(turns, transcript(given)) for given in transcripts)


def without_repeated_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages, altered: list[str]
) -> tuple[Messages, Messages, Messages]:
    """Prompt and responses, where chosen and rejected may repeat the prompt, each in its way.

    A conversation repeats the prompt where it holds the prompt's last turn; white space does not matter. What the
    prompt has before it (a system turn, say), and what the two share after it, belongs to the prompt.

    Raises `ValueError` for a conversation that neither starts with the assistant nor repeats the prompt.
    """
    chosen, rejected = _with_begun_turn_apart(prompt, chosen, rejected, altered)
    ends = [_repeated_turns(_asked(prompt), conversation) for conversation in (chosen, rejected)]
    if None in ends:
        role = (chosen, rejected)[ends.index(None)][0]["role"]
        raise ValueError(
            "chosen and rejected neither start with an assistant turn nor repeat the prompt: expected the response "
            f"alone, or the whole conversation, got one that starts with a turn of the role {role!r:.60}"
        )
    if not any(ends):
        return prompt, chosen, rejected
    heads = chosen[: ends[0]], rejected[: ends[1]]
    chosen, rejected = chosen[ends[0] :], rejected[ends[1] :]
    if not chosen or not rejected:
        raise ValueError(f"the {'rejected' if chosen else 'chosen'} conversation ends with the prompt: no response")

    systems, bodies = zip(*map(_system_and_rest, (*heads, _asked(prompt))), strict=True)
    if len({_words(system) for system in systems if system}) > 1:
        altered.append(OTHER_SYSTEM)
    theirs = max(bodies[:2], key=len)
    if not all(_ends_with(theirs, body) for body in bodies[:2]):
        raise ValueError("chosen and rejected repeat the prompt after different turns: expected one prompt for both")
    if not _ends_with(theirs, bodies[2]) and not _ends_with(bodies[2], theirs):
        altered.append(OTHER_TURNS)
        prompt = theirs
    else:
        prompt = bodies[2] if len(bodies[2]) > len(theirs) else theirs
    shared, chosen, rejected = split_shared_turns(chosen, rejected)
    return [*next(filter(None, systems), []), *prompt, *shared], chosen, rejected


def _with_begun_turn_apart(
    prompt: Messages, chosen: Messages, rejected: Messages, altered: list[str]
) -> tuple[Messages, Messages]:
    """Conversations that repeat the text of an assistant's turn which the prompt begins and they complete, with that
    text as a turn of its own, after the prompt's others."""
    begun = prompt[-1]
    if begun["role"] != "assistant" or says_nothing(begun) or begun.get("tool_calls"):
        return chosen, rejected
    apart = []
    for conversation in (chosen, rejected):
        place = len(prompt) - 1 if conversation[0]["role"] != "assistant" else 0
        head, turn, tail = conversation[:place], conversation[place : place + 1], conversation[place + 1 :]
        rest = _completed(begun["content"], turn[0]["content"]) if turn and turn[0]["role"] == "assistant" else None
        if rest is None or not all(map(_alike, prompt, head)):
            return chosen, rejected
        apart.append([*(head or prompt[:-1]), begun, {**turn[0], "content": rest}, *tail])
    altered.append(REPEATED_TEXT)
    return apart[0], apart[1]


def _completed(begun: str, whole: str) -> str | None:
    """What a turn says after the text with which it was begun; None where it does not begin with it, or may as well go
    on with it: `[` with `[1], [2]]`."""
    text = begun.strip()
    rest = whole.lstrip()[len(text) :]
    if not re.search(r"\w", text) or not whole.lstrip().startswith(text) or not rest.strip():
        return None
    if (text[-1] + rest[0]).isalnum():
        return None
    return rest.lstrip() if begun[-1].isspace() else rest


def _repeated_turns(prompt: Messages, conversation: Messages) -> int | None:
    """How many first turns of a conversation repeat a prompt: 0 for a response alone, None where it has another one."""
    if len(conversation) > len(prompt) and all(map(_alike, prompt, conversation)):
        return len(prompt)
    if conversation[0]["role"] == "assistant":
        return 0
    places = [place for place, turn in enumerate(conversation) if _alike(turn, prompt[-1])]
    expected = len(prompt) - 1
    return 1 + min(places, key=lambda place: (abs(place - expected), -place)) if places else None


def _system_and_rest(messages: Messages) -> tuple[Messages, Messages]:
    count = next((i for i, turn in enumerate(messages) if turn["role"] not in ("system", "developer")), len(messages))
    return messages[:count], messages[count:]


def _alike(one: Message, other: Message) -> bool:
    """Whether two turns say the same, be it in other white space."""
    return one["role"] == other["role"] and _words([one]) == _words([other])


def _ends_with(messages: Messages, end: Messages) -> bool:
    return len(end) <= len(messages) and all(map(_alike, messages[len(messages) - len(end) :], end))


def _words(messages: Messages) -> str:
    return "\n".join(" ".join(message["content"].split()) for message in messages)


# Text. Scripts that put no spaces between words: a Chinese character is about half a word, others a third of one.
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]")


def without_repeated_text(prompt: str, chosen: str, rejected: str, altered: list[str]) -> tuple[str, str]:
    """The responses without the prompt, where both repeat it, and something follows in both.

    An answer may begin as a short prompt does ("Hello!"), so that it counts as repeated only where it is more than
    three words, or ends as a line or a label does (`"A:"`, `"[/INST]"`), and where it does not end inside a word of
    the response. White space around the prompt does not matter.
    """
    for repeated, responses in (
        (prompt, (chosen, rejected)),
        (prompt.strip(), (chosen.lstrip(), rejected.lstrip())),
    ):
        if _count_words(repeated) and all(_repeats(response, repeated) for response in responses):
            altered.append(REPEATED_TEXT)
            return responses[0][len(repeated) :], responses[1][len(repeated) :]
    return chosen, rejected


def _repeats(response: str, prompt: str) -> bool:
    rest = response[len(prompt) :]
    if not response.startswith(prompt) or not rest.strip() or unicodedata.combining(rest[0]):
        return False
    unspaced = [script.match(letter) for script in (_HAN, _UNSPACED) for letter in (prompt[-1], rest[0])]
    if prompt[-1].isalnum() and rest[0].isalnum() and not any(unspaced):
        return False
    return prompt.rstrip(" \t*_").endswith(("\n", ":", "：", "]", ">", "|")) or _count_words(prompt) > 3


def _count_words(given: str) -> float:
    spaced = _UNSPACED.sub(" ", _HAN.sub(" ", given))
    return len(re.findall(r"\w+", spaced)) + len(_HAN.findall(given)) / 2 + len(_UNSPACED.findall(given)) / 3
