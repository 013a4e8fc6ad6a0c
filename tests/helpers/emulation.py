"""Builds CUDA sources for the CPU, with the emulation in tests/impl/cuda; nothing of CUDA is needed.

A launch takes DPO_EMULATION_SEED from the environment: see cuda/fibers.h. `flags` with which more is found:
-fsanitize=alignment -fno-sanitize-recover=alignment, for vectors at addresses that are not their size's multiples.
"""

import fcntl
import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from places import ROOT

HERE = ROOT / "tests" / "impl" / "cuda"
SOURCES = ROOT / "csrc" / "cuda"
COMPILER = os.environ.get("CXX", "g++")
# Kernels read vectors of what is declared as scalars, which the device's compiler allows. Symbols stay in their module:
# two of them can be loaded at once.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
FLAGS += ["-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]


def unavailable_reason():
    """Why nothing can be built here, or None."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER} was not found"
    if os.uname().sysname != "Linux":
        return "the emulation needs Linux"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def run(command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def build(folder=SOURCES, flags=()):
    """Compiles the CUDA sources of `folder`, and bindings.cpp if it has one, to a module; returns its path.

    `flags` are the compiler's, such as -fsanitize=alignment. What was built once from the same sources is taken again.
    Raises RuntimeError with what the compiler wrote.
    """
    folder = Path(folder)
    bindings = [folder / "bindings.cpp"] if (folder / "bindings.cpp").exists() else []
    sources = [*sorted(folder.glob("*.cu")), *bindings]
    if not sources:
        raise ValueError(f"folder: expected CUDA sources, got {folder}")
    command = [COMPILER, *FLAGS, *flags, "-I", HERE / "include", "-include", HERE / "emulation.h"]
    command += ["-I", sysconfig.get_path("include")]
    if bindings:
        import pybind11

        command += ["-I", pybind11.get_include()]

    read = [
        p for at in {folder, folder.parent, HERE} for p in at.glob("*.*") if p.suffix in (".cu", ".cuh", ".h", ".cpp")
    ]
    content = hashlib.sha256("\0".join(map(str, command)).encode())
    for path in sorted(read):
        content.update(path.name.encode() + b"\0" + path.read_bytes())
    target = Path(tempfile.gettempdir()) / f"dpo_kernels_emulation_{os.getuid()}" / content.hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True)
    module = target / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(target / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            objects = [target / f"{source.name}.o" for source in sources]
            commands = [[*command, "-x", "c++", "-c", s, "-o", o] for s, o in zip(sources, objects, strict=True)]
            commands = [[*c, "-O0"] if s in bindings else c for s, c in zip(sources, commands, strict=True)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(run, commands))
            partial = target / "linked"
            run([COMPILER, *flags, "-shared", *objects, "-o", partial])
            partial.rename(module)
            for built in objects:
                built.unlink()
    return module


def load(path, name="_cuda"):
    """The extension module at `path`, not entered in sys.modules."""
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path, loader=loader))
    loader.exec_module(module)
    return module


@functools.cache
def cuda_module():
    """What dpo_kernels._cuda is on a machine with a GPU."""
    return load(build())
