"""Processes that were started with what does not go together: each of them says so before a step."""

import json

import pytest

pytest.importorskip("accelerate")
from short_runs import TINY
from two_processes import run_in_two

SCRIPT = """
import json, os, sys
from pathlib import Path
import dpo_kernels.training.loop as loop
from dpo_kernels.training import TrainConfig, train

loop.plot_training_curves = lambda metrics, picture: None
rank, said = int(os.environ["RANK"]), []
for settings, of_the_second in json.loads(Path(sys.argv[1]).read_text()):
    try:
        train(TrainConfig(**settings | (of_the_second if rank else {})))
        said.append("")
    except ValueError as error:
        said.append(str(error))
Path(sys.argv[2] + str(rank)).write_text(json.dumps(said))
"""
SAME = "expected the same in all processes, got"
CASES = {
    "learning_rate": ({}, {"learning_rate": 0.5}, f"learning_rate: {SAME} 0.001 in process 0 and 0.5 in process 1"),
    "loss": ({"beta": 0.2}, {"loss_type": "ipo"}, f"loss_type: {SAME} ['sigmoid'] in process 0 and ['ipo'] in"),
    "rows": ({"sharding": "fsdp2"}, {"max_rows": 8}, f"max_rows: {SAME} 30 in process 0 and 8 in process 1"),
}


def test_settings(tmp_path):
    runs = [(TINY | {"output_dir": str(tmp_path / name)} | given, other) for name, (given, other, _) in CASES.items()]
    for found in said(tmp_path, runs):
        for text, (_, _, expected) in zip(found, CASES.values(), strict=True):
            assert expected in text


def test_folders_and_files(tmp_path):
    """Of the same names, which each process finds where it is."""
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        rows = [{"prompt": f"{n}", "chosen": f"yes {n}", "rejected": f"no {number}"} for n in range(8)]
        (tmp_path / str(number) / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = TINY | {"output_dir": "run", "max_steps": 1, "eval_fraction": 0}
    runs = [(settings | {"sharding": "fsdp2"}, {}), (settings | {"dataset": "data.jsonl", "reference": "copy"}, {})]
    apart = "import os\nos.chdir(os.environ['PLACE'] + os.environ['RANK'])\n"
    for folder, data in said(tmp_path, runs, apart, PLACE=f"{tmp_path}/"):
        assert "output_dir: expected one folder that all processes see, got another run in process(es) [1]" in folder
        assert f"the training data: {SAME}" in data
    assert not list(tmp_path.rglob("*.tmp"))


def said(tmp_path, runs, before="", **environment):
    """Of each process, what it said of each run."""
    script, file = tmp_path / "script.py", tmp_path / "runs.json"
    script.write_text(before + SCRIPT)
    file.write_text(json.dumps(runs))
    run_in_two(script, file, tmp_path / "said", ACCELERATE_USE_CPU="true", **environment)
    return [json.loads((tmp_path / f"said{rank}").read_text()) for rank in range(2)]
