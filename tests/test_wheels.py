"""What the compiled modules ask of a machine, and what a source distribution has.

The modules are those of the package that is imported: run beside an installed wheel and away from the sources, these
tests are about that wheel.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile

import pytest
from places import ROOT

# Of glibc, which until 2.34 was several libraries, and of GCC. The CUDA runtime is linked statically; the driver it
# looks for itself, when it is first called.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"}
SYSTEM |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
# The newest symbols of manylinux_2_34: Debian 12, Ubuntu 22.04, RHEL 9.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}


def readelf(*args):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    return subprocess.run(["readelf", *map(str, args)], capture_output=True, text=True, check=True).stdout


def numbers(version):
    return tuple(map(int, version.split(".")))


def needed(module):
    return set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", module)))


def newest_symbols(module):
    """The newest version that is asked for, of each library whose symbols have versions."""
    found = {}
    for library, version in re.findall(r"Name: ([A-Z]+)_([\d.]+)", readelf("--version-info", module)):
        found[library] = max(found.get(library, ()), numbers(version))
    return found


@pytest.fixture(params=["_native", "_cuda"])
def module(request):
    if not sys.platform.startswith("linux"):
        pytest.skip("wheels are built for Linux")
    spec = importlib.util.find_spec(f"dpo_kernels.{request.param}")  # one that cannot be loaded is not left out
    if spec is None:
        pytest.skip(f"{request.param} was not built")
    return spec.origin


def test_modules_need_what_every_linux_has(module):
    assert {"libc.so.6"} <= needed(module) <= SYSTEM


def test_a_library_of_cuda_would_be_noticed(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    for name in ("cuda", "cudart"):
        command = ["g++", "-shared", "-x", "c++", "/dev/null", f"-Wl,-soname,lib{name}.so.1", "-o", f"lib{name}.so"]
        subprocess.run(command, cwd=tmp_path, check=True)
    command = ["g++", "-shared", "-x", "c++", "/dev/null", "-L.", "-Wl,--no-as-needed", "-lcuda", "-lcudart"]
    subprocess.run([*command, "-o", "module.so"], cwd=tmp_path, check=True)
    assert needed(tmp_path / "module.so") - SYSTEM == {"libcuda.so.1", "libcudart.so.1"}


def test_modules_run_where_the_documentation_says(module):
    compilers = [numbers(version) for version in re.findall(r"GCC: \(.*\) ([\d.]+)", readelf("-p", ".comment", module))]
    library, version = platform.libc_ver()
    if library != "glibc" or numbers(version) > (2, 37) or not compilers or max(compilers) >= (13,):
        pytest.skip(f"what is built with {library} {version} and GCC {compilers} may ask for newer symbols")
    found = newest_symbols(module)
    assert {"GLIBC", "GLIBCXX"} <= found.keys()
    assert all(found[library] <= newest for library, newest in NEWEST.items() if library in found), found


def test_version_of_cuda():
    """1000 major + 10 minor: what says how new a driver has to be."""
    cuda = pytest.importorskip("dpo_kernels._cuda", reason="was not built")
    assert 12050 <= cuda.CUDA_VERSION < 20000 and cuda.CUDA_VERSION % 10 == 0


def test_source_distribution_has_what_a_build_takes(tmp_path):
    if not (ROOT / "csrc").is_dir():
        pytest.skip("the sources are not beside the tests")
    pytest.importorskip("pybind11", reason="pybind11, which the extension is built with, is not installed")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "dpo_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", ".*"))
    command, env = [sys.executable, "setup.py", "-q", "sdist"], {**os.environ, "DPO_KERNELS_BUILD": "none"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        packed = {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}
    files = {str(path.relative_to(tmp_path)) for top in ("csrc", "dpo_kernels") for path in (tmp_path / top).rglob("*")}
    files = {name for name in files if (tmp_path / name).is_file()}
    assert {"csrc/cuda/hopper.cuh", "csrc/tiles.h", "dpo_kernels/data/lengths.json", "dpo_kernels/_cuda.pyi"} <= files
    assert files | {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= packed
    # the tests need more than a build does: half of them, which setuptools would take, are of no use
    assert not [name for name in packed if name.startswith("tests/")]
