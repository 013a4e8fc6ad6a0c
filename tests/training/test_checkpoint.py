"""What is wrong with a checkpoint is found, named, and passed over for the one before."""

import os
import subprocess

import pytest
import torch

pytest.importorskip("safetensors")

from dpo_kernels.training.checkpoint import (
    CHECKSUMS,
    FILES,
    PROGRESS,
    STATE,
    WEIGHTS,
    damage,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
)

IDENTITY = {"seed": 1, "the training data": "0" * 64, "the starting weights": "f" * 64}


def save(directory, step, limit=None):
    weights = {"w": torch.full((7, 11), float(step)), "b": torch.arange(5.0)}
    return save_checkpoint(directory, weights, {"step": step}, {"step": step, "identity": IDENTITY}, limit)


@pytest.fixture
def two(tmp_path):
    return save(tmp_path, 8), save(tmp_path, 12)


def cut(file):
    file.write_bytes(file.read_bytes()[:100])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_the_end(file):
    file.write_bytes(file.read_bytes()[:-1])


def append(file):
    file.write_bytes(file.read_bytes() + b"\n")


def zeros(file):
    """What some file systems leave after a power failure: the length, and nothing in it."""
    file.write_bytes(bytes(file.stat().st_size))


def empty(file):
    file.write_bytes(b"")


def other_step(file):
    """A file of another checkpoint, as a copy that was broken off leaves it."""
    file.write_bytes((file.parent.parent / "checkpoint-8" / file.name).read_bytes())


def a_directory(file):
    file.unlink()
    file.mkdir()


def a_dead_link(file):
    file.unlink()
    file.symlink_to("nowhere")


def unlink(file):
    file.unlink()


