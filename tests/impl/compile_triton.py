"""Compiles every Triton kernel ahead of time, without a GPU, and prints what the machine code uses, as JSON lines.

    PYTHONPATH=tests/helpers python tests/impl/compile_triton.py 80 90 100
    PYTHONPATH=tests/helpers python tests/impl/compile_triton.py 90 "fold bf16 plain"    # these kernels alone
    PYTHONPATH=tests/helpers python tests/impl/compile_triton.py 90 without "fold bf16 plain"    # all the others

Tensors are taken to be aligned to 16 bytes and sizes to be multiples of 16, as they are in training, but for what the
kernels are not specialised on, and for `odd` sizes.
"""

import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import machine_code
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_kernels.impl import triton_pairs
from dpo_kernels.impl.triton import (
    CHECKED_LABELS,
    FEW_REGISTERS,
    MAX_BLOCK_BYTES,
    MAX_BLOCK_H,
    MAX_REGISTERS,
    dlogits_bwd_kernel,
    fold_fwd_kernel,
    logits_bwd_kernel,
    logits_fwd_kernel,
)
from dpo_kernels.impl.triton_exponentials import (
    BLOCK_ROWS,
    DLOGITS_BLOCK_N,
    DLOGITS_BLOCK_V,
    FAR,
    GROUP,
    SQUARED,
    dhidden_kernel,
    exp_dlogits_kernel,
    linear_dlogits_bwd_kernel,
    linear_exp_fwd_kernel,
    linear_pack_fwd_kernel,
    packed_pieces,
    pieces,
    shifted_pieces,
)
from dpo_kernels.impl.triton_exponentials import MAX_BLOCK_H as MAX_ROW_BLOCK
from dpo_kernels.impl.triton_exponentials import MAX_REGISTERS as MOST_REGISTERS
from dpo_kernels.impl.triton_join import JOIN_ROWS, JOIN_SPLITS, join_kernel
from dpo_kernels.impl.triton_linear import BLOCK_H, BLOCK_N, NUM_STAGES, NUM_WARPS, block_v, linear_fold_fwd_kernel
from dpo_kernels.impl.triton_math import LOG2_E, shift_by
from dpo_kernels.impl.triton_rows import BLOCK_P, WITH_ASSERTS, gather_rows_kernel, put_rows_kernel, rows_kernel
from dpo_kernels.impl.triton_rows import MAX_BLOCK_H as MAX_GATHER_BLOCK
from dpo_kernels.impl.triton_rows import NUM_WARPS as ROWS_WARPS


@triton.jit
def change_kernel(old_ptr, new_ptr, out_ptr):
    """Of shifts, from some maxima to others."""
    n = tl.arange(0, 32)
    old, _ = shift_by(tl.load(old_ptr + n), LOG2_E)
    new, _ = shift_by(tl.load(new_ptr + n), LOG2_E)
    tl.store(out_ptr + n, old - new)


