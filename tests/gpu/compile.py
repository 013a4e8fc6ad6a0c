"""Compiles every Triton kernel ahead of time, without a GPU, and prints what the machine code uses, as JSON lines.

    python compile.py 80 90 100

Tensors are taken to be aligned to 16 bytes and sizes to be multiples of 16, as they are in training.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_kernels.impl.triton import MAX_BLOCK_V, dlogits_bwd_kernel, fold_fwd_kernel
from dpo_kernels.impl.triton_linear import BLOCK_H, BLOCK_N, NUM_STAGES, NUM_WARPS, block_v, linear_fold_fwd_kernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTIONS = {
    "tensor_core": r"\b(HMMA|HGMMA|UTCHMMA)\b",
    "hgmma": r"\bHGMMA\b",
    "load128": r"\bLDG\.E\.128|\bLDG\.E\.\w*\.?128",
    "store128": r"\bSTG\.E\.128|\bSTG\.E\.\w*\.?128",
    "copy_to_shared": r"\bLDGSTS\b|\bUTMALDG\b",
    "atomics": r"\b(ATOM|ATOMG|RED|REDG)\.",
}


def cases(capability):
    transforms = {"plain": (0.0, 1.0), "softcap": (1 / 30.0, 30.0)}
    acc = {"fp32": tl.float32, "fp64": tl.float64}
    for storage in ("fp32", "fp64", "bf16", "fp16"):
        common = {"ACC": acc.get(storage, tl.float32), "BLOCK_N": 1, "num_warps": 8}
        accumulator = "fp64" if storage == "fp64" else "fp32"
        half = storage in ("bf16", "fp16")
        for name, (inner, outer) in transforms.items():
            if half and name != "plain":
                continue
            where = {"INNER": inner, "OUTER": outer, "HAS_BIAS": name == "softcap", "GATHER": half}
            for stats in (False, True):
                for write in (False,) if half else (False, True):
                    yield (
                        f"fold {storage} {name}{' stats' * stats}{' exp' * write}",
                        fold_fwd_kernel,
                        {"a_ptr": f"*{storage}", "out_ptr": "*bf16", "bias_ptr": f"*{accumulator}",
                         "rescale_ptr": f"*{accumulator}"},
                        {**common, **where, "BLOCK_V": MAX_BLOCK_V["fold"], "STATS": stats, "WRITE_EXP": write},
                    )  # fmt: skip
            yield (
                f"dlogits {storage} {name}",
                dlogits_bwd_kernel,
                {"a_ptr": f"*{storage}", "out_ptr": f"*{storage}" if half else "*bf16",
                 **{f"{n}_ptr": f"*{accumulator}" for n in ("bias", "norm", "logp", "g", "value")}},
                {**common, **where, "BLOCK_V": MAX_BLOCK_V["dlogits"], "SLOPE": 1.0},
            )  # fmt: skip
    for storage, compute in (("bf16", tl.bfloat16), ("fp16", tl.float16)):
        for stats in (False, True):
            yield (
                f"linear fold {storage}{' stats' * stats}",
                linear_fold_fwd_kernel,
                {"x_ptr": f"*{storage}", "w_ptr": f"*{storage}", "bias_ptr": f"*{storage}", "part_ptr": "*fp32",
                 "stride_xh": 1, "stride_wh": 1},
                {"INNER": 0.0, "OUTER": 1.0, "HAS_BIAS": False, "STATS": stats, "COMPUTE": compute, "BLOCK_N": BLOCK_N,
                 "BLOCK_V": block_v(stats, capability == 90), "BLOCK_H": BLOCK_H,
                 "num_warps": NUM_WARPS, "num_stages": NUM_STAGES},
            )  # fmt: skip


POINTERS = {"y_ptr": "*i64", "sequence_ptr": "*i64", "position_ptr": "*i64", "state_ptr": "*fp64", "argmax_ptr": "*i64"}
UNIT = {"stride_av": 1, "stride_ov": 1}


def compile_one(kernel, types, settings, capability):
    options = {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}
    constants = {name: value for name, value in settings.items() if name not in options}
    constants |= {
        name: value for name, value in {**UNIT, **types}.items() if isinstance(value, int) and name in kernel.arg_names
    }
    if not constants.get("HAS_BIAS", True):
        constants["bias_ptr"] = None
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = {**POINTERS, **types}.get(name, "i32")
        if name != "start":
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([CUOBJDUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", resources))
    used = {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}
    used["shared"] = compiled.metadata.shared
    return used | {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for name, kernel, types, settings in cases(capability):
            row = {"kernel": name, "sm": capability} | usage(compile_one(kernel, types, settings, capability))
            print(json.dumps(row), flush=True)