DAMAGE = {
    cut: "is damaged",
    flip: "is damaged",
    lose_the_end: "is damaged",
    append: "is damaged",
    zeros: "is damaged",
    other_step: "is damaged",
    empty: "is empty",
    a_directory: "cannot be read",
    a_dead_link: "is missing",
    unlink: "is missing",
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_the_checkpoint_before_a_damaged_one_is_taken(tmp_path, two, name, harm):
    harm(two[1] / name)
    with pytest.warns(UserWarning) as caught:
        assert find_checkpoint(tmp_path, "auto") == two[0]
    (message,) = (str(warning.message) for warning in caught)
    assert f"{two[1]} is not whole: {name} {DAMAGE[harm]}" in message and f"one before, {two[0]}" in message
    assert not any(other in message for other in FILES if other != name)
    weights = {"w": torch.zeros(7, 11), "b": torch.zeros(5)}
    state, progress = load_checkpoint(two[0], weights, IDENTITY)
    assert state == {"step": 8} and progress["step"] == 8 and (weights["w"] == 8).all()


@pytest.mark.parametrize("harm", [cut, empty, unlink, zeros, append, lose_the_end], ids=lambda harm: harm.__name__)
def test_without_its_checksums_a_checkpoint_is_not_trusted(tmp_path, two, harm):
    harm(two[1] / CHECKSUMS)
    if harm in (append, lose_the_end):  # a line's end more or less says the same
        assert damage(two[1]) == "" or CHECKSUMS in damage(two[1])
        return
    with pytest.warns(UserWarning, match=f"checkpoint-12 is not whole: {CHECKSUMS} is"):
        assert find_checkpoint(tmp_path, "auto") == two[0]


def test_checkpoints_of_earlier_versions_are_refused_in_so_many_words(tmp_path, two):
    for path in two:
        (path / CHECKSUMS).unlink()
    with pytest.raises(ValueError, match="checkpoint-12 is not whole: SHA256SUMS is missing .versions before this one"):
        find_checkpoint(tmp_path, "auto")


def test_where_no_checkpoint_is_whole_all_are_named(tmp_path, two):
    third = save(tmp_path, 16)
    cut(two[0] / WEIGHTS)
    unlink(two[1] / STATE)
    empty(two[1] / PROGRESS)
    flip(third / PROGRESS)
    with pytest.raises(ValueError, match="resume: there is no checkpoint to go on from") as error:
        find_checkpoint(tmp_path, "auto")
    for words in (
        f"{two[0]} is not whole: {WEIGHTS} is damaged",
        f"{two[1]} is not whole: {STATE} is missing, {PROGRESS} is empty",
        f"{third} is not whole: {PROGRESS} is damaged",
        "Delete them to start afresh",
    ):
        assert words in str(error.value)


def test_a_checkpoint_that_lost_all_files_is_named(tmp_path, two):
    for file in list(two[1].iterdir()):
        file.unlink()
    with pytest.warns(UserWarning, match=f"checkpoint-12 is not whole: {CHECKSUMS} is missing, {WEIGHTS} is missing"):
        assert find_checkpoint(tmp_path, "auto") == two[0]


def test_a_path_given_by_hand_is_not_replaced_by_another(tmp_path, two):
    assert find_checkpoint(tmp_path, str(two[1])) == two[1]
    for name in FILES:
        file = two[1] / name
        content = file.read_bytes()
        cut(file)
        with pytest.raises(ValueError, match=f"resume: {two[1]} is not whole: {name} is damaged"):
            find_checkpoint(tmp_path, str(two[1]))
        file.write_bytes(content)
    assert find_checkpoint(tmp_path, str(two[1])) == two[1]


def test_a_whole_checkpoint_says_nothing(tmp_path, two, recwarn):
    assert find_checkpoint(tmp_path, "auto") == two[1] and damage(two[1]) == "" and not recwarn.list
    (two[1] / "notes.txt").write_text("mine")  # what others put beside the files is theirs
    assert find_checkpoint(tmp_path, "auto") == two[1]
    done = subprocess.run(["sha256sum", "-c", "--strict", CHECKSUMS], cwd=two[1], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("OK") == 3


def test_checkpoints_of_other_trainers_are_left_alone(tmp_path):
    for name, file in (("checkpoint-3", "trainer_state.json"), ("checkpoint-5", "model.safetensors")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    for name in ("checkpoint-last", "checkpoint-4-copy", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert list_checkpoints(tmp_path) == [] and find_checkpoint(tmp_path, "auto") is None
    for step in (7, 8, 9):
        save(tmp_path, step, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9"]
    assert (tmp_path / "checkpoint-3").is_dir() and (tmp_path / "checkpoint-5").is_dir()


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 100, 20):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]


def test_a_damaged_checkpoint_does_not_push_out_whole_ones(tmp_path):
    """The run goes on from step 8 and writes step 10 while a damaged step 12 lies there."""
    for step in (4, 8, 12):
        save(tmp_path, step, limit=3)
    cut(tmp_path / "checkpoint-12" / WEIGHTS)
    save(tmp_path, 10, limit=2)
    whole = [path.name for path in list_checkpoints(tmp_path) if not damage(path)]
    assert whole == ["checkpoint-8", "checkpoint-10"]
    save(tmp_path, 12, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-12"]
    assert damage(tmp_path / "checkpoint-12") == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path, two):
    (two[1] / STATE).chmod(0)
    with pytest.warns(UserWarning, match=f"{STATE} cannot be read .Permission denied"):
        assert find_checkpoint(tmp_path, "auto") == two[0]


@pytest.mark.parametrize(
    "line", [b"x" + b'{"step": 1}', b'{"step": \xff}', b"[1]", b'{"loss": 1.0}', b'{"step": null}', b""], ids=str
)
def test_metrics_that_are_damaged_are_named(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n' + line + b'\n{"step": 2}\n{"ste')
    with pytest.raises(ValueError, match=f"{file} is damaged: expected a JSON object with a step in line 2, got"):
        read_metrics(file)


def test_a_file_in_the_place_of_a_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint-3").write_text("mine")
    with pytest.raises(ValueError, match=f"output_dir: expected no file {tmp_path}/checkpoint-3"):
        save_checkpoint(tmp_path, {}, {}, {"step": 3}, None)
    assert (tmp_path / "checkpoint-3").read_text() == "mine"