def cases(capability):
    """Name, kernel, types of arguments, constants and options, and the sizes that are not multiples of 16. Of what
    differs little, all for Hopper and a part for the others."""
    transforms = {"plain": (None, 1.0), "softcap": (1 / 30.0, 30.0)}
    everything = capability == 90
    for storage in ("fp32", "fp64") if everything else ("fp32",):
        common = {"ACC": getattr(tl, f"float{storage[2:]}"), "BLOCK_N": 1, "num_warps": 8}
        common["BLOCK_V"] = MAX_BLOCK_BYTES // BYTES[storage]
        if storage == "fp32":
            common["maxnreg"] = MAX_REGISTERS
        for name, (inner, outer) in transforms.items():
            if storage == "fp64" and name != "softcap":
                continue
            per = 16 // BYTES[storage]
            where = common | {"INNER": inner, "OUTER": outer, "HAS_BIAS": name == "softcap"}
            types = {f"{n}_ptr": f"*{storage}" for n in ("a", "bias", "sums", "norm", "logp", "g", "value")}
            types["out_ptr"] = "*bf16"
            for stats in (False, True):
                for write in (False, True):
                    if storage == "fp64" and not (stats and write):
                        continue
                    if storage == "fp32" and not everything and stats != (name == "softcap"):
                        continue
                    few = storage == "fp32" and name == "plain" and not stats
                    registers = {"maxnreg": FEW_REGISTERS} if few else {}
                    yield (
                        f"fold {storage} {name}{' stats' * stats}{' exp' * write}",
                        fold_fwd_kernel,
                        types,
                        {**where, **registers, "BLOCK_H": MAX_BLOCK_H, "STATS": stats, "WRITE_EXP": write, "PER": per},
                        (),
                    )
            yield f"dlogits {storage} {name}", dlogits_bwd_kernel, types, {**where, "SLOPE": 1.0}, ()
    for storage in ("bf16", "fp32") if everything else ("bf16",):
        common = {"ACC": tl.float32, "BLOCK_N": 1, "num_warps": 8}
        common |= {"BLOCK_V": MAX_BLOCK_BYTES // BYTES[storage], "maxnreg": MAX_REGISTERS}
        types = {"a_ptr": f"*{storage}", "out_ptr": f"*{storage}", "fit_ptr": "*i32"}
        types |= {f"{n}_ptr": "*fp32" for n in ("logp", "norm", "stats", "g")}
        for stats in (False, True):
            names = ("ENTROPY", "IS_TOP1", "MEAN_LOGIT", "SUM_SQ_PROBS")
            asked = {name: i if stats else None for i, name in enumerate(names)}
            settings = {**common, **asked, "STATS": stats, "PER": 16 // BYTES[storage], "BLOCK_T": CHECKED_LABELS}
            settings["maxnreg"] = MAX_REGISTERS if stats else FEW_REGISTERS
            yield f"fold logits {storage}{' stats' * stats}", logits_fwd_kernel, types, settings, ()
        yield f"dlogits logits {storage}", logits_bwd_kernel, types, common, ()
    for storage in ("bf16", "fp16") if everything else ("bf16",):
        for name, (inner, outer) in (transforms | {"bias": (None, 1.0)}).items():
            for stats in (False, True):
                if storage == "fp16" and (stats or name != "plain"):
                    continue
                where = {
                    "INNER": inner, "OUTER": outer, "HAS_BIAS": name != "plain", "BLOCK_N": BLOCK_N,
                    "BLOCK_V": block_v(stats, name == "softcap", hopper=capability == 90), "BLOCK_H": BLOCK_H,
                    "num_warps": NUM_WARPS, "num_stages": NUM_STAGES,
                }  # fmt: skip
                types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr"), f"*{storage}") | {"part_ptr": "*fp32"}
                odd = ("V",) if name != "plain" else ()
                for slots in () if name == "bias" else (False, True) if everything else (True,):
                    yield (
                        f"linear fold {storage} {name}{' stats' * stats}{' slots' * slots}",
                        linear_fold_fwd_kernel,
                        types,
                        {**where, "STATS": stats} | ({} if slots else {"slot_ptr": None}),
                        odd,
                    )
                if storage == "fp16":
                    continue
                types |= {"shift_ptr": "*fp32", "e_ptr": "*bf16"}
                where["maxnreg"] = MOST_REGISTERS
                where["BLOCK_V"] = block_v(False, name == "softcap", hopper=capability == 90)
                count = shifted_pieces(where["BLOCK_V"])
                for again in (False, True):
                    yield (
                        f"linear exp {name}{' stats' * stats}{' again' * again}",
                        linear_exp_fwd_kernel,
                        types,
                        {**where, "STATS": stats, "AGAIN": again, "FAR": FAR, "SQUARED": SQUARED, "PIECES": count},
                        odd,
                    )
                where["BLOCK_V"] = block_v(False, False, hopper=capability == 90)
                where["PIECES"] = packed_pieces(where["BLOCK_V"], name == "softcap", ampere=capability == 80)
                yield (
                    f"linear pack {name}{' stats' * stats}",
                    linear_pack_fwd_kernel,
                    types | {"e_ptr": "*fp16"},
                    {**where, "STATS": stats},
                    odd,
                )
                if stats:
                    continue
                where["PIECES"] = pieces(where["BLOCK_V"], name == "softcap")
                yield (
                    f"linear dlogits {name}",
                    linear_dlogits_bwd_kernel,
                    types | {"d_ptr": "*bf16"} | {f"{n}_ptr": "*fp32" for n in ("norm", "logp", "g", "missing")},
                    {**where, "SLOPE": 1.0, "GROUP": GROUP},
                    odd,
                )
    yield "shifts", change_kernel, {f"{name}_ptr": "*fp32" for name in ("old", "new", "out")}, {"num_warps": 1}, ()
    names = {name: i for i, name in enumerate(("ENTROPY", "IS_TOP1", "MEAN_LOGIT", "SUM_SQ_PROBS"))}
    join = {
        "INNER": 1 / 30.0, "OUTER": 30.0, "SLOPE": 1.0, "SQUARED": SQUARED, "STATS": True, "BLOCK_N": JOIN_ROWS,
        "BLOCK_SPLITS": JOIN_SPLITS, "num_warps": 8,
    }  # fmt: skip
    numbers = ("part", "shift", "logp", "norm", "stats", "joint", "scale", "label", "missing", "g", "sums")
    types = {f"{name}_ptr": "*fp32" for name in numbers}
    types |= dict.fromkeys(("d_ptr", "w_ptr", "out_ptr"), "*bf16") | {"e_ptr": "*fp16"}
    of_dlogits = {
        "COLUMNS": block_v(False, False, hopper=capability == 90),
        "BLOCK_N": DLOGITS_BLOCK_N,
        "BLOCK_V": DLOGITS_BLOCK_V,
        "num_warps": 4,
    }
    of_rows = {"SHIFT": 1, "STATS": 4, "ASSERTS": False, "BLOCK_P": BLOCK_P, "num_warps": ROWS_WARPS}
    yield "rows found", rows_kernel, types, of_rows, ()
    yield "rows found asserts", rows_kernel, types, of_rows | WITH_ASSERTS | {"ASSERTS": True}, ()
    yield "rows put", put_rows_kernel, types | {"rows_ptr": "*fp32"}, {"BLOCK_H": MAX_GATHER_BLOCK}, ()
    of_hidden = dict.fromkeys(("hidden_ptr", "out_ptr"), "*bf16")
    yield "rows gathered", gather_rows_kernel, of_hidden, {"stride_hh": 1, "BLOCK_H": MAX_GATHER_BLOCK}, ()
    blocks = {name: getattr(triton_pairs, name) for name in ("BLOCK_N", "BLOCK_B", "BLOCK_S", "BLOCK_T")}
    of_pairs = {"COMPARES": True, **blocks, "stride_wt": 1, "num_warps": triton_pairs.NUM_WARPS}
    numbers = ("logp", "slope", "table", "weight", "ref", "sum", "of_sum", "loss", "chosen", "rejected", "mean")
    of_tables = {f"{name}_ptr": "*fp32" for name in numbers} | {"beta": "fp32", "more_beta": "fp32"}
    of_tables |= dict.fromkeys(("begin_ptr", "end_ptr", "count_ptr"), "*i64")
    yield "rows compared", triton_pairs.compare_kernel, of_tables, of_pairs, ()
    yield "rows join", join_kernel, types, join | names, ()
    yield "rows dlogits", exp_dlogits_kernel, types, of_dlogits, ("N",)
    yield "rows dhidden", dhidden_kernel, types, {"BLOCK_N": BLOCK_ROWS, "BLOCK_H": MAX_ROW_BLOCK}, ()


def is_shown(name, capability):
    """Without being asked for: on Hopper kernels of rows, and products with nothing besides and with both softcap and
    statistics; on the others what needs the most registers. Of those with a bias, and of what is gone over again, the
    same, once."""
    if "again" in name or "bias" in name:
        return "stats" in name and capability == (100 if "pack" in name else 90) and "plain" not in name
    if capability != 90:
        most = ("softcap stats", "softcap stats slots", "softcap stats exp")
        return name.endswith((*most, "join", "dlogits", "compared"))
    has_both = ("softcap" in name) == ("stats" in name)
    return not name.startswith(PRODUCTS) or has_both and ("fold" not in name or "slots" in name)


PRODUCTS = "linear fold", "linear exp", "linear pack"
BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
POINTERS = dict.fromkeys(
    (
        "y",
        "argmax",
        "slot",
        "place",
        "broken",
        "labels",
        "predictors",
        "rows",
        "notes",
        "slots",
        "sequence",
        "position",
    ),
    "*i64",
)
POINTERS = {f"{name}_ptr": kind for name, kind in (POINTERS | {"state": "*fp64"}).items()}
OPTIONS = ("num_warps", "num_stages", "maxnreg", *WITH_ASSERTS)
UNIT = {"stride_av": 1, "stride_ov": 1}


def compile_one(kernel, types, settings, odd, capability):
    options = {name: settings[name] for name in OPTIONS if name in settings}
    constants = {name: value for name, value in settings.items() if name not in options}
    constants |= {name: value for name, value in UNIT.items() if name in kernel.arg_names}
    if not constants.get("HAS_BIAS"):
        constants |= {"bias_ptr": None} if "bias_ptr" in kernel.arg_names else {}
    signature, attributes = {}, {}
    for parameter in kernel.params:
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = {**POINTERS, **types}.get(name, "i32")
        if name not in odd and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (found,) = machine_code.kernels(file.name)
    found |= {"shared": compiled.metadata.shared, "asserts": "__assertfail" in compiled.asm["ptx"]}
    return found | {"barriers": compiled.asm["ttir"].count("barrier")}  # that the kernel asks for


if __name__ == "__main__":
    capabilities = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    names = [argument for argument in sys.argv[1:] if not argument.isdecimal()]
    for capability in capabilities:
        if names and names[0] != "without":
            wanted = [case for case in cases(capability) if case[0] in names]
        else:
            wanted = [case for case in cases(capability) if is_shown(case[0], capability) and case[0] not in names]
        with ThreadPoolExecutor() as pool:  # one kernel is disassembled while the next is compiled
            used = {name: pool.submit(usage, compile_one(*case, capability)) for name, *case in wanted}
        for name, found in used.items():
            print(json.dumps({"kernel": name, "sm": capability} | found.result()), flush=True)
