"""How the extension is built, and the kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

import ast
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from places import ROOT

NATIVE = ROOT / "tests" / "impl" / "native"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
pytest.importorskip("pybind11", reason="pybind11, which the extension is built with, is not installed")
if not (ROOT / "csrc").is_dir():
    pytest.skip("the sources are not beside the tests", allow_module_level=True)


def instruction_sets():
    """The table of setup.py, read without running it."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "INSTRUCTION_SETS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no INSTRUCTION_SETS")


def run(*args, cwd=None, timeout=300, **environment):
    command = list(map(str, args))
    env = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def succeeds(*args, **options):
    done = run(*args, **options)
    assert done.returncode == 0, f"{args}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}"
    return done


COMMON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden"]


def build_module(out, *flags):
    """Compiles csrc as setup.py does, but with flags of its own, to the module `out`."""
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    files = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    flags_of = instruction_sets()
    common = [*COMMON, *flags]
    objects = [out.with_name(f"{file.stem}.o") for file in files]

    def compile_one(file, obj):
        succeeds(*common, *flags_of.get(file.name, []), *includes, "-c", file, "-o", obj)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, files, objects))
    succeeds(*common, "-shared", *objects, "-o", out)


@pytest.mark.release
def test_sanitizers(tmp_path):
    """Every kernel, storage type and instruction set; each tensor in an allocation of its very size. The driver ends
    only after each kernel has overstepped by one entry and the sanitizer has killed it for that."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    libraries = [run("g++", f"-print-file-name={name}").stdout.strip() for name in ("libasan.so", "libubsan.so")]
    if not all(os.path.isabs(library) for library in libraries):
        pytest.skip("g++ has no libasan or libubsan")
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
    build_module(tmp_path / f"_native{SUFFIX}", "-O0", "-g1", *sanitize)
    # libstdc++ too, whose exceptions libasan must find when it starts
    libraries.append(run("g++", "-print-file-name=libstdc++.so.6").stdout.strip())
    command = [sys.executable, NATIVE / "with_module.py", tmp_path / f"_native{SUFFIX}", NATIVE / "edges.py", "malloc"]
    environment = {"PYTHONPATH": str(ROOT), "LD_PRELOAD": ":".join(libraries), "OMP_WAIT_POLICY": "passive"}
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    # to find the names of functions takes longer than all the rest
    done = run(*command, **environment, ASAN_OPTIONS="detect_leaks=0:symbolize=0")
    if done.returncode != 0:
        done = run(*command, **environment, ASAN_OPTIONS="detect_leaks=0")
        pytest.fail(done.stdout[-3000:] + done.stderr[-6000:])
    assert "all kernels stayed inside, all oversteps were noticed" in done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A function that copies what a source distribution has to a place of its own, without a built extension."""

    def make(name):
        place = tmp_path_factory.mktemp(name)
        for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, place)
        shutil.copytree(ROOT / "csrc", place / "csrc")
        shutil.copytree(
            ROOT / "dpo_kernels", place / "dpo_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
        return place

    return make


def build(place, choice, **environment):
    return run(sys.executable, "setup.py", "build", cwd=place, DPO_KERNELS_BUILD=choice, **environment)


def built_modules(place):
    return list((place / "build").rglob(f"_native{SUFFIX}"))


# nvcc has a host compiler of its own, and would build the CUDA module for half a minute.
NO_NVCC = [folder for folder in os.environ["PATH"].split(os.pathsep) if shutil.which("nvcc", path=folder) is None]
BROKEN = {"CC": "/bin/false", "CXX": "/bin/false", "PATH": os.pathsep.join(NO_NVCC)}
WHEELS = Path("nvidia", "cu13", "bin", "nvcc")  # below a Python's packages
no_nvcc = pytest.mark.skipif(Path(sysconfig.get_path("purelib"), WHEELS).exists(), reason="pip installed an nvcc")


@pytest.mark.parametrize("choice", ["none", pytest.param(None, marks=no_nvcc), pytest.param("", marks=no_nvcc)])
def test_without_an_extension(copy, choice):
    """None asked for, or no compiler that works and none demanded: the package is built, the extension is not."""
    place = copy("without")
    done = build(place, choice, **BROKEN)
    assert done.returncode == 0, done.stderr
    assert not built_modules(place) and list((place / "build").rglob("dispatch.py"))
    asked_for_compiler = "/bin/false" in done.stdout + done.stderr
    assert asked_for_compiler == (choice != "none" and sys.platform.startswith("linux"))


def test_a_demanded_extension_that_does_not_compile_is_an_error(copy):
    place = copy("demanded")
    done = build(place, "cpu", **BROKEN)
    assert done.returncode != 0 and "/bin/false" in done.stderr and not built_modules(place)


@pytest.mark.parametrize("choice", ["cpu", None])
def test_no_compiler_at_all(copy, choice):
    """An error where the extension is demanded, and a warning elsewhere, that say what to do."""
    place = copy("no_compiler")
    done = build(place, choice, CC="no-such-cc", CXX="no-such-c++", PATH=os.pathsep.join(NO_NVCC))
    message = "dpo_kernels._native: expected a C++ compiler, found no 'no-such-c++': install g++, or set CXX"
    assert (done.returncode != 0) == (choice == "cpu"), done.stderr
    assert not built_modules(place)
    if choice == "cpu" or sys.platform.startswith("linux"):
        assert message in done.stderr


def test_unknown_choice_is_an_error(copy):
    done = build(copy("unknown"), "nonsense", **BROKEN)
    message = "DPO_KERNELS_BUILD: expected none, cpu or cuda, or nothing, got 'nonsense'"
    assert done.returncode != 0 and message in done.stderr


# Writes down what it is asked for, and makes an empty file of it.
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
if [ "$1" = --list-gpu-code ]; then echo sm_75 sm_80 sm_90; fi
while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is built unless it is asked for")
@pytest.mark.parametrize(
    "choice, has_nvcc, modules",
    [("cpu", True, {"_native"}), ("cuda", True, {"_native", "_cuda"}), (None, True, {"_native", "_cuda"})]
    + [pytest.param(None, False, {"_native"}, marks=no_nvcc)],
)
def test_what_is_compiled(copy, tmp_path, choice, has_nvcc, modules):
    """Each source once, for its own instruction set alone, or for the architectures that this nvcc knows."""
    for name in ("c++", "nvcc")[: 1 + has_nvcc]:
        (tmp_path / name).write_text(COMPILER)
        (tmp_path / name).chmod(0o755)
    place = copy("compiled")
    tools = {"CC": str(tmp_path / "c++"), "CXX": str(tmp_path / "c++")}
    done = build(place, choice, **tools, PATH=os.pathsep.join([str(tmp_path), *NO_NVCC]))
    assert done.returncode == 0, done.stderr
    assert {path.name.partition(".")[0] for path in (place / "build").rglob("*.so")} == modules

    def compiled(tool):
        asked = [line.split() for line in (tmp_path / f"{tool}.log").read_text().splitlines()]
        return [(next(Path(word).name for word in words if "csrc" in word), words) for words in asked if "-c" in words]

    sources = {path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")}
    wide = set().union(*instruction_sets().values())
    flags = {name: wide.intersection(words) for name, words in compiled("c++")}
    assert flags == {name: set(instruction_sets().get(name, ())) for name in sources}
    assert len(compiled("c++")) == len(sources) and all("-O3" in words for _, words in compiled("c++"))
    if "_cuda" in modules:
        sources = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.c*") if path.suffix in (".cu", ".cpp")}
        known = {f"-gencode=arch=compute_{a}" for a in ("80,code=sm_80", "90,code=sm_90", "80,code=compute_80")}
        flags = {name: {word for word in words if "gencode" in word} for name, words in compiled("nvcc")}
        hopper = dict.fromkeys(
            ("linear_fold.cu", "linear_gradients.cu", "exponentials.cu"), {"-gencode=arch=compute_90a,code=sm_90a"}
        )
        assert flags == dict.fromkeys(sources, known) | hopper and len(compiled("nvcc")) == len(sources)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheels of nvcc are for Linux")
@pytest.mark.parametrize("in_path", [False, True])
def test_nvcc_that_pip_installed(copy, tmp_path, in_path):
    """Taken where none is in the PATH, with the runtime beside it, which is linked with no other nvcc."""
    import pybind11
    import setuptools

    succeeds(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(succeeds(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    tools = {"c++": tmp_path / "bin" / "c++", "of wheels": packages / WHEELS}
    if in_path:
        tools["in path"] = tmp_path / "bin" / "nvcc"
    for tool in tools.values():
        tool.parent.mkdir(parents=True, exist_ok=True)
        tool.write_text(COMPILER)
        tool.chmod(0o755)
    others = os.pathsep.join({str(Path(module.__file__).parents[1]) for module in (pybind11, setuptools)})
    environment = dict.fromkeys(("CC", "CXX"), str(tools["c++"])) | {"PYTHONPATH": others}
    environment["PATH"] = os.pathsep.join([str(tmp_path / "bin"), *NO_NVCC])
    place = copy("wheels")
    done = run(python, "setup.py", "build", cwd=place, DPO_KERNELS_BUILD="cuda", **environment)
    assert done.returncode == 0, done.stderr
    taken = tools.pop("in path" if in_path else "of wheels")
    assert list((place / "build").rglob("_cuda*.so"))
    assert "of wheels" not in tools or not tools["of wheels"].with_name("nvcc.log").exists()
    link = taken.with_name("nvcc.log").read_text().splitlines()[-1].split()
    assert {"-shared", "--strip-all"} <= set(link)
    assert (f"-L{packages / WHEELS.parents[1] / 'lib'}" in link) == (not in_path)


@no_nvcc
def test_cuda_without_a_compiler_is_an_error(copy):
    done = build(copy("no_nvcc"), "cuda", **BROKEN)
    assert (
        done.returncode != 0 and "DPO_KERNELS_BUILD: expected an nvcc in the PATH for cuda, found none" in done.stderr
    )


@pytest.fixture(scope="module")
def module():
    return pytest.importorskip("dpo_kernels._native", reason="the extension was not built").__file__


def tool(name, *args):
    if shutil.which(name) is None:
        pytest.skip(f"no {name}")
    return succeeds(name, *args).stdout


def test_module_brings_no_openmp_and_exports_its_entry_alone(module):
    needed = [line for line in tool("readelf", "-d", module).splitlines() if "NEEDED" in line]
    assert any("libc.so" in line for line in needed) and not any("omp" in line for line in needed), needed
    # weak ones are templates of libstdc++, which are visible whatever -fvisibility says
    exported = [line.split()[-2:] for line in tool("nm", "-D", "--defined-only", module).splitlines()]
    assert [name for kind, name in exported if kind not in "WVu"] == ["PyInit__native"]
    assert not any("dpo_kernels" in name for _, name in exported)


def assert_asks_without_wide_instructions(path, symbol):
    """Of the function that says whether the processor has them."""
    asking = tool("objdump", "-d", "--no-show-raw-insn", f"--disassemble={symbol}", path)
    mnemonics = [line.split()[1] for line in asking.splitlines() if line.startswith("  ") and len(line.split()) > 1]
    assert "ret" in mnemonics and not [m for m in mnemonics if m.startswith("v")], asking


def test_wide_instructions_are_of_their_files(module):
    """In the module, where the linker has put together what has the same name."""
    if not instruction_sets():
        pytest.skip("not x86-64")
    file_of, file, asking = {}, None, []
    for line in tool("readelf", "--syms", "--wide", module).partition("Symbol table '.symtab'")[2].splitlines():
        match line.split():
            case [_, _, _, "FILE", _, _, _, *name]:  # whose symbols follow; without a name: those of all files
                file = name[0] if name else None
            case [_, address, _, "FUNC", _, _, section, name] if section != "UND":
                file_of[int(address, 16)] = file
                asking += [name] if re.search(r"(baseline|avx2|avx512)_kernels", name) else []
    wide = {"%ymm": set(), "%zmm": set()}
    for line in tool("objdump", "-d", "--no-show-raw-insn", module).splitlines():
        if begins := re.match(r"([0-9a-f]+) <.*>:$", line):
            function = int(begins[1], 16)
        for register, files in wide.items():
            if register in line:
                files.add(file_of.get(function))
    assert wide == {"%ymm": {"kernels_avx2.cpp", "kernels_avx512.cpp"}, "%zmm": {"kernels_avx512.cpp"}}
    assert len(asking) == 3
    for symbol in asking:
        assert_asks_without_wide_instructions(module, symbol)


@pytest.mark.full
def test_wide_instructions_stay_in_their_files(tmp_path):
    """Nothing compiled for a wider instruction set runs before that set is known to be there: no symbol that the linker
    could merge, and the function that asks the processor uses no wide registers."""
    if not instruction_sets():
        pytest.skip("not x86-64")
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    assert instruction_sets().keys() == {"kernels_avx2.cpp", "kernels_avx512.cpp"}
    for name, flags in instruction_sets().items():
        path = tmp_path / "kernels.o"
        succeeds(*COMMON, "-O1", *flags, "-c", ROOT / "csrc" / "cpu" / name, "-o", path)
        assert "%ymm" in tool("objdump", "-d", "--no-show-raw-insn", path)
        isa = name.removeprefix("kernels_").removesuffix(".cpp")
        (symbol,) = tool("nm", "--defined-only", "--extern-only", path).splitlines()
        assert symbol.split()[1] == "T" and f"{isa}_kernels" in symbol
        assert_asks_without_wide_instructions(path, symbol.split()[2])


@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_kernels_compile_without_warnings(compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    flags_of = {} if "aarch64" in compiler else instruction_sets()
    for file in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        if file.name == "bindings.cpp":  # pybind11's own warnings are not ours
            continue
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", *flags_of.get(file.name, [])]
        succeeds(compiler, *flags, "-fsyntax-only", file)


def test_exp_on_neon(tmp_path):
    """The baseline's exp as AArch64 computes it."""
    compiler = "aarch64-linux-gnu-g++"
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if shutil.which(compiler) is None or emulator is None:
        pytest.skip(f"no {compiler} or no qemu-aarch64")
    kernels = [file for file in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if file.name != "bindings.cpp"]
    sources = [NATIVE / "exp_error.cpp", *kernels]
    succeeds(compiler, "-std=c++17", "-O1", "-static", f"-I{ROOT / 'csrc'}", *sources, "-o", tmp_path / "exp_error")
    name, _, normal, _, _, _, subnormal, *_ = succeeds(emulator, tmp_path / "exp_error", 20011).stdout.split()
    assert name == "baseline" and 0.5 <= float(normal) <= 1.05 and float(subnormal) <= 2
