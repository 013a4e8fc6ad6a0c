"""Everything that is declared stands in pyproject.toml; this file builds the native extension.

DPO_KERNELS_BUILD decides what is built: "none" nothing; "cpu" the CPU kernels, or an error. Unset: the CPU kernels
where a compiler makes them, else the package goes without (`dpo-kernels env` says so).
"""

import os
import platform
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# One file an instruction set; which one runs is decided when the module is loaded.
INSTRUCTION_SETS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "kernels_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


class BuildExtension(build_ext):
    def build_extensions(self) -> None:
        compile_one = self.compiler._compile

        def compile_with_instruction_set(obj, source, ext, cc_args, extra, pp_opts):
            x86 = platform.machine().lower() in ("x86_64", "amd64")
            flags = INSTRUCTION_SETS.get(Path(source).name, []) if x86 else []
            compile_one(obj, source, ext, cc_args, [*extra, *flags], pp_opts)

        self.compiler._compile = compile_with_instruction_set
        super().build_extensions()


def extensions(build: str) -> list[Pybind11Extension]:
    if build not in ("", "none", "cpu"):
        raise SystemExit(f"DPO_KERNELS_BUILD: expected none or cpu, or nothing, got {build!r}")
    if build == "none" or (not build and not sys.platform.startswith("linux")):
        return []
    sources = ["csrc/bindings.cpp", *sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))]
    return [
        Pybind11Extension(
            "dpo_kernels._native",
            sources,
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math"],
            depends=[str(p) for p in Path("csrc").rglob("*.h")],
            optional=not build,
        )
    ]


setup(
    ext_modules=extensions(os.environ.get("DPO_KERNELS_BUILD", "").lower()),
    cmdclass={"build_ext": BuildExtension},
)
