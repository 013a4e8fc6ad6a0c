"""The scaling sweep runs, and would notice a cost that grows faster than the work, or memory that grows with it."""

import json
import subprocess
from types import SimpleNamespace

import pytest
from places import ROOT

from dpo_kernels.cli import main


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    return scaling


def tables(power, mib):
    """Of two contenders at three sizes; the second takes work ** power and mib(work)."""
    found = []
    for tokens in (256, 1024, 4096):
        table = {"N": tokens, "V": 32768, "H": 128, "mode": "forward", "rows": []}
        for name, ms, memory in (("A, fine", tokens, 24.0), ("A, odd", tokens**power, mib(tokens))):
            table["rows"].append(
                {"name": name, "median_ms": ms, "over_ours": 1.0, "over_limit": 1.0, "peak_mib": memory}
            )
        found.append(table)
    return found


@pytest.mark.parametrize(
    "power, mib, expected",
    [
        (1.0, lambda tokens: 24.0, None),
        (1.2, lambda tokens: 24.0, "A, odd: N=4096 V=32768: 1.74 times the cost of the cheapest size"),
        (1.0, lambda tokens: tokens / 32, "A, odd: N=4096 V=32768: 128 MiB, expected 64 at most"),
    ],
)
def test_growth_is_noticed(scaling, power, mib, expected):
    found = scaling.judged(tables(power, mib))
    problems = [problem for _, problem in found if problem]
    assert len(found) == 6
    assert problems == [] if expected is None else (len(problems) == 1 and problems[0].startswith(expected)), problems


def test_sums_of_hidden_size_may_grow(scaling):
    """[N, H] in fp32 is no tile: 0.5 MiB for 1024 rows of 128, a few of them."""
    (table, *_) = tables(1.0, lambda tokens: 24.0)
    table |= {"mode": "train", "N": 65536}
    assert [point.sums_mib for point in scaling.curves([table])["A, fine"]] == [3 * 32.0]


@pytest.fixture
def here(scaling, monkeypatch, capsys):
    """Runs the script in this process, and what it starts; pictures are empty."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, path, **options: path.touch())

    def bench(command):
        assert command[1:3] == ["-m", "dpo_kernels"]
        return subprocess.CompletedProcess(command, main([*map(str, command[3:])]))

    def run(*arguments):
        monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=bench))
        monkeypatch.setattr("sys.argv", ["scaling.py", *map(str, arguments)])
        status = 0
        try:
            scaling.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def test_both_sweeps_run(here, tmp_path):
    arguments = ["--rounds", "1", "--no-memory", "--impl", "torch"]
    arguments += ["--tokens", "8", "16", "--vocab", "256", "512", "--hidden", "16"]
    done = here(tmp_path, *arguments)
    # the times of such sizes mean nothing: either verdict is right
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    for name, along in (("tokens", "N"), ("vocab", "V")):
        found = json.loads((tmp_path / f"{name}.json").read_text())["tables"]
        assert len({table[along] for table in found}) == 2 and len(found) == 6
        assert list(tmp_path.glob(f"*_over_{along.lower()}_*.png"))
    assert "ns a logit" in done.stdout
