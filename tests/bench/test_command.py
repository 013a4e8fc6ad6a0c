"""`dpo-kernels bench` runs, writes what it promises, and names what is missing."""

import csv
import functools
import importlib.util
import json
import os

import forks
import pytest
import torch
import unflushed

from dpo_kernels.bench import charts, command
from dpo_kernels.cli import main
from dpo_kernels.data.lengths import real_lengths

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Runs the command in a process of its own and gives its JSON, with what it printed, the CSV and the pictures."""

    @functools.cache  # it is asked for again where parameters change
    def run(*arguments, python=forks.python, plot=False):
        out = tmp_path_factory.mktemp("bench")
        files = ["--json", out / "out.json", "--csv", out / "out.csv", *(["--plot", out / "plots"] if plot else [])]
        quick = ("--quick", "--rounds", "2", "--threads", "1")
        done = python(unflushed.__file__, "dpo_kernels", "bench", *quick, *arguments, *files)
        assert done.returncode == 0, done.stderr
        with (out / "out.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        pictures = sorted((out / "plots").glob("*"))
        return json.loads((out / "out.json").read_text()) | {
            "stdout": done.stdout,
            "stderr": done.stderr,
            "csv": lines,
            "pictures": pictures,
        }

    return run


@pytest.fixture(
    scope="module",
    params=[forks.python, pytest.param(forks.python_alone, marks=pytest.mark.release)],
    ids=["not compiled", "compiled"],  # what torch.compile is given
)
def with_peers(bench, request):
    masks = ["all", "real"] if request.param is forks.python else ["real"]  # a compiler takes its time for each
    return bench("--mask", *masks, "--max-length", "24", "--no-memory", python=request.param, plot=True)


@pytest.fixture(scope="module", params=[("64",), pytest.param(("32", "64"), marks=pytest.mark.release)], ids=", ".join)
def all_modes(bench, request):
    modes = ["--mode", "forward", "frozen", "train", "logits", "--dtype", "float32", "bfloat16"]
    return bench(*modes, "--tokens", *request.param, "--peers", "eager", "eager, not in fp32", "--no-memory")


# Both reports, each of the two ways; what one says has nothing to do with the other.
both = pytest.mark.parametrize(
    ("with_peers", "all_modes"),
    [(forks.python, ("64",)), pytest.param(forks.python_alone, ("32", "64"), marks=pytest.mark.release)],
    ids=["not compiled, 64", "compiled, 32, 64"],
    indirect=True,
)


def masks_of(report):
    return report["arguments"]["mask"]


def sizes_of(report):
    return report["arguments"]["tokens"]


def rows_of(report, title):
    (table,) = [table for table in report["tables"] if table["title"].startswith(title)]
    return {row["name"]: row for row in table["rows"]}


def test_report_says_where_it_comes_from(with_peers):
    environment = with_peers["environment"]
    assert {"date", "commit", "cpu", "threads", "python", "versions"} <= set(environment)
    assert environment["threads"] == 1 and environment["device"]["type"] == "cpu"
    assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert with_peers["arguments"]["quick"] is True
    assert "cuda" in with_peers["unavailable"] and "impl='cuda' does not run here" in with_peers["stdout"]
    assert "run/s" in with_peers["stderr"] or "s/run" in with_peers["stderr"]  # the progress bar


@both
def test_every_row_is_timed_or_says_why_not(with_peers, all_modes):
    titles = {"all": "Trained head, every position", "real": "Trained head, real batch"}
    for mask, table in zip(masks_of(with_peers), with_peers["tables"], strict=True):
        assert table["title"].startswith(titles[mask])
    assert len(all_modes["tables"]) == 5 * 2 * len(sizes_of(all_modes))
    for report in (with_peers, all_modes):
        for table in report["tables"]:
            assert table["title"] in report["stdout"]
            rows = {row["name"]: row for row in table["rows"]}
            for row in rows.values():
                assert "reason" in row or 0 < row["min_ms"] <= row["median_ms"], row
                assert "reason" not in row or row["package"] != "dpo_kernels", row
                if "over_limit" in row:
                    assert row["over_limit"] == pytest.approx(row["median_ms"] / rows[row["limit"]]["median_ms"])
                if "over_ours" in row:
                    assert row["over_ours"] == pytest.approx(row["median_ms"] / rows[table["ours"]]["median_ms"])


def test_ours_are_right(with_peers):
    for table in with_peers["tables"]:
        rows = rows_of(with_peers, table["title"])
        ours = [row for row in rows.values() if row["package"] == "dpo_kernels"]
        assert {row["name"][0] for row in ours} == {"C", "D"} and len(ours) >= 2
        for row in ours:
            # eager in the same precision, with room for sums of few terms that differ by luck
            for name, error in row["errors"].items():
                assert error <= 2 * rows["eager"]["errors"][name] + 1e-7, (table["title"], row["name"], name)


@pytest.mark.parametrize(
    "package, name",
    [
        ("trl", "TRL"),
        ("liger_kernel", "Liger, compiled"),
        ("liger_kernel", "Liger, not compiled"),
        ("cut_cross_entropy", "CCE torch_compile"),
        ("torch", "eager"),
        ("torch", "eager, TRL <= 1.14"),
        ("torch", "eager, torch.compile"),
        ("torch", "F.linear_cross_entropy"),
        ("torch", "F.linear_cross_entropy, 256 rows"),
    ],
)
def test_peers_compute_the_same(with_peers, package, name):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if name.startswith("F.") and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this version of PyTorch has no linear_cross_entropy")
    for table in with_peers["tables"]:
        row = rows_of(with_peers, table["title"])[name]
        if "compile" in name and not row.get("reason", "wrong").startswith("wrong"):
            pytest.skip(f"torch.compile does not work here: {row['reason']}")
        assert "reason" not in row, row
        assert max(row["errors"].values()) < 1e-4, row


def test_responses_alone_are_what_the_head_gets_of_packed_batches(bench):
    """As many labels as in the padded batch, in [2B, L]."""
    options = (
        "--mask",
        "real",
        "responses",
        "--max-length",
        "1024",
        "--no-memory",
        "--impl",
        "torch",
        "--peers",
        "eager",
    )
    padded, alone = bench(*options, "--tokens", "64")["tables"]
    assert alone["title"].startswith("Trained head, responses of a real batch: ")
    assert padded["N"] == alone["N"] and alone["positions"] < padded["positions"]
    lengths = real_lengths(64, 1024)
    longest = max(max(chosen, rejected) for _, chosen, rejected in lengths)
    assert alone["positions"] == 2 * len(lengths) * longest
    assert all("reason" not in row for row in alone["rows"])


def test_modes_have_the_gradients_that_they_say(all_modes):
    expected = {
        "Forward only": set(),
        "Frozen head": {"dhidden"},
        "Trained head": {"dhidden", "dweight"},
        "From logits, forward, ": set(),
        "From logits, forward and backward": {"dlogits"},
    }
    for table in all_modes["tables"]:
        (gradients,) = [found for title, found in expected.items() if table["title"].startswith(title)]
        for row in table["rows"]:
            if row["errors"]:
                assert {name for name in row["errors"] if name.startswith("d")} == gradients, row


def test_bf16_inputs_keep_exact_log_probabilities(all_modes):
    tables = [table for table in all_modes["tables"] if table["dtype"] == "bfloat16" and table["mode"] != "train"]
    assert len(tables) == 4 * len(sizes_of(all_modes))
    for table in tables:
        rows = {row["name"]: row for row in table["rows"]}
        rounded = rows["eager, not in fp32" if table["mode"].startswith("logits") else "eager"]
        ours = [row for row in rows.values() if row["package"] == "dpo_kernels"]
        assert ours and all(
            row["errors"]["token_logps"] < 1e-5 < 1e-3 < rounded["errors"]["token_logps"] for row in ours
        )


def test_limits_do_the_products_that_a_mode_takes(all_modes):
    limits = {table["mode"]: table["rows"][0]["name"] for table in all_modes["tables"]}
    expected = {"forward": "1 x torch.mm", "frozen": "2 x torch.mm", "train": "3 x torch.mm"}
    logits = {"logits, forward": "read", "logits, forward and backward": "read, scale in place"}
    assert limits == expected | logits
    for table in all_modes["tables"]:
        measure = "gb_per_s" if table["mode"].startswith("logits") else "tflops"
        assert all(measure in row for row in table["rows"])


@both
def test_csv_has_a_line_for_each_row(all_modes, with_peers):
    for report in (all_modes, with_peers):
        assert len(report["csv"]) == sum(len(table["rows"]) for table in report["tables"])
    first = all_modes["csv"][1]
    row = all_modes["tables"][0]["rows"][1]
    assert float(first["median_ms"]) == row["median_ms"] and first["name"] == row["name"]
    assert float(first["err_logps"]) == row["errors"]["logps"]
    assert (first["mode"], first["mask"], first["dtype"], first["N"], first["V"]) == (
        "forward",
        "all",
        "float32",
        str(sizes_of(all_modes)[0]),
        "512",
    )
    assert first["torch"] and first["device"] and first["commit"] == (all_modes["environment"]["commit"] or "")


def test_pictures(with_peers):
    """Bars for every table."""
    assert len(with_peers["pictures"]) == len(masks_of(with_peers))
    for picture in with_peers["pictures"]:
        assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 10_000
        assert str(picture) in with_peers["stdout"]


def test_which_pictures_are_drawn(all_modes, tmp_path, monkeypatch):
    """Bars for every table; curves over N, where there are two, for every mode and dtype."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: path.touch())
    sizes = len(sizes_of(all_modes))
    pictures = list(charts.draw(all_modes["tables"], tmp_path))
    assert set(pictures) == {*tmp_path.iterdir()} and len(pictures) == 10 * sizes + 10 * (sizes > 1)
    assert sum("_over_n_" in picture.name for picture in pictures) == 10 * (sizes > 1)


