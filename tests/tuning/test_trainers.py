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
import transformers
from short_runs import run

from dpo_kernels import dispatch, measure, verdicts
from dpo_kernels.cli import main
from dpo_kernels.tuning import trial
from dpo_kernels.tuning.heads import head_of
from dpo_kernels.verdicts import Head, Times, Verdict

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


def test_a_run_after_another_is_a_run_of_its_own(tmp_path, tried):
    """Whatever an earlier one in this process went on with."""
    run(tmp_path / "one", **SHORT)
    assert dispatch._pinned == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_models_without_a_head_that_can_be_described_are_trained(tmp_path, trainers, monkeypatch):
    def head_of(*arguments):
        raise ValueError("no base model found")

    monkeypatch.setattr("dpo_kernels.trl._kernels.head_of", head_of)
    trainers(tmp_path, max_steps=1).train()


def test_a_reference_is_scored_by_the_kernels_of_the_run(tmp_path, monkeypatch):
    """Those of its checkpoint; and what others have scored is not taken for it."""
    scored = []
    from dpo_kernels.training import reference_model

    of = reference_model._score
    families = lambda: dispatch.choose("auto", CPU, "A", torch.float32, 300, 32)  # noqa: E731
    monkeypatch.setattr(reference_model, "_score", lambda *a: scored.append(families()) or of(*a))
    run(tmp_path, **SHORT)
    assert scored == ["torch"]
    verdict = verdicts.read(verdicts.key_of(CPU))
    verdict.times[0].ms["A"]["cpu"] = [0.5, 0.5]
    verdicts.write(verdict)
    dispatch.forget()
    again = tmp_path / "again"
    run(again, **SHORT, cache_dir=str(tmp_path / "cache"))
    assert scored == ["torch", "cpu"]
    back_to(again, 1)
    shutil.rmtree(tmp_path / "cache" / "reference")
    verdict.times[0].ms["A"]["cpu"] = [5.0, 5.0]
    verdicts.write(verdict)
    dispatch.forget()
    run(again, **SHORT, cache_dir=str(tmp_path / "cache"))
    assert scored == ["torch", "cpu", "cpu"] and kernels_of(again, 2)["A"] == "cpu"


def test_a_run_goes_on_with_the_kernels_that_it_was_begun_with(tmp_path, tried, monkeypatch):
    """With the same bits; where they cannot run any more, it says so and goes on."""
    _, straight = run(tmp_path / "straight", **SHORT | {"max_steps": 3})
    stopped = tmp_path / "stopped"
    run(stopped, **SHORT | {"max_steps": 3})
    back_to(stopped, 1)
    verdict = verdicts.read(verdicts.key_of(CPU))  # a second thought
    verdict.times[0].ms["C"]["cpu"] = [9.0, 9.0]
    verdicts.write(verdict)
    dispatch.forget()
    _, resumed = run(stopped, **SHORT | {"max_steps": 3})
    assert resumed == straight
    assert kernels_of(stopped, 3) == CHOSEN
    assert dispatch._pinned == []
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    dispatch.forget()
    back_to(stopped, 2)
    with pytest.warns(UserWarning, match="not gone on from to the bit: it was computed by A torch, .* C cpu"):
        run(stopped, **SHORT | {"max_steps": 3})
    assert set(kernels_of(stopped, 3).values()) == {"torch"}


def test_a_reference_is_kept_for_its_kernels(tmp_path):
    """Its numbers have the last bits of those that computed it."""
    settings = SHORT | {"cache_dir": str(tmp_path / "cache")}
    found = []
    for kernels in ("torch", "cpu", "torch"):
        row = dispatch.pin({"A": kernels})
        run(tmp_path / f"{len(found)}", **settings)
        dispatch.unpin(row)
        found.append(len([file for file in (tmp_path / "cache").rglob("*") if file.is_file()]))
    assert found == [found[0], 2 * found[0], 2 * found[0]] and found[0] > 0


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


def test_the_head_of_a_model():
    """A shard of its weight, and a packed one, say nothing of its shape."""
    from heads import build

    capped = build("gemma2")
    assert head_of(capped) == Head("float32", 32, 101, 0.8)
    assert head_of(capped, "bf16") == Head("bfloat16", 32, 101, 0.8)
    assert head_of(capped.half(), "no").dtype == "float16"
    model = build("llama")
    for weight in (torch.zeros(7), torch.zeros(3, 5), torch.zeros(101 * 16, 1, dtype=torch.uint8)):
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        assert head_of(model) == Head("float32", 32, 101)


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
    trainers(tmp_path, bf16=True)
    assert tried[1] == head._replace(dtype="bfloat16")


