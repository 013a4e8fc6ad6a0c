"""The benchmark for a GPU runs on a CPU too, writes what it promises, and goes on without what hangs or dies."""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch._dynamo
from places import DEVICE, ROOT

from dpo_kernels import dispatch

BENCHMARKS = ROOT / "benchmarks"
GRADIENTS = {"dhidden", "dweight"}


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import gpu

        yield gpu


def forked(patch, gpu):
    """The process that measures begins as a copy of this one, which has imported all that it needs."""
    patch.setattr(gpu.multiprocessing, "get_context", lambda how, of=multiprocessing.get_context: of("fork"))


@pytest.fixture(scope="module")
def gpu_report(tmp_path_factory, gpu):
    """What the GPU's benchmark reports on the CPU, Triton's kernels interpreted, in larger blocks than ship."""
    if DEVICE != "cpu":
        pytest.skip("Triton's kernels are not interpreted where they are compiled")
    out, said = tmp_path_factory.mktemp("gpu") / "out.json", io.StringIO()
    options = ["--quick", "--device", "cpu", "--impl", "torch", "triton", "cuda", "--rounds", "1"]
    options += ["--only", "paths,E,masks", "--json", str(out)]
    options += ["--peers", "eager", "TRL", "Liger, not compiled", "QuACK", "QuACK, labelled"]
    # of the peers, one is compiled
    uncompiled = torch._dynamo.config.patch(disable=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), uncompiled:
        if dispatch.HAS_TRITON:
            patch.setattr(dispatch.load("triton"), "BLOCK_N", 32)
        patch.setenv("DPO_KERNELS_COMMIT", "a copy")
        patch.setattr(sys, "argv", ["gpu.py", *options])
        forked(patch, gpu)
        gpu.main()
    return json.loads(out.read_text()) | {"stdout": said.getvalue()}


def rows_of(report, title):
    (table,) = [table for table in report["tables"] if table["title"].startswith(title)]
    return {row["name"]: row for row in table["rows"]}


def test_gpu_rows_are_timed_or_say_why_not(gpu_report):
    assert len(gpu_report["tables"]) == 6 and gpu_report["left_out"] == []
    assert "NVIDIA" in gpu_report["unavailable"]["cuda"]
    assert gpu_report["environment"]["device"]["type"] == "cpu"
    for table in gpu_report["tables"]:
        assert table["title"] in gpu_report["stdout"]
        rows = {row["name"]: row for row in table["rows"]}
        for row in rows.values():
            assert "reason" in row or 0 < row["min_ms"] <= row["median_ms"], row
            assert "reason" not in row or row["package"] != "dpo_kernels", row
            if "over_baseline" in row:
                assert row["over_baseline"] == pytest.approx(row["median_ms"] / rows["1 x torch.mm"]["median_ms"])
        if table["title"].startswith("E"):
            assert rows["copy"]["percent"] == pytest.approx(100)
        else:
            own, bare = (rows[name]["median_ms"] for name in ("B frozen head, torch", "2 x torch.mm"))
            assert rows["B frozen head, torch"]["percent"] == pytest.approx(100 * bare / own)


def test_gpu_rows_of_tiles(gpu, monkeypatch):
    """Of every path, in this process."""
    args, _ = gpu_arguments(gpu, monkeypatch, "--rounds", "1", "--only", "tiles")
    monkeypatch.setattr(gpu, "TILE_MIB", (32, 64))
    if dispatch.HAS_TRITON:
        args.impl.append("triton")
        monkeypatch.setattr(dispatch.load("triton"), "BLOCK_N", 32)
    (job,) = gpu.jobs(args)
    rows = gpu.table(job, gpu.Harness(1, memory=False), args)["rows"]
    sized = [f"{impl}, tiles of {mib} MiB" for impl in args.impl for mib in gpu.TILE_MIB]
    paths = ("A forward", "B frozen head", "C fused loss", "D any loss")
    expected = {f"{path}, {size}" for path in paths for size in sized}
    assert {row["name"] for row in rows} == {"1 x torch.mm"} | expected
    assert all(row["median_ms"] > 0 and ("tiles" not in row["name"] or row["over_baseline"] > 0) for row in rows)


