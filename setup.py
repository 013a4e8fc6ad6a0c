"""Everything that is declared stands in pyproject.toml; this file builds the native extensions.

DPO_KERNELS_BUILD decides what is built: "none" nothing; "cpu" the CPU kernels, "cuda" these and the CUDA kernels, or an
error. Unset: the CPU kernels where a compiler makes them, the CUDA kernels where there is an nvcc, else the package
goes without (`dpo-kernels env` says so).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import ExecError

# One file an instruction set; which one runs is decided when the module is loaded.
INSTRUCTION_SETS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Machine code for these, as far as this nvcc knows them, and PTX of the first for what is in between or newer.
ARCHITECTURES = ("80", "90", "100")
HOPPER_ALONE = dict.fromkeys(
    ("linear_fold.cu", "linear_gradients.cu", "exponentials.cu"), ["-gencode=arch=compute_90a,code=sm_90a"]
)
# Where the wheels of CUDA 13 are, in the environment of this Python. pip's isolated builds find it there too.
WHEELS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13")
NVCC_FLAGS = ["-O3", "-std=c++17", "--ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class BuildExtension(build_ext):
    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_instruction_set(obj, source, ext, cc_args, extra, pp_opts):
            x86 = platform.machine().lower() in ("x86_64", "amd64")
            flags = INSTRUCTION_SETS.get(Path(source).name, []) if x86 else []
            compile_one(obj, source, ext, cc_args, [*extra, *flags], pp_opts)

        self.compiler._compile = compile_with_instruction_set
        with ParallelCompile():  # a file on each core
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        compiler = getattr(self.compiler, "compiler_cxx", [sys.executable])[0]  # Microsoft's finds itself
        if shutil.which(compiler) is None:
            raise ExecError(f"{ext.name}: expected a C++ compiler, found no {compiler!r}: install g++, or set CXX")
        if ext.name != "dpo_kernels._cuda":
            return super().build_extension(ext)
        target, folder = Path(self.get_ext_fullpath(ext.name)), Path(self.build_temp)
        for path in (target.parent, folder):
            path.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
        architectures = gencode()

        def compile_one(source: str) -> str:
            flags = HOPPER_ALONE.get(Path(source).name, architectures)
            out = str(folder / f"{Path(source).stem}.o")
            self.spawn([nvcc(), "-c", source, *NVCC_FLAGS, "--threads=0", *flags, *includes, "-o", out])
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        # nvcc links the CUDA runtime statically, which looks for the driver when it is first called: the module can be
        # imported without one. The names of its functions, 0.4 MB, are left out.
        link = [nvcc(), "-shared", "-Xlinker", "--strip-all", *architectures, *objects, "-o", str(target)]
        if WHEELS in Path(nvcc()).parents:  # that of CUDA 13.0 looks for the runtime in lib64, and it is in lib
            link.append(f"-L{WHEELS / 'lib'}")
        self.spawn(link)


def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(WHEELS / "bin"))


def gencode() -> list[str]:
    try:
        known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        raise ExecError(f"nvcc does not work: {error}") from error
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES if f"sm_{a}" in known]
    return [*flags, f"-gencode=arch=compute_{ARCHITECTURES[0]},code=compute_{ARCHITECTURES[0]}"]


def extensions(build: str) -> list[Extension]:
    if build not in ("", "none", "cpu", "cuda"):
        raise SystemExit(f"DPO_KERNELS_BUILD: expected none, cpu or cuda, or nothing, got {build!r}")
    if build == "none" or (not build and not sys.platform.startswith("linux")):
        return []
    if build == "cuda" and not nvcc():
        how = "docs/implementations.md says how pip installs one"
        raise SystemExit(f"DPO_KERNELS_BUILD: expected an nvcc in the PATH for cuda, found none: {how}")
    headers = [str(p) for p in Path("csrc").rglob("*.h")]
    found = [
        Pybind11Extension(
            "dpo_kernels._native",
            sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp")),
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
            depends=headers,
            optional=not build,
        )
    ]
    if build == "cuda" or (not build and nvcc()):
        sources = sorted(str(p) for p in Path("csrc/cuda").glob("*.c*") if p.suffix in (".cu", ".cpp"))
        found.append(Extension("dpo_kernels._cuda", sources, optional=not build))
    return found


setup(
    ext_modules=extensions(os.environ.get("DPO_KERNELS_BUILD", "").lower()),
    cmdclass={"build_ext": BuildExtension},
)
