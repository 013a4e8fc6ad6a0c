"""What is called wrongly says so: each call of `wrong_calls.py` is an error of this package that names the argument."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="calls what needs transformers, which is not installed")
pytest.importorskip("trl", reason="calls TRL's trainers, which are not installed")

sys.path.append(str(Path(__file__).parent))
import wrong_calls
from wrong_calls import ENTRIES, OTHERS, SHOWN, TABLE, outcome, read_table

CASES = [pytest.param(call, word, id=call) for _, call, word in ENTRIES]


@pytest.fixture(scope="module")
def table():
    return read_table()


@pytest.fixture(scope="module", autouse=True)
def as_it_was():
    """What a run that fails early has set is no matter of the next test module."""
    from accelerate.state import AcceleratorState

    yield
    assert not torch.are_deterministic_algorithms_enabled()
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("call", "word"), CASES)
def test_a_wrong_call_names_its_argument(call, word, table):
    found = outcome(call, word)
    assert not found.fault, f"{found.fault}: {found.text}"
    assert found.text == table[call][1], "python tests/wrong_calls.py writes the table anew"


def test_the_table_has_all_calls_once():
    calls = [call for _, call, _ in ENTRIES]
    assert len(calls) == len(set(calls))
    assert list(read_table()) == calls
    assert set(calls) >= OTHERS


def test_every_public_name_is_called_wrongly():
    from dpo_kernels import compat, data, models, planning, training

    results = {
        "Batching",
        "FusedOutput",
        "KTOLoss",
        "LinearDPOOutput",
        "PreferenceLoss",
        "RankingLoss",
        "SequenceLogps",
    }
    public = {
        name
        for module in (compat, data, models, planning, training, wrong_calls.dpo_kernels)
        for name in module.__all__
    }
    calls = "\n".join(call for _, call, _ in ENTRIES)
    assert {name for name in public - results if f"{name}(" not in calls and f"{name}." not in calls} == set()


@pytest.mark.parametrize(
    ("call", "word", "fault"),
    [
        ("linear_dpo_loss(*given)", "ref_logps", "no error"),
        ("hidden.no_such_name", "hidden", "a raw AttributeError"),
        ("linear_dpo_loss(hidden, weight, labels, None)", "softcap", "does not name softcap"),
        ("torch.zeros(2) + torch.zeros(3)", "size", "a raw error"),
        ("Preference(None).ref_logps", "options", "does not name options"),
        ("command('env')", "env", "no error"),
        ("command('plan')", "impl", "does not name impl"),
    ],
)
def test_faults_are_seen(call, word, fault):
    found = outcome(call, word)
    assert found.fault == fault
    assert len(found.text) <= SHOWN


def test_the_table_is_text():
    assert TABLE.read_text().isascii()