@pytest.mark.parametrize("title", ["paths", "masks"])
def test_gpu_contenders_are_right(gpu_report, title):
    rows = rows_of(gpu_report, title)
    found = {name: row for name, row in rows.items() if row["package"] == "dpo_kernels"}
    names = ["A forward", "B frozen head", "C fused loss", "C fused loss, 4 GiB", "D any loss"]
    expected = {name.replace(",", ", torch,") if "," in name else f"{name}, torch" for name in names}
    if dispatch.HAS_TRITON:
        expected |= {name.replace("torch", "triton") for name in expected} | {"A forward, triton, fused"}
    assert set(found) == expected
    for name, row in found.items():
        assert row["errors"]["logps"] < 1e-4 < rows["eager"]["errors"]["logps"], name
        for gradient in ("dhidden", "dweight"):
            assert row["errors"].get(gradient, 0) <= rows["eager"]["errors"][gradient], name
    gradients = {"A forward, torch": set(), "B frozen head, torch": {"dhidden"}, "D any loss, torch": set(GRADIENTS)}
    for name, kept in gradients.items():
        assert GRADIENTS & set(rows[name]["errors"]) == kept


@pytest.mark.parametrize("package, name", [("torch", "eager"), ("trl", "TRL"), ("liger_kernel", "Liger, not compiled")])
def test_gpu_peers_do_what_their_row_says(gpu_report, package, name):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    for title in ("paths", "masks"):
        rows = rows_of(gpu_report, title)
        if name not in ("eager", "TRL") and title == "paths":
            assert name not in rows
            continue
        for mode, gradients in ((", forward", set()), (", frozen head", {"dhidden"}), ("", GRADIENTS)):
            row = rows[name + mode]
            assert "reason" not in row and GRADIENTS & set(row["errors"]) == gradients, row


def test_gpu_peers_that_are_missing_are_named(gpu_report):
    if importlib.util.find_spec("quack"):
        pytest.skip("QuACK is installed")
    rows = rows_of(gpu_report, "masks")
    assert rows["QuACK"]["reason"] == rows["QuACK, labelled"]["reason"] == "not installed: pip install quack-kernels"
    assert "QuACK: not installed: pip install quack-kernels" in gpu_report["stdout"]


def gpu_arguments(gpu, monkeypatch, *arguments):
    command = ["gpu.py", "--quick", "--device", "cpu", "--impl", "torch", "--peers", "eager", *arguments]
    monkeypatch.setattr(sys, "argv", command)
    args = gpu.arguments()
    args.deadline = time.time() + 300
    return args, {"environment": {}, "tables": [], "left_out": []}


def test_process_that_is_lost_is_followed(gpu, monkeypatch, tmp_path):
    args, found = gpu_arguments(gpu, monkeypatch, "--patience", "0.2", "--json", str(tmp_path / "out.json"))
    row = {"title": "a table", "rows": []}
    for end, lost in ((None, "it did not return within 0 s"), (("error", "no such luck"), "the process failed: no")):
        receiver, sender = multiprocessing.Pipe(duplex=False)
        for message in (("device", "one"), ("at", "a"), ("table", row), ("at", "b"), *([end] if end else [])):
            sender.send(message)
        if end:
            sender.close()
        done, at, why = gpu.follow(receiver, "start", args, found)
        assert (done, at) == (1, "b") and why.startswith(lost)
    assert [table["title"] for table in json.loads((tmp_path / "out.json").read_text())["tables"]] == ["a table"] * 2


