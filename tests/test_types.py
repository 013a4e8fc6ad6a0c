"""What a type checker says of a user's script, with a mistake in each marked line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from places import ROOT

pytest.importorskip("mypy", reason="asks mypy, which is not installed")
pytest.importorskip("transformers", reason="the script has a model of transformers, which is not installed")

SCRIPT = """
import torch

from dpo_kernels import DPOLoss, LMHead, dpo_loss, linear_dpo_loss, linear_sequence_logps, sequence_logps, simpo_loss
from dpo_kernels.models import Preference
from dpo_kernels.training import TrainConfig, train

hidden, weight = torch.randn(4, 6, 8), torch.randn(10, 8)
labels, ref = torch.zeros(4, 6, dtype=torch.int64), torch.zeros(4)
head = LMHead.from_model(torch.nn.Linear(2, 2))

right = linear_dpo_loss(hidden, weight, labels, ref, loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.1), impl="cpu")
total = right.loss + right.logps.sum() + dpo_loss(ref, ref, ref, ref, beta=0.1, f_divergence="js").loss
also_right = head.dpo_loss(hidden, labels, ref, beta=0.1, token_weights=torch.ones(4, 6)), Preference(ref, beta=0.1)
objects = DPOLoss(beta=0.1, loss_type="ipo"), TrainConfig(beta=0.2)

linear_dpo_loss(hidden, weight, labels, ref, betta=0.1)  # wrong
linear_dpo_loss(hidden, weight, labels, ref, loss_type="sigmod")  # wrong
head.dpo_loss(hidden, labels, ref, betta=0.1)  # wrong
head.sequence_logps(hidden, labels, reduction="average")  # wrong
Preference(ref, betta=0.1)  # wrong
simpo_loss(ref, ref)  # wrong
sequence_logps(hidden, labels, impl="gpu")  # wrong
linear_sequence_logps(hidden, weight, labels, stats=("entropies",))  # wrong
dpo_loss(ref, ref, ref, ref).chosen_reward  # wrong
DPOLoss(f_divergence="kl")  # wrong
"""


@pytest.mark.full
def test_mistakes_that_a_type_checker_finds(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # nearly all of the time would go into their own code; what is wrong here is what our signatures say
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-transformers.*,torch.*]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--follow-imports=silent", str(script)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}  # an editable install is nothing that mypy finds
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert len(wrong) == 10
    assert {int(number) for number in re.findall(r"script\.py:(\d+): error", found.stdout)} == wrong, found.stdout
