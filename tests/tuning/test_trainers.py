"""Trainers and commands try the kernels before they begin, and a run that goes on keeps what it was begun with.

The CPU stands for a device of which no measurement comes with the package, and a verdict that is made up for one that
was measured."""

import copy
import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from short_runs import run

from dpo_kernels import dispatch, measure, verdicts
from dpo_kernels.cli import main
from dpo_kernels.tuning import trial
from dpo_kernels.verdicts import Refusal, Times, Verdict

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:learning_rate")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def tried(tmp_path, monkeypatch):
    """The heads that were tried, of which plain PyTorch is faster for paths A and B."""
    found = []

    def with_bar(device, heads, bar, **options):
        found.extend(heads)
        key = verdicts.key_of(device)
        verdict = verdicts.read(key) or Verdict(key, [("cpu", "float32"), ("cpu", "bfloat16")])
        ms = {path: {"torch": [1.0, 1.0], "cpu": [2.0 if path in "AB" else 0.5] * 2} for path in "ABCDE"}
        verdict.times += [Times(head, (16, 64), ms) for head in heads]
        verdicts.write(verdict)
        return verdict

    monkeypatch.setenv("DPO_KERNELS_CACHE", str(tmp_path / "verdicts"))
    monkeypatch.setattr(dispatch, "CHOICES", ())
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch", "cpu"])
    monkeypatch.setattr(dispatch, "_told", {"cpu"})
    monkeypatch.setattr(dispatch, "_pinned", [])
    monkeypatch.setattr(trial, "with_bar", with_bar)
    if dispatch.CPU_PROBLEM:
        pytest.skip(dispatch.CPU_PROBLEM)
    dispatch.forget()
    yield found
    dispatch.forget()


CHOSEN = {"A": "torch", "B": "torch", "C": "cpu", "D": "cpu", "E": "cpu"}
SHORT = {"max_steps": 2, "save_steps": 1, "eval_fraction": 0, "reference": "precompute", "save_total_limit": 9}