def test_contender_that_ends_the_process_is_left_out(gpu, monkeypatch, tmp_path):
    """The next process is told to leave it out; a table that is lost with nothing to leave out is named."""
    (tmp_path / "worker.py").write_text(
        "import os\n\n\n"
        "def work(left, excluded, args, pipe):\n"
        "    if not excluded:\n"
        "        pipe.send(('at', 'D any loss, torch'))\n"
        "        os._exit(1)\n"
        "    if len(left) == 2:\n"
        "        pipe.send(('table', {'title': 'first', 'rows': [], 'excluded': excluded}))\n"
        "    pipe.send(('at', 'inputs'))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    forked(monkeypatch, gpu)
    import worker

    args, found = gpu_arguments(gpu, monkeypatch, "--only", "paths,flat")
    left = list(gpu.jobs(args))
    gpu.supervise(worker.work, left, args, found)
    (table,) = found["tables"]
    assert table["excluded"] == {"D any loss, torch": "the process ended"}
    assert found["left_out"] == [f"{left[1].title}: the process ended"]

    args.deadline = time.time()
    gpu.supervise(worker.work, left, args, found)
    assert found["left_out"][1:] == [f"{job.title}: out of time" for job in left]


def test_memory_is_held_against_the_plan(gpu_report, gpu):
    """Here it is not measured; what a tenth more or less is, is said."""
    rows = rows_of(gpu_report, "paths")
    assert {name for name, row in rows.items() if "planned_mib" in row} >= {
        "B frozen head, torch",
        "eager",
        "eager, forward",
    }
    assert rows["eager, forward"]["planned_mib"] < rows["eager"]["planned_mib"]
    ours = {"name": "ours", "package": "dpo_kernels", "planned_mib": 100.0}
    table = {
        "title": "a table",
        "rows": [ours | {"peak_mib": 109.0}, ours | {"peak_mib": 111.0}, ours | {"peak_mib": 89.0}],
    }
    table["rows"] += [ours | {"peak_mib": "out of memory"}, {**ours, "package": "torch", "peak_mib": 500.0}]
    took = [f"a table: ours took {mib} MiB, planned were 100" for mib in (111, 89)]
    assert gpu.misplanned(table) == took


def test_gpu_launches_each_kernel_once(gpu, monkeypatch, capsys):
    args, _ = gpu_arguments(gpu, monkeypatch, "--once")
    if dispatch.HAS_TRITON:
        args.impl.append("triton")
    assert gpu.launch_once(args) == []
    at = [line.split(maxsplit=2)[2] for line in capsys.readouterr().err.splitlines()]
    names = ["E", "A forward", "B frozen head", "D any loss"]
    expected = [f"{name}, {impl}" for name in names for impl in args.impl]
    expected = ["A forward, triton, fused"] * ("triton" in args.impl) + expected
    assert [line.split(":")[0] for line in at] == expected

    def failing(inputs):
        raise RuntimeError("no such luck")

    own = replace(gpu.contenders.paths("torch")["A"], run=failing)
    monkeypatch.setattr(gpu, "launches", lambda args: [(gpu.HeadCase(*gpu.QUICK), [own, own])])
    assert gpu.launch_once(args) == ["A forward, torch: RuntimeError: no such luck"] * 2
    args.deadline = time.time() - 1
    assert gpu.launch_once(args) == ["A forward, torch: out of time"]


# gpu_runbook.sh

RUNBOOK = BENCHMARKS / "gpu_runbook.sh"
FIRST = ["wheels", "build", "environment", "tune", "paths", "gradients"]
REST = ["triton", "cuda", "tuning", "grids", "tiles", "launches", "peers", "memcheck", "racecheck"]
TRAINING = ["attention", "training", "one_rank"]
STEP = re.compile(r"^ *(?:\[ .* \] \|\| )?step (\S+) (\d+) ", re.MULTILINE)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a script for Linux")

# Write down what they are asked for. The Python is none, apart from setup.py's.
PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  setup.py*) exec "$REAL_PYTHON" "$@" ;;
  *"dpo_kernels tune"*) mkdir "$DPO_KERNELS_CACHE"; echo 'refused: triton in bfloat16 wrong at path A: by far' ;;
  *"dpo_kernels env"*) echo 'no such luck' >&2; exit 3 ;;
  "-c import xdist") exit 1 ;;
  *tests/tuning*) sleep 60 ;;
