"""The scripts in benchmarks/ run, write what they promise, and would notice a contender that is wrong."""

import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from places import ROOT, SHARED

BENCHMARKS = ROOT / "benchmarks"
PREFERENCES = SHARED / "data" / "preferences_en.jsonl"
TINY = {"TOKENS": "16", "HIDDEN": "16", "VOCAB": "128", "PAIRS": "32", "ROUNDS": "1"}
README = (BENCHMARKS / "README.md").read_text()
QUICK = ("--quick", "--impl", "torch", "--threads", "1")


@pytest.fixture(autouse=True)
def on_the_cpu():
    """Where the scripts run that are run here; a test of a device may have made it the default."""
    before = torch.get_default_device()
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(before)


# What benchmarks/README.md says to type


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.sh")))
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_shell_script_says_what_it_is_for(script, flag, tmp_path):
    done = subprocess.run(["bash", BENCHMARKS / script, flag], capture_output=True, text=True, cwd=tmp_path, timeout=30)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: {script} ") and f"    bash benchmarks/{script} " in done.stdout
    assert "set -" not in done.stdout and not list(tmp_path.iterdir())
    done = subprocess.run(["bash", BENCHMARKS / script, "--no-such-flag"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.startswith(f"usage: {script} ") and done.stdout == ""


COMMANDS = re.findall(
    r"^    (dpo-kernels bench.*|python benchmarks/.*|bash benchmarks/.*|pip install.*)", README, re.MULTILINE
)
BENCH = [shlex.split(command, comments=True)[1:] for command in COMMANDS if command.startswith("dpo-kernels")]


@pytest.mark.parametrize("arguments", BENCH, ids=lambda arguments: " ".join(arguments[1:4]))
def test_bench_is_called_as_it_may_be(arguments, monkeypatch, tmp_path, capsys):
    """With everything that is said but the sizes and the peers, which would take minutes."""
    from dpo_kernels.bench import command
    from dpo_kernels.cli import main

    if "--help" in arguments:
        pytest.raises(SystemExit, main, arguments)
        assert "--peers" in capsys.readouterr().out
        return
    monkeypatch.chdir(tmp_path)
    shape = command.find_shape
    monkeypatch.setattr(command, "find_shape", lambda name: replace(shape(name), hidden=32, vocab=512))
    small = ["--quick", "--rounds", "1", "--no-memory", "--max-length", "24", "--peers", "eager"]
    small += [] if "--impl" in arguments else ["--impl", "torch"]  # Triton's interpreter takes its time
    small += ["--tokens", "32", "64"] if "--tokens" in arguments else []
    small += ["--vocab", "512"] if "--vocab" in arguments else []
    assert main([*arguments, *small]) == 0
    assert "Trained head" in capsys.readouterr().out
    if "--plot" in arguments:
        assert (tmp_path / "curves").is_dir() and (tmp_path / "out.json").is_file() and (tmp_path / "out.csv").is_file()


def test_other_commands_are_those_that_need_a_gpu_or_a_registry():
    """And those of them that a CPU runs are run by test_gpu.py, with the flags that are said here among its own, and by
    test_gpu_model.py."""
    others = [command for command in COMMANDS if not command.startswith("dpo-kernels")]
    starts = (
        "pip install ",
        "bash benchmarks/gpu_runbook.sh ",
        *(f"python benchmarks/{n}.py " for n in ("gpu", "gpu_model")),
    )
    assert others and all(command.startswith(starts) for command in others)
    source = (BENCHMARKS / "gpu.py").read_text()
    flags = {flag for command in others if "gpu.py" in command for flag in re.findall(r"--[\w-]+", command)}
    assert flags and all(f'"{flag}"' in source for flag in flags)


@pytest.mark.release  # at the size that it has without being told
def test_microbenchmarks_as_they_are_called(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (command,) = re.findall(r"`pytest (benchmarks/microbenchmarks.py [^`]*)`", README)
    done = forks.python("-m", "pytest", "-p", "no:cacheprovider", *shlex.split(command), cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"4\d passed, 2 skipped", done.stdout)


# benchmarks/microbenchmarks.py


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("pytest_benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPO_KERNELS_TEST_DEVICE", "cpu")
        for name, value in TINY.items():
            patch.setenv(f"DPO_KERNELS_BENCH_{name}", value)
        spec = importlib.util.spec_from_file_location("microbenchmarks", BENCHMARKS / "microbenchmarks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


def test_every_operator_is_timed_beside_eager(tmp_path):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    options = {f"DPO_KERNELS_BENCH_{name}": value for name, value in TINY.items()}
    out = tmp_path / "out.json"
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-q", BENCHMARKS / "microbenchmarks.py")
    done = forks.python(*command, f"--benchmark-json={out}", DPO_KERNELS_TEST_DEVICE="cpu", **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = {}
    for benchmark in json.loads(out.read_text())["benchmarks"]:
        assert benchmark["stats"]["median"] > 0
        found.setdefault(benchmark["group"], set()).add(benchmark["params"]["contender"])
    expected = {}
    for dtype in ("torch.float32", "torch.bfloat16"):
        for mode in ("forward", "frozen head", "trained head"):
            expected[f"linear_sequence_logps, {mode}, {dtype}"] = {"ours", "eager"}
        expected[f"linear_dpo_loss, trained head, {dtype}"] = {"ours", "eager"}
        expected[f"sequence_logps, forward, {dtype}"] = {"ours", "eager"}
        expected[f"sequence_logps, forward and backward, {dtype}"] = {"ours", "ours in place", "eager"}
    for name in ("dpo_loss, sigmoid", "dpo_loss, hinge", "dpo_loss, ipo", "dpo_loss, robust"):
        expected[name] = {"ours", "eager"}
    for name in ("simpo_loss", "orpo_loss", "cpo_loss", "kto_loss"):
        expected[name] = {"ours", "eager"}
    assert found == expected


def test_operator_that_is_wrong_is_not_timed(ops, monkeypatch):
    """`benchmark` is None: the test has to fail before it is used."""
    ours, eager = ops.FROM_HIDDEN["linear_dpo_loss, trained head"]

    def off_by_a_percent(inputs):
        result = ours(inputs)
        return result._replace(gradients={**result.gradients, "weight": 1.01 * result.gradients["weight"]})

    monkeypatch.setitem(ops.FROM_HIDDEN, "linear_dpo_loss, trained head", (off_by_a_percent, eager))
    with pytest.raises(AssertionError, match="dweight: rms error"):
        ops.test_from_hidden_states(None, "linear_dpo_loss, trained head", "ours", torch.bfloat16)

    right = ops.contenders.ours_from_logits
    wrong = lambda *args, **kwargs: right(*args, **kwargs)._replace(token_logps=torch.zeros(8, 2))  # noqa: E731
    monkeypatch.setattr(ops.contenders, "ours_from_logits", wrong)
    with pytest.raises(AssertionError, match="token_logps: rms error"):
        ops.test_from_logits(None, "ours", False, torch.float32)

    for name, (mine, theirs) in ops.LOSSES.items():
        changed = lambda *args, mine=mine: 1.001 * mine(*args)  # noqa: E731
        monkeypatch.setitem(ops.LOSSES, name, (changed, theirs))
        with pytest.raises(AssertionError, match="losses: rms error"):
            ops.test_loss(None, name, "ours")


# benchmarks/revisions.py


@pytest.fixture(scope="module")
def revisions():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("revisions")


def worktrees(root):
    return subprocess.run(["git", "worktree", "list"], cwd=root, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def other_repository(tmp_path_factory):
    """A repository with a copy of the package. Its tag `old` lacks an operator that HEAD has, and in the working tree
    this operator is wrong."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(ROOT / "dpo_kernels", root / "dpo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (root / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "revisions.py", root / "benchmarks")
    (root / ".gitignore").write_text("__pycache__/\n")
    package = root / "dpo_kernels" / "__init__.py"
    original = package.read_text()
    who = ("-c", "user.name=a test", "-c", "user.email=test@example.invalid")

    def git(*arguments):
        subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)

    git("init", "--quiet")
    package.write_text(original + "\ndel sequence_logps\n")
    git("add", ".")
    git("commit", "--quiet", "-m", "old")
    git("tag", "old")
    package.write_text(original)
    git("commit", "--quiet", "-a", "-m", "new")
    package.write_text(
        original + "\n_right = sequence_logps\n\n\n"
        "def sequence_logps(*args, **options):\n"
        "    found = _right(*args, **options)\n"
        "    return found._replace(logps=1.1 * found.logps, token_logps=1.1 * found.token_logps)\n"
    )
    return root


def compare(root, *options):
    """Runs the script of that repository."""
    return forks.python(root / "benchmarks" / "revisions.py", *QUICK, *options, cwd=root)


@pytest.mark.release  # as below, in this repository
def test_revision_beside_the_working_tree(revisions, tmp_path):
    try:
        commit = revisions.commit_of("HEAD", "--base")
    except ValueError as error:
        pytest.skip(str(error))
    before, out = worktrees(ROOT), tmp_path / "out.json"
    done = compare(ROOT, "--base", "HEAD", "--only", "C", "--dtypes", "float32", "--rounds", 3, "--json", out)
    assert done.returncode == 0, done.stderr
    assert worktrees(ROOT) == before
    found = json.loads(out.read_text())
    assert (found["base"]["commit"], found["base"]["impl"], found["head"]["impl"]) == (commit, "torch", "torch")
    assert found["base"]["root"] != found["head"]["root"] == str(ROOT)
    assert {"commit", "cpu", "versions"} <= found["environment"].keys()
    (row,) = found["rows"]
    assert_compared(row, 3)
    assert "C fused loss  float32  " in done.stdout


def assert_compared(row, rounds):
    for side in ("base", "head"):
        assert len(row[side]["samples_ms"]) == rounds and row[side]["median_ms"] > 0
    assert row["low"] <= row["ratio"] <= row["high"] and row["verdict"] == "too few rounds to tell"
    assert {"logps", "loss", "dhidden", "dweight"} == row["difference"].keys()
    assert max(row["difference"].values()) < 1e-5 and row["operation"] == "C fused loss"


def test_revision_that_is_wrong_is_named_and_not_timed(other_repository, tmp_path):
    """And what is right there is compared."""
    out = tmp_path / "out.json"
    done = compare(
        other_repository, "--base", "HEAD", "--only", "C,E", "--dtypes", "float32", "--rounds", 1, "--json", out
    )
    assert done.returncode == 1 and "E forward, float32: wrong: error of logps" in done.stderr
    assert re.search("C fused loss +float32", done.stdout)
    right, row, _ = json.loads(out.read_text())["rows"]
    assert "median_ms" in row["base"] and "median_ms" not in row["head"] and "ratio" not in row
    assert row["difference"]["logps"] > 0.1
    assert_compared(right, 1)
    assert len(worktrees(other_repository).splitlines()) == 1


def test_what_an_old_revision_lacks_is_named(other_repository):
    done = compare(other_repository, "--base", "old")
    assert (
        done.returncode == 2 and "cannot be compared: ImportError: cannot import name 'sequence_logps'" in done.stderr
    )
    assert len(worktrees(other_repository).splitlines()) == 1


@pytest.mark.parametrize("sent", [pytest.param(signal.SIGINT, marks=pytest.mark.full), signal.SIGTERM])
def test_nothing_is_left_of_a_comparison_that_is_stopped(other_repository, sent):
    command = [sys.executable, "benchmarks/revisions.py", "--base", "HEAD", *QUICK]
    # a job in the background ignores SIGINT, and so would what it starts
    take_signals = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, cwd=other_repository, stderr=subprocess.PIPE, text=True, preexec_fn=take_signals
    )
    deadline = time.monotonic() + 60
    while len(worktrees(other_repository).splitlines()) == 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    root = Path(worktrees(other_repository).splitlines()[1].split()[0])
    assert root.is_dir()
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (1 if sent == signal.SIGINT else 143)
    assert len(worktrees(other_repository).splitlines()) == 1 and not root.parent.exists()


def test_revisions_that_cannot_be_had(revisions, other_repository, monkeypatch, tmp_path):
    monkeypatch.setattr(revisions, "REPOSITORY", tmp_path)
    with pytest.raises(
        ValueError, match=f"--base: there are no revisions to compare in {tmp_path}: .*not a git repository"
    ):
        revisions.commit_of("HEAD", "--base")
    monkeypatch.setattr(revisions, "REPOSITORY", other_repository / "benchmarks")
    with pytest.raises(ValueError, match="is no git repository of its own, but lies in that of"):
        revisions.commit_of("HEAD", "--base")
    monkeypatch.setattr(revisions, "REPOSITORY", other_repository)
    with pytest.raises(
        ValueError, match=f"--head: expected a commit, branch or tag of {other_repository}, got 'nowhere'"
    ):
        revisions.commit_of("nowhere", "--head")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="git, which is not installed"):
        revisions.commit_of("HEAD", "--base")


def test_extension_of_a_revision(revisions, tmp_path):
    assert [revisions.extension_for(impl, "cpu") for impl in ("auto", "cpu", "cuda")] == ["cpu", "cpu", "cuda"]
    assert revisions.extension_for("auto", "cuda") == "cuda"
    assert revisions.extension_for("torch", "cpu") is None and revisions.extension_for("triton", "cuda") is None
    revision = revisions.Revision("old", "0" * 40, tmp_path)
    revisions.build(revision, "cpu")
    assert revision.notes == ["it has no setup.py, so no native extension"]
    (tmp_path / "setup.py").write_text("import os\n\nprint(os.environ['DPO_KERNELS_BUILD'])\n")
    revisions.build(revision, "cpu")
    assert revision.notes[1:] == ["its setup.py builds no native extension"]
    (tmp_path / "setup.py").write_text("import os\n\nraise SystemExit('no ' + os.environ['DPO_KERNELS_BUILD'])\n")
    with pytest.raises(ValueError, match="old: its extension for cuda does not build: no cuda"):
        revisions.build(revision, "cuda")


def test_interval_holds_the_median(revisions):
    """Six coins all show heads once in 64 times, so that the extremes of six hold the median 62 times in 64."""
    six = revisions.interval([1.1, 1.6, 1.3, 1.2, 1.5, 1.4], 0.95)
    assert six == {"low": 1.1, "high": 1.6, "coverage": 1 - 2 / 64, "verdict": "slower"}
    assert revisions.interval([0.9, 0.8, 0.7], 0.95)["verdict"] == "too few rounds to tell"
    # of ten, one and eleven in 1024 have the median beyond the first and the second value
    ten = revisions.interval([0.9 + 0.02 * i for i in range(10)], 0.95)
    assert (ten["low"], ten["high"]) == pytest.approx((0.92, 1.06)) and ten["verdict"] == "no difference seen"
    assert ten["coverage"] == 1 - 2 * 11 / 1024
    assert revisions.interval([0.5] * 10, 0.95)["verdict"] == "faster"
    draw = random.Random(0)
    samples = [[draw.lognormvariate(0, 0.3) for _ in range(15)] for _ in range(2000)]
    held = [found["low"] <= 1 <= found["high"] for found in (revisions.interval(each, 0.95) for each in samples)]
    assert 0.95 < sum(held) / len(held) < 0.98


# benchmarks/train_step.py


@pytest.fixture(scope="module")
def train_step():
    for package in ("transformers", "accelerate", "datasets"):
        pytest.importorskip(package)
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)  # for the processes that it starts, too
        yield importlib.import_module("train_step")
    AcceleratorState._reset_state(reset_partial_state=True)


def steps(train_step, monkeypatch, out, *arguments):
    """What the script writes, run here; and what it ends with."""
    monkeypatch.setattr(sys, "argv", ["train_step.py", *QUICK, "--no-memory", "--json", str(out), *map(str, arguments)])
    threads = torch.get_num_threads()
    end = None
    try:
        train_step.main()
    except SystemExit as error:
        end = error.code
    finally:
        torch.set_num_threads(threads)
    return json.loads(out.read_text()), end


def test_training_steps_agree(train_step, monkeypatch, tmp_path, capsys):
    pytest.importorskip("trl")
    found, end = steps(train_step, monkeypatch, tmp_path / "out.json")
    assert end is None, end
    assert [table["reference"] for table in found["tables"]] == ["precompute", "copy"]
    assert len(found["batches"]) == 4 and {"commit", "cpu", "versions"} <= found["environment"].keys()
    losses = []
    for table in found["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        packed = train_step.PACKED
        assert list(rows) == ["no head", "eager", "TRL", "TRL, our head", "dpo_kernels", packed]
        for row in rows.values():
            assert len(row["samples_ms"]) == 3 and row["tokens_per_second"] > 0
            assert row["median_ms"] > row["gradients_ms"] > 0 and row["update_ms"] > 0
            # each prompt once, and nothing else that could be left out
            once = sum(batch["once"] for batch in found["batches"][1:]) / 3
            padded = sum(batch["positions"] for batch in found["batches"][1:]) / 3
            real = sum(batch["tokens"] for batch in found["batches"][1:]) / 3
            expected = (once, 0.0) if row["name"] == packed else (padded, 1 - real / padded)
            assert (row["positions"], row["padding"]) == pytest.approx(expected) and once < real < padded
        assert "losses" not in rows["no head"] and rows["dpo_kernels"]["over_ours"] == 1
        for name in ("eager", "TRL", "TRL, our head", "dpo_kernels", packed):
            assert len(rows[name]["losses"]) == 4 and rows[name]["loss_deviation"] < 1e-4
            assert name == packed or rows[name]["head_share"] < 1
            losses.append(rows[name]["losses"])
    # the policy starts at the reference, moves away, and where that one is computed makes no difference
    assert losses[0][0] == pytest.approx(0.693147, abs=1e-5)
    assert max(abs(loss - losses[0][0]) for loss in losses[0]) > 1e-2
    assert all(each == pytest.approx(losses[0], rel=1e-4) for each in losses)
    assert "of the positions are labelled" in capsys.readouterr().out


def test_training_steps_on_rankings_agree_with_those_on_their_pairs(train_step, monkeypatch, tmp_path):
    pytest.importorskip("trl")
    arguments = ("--responses", 4, "--reference", "precompute", "--contenders", "TRL", "dpo_kernels", train_step.PACKED)
    found, end = steps(train_step, monkeypatch, tmp_path / "out.json", *arguments)
    assert end is None, end
    rows = {row["name"]: row for row in found["tables"][0]["rows"]}
    for row in rows.values():
        assert row["losses"] == pytest.approx(rows["TRL"]["losses"], rel=1e-4)
    assert rows["TRL"]["positions"] == 6 / 4 * rows["dpo_kernels"]["positions"]  # three pairs, four answers
    assert rows[train_step.PACKED]["positions"] == sum(batch["once"] for batch in found["batches"][1:]) / 3


def test_training_step_that_is_wrong_or_missing_is_named(train_step, monkeypatch, tmp_path, capsys):
    class OtherLoss(train_step.Eager):
        def loss(self, batch):
            batch["labels"] = batch["labels"].clone()
            batch["labels"][0, -8:] = -100
            return super().loss(batch)

    class Failing(train_step.Ours):
        def update(self):
            raise RuntimeError("no such luck")

    monkeypatch.setitem(train_step.CONTENDERS, "other loss", OtherLoss)
    monkeypatch.setitem(train_step.CONTENDERS, "missing", partial(train_step.OfTrainer, module="no_such_package"))
    contenders = ("eager", "other loss", "missing", "dpo_kernels")
    one = ("--reference", "copy", "--learning-rate", "1e-3", "--contenders", *contenders)
    found, end = steps(train_step, monkeypatch, tmp_path / "out.json", *one)
    title = "Reference log-probabilities from a frozen copy, in every step"
    assert end.startswith(f"{title}: other loss: wrong: loss ") and end.count("\n") == 0
    rows = {row["name"]: row for row in found["tables"][0]["rows"]}
    assert rows["missing"]["reason"] == "not installed: No module named 'no_such_package'"
    assert "missing: not installed" in capsys.readouterr().out
    assert rows["dpo_kernels"]["loss_deviation"] < 1e-4 < train_step.TOLERANCE < rows["other loss"]["loss_deviation"]

    monkeypatch.setitem(train_step.CONTENDERS, "dpo_kernels", Failing)
    found, end = steps(train_step, monkeypatch, tmp_path / "out.json", *one[:5], "eager", "dpo_kernels")
    assert end == f"{title}: dpo_kernels: RuntimeError: no such luck"
    assert "median_ms" in found["tables"][0]["rows"][0]


def test_loss_that_is_not_a_number_is_another_one(train_step):
    losses = {"eager": [0.7, 0.6], "ours": [0.7, float("nan")]}
    rows = [
        {"name": name, "losses": of, "loss_deviations": train_step.loss_deviations(losses)[name]}
        for name, of in losses.items()
    ]
    table = [{"title": "a table", "rows": rows}]
    (problem,) = train_step.problems(table, train_step.TrainConfig())
    assert problem.startswith("a table: ours: wrong: loss nan of step 2")
    assert train_step.problems(table, train_step.TrainConfig(mixed_precision="bf16")) == []


def test_training_steps_on_real_preferences(train_step, monkeypatch, tmp_path):
    if not PREFERENCES.exists():
        pytest.skip("no real preferences here")
    options = ("--dataset", PREFERENCES, "--reference", "precompute", "--contenders", "eager", "dpo_kernels")
    found, end = steps(train_step, monkeypatch, tmp_path / "out.json", *options)
    assert end is None, end
    assert all(0 < batch["labelled"] < batch["tokens"] <= batch["positions"] for batch in found["batches"])
    assert found["tables"][0]["rows"][1]["loss_deviation"] < 1e-4


@pytest.mark.release  # a process that imports all that trains
def test_memory_of_a_training_step(train_step, monkeypatch):
    """Eager has logits [2B, T, V] in fp32 and more like them; they are most of what this model takes."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    monkeypatch.setattr(sys, "argv", ["train_step.py", *QUICK, "--reference", "precompute"])
    _, args = train_step.arguments()
    args.vocab = 16384
    (setup,) = train_step.setups(args)
    one = train_step.OneStep("eager", setup.largest())
    logits = train_step.positions(one.setup.batches[0]) * args.vocab * 4 / 2**20
    peak = train_step.measure.peak_memory(one, one, 1)
    assert isinstance(peak, float) and 2 * logits < peak < 8 * logits