def test_curves_show_every_row_and_the_limit(tmp_path, monkeypatch):
    def row(name, package, ms):
        return {"name": name, "package": package, "median_ms": ms, "peak_mib": 2.0 * ms, "errors": {"loss": 1e-9}}

    drawn = []
    figure_of = charts._figure
    monkeypatch.setattr(charts, "_figure", lambda *size: drawn.append(figure_of(*size)) or drawn[-1])
    labels = {"mode": "train", "mask": "all", "dtype": "float32", "H": 8, "N": 64}
    tables = [
        {"title": f"V={v}", "V": v, **labels}
        | {
            "rows": [
                {"name": "limit", "package": "torch", "median_ms": v / 4, "errors": {}},
                row("ours", "dpo_kernels", v / 2),
            ]
        }
        for v in (1024, 512)
    ]
    pictures = list(charts.draw(tables, tmp_path))
    assert [picture.name for picture in pictures] == [
        "train_all_n64_h8_v1024_float32.png",
        "train_all_n64_h8_v512_float32.png",
        "train_all_over_v_n64_h8_float32.png",
    ]
    time, memory = drawn[-1].axes
    assert {line.get_label(): list(line.get_ydata()) for line in time.lines} == {
        "limit": [128, 256],
        "ours": [256, 512],
    }
    assert {line.get_label(): list(line.get_ydata()) for line in memory.lines} == {"ours": [512, 1024]}
    assert time.get_xscale() == time.get_yscale() == "log"


