"""The embedded demo: preference pairs of our own making, and a tokenizer and a model small enough for two CPU cores.

Nothing here is downloaded, and everything follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from dpo_kernels.data.batching import whole_number

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

EOS, TURN = "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_A_SEED = "a whole number from 0 to 2**64 - 1"

# Subject and fact, in our own words.
_FACTS = (
    ("why the sky looks blue", "air scatters blue light more than red light"),
    ("what bees make", "bees gather nectar and turn it into honey"),
    ("how plants eat", "plants build sugar out of light, water and air"),
    ("why ice floats", "ice takes more room than the same weight of water"),
    ("what the moon does to the sea", "the moon pulls at the sea and so makes the tides"),
    ("how bread rises", "yeast makes gas, and the gas lifts the dough"),
    ("why leaves turn red", "the green fades in autumn and the other colours show"),
    ("what a thermometer shows", "it shows how warm or cold something is"),
    ("how birds stay warm", "their feathers hold a layer of still air"),
    ("why we see lightning first", "light travels far faster than sound"),
    ("what rust is", "rust is iron that has joined with oxygen"),
    ("how a compass works", "its needle turns along the field of the earth"),
    ("why bridges have gaps", "steel grows in the heat and needs the room"),
    ("what yeast is", "yeast is a tiny fungus that lives on sugar"),
    ("how fish breathe", "their gills take oxygen out of the water"),
    ("why the days get longer", "the earth leans, and in spring our half leans towards the sun"),
    ("what a magnet pulls", "a magnet pulls iron, nickel and cobalt"),
    ("how soap cleans", "soap holds on to water with one end and to grease with the other"),
    ("why onions make us cry", "cutting them sets free a gas that stings the eyes"),
    ("what snow is made of", "snow is made of small crystals of ice"),
    ("how a sail drives a boat", "the wind flows around the sail and pulls it forward"),
    ("why bread goes stale", "its starch slowly turns hard again"),
    ("what an echo is", "an echo is sound that comes back from a wall"),
    ("how cats land on their feet", "they twist their back while they fall"),
)
_TASKS = (
    ("boil an egg", "put it in boiling water for eight minutes, then cool it"),
    ("remove a stain", "dab it with cold water and a little soap, and do not rub"),
    ("fall asleep sooner", "keep the room dark and leave the phone outside"),
    ("learn new words", "read them aloud and use each in a sentence of your own"),
    ("save water at home", "take shorter showers and mend the taps that drip"),
    ("tie a parcel", "cross the string underneath and finish with a flat knot"),
    ("keep herbs fresh", "stand them in a glass of water like flowers"),
    ("start running", "walk and run in turns, three times a week"),
    ("thank a teacher", "write a short note that says what helped you"),
    ("sharpen a pencil", "turn the pencil, not the blade, and press lightly"),
    ("plan a small trip", "choose one place, look up the trains, and pack the night before"),
    ("clean a window", "wipe it with water and vinegar, then dry it with paper"),
    ("cook rice", "use two cups of water for one of rice and leave the lid on"),
    ("mend a sock", "weave a thread across the hole, first one way, then the other"),
    ("greet a new neighbour", "ring the bell, say your name and offer some help"),
    ("remember names", "repeat the name at once and link it to the face"),
)
_GREETINGS = ("Hello!", "Hi there.", "Good morning.", "Good evening!", "Hey, are you there?", "Nice to meet you.")
_PLANS = (
    "cook",
    "paint",
    "read more",
    "fix my bicycle",
    "write a letter",
    "bake a cake",
    "tidy my desk",
    "plant a tree",
)

_QUESTIONS = (
    "Can you tell me {}?",
    "Please explain {}.",
    "Do you know {}?",
    "I would like to know {}.",
    "My friend asked me {}. What should I say?",
)
_HOW_TO = ("How do I {}?", "What is a good way to {}?", "Please help me {}.", "I want to {}. Where do I begin?")
_SUMS = ("What is {}?", "Please work out {}.", "Can you tell me what {} is?", "Help me with this: {}.")

# Both kinds of answer share most of their words: what tells them apart is what they do with the question.
_HELPFUL = (
    "{answer}. I hope that helps.",
    "Of course: {answer}.",
    "Good question. {answer}.",
    "Here is the answer: {answer}.",
    "Sure, I can help. {answer}.",
    "{answer}. Please ask if you want to know more.",
    "Thank you for asking. {answer}.",
    "In short, {answer}. Let me know if that is clear.",
)
_UNHELPFUL = (
    "I could tell you {subject}, but I do not want to.",
    "That is a silly question. Of course you should know {subject}.",
    "Who cares {subject}? Ask somebody else.",
    "I hope you do not need the answer, since I will not help.",
    "Good question. I have no time for it, so look it up.",
    "Sure, or maybe not. It could be anything, who knows.",
    "Let me think. No, I would rather not say {subject}.",
    "Please do not ask me that. Here is no answer for you.",
    "Why do you want to know {subject}? Leave me alone.",
    "{answer}, as anybody knows. Do not waste my time.",
)

# Share of the rejected answers that are as friendly as the chosen ones but answer something else. Only a model that
# looks at the question tells those apart, so that the held-out accuracy has something to climb.
_BESIDE_THE_QUESTION = 0.3


def demo_preferences(num_rows: int = 600, *, seed: int = 0) -> Dataset:
    """Conversational preference pairs with the columns `prompt`, `chosen`, `rejected`: sums, small facts, household
    advice and plans, where the chosen answer is friendly and to the point, the rejected one evasive, rude or an answer
    to something else.

    Prompts are all different, so that a held-out part shares none with the rest.

    Raises `ValueError` for more rows than there are different prompts (somewhat over 900).
    """
    from datasets import Dataset

    rng = random.Random(whole_number("seed", seed, _A_SEED, least=0, most=2**64 - 1))
    questions = _questions()
    num_rows = whole_number("num_rows", num_rows, f"1 to {len(questions)}", least=1, most=len(questions))
    rows = []
    for question, subject, answer in rng.sample(questions, num_rows):
        chosen = rng.choice(_HELPFUL).format(answer=answer)
        if rng.random() < _BESIDE_THE_QUESTION:
            rejected = rng.choice(_HELPFUL).format(answer=rng.choice([a for _, _, a in questions if a != answer]))
        else:
            rejected = rng.choice(_UNHELPFUL).format(answer=answer, subject=subject)
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": _sentence(chosen)}],
                "rejected": [{"role": "assistant", "content": _sentence(rejected)}],
            }
        )
    return Dataset.from_list(rows)


def _questions() -> list[tuple[str, str, str]]:
    """All (question, subject, answer), each question once."""
    found = [(text.format(subject), subject, answer) for subject, answer in _FACTS for text in _QUESTIONS]
    found += [(text.format(task), f"how to {task}", answer) for task, answer in _TASKS for text in _HOW_TO]
    for a in range(2, 20):
        for b in range(2, 20):
            text = _SUMS[(a * 7 + b) % len(_SUMS)]
            found.append((text.format(f"{a} plus {b}"), f"what {a} plus {b} is", f"{a} plus {b} is {a + b}"))
            if a > b:
                text = _SUMS[(a + 5 * b) % len(_SUMS)]
                found.append((text.format(f"{a} minus {b}"), f"what {a} minus {b} is", f"{a} minus {b} is {a - b}"))
    for greeting in _GREETINGS:
        for plan in _PLANS:
            for when in ("today", "tomorrow", "this week", "with my sister", "for the first time", "after work"):
                wish = f"I want to {plan} {when}."
                found.append((f"{greeting} {wish}", f"how to {plan}", f"it is a fine idea to {plan} {when}"))
    return found


def _sentence(text: str) -> str:
    """Capital letters where sentences begin: an answer may stand at the start of one or inside it."""
    parts = text.split(". ")
    return ". ".join(part[:1].upper() + part[1:] for part in parts)


def demo_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Qwen2Tokenizer:
    """A byte-level BPE trained on `texts`: any text in Unicode's form NFC goes through it and comes back unchanged.

    It has an EOS (`<|im_end|>`, which ends a turn), a padding token of its own, no BOS, and a ChatML chat template.
    The vocabulary has `vocab_size` entries, or fewer where the texts offer too few merges.

    It is of the class that transformers goes by where a tokenizer lies beside a Qwen2 model, whatever class was saved
    there: another's normalization and word boundaries would be lost on the way.

    Raises `ValueError` for a `vocab_size` that does not hold the 256 bytes and the 3 special tokens, and for a single
    text, whose letters would be taken for texts.
    """
    from transformers import Qwen2Tokenizer

    vocab_size = whole_number("vocab_size", vocab_size, f"a whole number of at least {256 + 3}", least=256 + 3)
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise ValueError(f"texts: expected a list of texts, got {texts!r:.80}")
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size, new_special_tokens=[TURN, EOS], show_progress=False
    )
    tokenizer.eos_token = EOS
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def demo_model(
    vocab_size: int,
    *,
    seed: int = 0,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    tied: bool = False,
    max_positions: int = 2048,
    eos_token_id: int | None = None,
) -> Qwen2ForCausalLM:
    """A Qwen2 model with random float32 weights, the same for the same seed; the global random state is left alone.

    `tied` shares the embedding matrix with the head; `eos_token_id` is where the model stops when it generates. The
    size of an attention head is `hidden_size / heads`, which must be even.

    Raises `ValueError` where `hidden_size` is not divisible by `2 * heads`, and for sizes that are no whole numbers
    above 0.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    seed = whole_number("seed", seed, _A_SEED, least=0, most=2**64 - 1)
    above_0 = "a whole number above 0"
    vocab_size = whole_number("vocab_size", vocab_size, above_0, least=1)
    hidden_size = whole_number("hidden_size", hidden_size, above_0, least=1)
    layers, heads = whole_number("layers", layers, above_0, least=1), whole_number("heads", heads, above_0, least=1)
    max_positions = whole_number("max_positions", max_positions, above_0, least=1)
    if not isinstance(tied, bool):
        raise ValueError(f"tied: expected True or False, got {tied!r:.80}")
    if eos_token_id is not None:
        eos_token_id = whole_number("eos_token_id", eos_token_id, "None or a token id", least=0)
    if hidden_size % (2 * heads):
        raise ValueError(f"hidden_size: expected a multiple of 2 * heads = {2 * heads}, got {hidden_size}")
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Qwen2ForCausalLM(config)
