"""The sweep over all classes of transformers': none is silently wrong, none fails in words of its own, and the table in
`sweep.txt` is what it gives."""

from __future__ import annotations

import collections
import itertools
import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="builds its models with transformers, which is not installed")

import transformers
from forks import python

sys.path.append(str(Path(__file__).parent))
import sweep

TABLE = Path(__file__).with_name("sweep.txt")
SAME_VERSION = f"# transformers {transformers.__version__}\n" in TABLE.read_text()

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits what a fork may use")
# A plain one; a transform in the way; images; no base model to be found; no logits_to_keep; a factor and a cap; masked
# logits; more than text; no head at all
SOME = ("LlamaForCausalLM", "RemBertForCausalLM", "Qwen2VLForConditionalGeneration", "Llama4ForConditionalGeneration")
SOME += ("Qwen2_5OmniThinkerForConditionalGeneration", "MuseSparkForConditionalGeneration")
SOME += ("ChameleonForConditionalGeneration", "IdeficsForVisionText2Text", "PI0ForConditionalGeneration")


def verdicts(text):
    """Class, way and verdict, without the words of why."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return [tuple(line[a:b].strip() for a, b in ((0, 45), (45, 64), (64, 74))) for line in lines]


def test_the_table_has_every_class_and_nothing_wrong_or_unclear():
    table = verdicts(TABLE.read_text())
    count = collections.Counter(verdict for *_, verdict in table)
    assert not count["WRONG"] and not count["unclear"] and set(count) <= set(sweep.VERDICTS)
    assert count["right"] >= 480
    if SAME_VERSION:
        assert [(name, way) for name, way, _ in table] == list(itertools.product(sweep.classes(), sweep.WAYS))


def assert_as_in_the_table(names):
    done = python(sweep.__file__, *names)  # what has computed a gradient cannot fork, as this process may have
    assert done.returncode == 0, done.stderr
    found = verdicts(done.stdout)
    assert not [each for each in found if each[2] in ("WRONG", "unclear")]
    assert {name for name, *_ in found} == set(names)
    if SAME_VERSION:
        table = [each for each in verdicts(TABLE.read_text()) if each[0] in names]
        no_library = without_a_library(TABLE.read_text()) | without_a_library(done.stdout)
        assert [each for each in found if each[0] not in no_library] == [
            each for each in table if each[0] not in no_library
        ]


def without_a_library(text):
    return {line.split()[0] for line in text.splitlines() if re.search("not built +(ModuleNotFound|Import)Error", line)}


def test_some_classes():
    assert_as_in_the_table(sorted(SOME))


@pytest.mark.release
@pytest.mark.parametrize("part", range(6))
def test_every_class(part):
    assert_as_in_the_table(sweep.classes()[part::6])


@pytest.mark.parametrize(
    "ending, words",
    [
        (lambda: os._exit(3), "the process ended with 3"),
        (lambda: os.kill(os.getpid(), 9), "the process ended with -9"),
        (lambda: os.kill(os.getpid(), 11), "the process ended with -11"),
        (lambda: [0 for _ in iter(int, 1)], "the process ended with -(9|14)"),  # of processor time, or of any
        (lambda: bytearray(2 * sweep.BYTES), "not built MemoryError"),
    ],
)
def test_a_class_that_ends_its_process_is_a_line(monkeypatch, ending, words):
    monkeypatch.setattr(sweep, "SECONDS", 1)
    monkeypatch.setattr(sweep, "built", lambda name: ending())
    lines = sweep.tried("AnyForCausalLM")
    assert len(lines) == 2 and all(re.search(words, line) for line in lines)


def test_what_is_wrong_is_called_wrong(monkeypatch):
    """A head that forgets the softcap, or the scale, without a check."""
    monkeypatch.setattr(sweep.LMHead, "check", lambda head, *args: setattr(head, "softcap", None))
    monkeypatch.setattr(sweep.LMHead, "ensure_checked", lambda head, *args: setattr(head, "logit_scale", 1.0))
    assert [line.split()[2] for line in sweep.verdicts("Gemma2ForCausalLM")] == ["WRONG", "right"]
    assert [line.split()[2] for line in sweep.verdicts("CohereForCausalLM")] == ["right", "WRONG"]
    monkeypatch.setattr(sweep.LMHead, "check", lambda head, *args: head.nothing)
    assert [line.split()[2] for line in sweep.verdicts("LlamaForCausalLM")] == ["unclear", "right"]