def back_to(directory, step):
    """As if it had been stopped after that step."""
    for later in [*directory.glob("checkpoint-*"), directory / "final"]:
        if later.name == "final" or int(later.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(later)


def kernels_of(directory, step):
    return json.loads((directory / f"checkpoint-{step}" / "progress.json").read_text())["kernels"]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_loop_tries_its_head_once(tmp_path, tried, mixed_precision):
    """In the dtype that it is multiplied in, and before the reference is scored."""
    for name in ("first", "second"):
        run(tmp_path / name, mixed_precision=mixed_precision, **SHORT)
        assert kernels_of(tmp_path / name, 2) == CHOSEN
    (head,) = tried
    assert head.dtype == ("float32" if mixed_precision == "no" else "bfloat16")
    assert head.hidden > 1 and head.vocab > 200


@pytest.mark.parametrize("settings", [{"tune": False}, {"impl": "cpu"}, {"impl": "torch"}], ids=str)
def test_the_loop_does_not_where_it_is_told(tmp_path, tried, settings):
    run(tmp_path, **SHORT | settings)
    assert tried == [] and set(kernels_of(tmp_path, 2).values()) == {settings.get("impl", "torch")}


def test_a_run_goes_on_with_the_kernels_that_it_was_begun_with(tmp_path, tried, monkeypatch):
    """With the same bits; where they cannot run any more, it says so and goes on."""
    _, straight = run(tmp_path / "straight", **SHORT | {"max_steps": 3})
    stopped = tmp_path / "stopped"
    run(stopped, **SHORT | {"max_steps": 3})
    back_to(stopped, 1)
    verdict = verdicts.read(verdicts.key_of(CPU))  # a second thought
    verdict.refused = [Refusal("cpu", None, "hung", "path C", "it did")]
    verdicts.write(verdict)
    dispatch.forget()
    _, resumed = run(stopped, **SHORT | {"max_steps": 3})
    assert resumed == straight
    assert kernels_of(stopped, 3) == CHOSEN
    dispatch._pinned.clear()
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    back_to(stopped, 2)
    with pytest.warns(UserWarning, match="not gone on from to the bit: it was computed by A torch, .* C cpu"):
        run(stopped, **SHORT | {"max_steps": 3})
    assert set(kernels_of(stopped, 3).values()) == {"torch"}


def test_checkpoints_of_earlier_versions_go_on(tmp_path):
    from dpo_kernels.training.checkpoint import FILES, write_checksums

    run(tmp_path, **SHORT)
    back_to(tmp_path, 1)
    file = tmp_path / "checkpoint-1" / "progress.json"
    progress = json.loads(file.read_text())
    del progress["kernels"]
    file.write_text(json.dumps(progress))
    write_checksums(file.parent, FILES)
    result, _ = run(tmp_path, **SHORT)
    assert result.steps == 2 and kernels_of(tmp_path, 2) == CHOSEN


# TRL's trainers


@pytest.fixture
def trainers():
    pytest.importorskip("trl", reason="tests the trainers of TRL, which is not installed")
    pytest.importorskip("peft", reason="is imported by what the tests share, and is not installed")
    import trl
    import trl_runs

    from dpo_kernels import trl as ours

    def trainer(directory, of=ours.DPOTrainer, **more):
        model = copy.deepcopy(trl_runs.prototype("llama"))
        return of(
            model,
            copy.deepcopy(model),
            args=trl.DPOConfig(**trl_runs.settings(directory, save_strategy="steps", save_steps=1, **more)),
            train_dataset=trl_runs.preferences(),
            processing_class=trl_runs.tokenizer(),
        )

    yield trainer
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def recorded(directory, step):
    state = json.loads((directory / f"checkpoint-{step}" / "trainer_state.json").read_text())
    found = state["stateful_callbacks"]["DPOKernelsCallback"]
    return (found[-1] if isinstance(found, list) else found)["attributes"]["families"]


def test_trl_trainers_try_their_head_when_they_are_made(tmp_path, tried, trainers):
    trainer = trainers(tmp_path)
    (head,) = tried
    assert (head.dtype, head.vocab) == ("float32", 128) and head.hidden == trainer.model.config.hidden_size
    trainer.train()
    assert recorded(tmp_path, 3) == CHOSEN
    trainers(tmp_path)
    assert len(tried) == 1


def test_trl_trainers_do_not_where_they_are_told(tmp_path, tried, trainers, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_TUNE", "0")
    trainers(tmp_path)
    assert tried == []


def test_trl_runs_go_on_with_their_kernels(tmp_path, tried, trainers, monkeypatch):
    trainers(tmp_path, max_steps=1).train()
    verdict = verdicts.read(verdicts.key_of(CPU))
    verdict.refused = [Refusal("cpu", None, "hung", "path C", "it did")]
    verdicts.write(verdict)
    again = trainers(tmp_path)
    assert dispatch.choose("auto", CPU, "C", torch.float32, 128, tried[0].hidden) == "torch"
    again.train(resume_from_checkpoint=True)
    assert dispatch.choose("auto", CPU, "C", torch.float32, 128, tried[0].hidden) == "cpu"
    assert recorded(tmp_path, 3) == CHOSEN
    dispatch._pinned.clear()
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    with pytest.warns(UserWarning, match="not gone on from to the bit: it was computed by"):
        trainers(tmp_path, max_steps=4).train(resume_from_checkpoint=True)
    assert set(recorded(tmp_path, 4).values()) == {"torch"}


def test_checkpoints_go_from_trl_to_ours_and_back(tmp_path, trainers):
    import trl

    trainers(tmp_path, trl.DPOTrainer, max_steps=1).train()
    trainers(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert recorded(tmp_path, 2) == CHOSEN
    trainer = trainers(tmp_path, trl.DPOTrainer, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


# Commands


def test_bench_tries_what_it_times(tried, monkeypatch):
    monkeypatch.setattr(measure, "FLUSH_BYTES", 2**20)
    monkeypatch.setattr(measure.gc, "collect", lambda *of: 0)
    size = ["--tokens", "64", "--hidden", "32", "--vocab", "300", "--rounds", "1", "--no-memory", "--peers"]
    assert main(["bench", *size]) == 0
    assert [tuple(head) for head in tried] == [("float32", 32, 300, None)]
    for option in (["--no-tune"], ["--quick"], ["--impl", "torch"]):
        tried.clear()
        arguments = size if option != ["--quick"] else size[6:]
        assert main(["bench", *arguments, *option, "--dtype", "bfloat16"]) == 0 and tried == []


def test_tune_prints_its_table(tried, monkeypatch, capsys):
    from dpo_kernels.tuning import command

    monkeypatch.setattr(command, "with_bar", trial.with_bar)
    assert main(["tune", "--hidden", "32", "--vocab", "300", "--dtype", "float32", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "float32, H=32, V=300" in out and "bfloat16, H=32, V=300" in out and str(verdicts.folder()) in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:2] in ("A ", "C ")]
    assert rows[0] == ["A", "16", "1", "2", "torch"] and rows[2] == ["C", "16", "1", "0.5", "cpu", "2.00", "x"]
    assert main(["tune", "--model", "google/gemma-2-2b"]) == 0
    assert tried[-1] == ("float32", 2304, 256000, 30.0)
    tried.clear()
    assert main(["tune"]) == 0 and len(tried) == 2
    assert main(["tune", "--forget"]) == 0 and "deleted" in capsys.readouterr().out
    assert main(["tune", "--forget"]) == 0 and "there is no verdict of" in capsys.readouterr().out


def test_tune_without_a_choice(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    assert main(["tune"]) == 1
    assert "no verdict: there is nothing but plain PyTorch to choose from on cpu" in capsys.readouterr().err