@pytest.mark.release  # three processes; the harness is tested with two
def test_memory_is_measured_beside_time(bench):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    report = bench("--tokens", "256", "--vocab", "32768", "--hidden", "8", "--peers", "eager", "--impl", "torch")
    rows = {row["name"]: row for row in report["tables"][0]["rows"]}
    # [256, 32768] in fp32: the log-softmax, and in its backward two gradients
    assert rows["eager"]["peak_mib"] == pytest.approx(96, abs=16)
    assert "peak_mib" not in rows["3 x torch.mm"] and rows["D any loss, torch"]["peak_mib"] < 40


def test_missing_peer_is_named_with_what_installs_it(monkeypatch, capsys):
    version = command.measure.version
    monkeypatch.setattr(command.measure, "version", lambda name: None if name == "liger_kernel" else version(name))
    arguments = ["--quick", "--rounds", "1", "--no-memory", "--impl", "torch", "--peers", "Liger, not compiled"]
    assert main(["bench", *arguments]) == 0
    assert "Liger, not compiled: not installed: pip install liger-kernel" in capsys.readouterr().out


SMALL = ["--rounds", "1", "--no-memory", "--peers", "--impl", "torch"]


def test_what_is_too_small_is_named_with_what_to_raise(monkeypatch, capsys):
    """On a CPU where a call takes a minute and on one where it takes no time, so that this one does not matter."""
    monkeypatch.setitem(command.TOO_SHORT, "cpu", 6e4)
    assert main(["bench", "--quick", *SMALL, "--mode", "train", "logits"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("too small")]
    start = "too small to mean anything, less than 60000 ms a call: "
    assert said == [
        start + "C fused loss, torch; D any loss, torch. Raise --tokens, --hidden or --vocab",
        start + "E, torch. Raise --tokens or --vocab",
        start + "E, torch; E in place, torch. Raise --tokens or --vocab",
    ]
    monkeypatch.setitem(command.TOO_SHORT, "cpu", 0.0)
    assert main(["bench", "--quick", *SMALL]) == 0
    assert "too small" not in capsys.readouterr().out


def test_models_by_name(capsys):
    arguments = ["--rounds", "1", "--no-memory", "--peers", "--tokens", "8", "--impl", "torch", "--mode", "forward"]
    assert main(["bench", "--model", "SmolLM2-135M", *arguments]) == 0
    assert "H=576 V=49152, float32 (SmolLM2-135M)" in capsys.readouterr().out


def test_ours_without_a_result_is_a_failure(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("dpo_kernels.bench.contenders.linear_dpo_loss", fail)
    assert main(["bench", "--quick", "--rounds", "1", "--no-memory", "--peers", "--impl", "torch"]) == 1
    captured = capsys.readouterr()
    assert "C fused loss, torch: RuntimeError: no such luck" in captured.err and "D any loss" in captured.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "12"], "--tokens: expected a multiple of 8"),
        (["--vocab", "0"], "--vocab: expected positive numbers, got 0"),
        (["--peers", "nobody"], "--peers: expected some of"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "llama-3-8b", "--vocab", "100"], "--model: a model says --hidden and --vocab already"),
        (["--device", "tpu"], "--device"),
        (["--device", "meta"], "--device: expected a CPU or a CUDA device, got 'meta'"),
        (["--impl", "cuda"], "'cuda' cannot run on device 'cpu'"),
        (["--rounds", "0"], "--rounds: expected at least 1"),
        (["--chunk-gib", "-1"], "--chunk-gib: expected a positive number"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    assert main(["bench", "--quick", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err and captured.out == ""
