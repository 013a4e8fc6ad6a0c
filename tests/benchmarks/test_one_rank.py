"""The check of what goes through NCCL runs with gloo, passes there, and sees what is wrong."""

import pytest
from places import ROOT
from two_processes import run_in_two

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SCRIPT = ROOT / "benchmarks" / "one_rank.py"

WRONG = """
import sys

sys.path.insert(0, sys.argv.pop(1))
import one_rank

loss = one_rank.linear_dpo_loss

def off(hidden, weight, *args, group, **options):
    return loss(hidden, weight * 1.001 if group else weight, *args, group=group, **options)

one_rank.linear_dpo_loss = off
one_rank.main()
"""


def test_one_rank_has_the_numbers_of_none():
    run_in_two(SCRIPT, processes=1)


@pytest.mark.full
def test_a_wrong_head_is_seen(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG)
    with pytest.raises(AssertionError, match="beyond 0.0001: head, losses, head, logps"):
        run_in_two(tmp_path / "wrong.py", SCRIPT.parent, processes=1)