def test_a_trainer_keeps_its_kernels_once(tmp_path, trainers):
    from dpo_kernels.trl._kernels import DPOKernelsCallback, with_kernels

    trainer = trainers(tmp_path)
    with_kernels(trainer)
    assert sum(isinstance(each, DPOKernelsCallback) for each in trainer.callback_handler.callbacks) == 1


def test_trl_trainers_do_not_where_they_are_told(tmp_path, tried, trainers, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_TUNE", "0")
    trainers(tmp_path)
    assert tried == []


class Watching(transformers.TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, *arguments, **options):
        self.look()


@pytest.mark.parametrize("restore", [False, True])
def test_trl_runs_go_on_with_their_kernels(tmp_path, tried, trainers, monkeypatch, restore):
    """With the callbacks that the trainer was made with, or made anew from the checkpoint."""
    options = {"restore_callback_states_from_checkpoint": restore}
    trainers(tmp_path, max_steps=1).train()
    verdict = verdicts.read(verdicts.key_of(CPU))
    verdict.times[0].ms["C"]["cpu"] = [9.0, 9.0]
    verdicts.write(verdict)
    again = trainers(tmp_path, **options)
    assert dispatch.choose("auto", CPU, "C", torch.float32, 128, tried[0].hidden) == "torch"
    seen = []
    again.add_callback(Watching(lambda: seen.append(dispatch.choose("auto", CPU, "C", torch.float32, 128, 32))))
    again.train(resume_from_checkpoint=True)
    assert set(seen) == {"cpu"} and dispatch._pinned == []  # a run has an end
    assert recorded(tmp_path, 3) == CHOSEN
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    dispatch.forget()
    with pytest.warns(UserWarning, match="not gone on from to the bit: it was computed by"):
        trainers(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=True)
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
    monkeypatch.setattr(measure.gc, "collect", lambda *of: 0)
    size = ["--tokens", "16", "--hidden", "32", "--vocab", "300", "--rounds", "1", "--no-memory", "--peers"]
    assert main(["bench", *size]) == 0
    assert [tuple(head) for head in tried] == [("float32", 32, 300, None)]
    tried.clear()
    for option in ("--no-tune", "--impl=torch"):
        assert main(["bench", *size, option, "--dtype", "bfloat16"]) == 0 and tried == []


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


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ([], {"again": False, "patience": trial.PATIENCE}),
        (["--again", "--patience", "7"], {"again": True, "patience": 7.0}),
    ],
    ids=str,
)
def test_tune_is_given_its_options(monkeypatch, options, given):
    from dpo_kernels.tuning import command

    def with_bar(device, heads, bar, **options):
        assert options == given and heads == [Head("float16", 32, 300)]
        return Verdict(verdicts.key_of(device))

    monkeypatch.setattr(command, "with_bar", with_bar)
    assert main(["tune", "--device", "cpu", "--hidden", "32", "--vocab", "300", "--dtype", "float16", *options]) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--model", "a/model", "--hidden", "32"], "--model: a model says --hidden and --vocab already, got both"),
        (["--model", "a/model", "--vocab", "32"], "--model: a model says --hidden and --vocab already, got both"),
        (["--hidden", "32"], "--hidden: expected with --vocab, and --vocab with --hidden"),
        (["--vocab", "300"], "--hidden: expected with --vocab, and --vocab with --hidden"),
        (["--hidden", "0", "--vocab", "300"], "--hidden: expected a positive number, got 0"),
        (["--patience", "0"], "--patience: expected a number of seconds above 0, got 0.0"),
        (["--patience", "nan"], "--patience: expected a number of seconds above 0, got nan"),
        (["--device", "xpu"], "--device: PyTorch sees no device 'xpu' here"),
        (["--device", "abacus"], "--device: "),
    ],
    ids=str,
)
def test_tune_refuses_what_it_cannot_mean(tried, capsys, options, error):
    assert main(["tune", *options]) != 0
    assert f"dpo-kernels: error: {error}" in capsys.readouterr().err and tried == []


def test_tune_without_a_choice(monkeypatch, capsys):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "families", lambda device: ["torch"])
    assert main(["tune"]) == 1
    assert "no verdict: there is nothing but plain PyTorch to choose from on cpu" in capsys.readouterr().err