esac
"""
COMPILER = """#!/bin/bash
echo "$*" >> "$0.log"
if [ "$1" = --list-gpu-code ]; then echo sm_90; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then echo "$*" > "$2"; fi; shift; done
"""
NCU = """#!/bin/bash
if [ "$1" = --query-metrics ]; then printf 'sm__pipe_tensor_cycles_active  Counter\\nsm__cycles  Counter\\n'; exit; fi
echo "ncu $*" >> "$CALLS"
while [ $# -gt 1 ]; do if [ "$1" = --log-file ]; then out=$2; fi; shift; done
printf '%s\\n' '==PROF== Connected' $NCU_SAYS > "$out"
"""
SANITIZER = '#!/bin/bash\necho "compute-sanitizer $*" >> "$CALLS"\n'


@pytest.fixture
def book(tmp_path):
    """A copy of what the script needs, in which everything that computes only says what it was asked for; a function
    that runs it: its end, and the lines of its summary."""
    place = tmp_path / "copy"
    (place / "dpo_kernels").mkdir(parents=True)
    (place / "benchmarks").mkdir()
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, place)
    shutil.copy(ROOT / "dpo_kernels" / "__init__.py", place / "dpo_kernels")
    shutil.copytree(ROOT / "csrc", place / "csrc")
    # one of its steps hangs, and is not waited for
    script = RUNBOOK.read_text().replace("step tuning 20", "spare=0\nstep tuning 1")
    (place / "benchmarks" / RUNBOOK.name).write_text(script)
    tools = tmp_path / "bin"
    tools.mkdir()
    scripts = {"python": PYTHON, "nvcc": COMPILER, "cxx": COMPILER, "ncu": NCU, "compute-sanitizer": SANITIZER}
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)

    def run(*arguments, **environment):
        environment |= {"PYTHON": str(tools / "python"), "REAL_PYTHON": sys.executable, "CXX": str(tools / "cxx")}
        environment |= {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
        environment |= {"DPO_KERNELS_COMMIT": "a copy"}
        command = ["bash", place / "benchmarks" / RUNBOOK.name, *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
        summary = tmp_path / "out" / "summary.txt"
        return done, summary.read_text().splitlines() if summary.exists() else []

    run.out, run.tools, run.place, run.calls = tmp_path / "out", tools, place, tmp_path / "calls"
    return run


def test_runbook_ends_in_time():
    """Whatever hangs: the first part in four minutes, both in eight; training in four."""
    text = RUNBOOK.read_text()
    text = text.replace("step $tool 20", "step memcheck 20 \nstep racecheck 20")
    seconds = {name: int(limit) for name, limit in STEP.findall(text)}
    # what matters most comes first
    assert [name for name in seconds if name not in TRAINING] == FIRST + REST and {*TRAINING} < {*seconds}
    first, both, training = (
        sum(seconds[name] for name in names) for names in (FIRST, FIRST + REST, FIRST[:3] + TRAINING)
    )
    assert first <= 240 and both <= 480 and training <= 240
    assert seconds["tune"] > 60, "what it may take for one head"


@linux
def test_runbook_in_one_call_and_in_two(book, tmp_path):
    (tmp_path / "wheels").mkdir()
    done, whole = book("--wheels", tmp_path / "wheels", book.out, NCU_SAYS='"ID" "" "0" "1"')
    assert done.returncode == 1 and [line.split(":")[0] for line in whole[1:]] == FIRST + REST
    lines = {line.split(":")[0]: line for line in whole[1:]}
    assert whole[0] == "a copy, cuda, all"
    assert lines["build"].startswith("build: ok, ") and lines["build"].endswith("COMPILED HERE: no objects were given")
    assert lines["environment"].startswith("environment: FAILED (3), ")
    assert lines["environment"].endswith(": no such luck")
    assert re.search(r": one head in \d+ s, of 60; refused: triton in bfloat16 wrong$", lines["tune"])
    assert lines["tuning"].startswith("tuning: FAILED (124), ")
    assert lines["launches"].endswith(": 2 launches")
    # what steps left is given to later ones, and never twice
    took, given = zip(*(map(int, re.search(r", (\d+) s of (\d+):", line).groups()) for line in whole[1:]), strict=True)
    limits = [int(limit) for name, limit in STEP.findall(RUNBOOK.read_text()) if name not in TRAINING]
    for at in range(1, 1 + FIRST.index("paths")):
        assert limits[at] < given[at] <= sum(limits[: at + 1]) - sum(took[:at])
    assert (book.out / "verdict").is_dir()
    calls = book.calls.read_text()
    assert "-m dpo_kernels tune --device cuda --hidden 4096 --vocab 128256 --dtype bfloat16" in calls
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__pipe_tensor_cycles_active.avg.pct_of" in calls
    parts = ",".join(re.findall(r"gpu\.py .*--only (\S+)", calls))
    assert sorted(parts.split(",")) == sorted(gpu_parts()) and parts.startswith("paths,E,tiles")
    assert (
        calls.count("compute-sanitizer --tool ") == calls.count("benchmarks/gradients.py --seconds 10 --json ") + 1 == 2
    )

    shutil.rmtree(book.out)
    book.calls.unlink()
    done, first = book("--first", book.out)
    assert done.returncode == 1 and [line.split(":")[0] for line in first[1:]] == FIRST[1:]
    done, both = book("--rest", book.out, NCU_SAYS="==ERROR==ERR_NVGPUCTRPERM")
    assert both[: len(first)] == first and both[len(first)] == "a copy, cuda, rest"
    assert [line.split(":")[0] for line in both[len(first) + 1 :]] == ["build", "environment", *REST]
    again, launches = (next(line for line in both[len(first) :] if line.startswith(name)) for name in ("build", "laun"))
    assert again.endswith(": it is built") and book.calls.read_text().count("setup.py") == 1
    assert launches.startswith("launches: FAILED (1)") and launches.endswith("==ERROR==ERR_NVGPUCTRPERM")

    before = len(both)
    done, all_of_it = book("--training", book.out, DPO_KERNELS_PREFERENCES="pairs of mine.jsonl")
    assert all_of_it[:before] == both and all_of_it[before] == "a copy, cuda, training"
    assert [line.split(":")[0] for line in all_of_it[before + 1 :]] == ["build", "environment", *TRAINING]
    calls = book.calls.read_text()
    assert "benchmarks/attention.py --device cuda\n" in calls and calls.count("setup.py") == 1
    assert "-m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/one_rank.py --device cuda\n" in calls
    (steps,) = re.findall("benchmarks/train_step.py .*", calls)
    assert "--device cuda --mixed-precision bf16 --dataset pairs of mine.jsonl " in steps and "--quick" not in steps
    assert steps.endswith("--contenders TRL dpo_kernels dpo_kernels, each prompt once")


def gpu_parts():
    return (
        re.search(r"^PARTS = \((.*?)\)", (BENCHMARKS / "gpu.py").read_text(), re.MULTILINE)[1]
        .replace('"', "")
        .split(", ")
    )


@linux
def test_runbook_links_objects_of_the_same_sources(book, tmp_path):
    """Those that no Python is in; all is compiled where the sources are others."""
    pytest.importorskip("pybind11")
    objects, log = tmp_path / "objects", book.tools / "nvcc.log"
    done, _ = book("--prepare", objects)
    assert done.returncode == 0, done.stderr
    sources = [*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "csrc" / "cpu").glob("*.cpp")]
    kernels = {f"{source.stem}.o" for source in sources if source.stem != "bindings"}
    assert {path.name for path in objects.iterdir()} == kernels | {"sources", "commit"}
    assert (objects / "commit").read_text() == "a copy\n" and not list(book.place.rglob("*.so"))

    compiled = {}
    for change in ("", "// another one"):
        with (book.place / "csrc" / "tiles.h").open("a") as file:
            file.write(change)
        for tool in ("nvcc", "cxx"):
            (book.tools / f"{tool}.log").unlink(missing_ok=True)
        _, summary = book("--first", "--objects", objects, book.out)
        logs = "".join((book.tools / f"{tool}.log").read_text() for tool in ("nvcc", "cxx"))
        compiled[change] = re.findall(r"-c csrc/(\S+)", logs)
        assert log.read_text().count("-shared") == 1 and len(list(book.place.rglob("_cuda*.so"))) == 1
        (build,) = [line for line in summary if line.startswith("build: ok, ")]
        assert build.endswith("COMPILED HERE: the objects are of other sources" if change else "objects are of a copy")
    assert sorted(compiled[""]) == ["cpu/bindings.cpp", "cuda/bindings.cpp"]
    assert len(compiled["// another one"]) == len(kernels) + 2


@linux
@pytest.mark.release  # minutes
def test_runbook_on_a_cpu(tmp_path):
    """The first part, on which a GPU's few minutes are spent first. The rest are tests that run here anyhow, and
    figures that the other tests of this file ask for."""
    place = tmp_path / "copy"
    hidden = shutil.ignore_patterns(".*", "build", "__pycache__")
    shutil.copytree(ROOT, place, ignore=hidden)
    environment = os.environ | {"PYTHON": sys.executable, "DPO_KERNELS_COMMIT": "a copy", "PYTHONPATH": ""}
    environment["TORCHDYNAMO_DISABLE"] = "1"  # of the peers, one is compiled
    for name in ("TRITON_INTERPRET", "DPO_KERNELS_CACHE"):
        environment.pop(name, None)
    command = ["bash", place / "benchmarks" / RUNBOOK.name, "--dry-run", "--first", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    names = [line.split(":")[0] for line in done.stdout.splitlines()[1:]]
    assert names == FIRST[1:-1], done.stderr
    assert done.returncode == 0 and done.stdout.count(": ok, ") == len(names), done.stdout
    assert json.loads((tmp_path / "out" / "paths.json").read_text())["tables"]
    assert list((tmp_path / "out" / "verdict").glob("*.json"))
