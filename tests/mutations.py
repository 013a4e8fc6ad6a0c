"""Do the tests notice? One line of the product is broken at a time, and tests that should fail then are run.

    python tests/mutations.py [--only TEXT] [--out FILE] [--revision COMMIT] [--jobs N] [--again FILE]

Everything happens in copies of what git tracks, with the extension modules that were built here. Each set of tests has
to pass there first. A mutation that no test notices SURVIVES, and the exit status is 1; so it is for an entry of the
list that is BROKEN: whose text is no longer there once, which does not compile, or which has no tests.

A mutation is a bug: it changes results, errors, memory or determinism. What changes none of them does not belong here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import queue
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[1]
Result = TypeVar("Result")
TIMEOUT = 400  # seconds, after which tests that have not ended have noticed


class Mutation(NamedTuple):
    """A line of the product, and what breaks it. `old` is in `file` once; `tests` are files below tests/, with
    options of pytest's where a whole file would take minutes."""

    file: str
    old: str
    new: str
    tests: str


# Sources, and the tests of several mutations
SIMD, CPU, FINISH = "csrc/cpu/simd.h", "csrc/cpu/kernels_impl.h", "csrc/finish.h"
ROWS_CU, ROW, MATH, FUSED_CU = (f"csrc/cuda/{name}" for name in ("rows.cu", "row.cuh", "math.cuh", "linear_fold.cu"))
EXP_CU, EXP_CUH = "csrc/cuda/exponentials.cu", "csrc/cuda/exponentials.cuh"
GRADIENTS_CU, CLUSTERS_CUH = "csrc/cuda/linear_gradients.cu", "csrc/cuda/clusters.cuh"
CUDA_LINEAR, CUDA_EXP = "dpo_kernels/impl/cuda_linear.py", "dpo_kernels/impl/cuda_exponentials.py"
TRITON, TRITON_LINEAR, TRITON_MATH = (f"dpo_kernels/impl/triton{part}.py" for part in ("", "_linear", "_math"))
EXP_PATHS, LINEAR_ROWS = "dpo_kernels/impl/exponential_paths.py", "dpo_kernels/linear_rows.py"
TORCH, PATHS, FOLD, NATIVE, CUDA = (f"dpo_kernels/impl/{n}.py" for n in ("torch", "paths", "fold", "native", "cuda"))
POSITIONS, TRITON_SUMS = (f"dpo_kernels/impl/{name}.py" for name in ("positions", "triton_sequences"))
SEQUENCES_CU, SUM_TESTS = "csrc/cuda/sequences.cu", "impl/test_sequences.py"
DISPATCH, GATHER, OPS, LOGPS, LINEAR_DPO, LOSSES, PARALLEL = (
    f"dpo_kernels/{name}.py" for name in ("dispatch", "rows", "ops", "logps", "linear_dpo", "losses", "parallel")
)
GROUPED_LOSS, SEQUENCES = "dpo_kernels/grouped_loss.py", "dpo_kernels/sequence_parallel.py"
PAIR_GROUPS, LINEAR_REFERENCE, COMPARISONS, LISTWISE = (
    f"dpo_kernels/{name}.py" for name in ("pair_groups", "linear_reference", "comparisons", "listwise")
)
HEAD, FUSED_FORWARD, WRAPPERS = (f"dpo_kernels/models/{n}.py" for n in ("head", "fused_forward", "through_wrappers"))
LAYERED, OPERANDS, CHECK = (f"dpo_kernels/models/{name}.py" for name in ("layered_forward", "operands", "check"))
LAYOUTS, LOADING, TOKENS, BATCHING, TURNS, MESSAGES = (
    f"dpo_kernels/data/{name}.py" for name in ("layouts", "loading", "tokenization", "batching", "turns", "messages")
)
SHARED_TEXT, SHARED_TEXT_TESTS = "dpo_kernels/data/shared_text.py", "data/test_shared_text.py"
RENDERING, MARKS = (f"dpo_kernels/data/{name}.py" for name in ("rendering", "marks"))
RANKED, RANKINGS, SPLITTING, PACKING = (
    f"dpo_kernels/data/{name}.py" for name in ("ranked", "rankings", "splitting", "packing")
)
FILES, FORMATS, MIXTURES = (f"dpo_kernels/data/{name}.py" for name in ("files", "formats", "mixtures"))
LOOP, SETUP, STATE, CHECKPOINT = (f"dpo_kernels/training/{n}.py" for n in ("loop", "setup", "state", "checkpoint"))
PAIRS, POLICY, REFERENCE, CONFIG = (
    f"dpo_kernels/training/{name}.py" for name in ("pairs", "policy", "reference_model", "config")
)
TOKENIZER, VALUES, SCHEDULE, SIZES, SHARDING, LAUNCHED = (
    f"dpo_kernels/training/{name}.py" for name in ("tokenizer", "values", "schedule", "sizes", "sharding", "launched")
)
HEARTBEAT, SAVING = (f"dpo_kernels/training/{name}.py" for name in ("heartbeat", "saving"))
MODEL_LAYOUTS = "dpo_kernels/models/layouts.py"
SEGMENTS = "dpo_kernels/models/segments.py"
PREVIEW = "dpo_kernels/data/preview.py"
LIGER, SCORING, TRAINERS = (f"dpo_kernels/compat/{name}.py" for name in ("liger", "scoring", "trainers"))
TRL = "dpo_kernels/trl"

CUDA_EXP_TESTS = "impl/test_cuda_exponentials.py"
WEIGHED_TESTS = "impl/test_cuda_exponentials.py -k weighed"
WAVES, PRODUCTS = (f"dpo_kernels/impl/{name}.py" for name in ("waves", "products"))
TRITON_SCALE = "dpo_kernels/impl/triton_scale.py"
TRITON_SHIFTED, TRITON_PACKED, TRITON_DLOGITS, TRITON_JOIN = (
    f"dpo_kernels/impl/triton_{name}.py" for name in ("shifted", "packed", "dlogits", "join")
)
TRITON_EXP, EXP_TESTS = "dpo_kernels/impl/triton_exponentials.py", "impl/test_triton_exponentials.py"
NATIVE_TESTS = "impl/test_native.py -k 'not outside'"
CUDA_TESTS = "impl/test_cuda.py -k 'not machine_code'"
TRITON_ROWS, ROWS_TESTS = "dpo_kernels/impl/triton_rows.py", "impl/test_found_rows.py impl/test_path_a.py -k triton"
TRITON_PAIRS, PAIR_TESTS = "dpo_kernels/impl/triton_pairs.py", "impl/test_pairs.py -k"
PAIRS_H, PAIRS_CU = "csrc/pairs.h", "csrc/cuda/pairs.cu"
POSITIONS_CPP, CPU_ROWS_TESTS = "csrc/cpu/labelled_rows.cpp", "impl/test_found_rows.py -k cpu"
POSITIONS_CU, CUDA_ROWS_TESTS = "csrc/cuda/positions.cu", "impl/test_found_rows.py impl/test_path_a.py -k cuda"
TRITON_TESTS = "impl/test_triton.py -k 'not machine_code and not every_batch'"
CONSUMERS = "test_logps.py test_linear_dpo.py test_numerics.py"
ON_CPU = f"{CONSUMERS} impl/test_native.py -k '(cpu or test_native) and not outside and not budget'"
ON_CUDA = f"{CONSUMERS} impl/test_cuda.py -k 'cuda and not machine_code and not budget'"
ON_TORCH = f"{CONSUMERS} test_ops.py -k 'torch and not budget'"
NUMERICS_OF = "test_numerics.py -k '"
LOGPS_TESTS, DPO_TESTS, NUMERICS = (f"test_{name}.py -k torch" for name in ("logps", "linear_dpo", "numerics"))
PUBLISHED = "test_losses.py -k published"
SHARD_TESTS = "test_parallel.py -k '3 or every'"
SEQUENCE_TESTS = "test_sequence_parallel.py -k '3'"
LOSS_TESTS, REFERENCE_FREE = "test_losses.py", "test_losses_reference_free.py"
HEAD_TESTS, FORWARD_TESTS = "models/test_head.py", "models/test_fused_forward.py"
CHECK_TESTS, SAYS_TESTS, PRECISION_TESTS = (f"models/test_{n}.py" for n in ("check", "check_messages", "precisions"))
LAYERED_TESTS, REFERENCE_TESTS = "models/test_layered_forward.py", "test_linear_reference.py"
LAYOUT_TESTS, LOADING_TESTS, BATCH_TESTS = (
    "data/test_layouts.py",
    "data/test_loading.py data/test_text_files.py",
    "data/test_batching.py",
)
RENDERING_TESTS, MARKS_TESTS, TOKEN_TESTS = (f"data/test_{n}.py" for n in ("rendering", "marks", "tokenization"))
FILE_TESTS, MIXTURE_TESTS = "data/test_files.py", "data/test_mixtures.py"
TURN_TESTS, MESSAGE_TESTS = "data/test_turns.py", "data/test_messages.py"
STEPS = "training/test_loop.py -k 'eager_loop or metrics_curves or accumulated or window or best'"
RESUMED = "training/test_loop.py -k 'killed or any_row or disturb or refused or found_finished'"
SHARDED = "training/test_sharded_loop.py -k 'steps_of_one'"
LOST, MEANWHILE = "training/test_lost_processes.py", "training/test_async_checkpoints.py"
SHARES = "training/test_weights.py -k 'not two_processes'"
ACCELERATED, ZERO_PLANS = "training/test_launched.py", "planning/test_planning.py -k zero"
CHECKPOINTS, PARTS = "training/test_checkpoint.py", "training/test_setup.py"
WEIGHTED = "test_linear_dpo.py -k 'torch and weight'"
SLOPES = "test_linear_dpo.py -k 'torch and (every_loss or without_a_graph)'"
LOOP_TESTS = "training/test_loop.py -k 'not two_processes and not real'"
GOLDEN = "training/test_golden.py -k 'of_the_loop and not two'"
TWO = "training/test_golden.py training/test_loop.py -k 'two'"
DPO, OTHERS, AGAIN, FAITHFUL = (f"trl/test_{name}.py" for name in ("dpo", "others", "again", "faithful"))
LIGER_TESTS = "compat/test_liger.py"
OPTIONS, MODULES, STEP = (f"dpo_kernels/{name}.py" for name in ("options", "modules", "planning/step"))
VERDICTS, TRL_KERNELS = "dpo_kernels/verdicts.py", "dpo_kernels/trl/_kernels.py"
TRIAL, WORKER, PROCESS, TIMED_HEADS, COMMAND = (
    f"dpo_kernels/tuning/{name}.py" for name in ("trial", "worker", "process", "heads", "command")
)
OPTION_TESTS = "test_losses.py -k 'unknown or passed_on or module or value or transformed'"
MODULE_TESTS = "test_losses.py -k 'module'"
ARGUMENTS = "test_logps.py test_linear_dpo.py -k 'torch and (errors or switch or checked or transforms or finite)'"
DIFFERENTIATED = "test_linear_dpo.py -k 'torch and (through or nobody)'"
REFERENCES = "test_losses.py test_losses_reference_free.py -k 'finite or kto or rpo or gradient_flows or errors or fit'"
INPUTS = "models/test_head.py -k 'hugging_face or refused_and'"
ASKED = "models/test_fused_forward.py -k 'preference or reference'"
PLANS = "planning/test_planning.py -k 'earlier or sharding or state_follows or adapters or no_step'"
WRONG_CALLS = "test_wrong_calls.py -k 'kto or simpo or orpo or Preference or Reference'"
TUNE_TESTS = "tuning/test_tune.py -k 'not along and not at_once and not with_different and not timed_and_kept'"
RANKS_TESTS = "tuning/test_tune.py -k 'with_different'"
WORKER_TESTS = "tuning/test_worker.py -k 'not kernels_pass'"
TRAINER_TESTS = "tuning/test_trainers.py -k 'not bench'"
COMPARED, PREDICTED = "test_comparisons.py", "test_predictors.py"
PACKED, GROUPED = "data/test_packing.py", "data/test_rankings.py"
SCHEDULED = "training/test_schedule.py"
RANKED_RUNS = "training/test_rankings.py -k 'weighted or plackett_luce_starts'"
RANKED_DATA = "training/test_rankings.py -k 'other_data or do_not_fit'"
ASKED_LAYOUTS = "models/test_layouts.py -k 'refused or noticed or router'"
ALIKE = "training/test_alike.py"
BY_SEQUENCES = "models/test_layouts.py -k 'sequences'"


MUTATIONS = {
    "C++ kernels of the CPU": [
        # what is almost 0 stays at the least normal number
        Mutation(SIMD, "maximum(broadcast(-105.0f), x)", "maximum(broadcast(-87.0f), x)", NATIVE_TESTS),
        # NaN becomes a number
        Mutation(SIMD, "maximum(broadcast(-105.0f), x)", "maximum(x, broadcast(-105.0f))", NATIVE_TESTS),
        # 1 - tanh^2 where tanh has reached 1
        Mutation(
            SIMD, "4.0f * e * inverse * inverse", "1.0f - (1.0f - e) * (1.0f - e) * inverse * inverse", NATIVE_TESTS
        ),
        # ties away from zero
        Mutation(SIMD, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16", NATIVE_TESTS),
        # lanes added up in fp32
        Mutation(SIMD, "double sum = 0;", "float sum = 0;", NATIVE_TESTS),
        # the label among the others
        Mutation(CPU, "ranges[1] = {label + 1, segment.last}", "ranges[1] = {label, segment.last}", NATIVE_TESTS),
        # a tail without its mask
        Mutation(CPU, "if (count != lanes) e = first_lanes(e, count, T(0));", "", NATIVE_TESTS),
        Mutation(CPU, "maximum(count == lanes ? u : first_lanes(u, count, lowest), m)", "maximum(u, m)", NATIVE_TESTS),
        # 0 times infinity
        Mutation(CPU, "e * maximum(broadcast(T(-1e4)), d)", "e * d", ON_CPU),
        # the last of equal segments
        Mutation(CPU, "segment_max > old_max ||", "segment_max >= old_max ||", ON_CPU),
        # cancels
        Mutation(
            FINISH, "lead > 0 ? -log1p(of.sum * exp(-lead)) : lead", "lead", "test_logps.py -k 'cpu and confident'"
        ),
        Mutation(FINISH, "y < state.argmax[row]", "y <= state.argmax[row] + 1", ON_CPU),
        Mutation(CPU, "-::expm1(logp[row]) * g[row]", "(1 - static_cast<T>(::exp(logp[row]))) * g[row]", ON_CPU),
        # a wrong stride
        Mutation(
            CPU, "row[(segment.first + i) * logits.stride_v]", "row[segment.first + i * logits.stride_v]", NATIVE_TESTS
        ),
        # a softcap forgotten
        Mutation("csrc/arithmetic.h", "return softcap == 0 && slope() == 1;", "return slope() == 1;", NATIVE_TESTS),
        # a maximum of no entries; the last entry of a block
        Mutation("csrc/cpu/bindings.cpp", "std::numeric_limits<float>::lowest()", "0", ON_CPU),
        Mutation("csrc/cpu/bindings.cpp", "column < tile.v)", "column < tile.v - 1)", ON_CPU),
        # another number of threads than PyTorch was told
        Mutation(
            "csrc/cpu/team.cpp",
            "static_cast<unsigned>(threads), 0)",
            "static_cast<unsigned>(threads) + 1, 0)",
            "impl/test_native_process.py -k 'openmp'",
        ),
        # the narrowest instruction set
        Mutation(
            "csrc/cpu/bindings.cpp",
            "available().front()",
            "available().back()",
            "impl/test_native_process.py -k 'fastest'",
        ),
        # Python's other threads wait
        Mutation(
            "csrc/cpu/bindings.cpp",
            "kernels->logits_fold(dtype_of(dtype), logits, rows, state, stats, threads); },\n      release_gil());",
            "kernels->logits_fold(dtype_of(dtype), logits, rows, state, stats, threads); });",
            "impl/test_native_process.py -k 'meanwhile'",
        ),
    ],
    "CUDA kernels": [
        # the last of equal entries
        Mutation(ROWS_CU, "(block > top ||", "(block >= top ||", CUDA_TESTS),
        # the first one nowhere, of the least numbers that there are
        Mutation(ROWS_CU, "(block == top && argmax < 0)", "false", f"{NUMERICS_OF} cuda and one_number'"),
        # what rounding a shift leaves: forgotten, and of huge logits
        Mutation(ROWS_CU, " * power(-rest), apart", ", apart", f"{NUMERICS_OF} cuda and offset'"),
        Mutation(
            ROWS_CU, "if (unit_of(found.top) != fold.shift.unit) {", "if (false) {", f"{NUMERICS_OF} cuda and huge'"
        ),
        Mutation(MATH, "kHuge<float> = 1 << 29", "kHuge<float> = FLT_MAX", f"{NUMERICS_OF} cuda and huge'"),
        # a scale forgotten
        Mutation(
            ROWS_CU,
            "(sum_ez + sum * (top - new_max)) * new_factor",
            "sum_ez * new_factor",
            "test_logps.py -k 'cuda and stats'",
        ),
        # off by one
        Mutation(
            ROW,
            "for (int i = head + packs * kPer<S> + first; i < row.v; i += step) row[i] = value;",
            "for (int i = head + packs * kPer<S> + first; i < row.v - 1; i += step) row[i] = value;",
            SUM_TESTS,
        ),
        # memory that nobody wrote to
        Mutation(
            ROWS_CU,
            "if (label < 0 && threadIdx.x == 0) value[n] = 0;",
            "",
            "test_numerics.py -k 'cuda and uninit'",
        ),
        # barriers forgotten
        Mutation(ROWS_CU, "__syncthreads();  // all have read the old maximum", "", CUDA_TESTS),
        Mutation(ROW, "if (sizeof(O) < sizeof(S)) __syncthreads();", "", CUDA_TESTS),
        Mutation(MATH, "__syncthreads();  // what an earlier call left there has been read", "", CUDA_TESTS),
        # wrong strides
        Mutation(
            ROWS_CU,
            "grad.norm_stride, static_cast<const S*>(grad.logp)",
            "tile.n, static_cast<const S*>(grad.logp)",
            "test_logps.py -k 'cuda and KiB'",
        ),
        Mutation(ROW, "if (stride != 1) return v;", "", "test_logps.py -k 'cuda and contiguous'"),
        Mutation(CLUSTERS_CUH, "static_cast<cuuint64_t>(m.stride)", "static_cast<cuuint64_t>(m.columns)", CUDA_TESTS),
        # vectors at addresses that are not multiples of their size, which a GPU refuses
        Mutation(
            ROW, "to.stride == 1 && reinterpret_cast<uintptr_t>(at) % sizeof(*at) == 0;", "to.stride == 1;", CUDA_TESTS
        ),
        # cancels
        Mutation(
            MATH,
            "t < 0.625f ? fmaf(t * s, p, t) : (1 - e) * inverse",
            "(1 - e) * inverse",
            "impl/test_triton.py -k 'wide_softcap and cuda'",
        ),
        # a label that is none, and one that is no entry
        Mutation(ROWS_CU, "if (threadIdx.x == 0) finished.write_zeros(n);", "", SUM_TESTS),
        Mutation(ROWS_CU, "outside += y < 0 || y >= v;", "outside += y >= v;", SUM_TESTS),
        # only the first 256 tokens of a response
        Mutation(SEQUENCES_CU, "t < labels.length; t += kThreads", "t < kThreads; t += kThreads", SUM_TESTS),
        # a stage given back while products read it
        Mutation(FUSED_CU, "wgmma_wait<1>();", "wgmma_wait<2>();", CUDA_TESTS),
        # a piece filled anew while it is copied
        Mutation(FUSED_CU, "stores_wait<kPieces - 1>();", "stores_wait<kPieces>();", f"{CUDA_EXP_TESTS} -k order"),
        # tanh of what is not to count; the softcap's part of what is stored
        # what rounding a shift leaves: of path D, and of what is kept for it
        Mutation(FUSED_CU, " * exp2f(rest);", ";", f"{CUDA_EXP_TESTS} -k offset"),
        Mutation(FINISH, "kept = static_cast<T>(most);", "kept = most;", f"{CUDA_EXP_TESTS} -k offset"),
        Mutation(FUSED_CU, "return t == kNothing ? -INFINITY : u;", "return u;", CUDA_TESTS),
        Mutation(
            FUSED_CU, "kCapped ? tanh_of(top, slope) : top", "logit(top, slope)", CUDA_EXP_TESTS + " -k 'cannot_be'"
        ),
        Mutation(
            FUSED_CU,
            "sum_ez * rescale + sum * rescale * fmaxf(top - next, -FLT_MAX)",
            "(sum_ez + sum * fmaxf(top - next, -FLT_MAX)) * rescale",
            CUDA_EXP_TESTS + " -k 'least_numbers'",
        ),
        Mutation(FUSED_CU, "e * slope * kPackedOne", "e * kPackedOne", CUDA_EXP_TESTS),
        # far rows that are told where nobody looks, or not gone over again
        Mutation(FUSED_CU, "p.far[row / kClusterRows * kClusterRows] = 1", "p.far[row] = 1", CUDA_EXP_TESTS),
        Mutation(
            CUDA_EXP,
            "for again in (False,) if self.packed else (False, True):",
            "for again in (False,):",
            CUDA_EXP_TESTS,
        ),
        # what rounding leaves of labels; labels of another part
        Mutation(FUSED_CU, "own - widen(narrow<__nv_bfloat16>(own))", "0", CUDA_EXP_TESTS),
        Mutation(GRADIENTS_CU, "p.first + first_row, at);", "first_row, at);", WEIGHED_TESTS),
        # registers of an operand, and a stage, that are written while products read them
        Mutation(GRADIENTS_CU, "take(step + 1, d[1]);", "take(step + 1, d[0]);", WEIGHED_TESTS),
        Mutation(GRADIENTS_CU, "wgmma_wait<1>();", "wgmma_wait<2>();", WEIGHED_TESTS),
        # columns that lie together taken for those of the next box; a descriptor of the next terms
        Mutation(GRADIENTS_CU, "shared.other(stage.index), kBoxBytes)", "shared.other(stage.index))", WEIGHED_TESTS),
        Mutation(CLUSTERS_CUH, "kNextTermsOfColumns = 16 * kSwizzled / 16", "kNextTermsOfColumns = 2", WEIGHED_TESTS),
        # shifts of the blocks of another part; of the first block of columns alone; W's rows of another part
        Mutation(GRADIENTS_CU, "second ? p.second_block : p.first_block", "p.first_block", WEIGHED_TESTS),
        Mutation(GRADIENTS_CU, "p.first_block + tile.row / kBlockColumns", "p.first_block", WEIGHED_TESTS),
        Mutation(GRADIENTS_CU, "(second ? p.second : p.first) + v", "p.first + v", WEIGHED_TESTS),
        # parts of a sum in the place of the first one
        Mutation(GRADIENTS_CU, "out + tile.part * p.rows * p.stride", "out", WEIGHED_TESTS),
        # labels' entries of one of the two rows of a thread, or one of its two columns; in sums of dW alone
        Mutation(
            GRADIENTS_CU,
            "labels[n] != first_row + at.row() + 8 * (i % 2)",
            "labels[n] != first_row + at.row()",
            WEIGHED_TESTS,
        ),
        Mutation(GRADIENTS_CU, "sums[i % 2] += own[n];", "sums[i % 2] += 0;", WEIGHED_TESTS),
        # results of rows and columns that there are not; sums that are forgotten
        Mutation(
            GRADIENTS_CU,
            "if (row + 8 * r >= p.rows || first + 8 * j >= p.columns) continue;",
            "if (row + 8 * r >= p.rows) continue;",
            WEIGHED_TESTS,
        ),
        Mutation(GRADIENTS_CU, "if (p.add && inside(first + j))", "if (false)", WEIGHED_TESTS),
        Mutation(GRADIENTS_CU, "* (1 / kPackedOne)", "", WEIGHED_TESTS),
        # a block of dW that is written over exponentials
        Mutation(
            EXP_PATHS,
            "(v * h - (kept - start) * stride) // h",
            "(v * h - (kept - start) * stride) // h + step",
            "impl/test_triton_exponentials.py -k overwrite",
        ),
        # what is computed again: labels' entries twice, dX without what is stored, blocks over dW
        Mutation(CUDA_EXP, "if missing is None else missing", "", f"{CUDA_EXP_TESTS} -k 'some_entries'"),
        Mutation(TRITON_EXP, "if missing is None else missing", "", f"{EXP_TESTS} -k 'some_entries and plain'"),
        Mutation(
            EXP_PATHS,
            "sums, accumulate=block.start > 0)",
            "sums, accumulate=False)",
            f"{CUDA_EXP_TESTS} -k 'some_entries'",
        ),
        Mutation(EXP_PATHS, "rest, places[-1], x", "rest, places[0], x", f"{CUDA_EXP_TESTS} -k 'some_entries'"),
        # a reference whose parts are others
        Mutation(
            EXP_PATHS,
            "sizes = part_sizes(weight.shape[0], kept, stored)\n",
            "sizes = part_sizes(weight.shape[0], kept)\n",
            f"{CUDA_EXP_TESTS} -k 'rewards'",
        ),
        # a scale forgotten
        Mutation(
            EXP_CU,
            "outer * (static_cast<double>(of_split) - shift)",
            "static_cast<double>(of_split) - shift",
            CUDA_TESTS,
        ),
        # the last of equal splits
        Mutation(EXP_CU, "if (split < label_split) before", "if (split > label_split) before", CUDA_TESTS),
    ],
    "Triton kernels": [
        # the first one nowhere, of the least numbers that there are
        Mutation(
            TRITON, "tl.minimum(argmax, place), argmax)", "argmax, argmax)", f"{NUMERICS_OF} triton and one_number'"
        ),
        # what rounding a shift leaves: forgotten, of huge logits, and lost in a multiply-add
        Mutation(TRITON, "tl.exp(apart) * tl.exp2(-rest)", "tl.exp(apart)", f"{NUMERICS_OF} triton and offset'"),
        Mutation(TRITON, "(sum_ez - total * rest) / LOG2_E", "sum_ez / LOG2_E", f"{NUMERICS_OF} triton and offset'"),
        Mutation(TRITON, "goes = tl.max(is_huge.to(tl.int32), axis=0)", "goes = 0", f"{NUMERICS_OF} triton and huge'"),
        Mutation(TRITON, "(tl.exp(apart) * tl.exp2(-rest))", "tl.exp(apart)", f"{NUMERICS_OF} triton and offset'"),
        Mutation(
            TRITON_MATH, "shift = tl.fma(top, unit, 0.0)", "shift = top * unit", "impl/test_triton.py -k machine_code"
        ),
        Mutation(TRITON_LINEAR, "tl.maximum(top, -huge(tl.float32))", "tl.maximum(top, 0.5 * LOWEST)", TRITON_TESTS),
        # a label of an earlier tile
        Mutation(TRITON, "is_row & (label >= 0) & (label < V)", "is_row & (label < V)", TRITON_TESTS),
        # a missing mask
        Mutation(
            TRITON,
            "tl.where(inside & (columns != label[:, None, None]), z,",
            "tl.where(columns != label[:, None, None], z,",
            TRITON_TESTS,
        ),
        # a flipped sign
        Mutation(
            TRITON, "rescale = tl.exp(old_top - top)[:, None]", "rescale = tl.exp(top - old_top)[:, None]", TRITON_TESTS
        ),
        # places within a tile
        Mutation(TRITON, "tl.store(argmax_ptr + n, start + argmax,", "tl.store(argmax_ptr + n, argmax,", TRITON_TESTS),
        # a wrong stride
        Mutation(
            TRITON,
            "tl.load(norm_ptr + stride_norm + n,",
            "tl.load(norm_ptr + N + n,",
            "test_logps.py -k 'triton and KiB'",
        ),
        # memory that nobody wrote to
        Mutation(
            TRITON,
            "writes = is_row & tl.where(has_label, label // BLOCK_V == block, block == 0)",
            "writes = is_row & (label // BLOCK_V == block)",
            "test_numerics.py -k 'triton and uninit'",
        ),
        # strides not looked at
        Mutation(TRITON, "_at(g_ptr, n, T, stride_gs, stride_gt)", "g_ptr + n", SUM_TESTS),
        # masks of the block with the label, alone
        Mutation(TRITON, "| (first + BLOCK_V > V):", "| (V < 0):", SUM_TESTS),
        # each lane's sums are of its own maximum
        Mutation(
            TRITON,
            "total = tl.sum(total.to(tl.float64) * factor, axis=1)",
            "total = tl.sum(total.to(tl.float64), axis=1)",
            SUM_TESTS,
        ),
        # a count that nobody looks at
        Mutation(TRITON, "(tl.sum(labelled, axis=0) == num_labelled)", "(num_labelled >= 0)", SUM_TESTS),
        # the first block of a response, again and again
        Mutation(TRITON_SUMS, "t = first + tl.arange(0, BLOCK_T)", "t = tl.arange(0, BLOCK_T)", SUM_TESTS),
        Mutation(TRITON_LINEAR, "bias = None if bias is None else bias.resolve_neg().contiguous()", "", TRITON_TESTS),
        # compiled for every number of rows
        Mutation(
            TRITON,
            '@triton.jit(\n    do_not_specialize=["start", "N", "stride_field"],',
            '@triton.jit(\n    do_not_specialize=["start", "stride_field"],',
            "impl/test_triton.py -k 'every_batch and A'",
        ),
        # exponentials that overflow, and those of others that are written again
        Mutation("dpo_kernels/impl/exponentials.py", "FAR = 60.0", "FAR = 1e9", EXP_TESTS),
        Mutation(TRITON_SHIFTED, "shift = tl.where(is_far, top, shift)", "shift = shift", EXP_TESTS),
        # a shift that rounds downwards, one for all blocks, sums that do not follow it, and another split's
        Mutation(TRITON_PACKED, "return tl.fma(tl.abs(shift), 2.0**-22, shift)", "return shift", EXP_TESTS),
        Mutation(TRITON_PACKED, "factor = weight * tl.exp2(shift - joint)", "factor = weight", EXP_TESTS),
        Mutation(TRITON_PACKED, "        total = total * rescale\n", "", EXP_TESTS),
        Mutation(TRITON_JOIN, "total += tl.sum(mass * factor, axis=0)", "total += tl.sum(mass, axis=0)", EXP_TESTS),
        # the label's part: its rounding, its slope, where it is, and what a split finds of another part's
        Mutation(TRITON_SHIFTED, "is_label = (v == label) & inside", "is_label = v == label", EXP_TESTS),
        Mutation(TRITON_PACKED, "target, _ = to_logits(at_label, INNER, OUTER)", "target = at_label", EXP_TESTS),
        Mutation(TRITON_JOIN, "(-total * slope).to(tl.float32)", "(-total).to(tl.float32)", EXP_TESTS),
        # a squared exponential's unit forgotten; an exponential's factor that is not by the largest shift
        Mutation(TRITON_JOIN, "tl.log(sum_sq / (SQUARED * SQUARED))", "tl.log(sum_sq)", EXP_TESTS),
        Mutation(
            TRITON_JOIN,
            "tl.store(shift_ptr + n, shift, mask=is_row)",
            "tl.store(shift_ptr + n, top, mask=is_row)",
            EXP_TESTS,
        ),
        # norm that is rounded behind the sum that goes with it
        Mutation(
            TRITON_JOIN,
            "largest = tl.maximum(top, target_z).to(tl.float64)",
            "largest = tl.maximum(shift, target)",
            TRITON_TESTS,
        ),
        Mutation(TRITON_PACKED, "leaves_out = (has_label > 0) |", "leaves_out =", EXP_TESTS),
        # the gradient of logits: what its label's entry loses, and programs that take turns
        Mutation(TRITON_DLOGITS, "missing += tl.sum(tl.where(is_label, left, 0.0), axis=1)", "pass", EXP_TESTS),
        Mutation(TRITON_DLOGITS, "tl.cdiv(N, BLOCK_N) - first_block, GROUP)", "GROUP, GROUP)", EXP_TESTS),
        # the softcap's part of the gradient
        Mutation(
            TRITON_SHIFTED, "e = e * slope\n                e_block_ptr", "pass\n                e_block_ptr", EXP_TESTS
        ),
        Mutation(
            TRITON_PACKED, "e = e * slope\n                v = start", "pass\n                v = start", EXP_TESTS
        ),
        # sums that do not follow the maximum
        Mutation(TRITON_JOIN, "(ez + mass * change) * factor", "ez * factor", TRITON_TESTS),
        # of equal logits not the first alone; the label among the others of its block
        Mutation(TRITON_JOIN, "(target_z > top_before)", "(target_z >= top_before)", TRITON_TESTS),
        Mutation(TRITON_LINEAR, 'z = tl.where(v == own, float("-inf"), z)', "pass", TRITON_TESTS),
        # rows behind others; labels of another sequence; hidden states as if they lay one after the other
        Mutation(TRITON_ROWS, "n = first_row + tl.cumsum(", "n = tl.cumsum(", ROWS_TESTS),
        Mutation(TRITON_ROWS, "inside = (p < P) & (t + SHIFT < T)", "inside = p < P", ROWS_TESTS),
        Mutation(TRITON_ROWS, "g, (n, h) = g.resolve_neg(), rows.shape", "n, h = rows.shape", ROWS_TESTS),
        Mutation(TRITON_LINEAR, "slot // T * stride_xr + slot % T * stride_xn", "slot * stride_xn", ROWS_TESTS),
        # infinite hidden states that a softcap hides; a wrong number of labels
        Mutation(TRITON_JOIN, "(at_label - at_label) != 0.0", "logp != logp", ROWS_TESTS),
        Mutation(TRITON_ROWS, "((expected < 0) | (count == expected))", "(count >= 0)", ROWS_TESTS),
        # copies of other hidden states; infinite ones that are passed over; tables that hold what was in memory
        Mutation(TRITON_ROWS, "slot // U * stride_hr + slot % U * stride_hu", "slot * stride_hu", ROWS_TESTS),
        Mutation(TRITON_ROWS, "((x - x) != 0.0)", "(x != x)", ROWS_TESTS),
        Mutation(TRITON_ROWS, "tl.store(logp_ptr + p, 0.0, mask=ignored)", "pass", ROWS_TESTS),
        # pairs of another part, a loss that loses its digits, a beta that does, and a mean of parts
        Mutation(TRITON_PAIRS, "is_row = n < ends[:, None]", "is_row = n < N", f"{PAIR_TESTS} triton"),
        Mutation(TRITON_PAIRS, "log1p(tl.exp(-tl.abs(h)))", "tl.log(1.0 + tl.exp(-tl.abs(h)))", f"{PAIR_TESTS} triton"),
        Mutation(TRITON_PAIRS, "range(0, PAIRS, BLOCK_B)", "range(first, PAIRS, BLOCK_B)", f"{PAIR_TESTS} triton"),
        Mutation(TRITON_PAIRS, "(after != s)", "(after >= s)", f"{PAIR_TESTS} triton"),
        # a wrong number of rows that nobody hears of; gradients of other rows
        Mutation(
            TRITON_ROWS,
            "        if ASSERTS:\n",
            "        if False:\n",
            "impl/test_found_rows.py -k 'triton and assertion'",
        ),
        Mutation(
            TRITON_ROWS,
            "mask=h < H, other=0.0) * g\n",
            "mask=h < H, other=0.0)\n",
            "impl/test_found_rows.py -k 'triton and put'",
        ),
        Mutation(
            TRITON_ROWS,
            "g_ptr + s * stride_gs + t * stride_gt",
            "g_ptr + s * T + t",
            "impl/test_found_rows.py -k 'triton and put'",
        ),
        # what copies of 16 bytes cannot take
        Mutation(TRITON_LINEAR, "        and t.stride(0) % 16 == 0\n", "", TRITON_TESTS),
        # cancels
        Mutation(TRITON_MATH, "magnitude = tl.where(t < 0.625, t * s * p + t, magnitude)", "", TRITON_TESTS),
        # a series far from 0
        Mutation(TRITON_MATH, "tl.where(x > -0.35,", "tl.where(x > -35.0,", TRITON_TESTS),
    ],
    "plain PyTorch, paths and what calls the kernels": [
        # the last of equal blocks
        Mutation(
            TORCH,
            "is_new = (block_max > old_max)",
            "is_new = (block_max >= old_max)",
            "test_logps.py -k 'torch and top1'",
        ),
        # 0 times infinity
        Mutation(TORCH, "torch.special.xlogy(z, z).sum(1)", "(z * z.log()).sum(1)", LOGPS_TESTS),
        # the label's slope of whatever tile comes last
        Mutation(
            TORCH,
            "own = torch.where(inside, slope.gather(1, column), fold.label_slope[rows, None])",
            "own = slope.gather(1, column)",
            "test_numerics.py -k 'torch and fp32'",
        ),
        # cancels where tanh has reached 1
        Mutation(
            TORCH,
            "torch.cosh(a).reciprocal_().square_() if with_slope",
            "1 - a.tanh().square() if with_slope",
            "test_numerics.py -k 'torch and saturated'",
        ),
        # path C's logits overwritten
        Mutation(TORCH, "_transform_(a.clone() if keep else a,", "_transform_(a,", DPO_TESTS),
        # dW in half precision rounded at every tile
        Mutation(
            PATHS,
            "rounded_by_product = one_tile and k.operand",
            "rounded_by_product = k.operand",
            "test_numerics.py -k 'torch'",
        ),
        # dW of the first group alone
        Mutation(PATHS, "if group.stop == n:", "if group.start == 0:", DPO_TESTS),
        # the softcap's slope forgotten
        Mutation(
            PATHS,
            "label = -torch.expm1(fold.logp) * transform.slope * fold.label_slope",
            "label = -torch.expm1(fold.logp) * transform.slope",
            LOGPS_TESTS,
        ),
        # dropped roundings
        Mutation(
            PATHS, "bias[block].to(compute_dtype).to(accumulate_dtype", "bias[block].to(accumulate_dtype", DPO_TESTS
        ),
        Mutation(PATHS, "weight[_part(y, span)].to(compute_dtype)", "weight[_part(y, span)]", DPO_TESTS),
        # a bias of the other sign
        Mutation(PATHS, "b.resolve_neg().contiguous()", "b.contiguous()", NATIVE_TESTS),
        # blocks of the head larger than a tile
        Mutation(
            PATHS,
            "columns = max(1, numel // max(h, rows))",
            "columns = max(1, numel // rows)",
            "test_memory.py -k 'blocks'",
        ),
        # overflows for labels that lead by far
        Mutation(FOLD, "shift = torch.maximum(self.max, self.target)", "shift = self.max", LOGPS_TESTS),
        # cancels
        Mutation(FOLD, "lead > 0, -torch.log1p", "lead > 60, -torch.log1p", LOGPS_TESTS),
        # 0 times infinity
        Mutation(
            FOLD,
            "torch.where(self.logp == -math.inf, 0.0, -self.logp.exp() * self.logp)",
            "-self.logp.exp() * self.logp",
            NUMERICS,
        ),
        # any of equal logits
        Mutation(
            FOLD,
            "first = (self.target == self.max) & (self.y < self.argmax)",
            "first = self.target == self.max",
            "test_logps.py -k 'torch and top1'",
        ),
        # long chains of sums
        Mutation(NATIVE, "spans(a.shape[1], MAX_TERMS)", "spans(a.shape[1], a.shape[1])", NATIVE_TESTS),
        # strides not looked at
        Mutation(NATIVE, "t.to(dtype)).contiguous() for t in of[1:])", "t.to(dtype)) for t in of[1:])", NATIVE_TESTS),
        # the argmax of other rows
        Mutation(NATIVE, "_address(argmax) + skipped", "_address(argmax)", ON_CPU),
        Mutation(CUDA, "fold.argmax[rows]", "fold.argmax", ON_CUDA),
        # 0 times infinity
        Mutation(EXP_CUH, "if (!logit.capped && outer < FLT_MIN) inner = 0, outer = 1;", "", CUDA_TESTS),
        # rows that a kernel finds: behind others; by all threads of their warp; labels of the next sequence, and of
        # another one; labels and predictors that are looked at by no block, or by their own alone; a wrong number
        Mutation(POSITIONS_CU, "      before += labels[j] != of.ignore_index;\n", "", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "lane < warp ? of_warp : 0", "lane <= warp ? of_warp : 0", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "!is_position || at.t + of.shift >= at.length", "!is_position", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "    offset += at_end;\n", "", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "&& lies_outside(labels[j], of.v);", "&& false;", CUDA_ROWS_TESTS),
        # a wrong number of rows that nobody hears of; gradients of other rows; marks that nobody took away
        Mutation(POSITIONS_CU, "fits || !of.asserts", "true", "impl/test_found_rows.py -k 'cuda and assertion'"),
        Mutation(POSITIONS_CU, "x[k] *= factor;", ";", "impl/test_found_rows.py -k 'cuda and put'"),
        Mutation(POSITIONS_CU, "g.at<float>(s, t)", "g.at<float>(s, 0)", "impl/test_found_rows.py -k 'cuda and put'"),
        Mutation("csrc/cuda/linear_fold.cu", "p.far[row] = 0;", ";", f"{CUDA_EXP_TESTS} -k 'far_logits_alone'"),
        # marks of blocks that begin elsewhere than pairs of blocks do; gradients that PyTorch keeps negated
        Mutation(
            "csrc/cuda/linear_fold.cu",
            "Epilogue::fold && p.far != nullptr)",
            "Epilogue::fold && p.far != nullptr && row % kClusterRows == 0)",
            f"{CUDA_EXP_TESTS} -k 'for_nothing'",
        ),
        Mutation(
            "dpo_kernels/impl/cuda_positions.py",
            "    g = g.resolve_neg()\n",
            "",
            "impl/test_found_rows.py -k 'cuda and put'",
        ),
        Mutation(POSITIONS_CU, "if (is_last && of.predictors.data != nullptr) {", "if (false) {", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "before == of.expected);", "before >= of.expected);", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "__syncthreads();  // what was there has been read", "", CUDA_ROWS_TESTS),
        # tables that hold what was in memory, or at a row's number what belongs to its place; what is not finite
        Mutation(POSITIONS_CU, "out.values[k * positions + place] = 0;", ";", CUDA_ROWS_TESTS),
        Mutation(POSITIONS_CU, "is_finite &= x[k] - x[k] == 0;", "is_finite &= x[k] == x[k];", CUDA_ROWS_TESTS),
        Mutation(EXP_CU, "out.places == nullptr ? row : out.places[row]", "row", CUDA_ROWS_TESTS),
        Mutation(EXP_CU, "out.places == nullptr ? n : out.positions", "n", CUDA_ROWS_TESTS),
        # the same on the CPU
        Mutation(
            GATHER, "spans(rows.shape[0], PUT_ROWS)", "spans(rows.shape[0], 2**30)", "test_logps.py -k fp32_is_that"
        ),
        Mutation(POSITIONS_CPP, "predicts = t + of.shift < of.length;", "predicts = true;", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "0 <= label && label < of.v", "label < of.v", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "0 <= slot && slot < of.slots", "slot < of.slots", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "n == of.expected)", "n >= of.expected)", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "        out.logp[place] = 0;\n", "", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "out.values[k * positions + place] = 0;", ";", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "if (stride == 1) {", "if (true) {", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "uint16_t{0x7f80}", "uint16_t{0x7fff}", CPU_ROWS_TESTS),
        Mutation(POSITIONS_CPP, "if (work.broken) *broken = 1;", "", CPU_ROWS_TESTS),
        # pairs compared: pairs of another part, products that are not rounded, a loss that loses its digits
        Mutation(PAIRS_H, "pairs + s - (stop - first)", "s", f"{PAIR_TESTS} cpu"),
        Mutation(PAIRS_H, "log1p(exp(-fabs(h)))", "log(1 + exp(-fabs(h)))", f"{PAIR_TESTS} cpu"),
        Mutation(PAIRS_H, "(h < 0 ? -h : 0) + ", "", f"{PAIR_TESTS} cpu"),
        Mutation(PAIRS_H, "static_cast<double>(pairs));", "static_cast<double>(stop - first));", f"{PAIR_TESTS} cpu"),
        Mutation("csrc/cpu/compare.cpp", "if (of.stop < of.pairs) return;", "", f"{PAIR_TESTS} cpu"),
        Mutation("csrc/cpu/compare.cpp", " * of.weight<T>(s, rows.position[n])", "", f"{PAIR_TESTS} cpu"),
        Mutation(PAIRS_CU, "i += kCompareWarps", "i += 2 * kCompareWarps", f"{PAIR_TESTS} cuda"),
        Mutation(PAIRS_CU, "if (row.after != row.s) ends", "ends", f"{PAIR_TESTS} cuda"),
        Mutation(
            "dpo_kernels/impl/pairs.py", "Rows(*map(Tensor.contiguous, at))", "at", f"{PAIR_TESTS} 'cpu and compared'"
        ),
        # a reference whose sums are others
        Mutation(
            LINEAR_REFERENCE,
            "weights.sums_of_rows(load(family), family, found, rows.at, token_logps, whole)",
            "weights.sums(token_logps, whole)",
            f"{REFERENCE_TESTS} -k 'cpu and zero'",
        ),
        # rows that are sorted by group with the labels of others; tables of another dtype; what is not finite
        Mutation(GATHER, "table=self.found.table[:, order]", "table=self.found.table", CUDA_ROWS_TESTS),
        Mutation(
            GATHER,
            "if self.found is not None and like.dtype == self.found.token_logps.dtype:",
            "if self.found is not None:",
            CUDA_ROWS_TESTS,
        ),  # fmt: skip
        Mutation(GATHER, "if not rows.found.broken.item():", "if True:", CUDA_ROWS_TESTS),
        Mutation(LOGPS, "if num_labelled > positions:", "if False:", "impl/test_found_rows.py -k positions"),
        # rows that lie one over another
        Mutation(CUDA_LINEAR, "rows = t.stride(0) >= t.shape[1] and t.stride(0)", "rows = t.stride(0)", CUDA_TESTS),
    ],
    "functions and operators": [
        # what lies at ignored positions
        Mutation(
            LOGPS,
            "        weights = weights.masked_fill(labels == ignore_index, 0)\n",
            "        pass\n",
            LOGPS_TESTS,
        ),
        # 0 / 0
        Mutation(LOGPS, "logps = logps / num_tokens.clamp(min=1)", "logps = logps / num_tokens", LOGPS_TESTS),
        # narrow sums
        Mutation(
            LOGPS,
            'wide = token_logps.dtype if token_logps.device.type == "mps" else torch.float64',
            "wide = token_logps.dtype",
            NUMERICS,
        ),
        # dropped detaches
        Mutation(LINEAR_DPO, "ref_logps.detach().to(dtype), token", "ref_logps.to(dtype), token", ON_TORCH),
        # shifted the other way
        Mutation(
            LOGPS,
            "[token_weights[:, 1:], token_weights.new_zeros(sequences, min(1, length))]",
            "[token_weights.new_zeros(sequences, min(1, length)), token_weights[:, :-1]]",
            LOGPS_TESTS,
        ),
        # a product more than is needed
        Mutation(
            LOGPS,
            "with_dhidden = torch.is_grad_enabled() and hidden",
            "with_dhidden = hidden",
            "test_memory.py -k 'torch'",
        ),
        # fp64 rounded to bf16
        Mutation(
            LOGPS,
            "torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:",
            "torch.is_autocast_enabled(device):",
            ON_TORCH,
        ),
        # a bias without its gradient
        Mutation(
            LOGPS,
            "and (weight.requires_grad or (bias is not None and bias.requires_grad))",
            "and weight.requires_grad",
            ON_TORCH,
        ),
        # swallowed errors
        Mutation(LOGPS, "if inplace_backward and any(", "if False and any(", ON_TORCH),
        Mutation(OPS, "    check_finite(x, rows, waits=known is None)", "    pass", ON_TORCH),
        Mutation(LINEAR_ROWS, "            check_finite(x, rows, of.waits)", "            pass", ON_TORCH),
        Mutation(OPTIONS, "for extreme in t.aminmax())", "for extreme in t.aminmax()[:1])", ON_TORCH),
        Mutation(DISPATCH, "else unavailable_reason(name, device)", "else None", LOGPS_TESTS),
        # a setting that is off
        Mutation(
            DISPATCH,
            'os.environ.get("TRITON_INTERPRET") == "1"',
            'os.environ.get("TRITON_INTERPRET")',
            f"test_cli.py {TRITON_TESTS}",
        ),
        # off by one
        Mutation(POSITIONS, "(labels >= vocab_size)", "(labels > vocab_size)", LOGPS_TESTS),
        # a device that is waited for
        Mutation(POSITIONS, 'if num_labelled is not None and y.device.type == "cuda":', "if False:", SUM_TESTS),
        Mutation(
            PAIR_GROUPS,
            "if max(map(max, sizes_of_ranks)) > budget:",
            "if max(map(max, sizes_of_ranks)) >= budget:",
            "test_memory.py planning/test_planning.py test_linear_dpo.py -k 'torch'",
        ),
        # memory that nobody wrote to
        Mutation(
            GATHER,
            "dhidden = dx.new_zeros(shape)\n",
            "dhidden = dx.new_empty(shape)\n",
            "test_numerics.py -k 'torch and uninit'",
        ),
        Mutation(TORCH, "    out[others.sequence, others.position] = 0\n", "", LOGPS_TESTS),
        # a compiled graph with another dtype
        Mutation(OPS, "dtype = accumulate_dtype(compute_dtype)\n", "dtype = hidden.dtype\n", "test_ops.py -k 'torch'"),
        # memory that is not counted
        Mutation(PAIR_GROUPS, "max(0, chunk_bytes - sums)", "chunk_bytes", "test_memory.py -k 'torch'"),
        # another order
        Mutation(
            PAIR_GROUPS,
            "torch.argsort(comparisons.order(rows.at.sequence),",
            "torch.argsort(rows.sequence,",
            DPO_TESTS,
        ),
        # a wrong reduction
        Mutation(
            GROUPED_LOSS,
            "lengths, _ = self.comparisons.split(self.num_tokens.to(self.ref_logps.dtype))",
            "lengths = self.num_tokens.to(self.ref_logps.dtype)",
            DPO_TESTS,
        ),
        Mutation(GROUPED_LOSS, "self.shares.any(), (lengths * self.shares).sum()", "True, lengths.mean()", WEIGHTED),
        # weights whose sum is infinite, of nothing, and of none
        Mutation(LINEAR_DPO, "weights / torch.where(largest > 0, largest, 1)", "weights", WEIGHTED),
        Mutation(LINEAR_DPO, "weights / weights.sum().clamp(min=1)", "weights / weights.sum()", WEIGHTED),
        Mutation(GROUPED_LOSS, "logps = torch.where(present, logps, logps.detach())", "pass", WEIGHTED),
        # token weights as they are where there is no label
        Mutation(
            LINEAR_DPO, "token_weights.to(dtype).masked_fill(labels == ignore_index, 0)", "token_weights", WEIGHTED
        ),
        # gradients in fp16 before the loss scale
        Mutation(
            LINEAR_DPO, "dtypes = compute_dtype, weight.dtype, hidden.dtype", "dtypes = (compute_dtype,)", DPO_TESTS
        ),
        # gradients handed out twice
        Mutation(GROUPED_LOSS, "formed, ctx.grads = ctx.grads, None", "formed = ctx.grads", DPO_TESTS),
        Mutation(GROUPED_LOSS, "places, ctx.places = ctx.places, None", "places = ctx.places", DPO_TESTS),
    ],
    "a head in shards": [
        # of equal logits on two ranks the last
        Mutation(FOLD, "is_later = later.max > self.max", "is_later = later.max >= self.max", SHARD_TESTS),
        # what was summed at another maximum
        Mutation(FOLD, "self.sum_sq.mul_(factor.square())", "self.sum_sq.mul_(factor)", SHARD_TESTS),
        Mutation(PATHS, "transform.slope * fold.others * rescale", "transform.slope * fold.others", SHARD_TESTS),
        # a label that another rank has
        Mutation(PATHS, "label = label.masked_fill((y < 0) | (y >= v), 0.0)", "pass", SHARD_TESTS),
        # entries here for those of the vocabulary
        Mutation(
            PARALLEL, "fold.argmax.copy_(joint.argmax - self.first)", "fold.argmax.copy_(joint.argmax)", SHARD_TESTS
        ),
        # ranks that plan otherwise than others
        Mutation(LINEAR_DPO, "comparisons, head.planned, dtype", "comparisons, weight, dtype", SHARD_TESTS),
        # memory that nobody wrote to
        Mutation(LINEAR_ROWS, "        if y.shape[0] == 0:", "        if False:", SHARD_TESTS),
        # sequences in parts: sums, positions, plans, memory that nobody wrote to, and ranks that wait for one another
        Mutation(SEQUENCES, "functools.reduce(torch.add, others, first)", "first + 0", SEQUENCE_TESTS),
        Mutation(SEQUENCES, "counts[: self.rank].sum(0)", "counts[: self.rank + 1].sum(0)", SEQUENCE_TESTS),
        Mutation(PARALLEL, "            if other != first:\n", "            if False:\n", SEQUENCE_TESTS),
        Mutation(SEQUENCES, "            if ranks.have_agreed:\n", "            if True:\n", SEQUENCE_TESTS),
        Mutation(SEQUENCES, "t.requires_grad and torch.is_grad_enabled()", "False", SEQUENCE_TESTS),
        Mutation(SEQUENCES, "    if shift:\n", "    if False:\n", SEQUENCE_TESTS),
        Mutation(LOSSES, "positions + whole.before[:, None]", "positions", SEQUENCE_TESTS),
        Mutation(LOSSES, "whole.join(sums), whole.num_tokens", "sums, whole.num_tokens", SEQUENCE_TESTS),
        Mutation(PAIR_GROUPS, "max(each.buffer for each in kept)", "kept[0].buffer", SEQUENCE_TESTS),
        Mutation(
            PAIR_GROUPS, "max(map(operator.add, filled, more)) > budget", "filled[0] + more[0] > budget", SEQUENCE_TESTS
        ),
        # dW summed in memory, slice by slice
        Mutation(PATHS, '== "cuda" and fit < n)', '== "cuda" and fit < 1)', "test_linear_dpo.py -k kept_in_the_memory"),
        # small blocks at the end; partial sums as large as the tiles of a whole product; a remainder of a sum left out
        Mutation(WAVES, "2 * _last(n, rows) >= rows", "2 * _last(n, rows) >= 0", "impl/test_waves.py"),
        Mutation(WAVES, "if not 0 < tiles < units:", "if tiles == 0:", "impl/test_waves.py"),
        Mutation(
            PRODUCTS, "return out if whole == a.shape[1] else", "return out if whole else", "impl/test_products.py"
        ),
        Mutation(PRODUCTS, 'device.type != "cuda" or k < LONG_SUM', 'device.type != "cuda"', "impl/test_products.py"),
        # a factor that is rounded, or left out
        Mutation(TRITON_SCALE, "if factor != 1.0:", "if factor > 1.0:", "impl/test_scale.py -k triton"),
        Mutation(ROWS_CU, "if (by == 1) return;", "", "impl/test_scale.py -k cuda"),
        # some exponentials where groups are faster, or cannot be; more of them than fit; a block that has no room
        Mutation(PAIR_GROUPS, "2 * len(groups) * sums", "0", "test_pair_groups.py"),
        Mutation(PAIR_GROUPS, "if groups is None or again", "if groups is not None and again", "test_pair_groups.py"),
        Mutation(EXP_PATHS, "- SHIFT_BYTES * math.ceil(kept / step)\n", "\n", "test_pair_groups.py"),
        Mutation(EXP_PATHS, "weight.device)) else 0", "weight.device)) else kept + buffer", "test_pair_groups.py"),
        Mutation(
            "dpo_kernels/planning/head_memory.py",
            "round(4 - stored / t.v, 2)",
            "3",
            "planning/test_planning.py -k that_do_not_all_fit",
        ),
        # a small part at the end
        Mutation(PAIR_GROUPS, "most)) == fewest", "rows)) >= 1", "test_pair_groups.py"),
        Mutation(LINEAR_DPO, "counts = None if ranks is None else ranks.counts", "counts = None", SEQUENCE_TESTS),
        Mutation(
            LINEAR_DPO, "check_hidden=check_hidden and ranks is None", "check_hidden=check_hidden", SEQUENCE_TESTS
        ),
        Mutation(LINEAR_REFERENCE, "counts = None if ranks is None else ranks.counts", "counts = None", SEQUENCE_TESTS),
        Mutation(PATHS, "(weight.new_empty if n else weight.new_zeros)", "weight.new_empty", SEQUENCE_TESTS),
        Mutation(PATHS, "if group.start == group.stop:  # other", "if False:  # other", SEQUENCE_TESTS),
    ],
    "losses": [
        # flipped signs
        Mutation(
            LOSSES,
            "* logistic_loss(h) + label_smoothing * logistic_loss(-h)",
            "* logistic_loss(h) - label_smoothing * logistic_loss(-h)",
            PUBLISHED,
        ),
        # wrong factors
        Mutation(
            LOSSES,
            "(_per_token_margins(p) - 1 / (2 * p.beta)) ** 2",
            "(_per_token_margins(p) - 1 / p.beta) ** 2",
            PUBLISHED,
        ),
        Mutation(
            LOSSES,
            "beta * (chosen - rejected) - gamma, label_smoothing",
            "beta * (chosen - rejected - gamma), label_smoothing",
            REFERENCE_FREE,
        ),
        # gradients that saturate
        Mutation(
            LOSSES, "return torch.exp(F.logsigmoid(x))", "return torch.sigmoid(x)", "test_losses.py -k 'saturated'"
        ),
        Mutation(
            LOSSES,
            "return -torch.sigmoid(-h)\n",
            "return torch.sigmoid(h) - 1\n",
            "test_losses.py -k 'saturated'",
        ),
        Mutation(
            LOSSES, " + math.exp(EXP_LIMIT) * torch.relu(x - EXP_LIMIT)", "", "test_losses.py -k 'tangent or extreme'"
        ),
        Mutation(LOSSES, " + torch.relu(logps + MIN_LOGP_GAP) / math.expm1(MIN_LOGP_GAP)", "", REFERENCE_FREE),
        # cancels
        Mutation(
            LOSSES,
            "torch.where(x.abs() < 1, torch.expm1(x.clamp(-1, 1)), _exp(x) - 1)",
            "_exp(x) - 1",
            "test_losses.py -k 'accurate'",
        ),
        # another order
        Mutation(
            LOSSES, "(policy.sort().values - reference.sort().values)", "(policy.sort().values - reference)", PUBLISHED
        ),
        Mutation(
            LOSSES,
            "(logratios.sum() / max(1, len(logratios))).clamp(min=0)",
            "logratios.clamp(min=0).sum() / max(1, len(logratios))",
            REFERENCE_FREE,
        ),
        Mutation(LOSSES, "/ max(1, len(logratios))", "/ len(logratios)", REFERENCE_FREE),
        # a dropped detach
        Mutation(
            LOSSES,
            "losses = losses * pair_weights.detach()",
            "losses = losses * pair_weights",
            "test_losses.py -k 'pair_weights'",
        ),
        # off by one
        Mutation(LOSSES, "positions <= shared_lengths[:, None]", "positions < shared_lengths[:, None]", REFERENCE_FREE),
        # division by 0
        Mutation(
            LOSSES,
            "-chosen_logps / max(mean_chosen_length, 1e-6)",
            "-chosen_logps / mean_chosen_length",
            f"{LOSS_TESTS} {REFERENCE_FREE}",
        ),
        Mutation(
            LOSSES,
            "_as_lengths(name, lengths, logps).clamp(min=1) if",
            "_as_lengths(name, lengths, logps) if",
            REFERENCE_FREE,
        ),
        # a narrower dtype
        Mutation(
            LOSSES,
            "any(tensor.dtype == torch.float64 for",
            "all(tensor.dtype == torch.float64 for",
            "test_losses.py -k 'mixed'",
        ),
        # a swallowed error
        Mutation(
            LOSSES,
            "if use_weighting and not BATCH_LOSSES.isdisjoint(names):",
            "if use_weighting and BATCH_LOSSES.issuperset(names):",
            LOSS_TESTS,
        ),
    ],
    "models": [
        # scales forgotten
        Mutation(HEAD, "            divisor = 1 / divisor", "            pass", HEAD_TESTS),
        Mutation(OPERANDS, "(lora_a(dropped) * scaling).to(hidden)", "lora_a(dropped).to(hidden)", HEAD_TESTS),
        Mutation(FUSED_FORWARD, "* (head.logit_scale / entries)", "/ weight.shape[0]", FORWARD_TESTS),
        # adapters that are off
        Mutation(OPERANDS, "        layer.unmerge()  #", "        pass  #", HEAD_TESTS),
        Mutation(OPERANDS, "inactive = layer.disable_adapters or not adapters", "inactive = not adapters", HEAD_TESTS),
        # state that is not left as it was
        Mutation(
            CHECK, 'stack.enter_context(torch.random.fork_rng(devices=cuda, device_type="cuda"))', "pass", CHECK_TESTS
        ),
        Mutation(WRAPPERS, '            vars(module)["forward"] = before', "            pass", FORWARD_TESTS),
        Mutation(WRAPPERS, "        after_all_other_hooks.remove()", "        pass", FORWARD_TESTS),
        # a check that lets everything pass, and one that lets nothing
        Mutation(CHECK, "<= max(1e-4, 8 * unit) * size", "<= max(1e-4, 800 * unit) * size", CHECK_TESTS),
        Mutation(CHECK, "<= max(1e-4, 2 * unit))", "<= 0.1)", CHECK_TESTS),
        Mutation(CHECK, "self.dtypes.add(output.dtype)", "pass", PRECISION_TESTS),
        # entries, positions, modes and calls that it does not look at
        Mutation(CHECK, "[_products(found, self.rows), ", "[_products(found, [0]), ", CHECK_TESTS),
        Mutation(CHECK, "TOKENS, ENTRIES, BLOCK = 130,", "TOKENS, ENTRIES, BLOCK = 3,", CHECK_TESTS),
        Mutation(
            CHECK, "            module.training = False\n        yield", "            pass\n        yield", CHECK_TESTS
        ),
        Mutation(CHECK, "        if calls > 1:", "        if calls > 3:", CHECK_TESTS),
        Mutation(HEAD, "return self.model.training, weakref.ref", "return True, weakref.ref", CHECK_TESTS),
        Mutation(HEAD, "weakref.ref(layer), check", "None, check", CHECK_TESTS),
        Mutation(CHECK, "for tower in towers for", "for tower in [model] for", CHECK_TESTS),
        Mutation(CHECK, "_One(each) for each in given", "0 for each in given", CHECK_TESTS),
        Mutation(CHECK, "mine is not None and mine is other._get()", "self._address == other._address", CHECK_TESTS),
        Mutation(HEAD, "        self._refuse_unreachable()\n        state", "        state", SAYS_TESTS),
        Mutation(CHECK, "in [(head.logit_scale, head.softcap)] if settled else", "in", CHECK_TESTS),
        # NaN that is a difference, and infinity that is none
        Mutation(CHECK, "close = differences.isfinite() & (", "close = (", CHECK_TESTS),
        Mutation(CHECK, "~ours.isfinite() & ((ours == own)", "((ours.isneginf() & ours.isnan())", CHECK_TESTS),
        Mutation(CHECK, "each.isnan() | each.isposinf()", "each.isposinf()", CHECK_TESTS),
        Mutation(FUSED_FORWARD, "output if found is None else found", "output", CHECK_TESTS),
        Mutation(LAYERED, "if not is_of_a_library(function)", "if False", LAYERED_TESTS),
        # a cache that nobody wants
        Mutation(HEAD, 'return {"use_cache": False} if accepted else {}', "return {}", HEAD_TESTS),
        # the router's loss in evaluation
        Mutation(HEAD, "if self.has_router_loss and self.model.training:", "if self.has_router_loss:", HEAD_TESTS),
        # padding of the vocabulary
        Mutation(
            HEAD,
            "            weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]",
            "            pass",
            HEAD_TESTS,
        ),
        # refused without need, and not refused
        Mutation(OPERANDS, "if layer.training and any(", "if any(", HEAD_TESTS),
        # a copy that uses the original's head
        Mutation(LAYERED, "MethodType(function.__func__, model) if", "function if", LAYERED_TESTS),
        # one head in the other, for ever
        Mutation(LAYERED, "        if _is_ours(function):", "        if False:", LAYERED_TESTS),
        # the autocast of a former trainer
        Mutation(
            LAYERED, "    layer.own = _own(model, layer.original)", "    layer.own = layer.original", LAYERED_TESTS
        ),
        # a reference in the order of sums of another path
        Mutation(LINEAR_REFERENCE, "in_b = bool(gradients) and not of_head", "in_b = False", REFERENCE_TESTS),
        Mutation(LINEAR_REFERENCE, "rows = group_major(rows, comparisons, groups)", "pass", REFERENCE_TESTS),
        Mutation(LINEAR_REFERENCE, "        groups = plan_groups(", "        plan_groups(", REFERENCE_TESTS),
        # hooks that watch see what is no logits
        Mutation(WRAPPERS, "if not is_of_a_library(hook)", "if False", FORWARD_TESTS),
        # weights of the next token
        Mutation(
            FUSED_FORWARD,
            "weights if self.is_shifted else torch.nn.functional.pad(weights[:, 1:], (0, 1))",
            "weights",
            FORWARD_TESTS,
        ),
        # rounded by autocast, and by what casts outputs
        Mutation(
            FUSED_FORWARD,
            "    with torch.autocast(hidden.device.type, enabled=False):\n        return",
            "    with torch.no_grad():\n        return",
            f"{FORWARD_TESTS} {OTHERS}",
        ),
        Mutation(
            WRAPPERS,
            "other if other.dtype == value.dtype else _WithValue.apply(other, value.detach())",
            "other",
            FORWARD_TESTS,
        ),
        # statistics of the next position
        Mutation(
            FUSED_FORWARD, "is_shifted else values[:, :-1]", "is_shifted else values[:, 1:]", f"{FORWARD_TESTS} {DPO}"
        ),
    ],
    "data": [
        # best against second
        Mutation(RANKED, "return found[-1:] if", "return found[:1] if", LAYOUT_TESTS),
        # off by one
        Mutation(
            TURNS,
            "most = min(len(chosen), len(rejected)) - 1",
            "most = min(len(chosen), len(rejected))",
            LAYOUT_TESTS,
        ),
        Mutation(TOKENS, "prompt[len(prompt) - room + 1 :]", "prompt[len(prompt) - room :]", LOADING_TESTS),
        Mutation(BATCHING, "labelled[:, 1:].sum()", "labelled.sum()", BATCH_TESTS),
        # other people's turns among the labels
        Mutation(BATCHING, "labelled = token_weights != 0", "labelled = attention_mask == 1", BATCH_TESTS),
        # the space of a word left to the prompt
        Mutation(SHARED_TEXT, 'after - 1 if window[after - 1] == " " else after', "after", SHARED_TEXT_TESTS),
        # flags cut in half
        Mutation(SHARED_TEXT, "return place - flags % 2", "return place", SHARED_TEXT_TESTS),
        # graphemes cut
        Mutation(
            SHARED_TEXT,
            "for place, firm in places.items() if place in whole}",
            "for place, firm in places.items()}",
            SHARED_TEXT_TESTS,
        ),
        # the question trained on as a response
        Mutation(SHARED_TEXT, "return begun <= min(_FEW, rest) and", "return", SHARED_TEXT_TESTS),
        Mutation(SHARED_TEXT, "if _QUESTION_COMES.search(window, *before):", "if False:", SHARED_TEXT_TESTS),
        # a label cut off from its emphasis
        Mutation(SHARED_TEXT, "text in marks and not blank", "False", SHARED_TEXT_TESTS),
        # turns in another order
        Mutation(RANKED, "prompt.insert(0, message)", "prompt.append(message)", LAYOUT_TESTS),
        # two system turns
        Mutation(TURNS, "return prompt if own else [*system, *prompt]", "return [*system, *prompt]", LAYOUT_TESTS),
        # the prompt trained on as a response
        Mutation(TURNS, "len(repeated) :], responses[1][len(repeated) :]", ":], responses[1][:]", TURN_TESTS),
        # Python's 1 is its True
        Mutation(
            TURNS,
            "if not same_turns(chosen[i : i + 1], rejected[i : i + 1])",
            "if chosen[i] != rejected[i]",
            TURN_TESTS,
        ),
        # JSON that is an answer
        Mutation(MESSAGES, "    return sound and any(\n", "    return True or any(\n", MESSAGE_TESTS),
        # a call of a tool is no answer
        Mutation(
            MESSAGES,
            'message["content"].strip() or message.get("tool_calls")',
            'message["content"].strip()',
            LAYOUT_TESTS,
        ),
        # cache keys that lack a part
        Mutation(LOADING, "for s in sources], options.max_rows, ", "for s in sources], ", LOADING_TESTS),
        Mutation(LOADING, "options.max_rows, options.ranked_pairs, ", "options.max_rows, ", LOADING_TESTS),
        Mutation(LOADING, "options.ranked_pairs, options.empty_response\n", "options.ranked_pairs\n", LOADING_TESTS),
        Mutation(LOADING, "[(s.origin, s.digest) for s in sources]", "[s.origin for s in sources]", LOADING_TESTS),
        Mutation(
            TOKENS,
            "dataset._fingerprint, _tokenizer_digest(tokenizer), settings)",
            "dataset._fingerprint, settings)",
            LOADING_TESTS,
        ),
        Mutation(
            TOKENS, "contents, special, tokenizer.chat_template)", "contents, tokenizer.chat_template)", TOKEN_TESTS
        ),
        # files read otherwise than they were written
        Mutation(FORMATS, 'errors="surrogateescape", newline=""', 'errors="surrogateescape"', FILE_TESTS),
        Mutation(FORMATS, "line.removeprefix(_BOM).decode()", "line.decode()", FILE_TESTS),
        Mutation(FORMATS, "    csv.field_size_limit(2**31 - 1)", "    pass", FILE_TESTS),
        Mutation(FORMATS, "(_is_layout(names[mark]), len(names[mark]))", "len(names[mark])", FILE_TESTS),
        # the last of two values
        Mutation(FORMATS, "if len(result) < len(pairs):", "if False:", FILE_TESTS),
        # what a damaged archive has before the damage, and nothing said
        Mutation(FORMATS, "        except EOFError:\n", "        except EOFError:\n            return\n", FILE_TESTS),
        # the order of the disk
        Mutation(FILES, "for file in sorted(_walk(path))", "for file in _walk(path)", FILE_TESTS),
        # files without the name of a split lost
        Mutation(FILES, 'return "train"', 'return "others"', FILE_TESTS),
        Mutation(FILES, 'words.find(f" {name} ")', "words.find(name)", FILE_TESTS),
        # another layout from some row on
        Mutation(LOADING, "if layout != source.layout:", "if False:", LOADING_TESTS),
        # columns of the right names
        Mutation(LOADING, " or dataset.info.description != _MARK", "", LOADING_TESTS),
        # pairs without a weight count nothing
        Mutation(LOADING, "weight = 1.0 if", "weight = 0.0 if", LOADING_TESTS),
        Mutation(MIXTURES, "math.floor(share * size + 0.5)", "math.floor(share * size)", MIXTURE_TESTS),
        # one choice for all datasets
        Mutation(MIXTURES, "default_rng([seed, place])", "default_rng(seed)", MIXTURE_TESTS),
        # nothing held out
        Mutation(
            SPLITTING,
            "max(1, round(len(dataset) * (eval_fraction or 0)))",
            "round(len(dataset) * (eval_fraction or 0))",
            LOADING_TESTS,
        ),
        # prompts on both sides of the split
        Mutation(SPLITTING, "held_out += prompts[place]", "held_out.append(prompts[place][0])", LOADING_TESTS),
        # EOS after the end of a turn
        Mutation(
            RENDERING,
            "closing.rstrip().endswith(self.template.special)",
            "closing.endswith(self.template.special)",
            RENDERING_TESTS,
        ),
        # any special token for EOS
        Mutation(RENDERING, "text.rstrip().endswith(self.eos)", "text.rstrip().endswith(self.special)", TOKEN_TESTS),
        # what a template loses
        Mutation(RENDERING, "if ours and part.what != CHANGES_SPACE:", "if False:", MARKS_TESTS),
        Mutation(
            MARKS, "if length is None or (number in found and field.kind != CALLS):", "if length is None:", MARKS_TESTS
        ),
        Mutation(
            MARKS,
            "if render([*messages[:message], silenced",
            "if not render([*messages[:message], silenced",
            MARKS_TESTS,
        ),
        # a text that occurs elsewhere taken for it
        Mutation(
            MARKS,
            "text.find(variant, max(0, end - len(variant)), start + len(variant))",
            "text.find(variant)",
            MARKS_TESTS,
        ),
        # to Python, 1 is True
        Mutation(RENDERING, "json.dumps(said) == json.dumps(also_said)", "said == also_said", MARKS_TESTS),
        # the prompt's last text trained on, or the response's first cut off
        Mutation(
            RENDERING,
            "return opening, [a + len(tail) for a, _ in at]",
            "return opening, [a for a, _ in at]",
            RENDERING_TESTS,
        ),
        Mutation(RENDERING, "at.append((place_end, begin))", "at.append((end, begin))", RENDERING_TESTS),
        # a turn that the prompt begins
        Mutation(
            RENDERING,
            'begun["content"] + first["content"]',
            'begun["content"] + first["content"].strip()',
            RENDERING_TESTS,
        ),
        # which turns count
        Mutation(RENDERING, 'train = message.get("train", ', 'train = message.get("", ', RENDERING_TESTS),
        Mutation(RENDERING, '_FLAGS = ("train", "weight")', '_FLAGS = ("train",)', RENDERING_TESTS),
        Mutation(RENDERING, "return max(end, len(closed.rstrip()))", "return len(closed)", RENDERING_TESTS),
        # weights that stay where their tokens were cut
        Mutation(TOKENS, "chosen.weights[: len(ids[1])]", "chosen.weights", TOKEN_TESTS),
        # pairs of which nothing is trained
        Mutation(
            TOKENS,
            "if not dropped and not all(map(any, weights)):",
            "if not dropped and not any(map(any, weights)):",
            TOKEN_TESTS,
        ),
        # dropped rows counted as altered
        Mutation(
            TOKENS,
            "for number in kept for reason in altered[number]",
            "for number in range(len(altered)) for reason in altered[number]",
            LOADING_TESTS,
        ),
        # a space before a response
        Mutation(TOKENS, "if joined == anchor + single:", "if True:", LOADING_TESTS),
        # rounded down
        Mutation(
            BATCHING,
            "-(-length // self.pad_to_multiple_of) * self",
            "length // self.pad_to_multiple_of * self",
            BATCH_TESTS,
        ),
        # pair by pair
        Mutation(
            BATCHING,
            "for key in _REF_LOGPS\n            for n, example in enumerate(examples)",
            "for n, example in enumerate(examples)\n            for key in _REF_LOGPS",
            BATCH_TESTS,
        ),
    ],
    "training": [
        # scales forgotten
        Mutation(LOOP, "run.backward(loss * share, is_last)", "run.backward(loss, is_last)", STEPS),
        Mutation(SCHEDULE, "float(share * weight[rows].sum())", "float(share)", STEPS),
        Mutation(SCHEDULE, "share * weight[rows].sum()", "share * len(rows)", SHARES),
        Mutation(SCHEDULE, "of_one in step for rows", "of_one in step[rank : rank + 1] for rows", SHARES),
        Mutation(STATE, 'weight if name == "loss" else pairs', "pairs", SHARES),
        Mutation(
            POLICY,
            "loss = loss + self.head.aux_loss_coef * aux_loss",
            "loss = loss + aux_loss",
            "training/test_loop.py -k 'router'",
        ),
        # a process without pairs counts one
        Mutation(LOOP, "if share:\n                    state", "if True:\n                    state", TWO),
        # every process evaluates the first one's
        Mutation(LOOP, "of_process(step, accelerator.process_index,", "of_process(step, 0,", TWO),
        # modes
        Mutation(LOOP, "    run.policy_loss.train()\n", "", RESUMED),
        Mutation(REFERENCE, "        adapter.train()", "        pass", GOLDEN),
        Mutation(
            REFERENCE,
            "copy.deepcopy(model).eval().requires_grad_(False)",
            "copy.deepcopy(model).requires_grad_(False)",
            "training/test_run.py",
        ),
        Mutation(
            SETUP,
            "        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)",
            "        pass",
            "training/test_run.py",
        ),
        # everything is clipped away
        Mutation(
            SETUP, "config.max_grad_norm or math.inf", "config.max_grad_norm", "training/test_loop.py -k 'divergence'"
        ),
        # a mean over other pairs
        Mutation(LOOP, "run.sizes.mean_chosen_length(rows)", "run.sizes.mean_chosen_length()", STEPS),
        Mutation(SIZES, "self.chosen[rows], weights=self.weight[rows]", "self.chosen[rows]", SHARES),
        # what weighs nothing
        Mutation(PAIRS, "pairs.select(np.flatnonzero(weights))", "pairs", SHARES),
        Mutation(PAIRS, "weights[weights > 0] / weights.max()", "weights[weights > 0]", SHARES),
        # the optimizer
        Mutation(
            SETUP,
            'if weight.dim() < 2], "weight_decay": 0.0}',
            'if weight.dim() < 2], "weight_decay": config.weight_decay}',
            "training/test_run.py",
        ),
        Mutation(
            SCHEDULE,
            "math.ceil(config.warmup_ratio * steps) if config.warmup_steps is None else config.warmup_steps",
            "config.warmup_steps or math.ceil(config.warmup_ratio * steps)",
            "training/test_run.py",
        ),
        # a seed forgotten
        Mutation(SETUP, "    set_seed(config.seed, device_specific=True)  #", "    #", GOLDEN),
        Mutation(
            SCHEDULE,
            "np.random.default_rng([seed, epoch])",
            "np.random.default_rng(seed)",
            "training/test_loop.py -k 'every_epoch'",
        ),
        # other weights on an old trajectory
        Mutation(SETUP, '        "the starting weights": fingerprint,\n', "", "training/test_state.py"),
        # checkpoints that forget a part
        Mutation(STATE, '        set_random_state(here["random"], run.device)\n', "", RESUMED),
        Mutation(STATE, '"window": self.window.tensors()}', '"window": Window.empty(run.device).tensors()}', RESUMED),
        Mutation(
            STATE,
            'in ("step", "before", "latest", "best"):\n            setattr',
            'in ("step", "before", "latest"):\n            setattr',
            "training/test_state.py",
        ),
        # off by one
        Mutation(CHECKPOINT, "[: -limit if limit else 0]", "[: -limit - 1 if limit else 0]", RESUMED),
        Mutation(CHECKPOINT, 'if row["step"] <= step]', 'if row["step"] < step]', RESUMED),
        Mutation(STATE, "return due or self.finished", "return due", STEPS),
        # 16 before 8
        Mutation(CHECKPOINT, "if _is_ours(path)), key=_step)", "if _is_ours(path)))", CHECKPOINTS),
        # damage
        Mutation(CHECKPOINT, "_sha256(file) == sums[name]", "True", CHECKPOINTS),
        Mutation(CHECKPOINT, "for path in reversed(checkpoints):", "for path in checkpoints[-1:]:", CHECKPOINTS),
        Mutation(CHECKPOINT, 'if _step(other) <= progress["step"]]', "]", CHECKPOINTS),
        Mutation(CHECKPOINT, "if path.is_dir() and _NAME.fullmatch(path.name)]", "if path.is_dir()]", CHECKPOINTS),
        Mutation(STATE, "damaged = damaged_weights(run.weights.items())", "damaged = ''", PARTS),
        # half a line
        Mutation(CHECKPOINT, 'if line.endswith(b"\\n"):', "if line:", CHECKPOINTS),
        Mutation(POLICY, "if copy_of and (problems", "if not copy_of and (problems", STEPS),
        # shards: what is computed for the others to meet
        Mutation(LOOP, "        if counts:\n            sums += found", "        sums += found", SHARDED),
        Mutation(REFERENCE, "if not counts:", "if False:", SHARDED),
        # gathered twice, or never freed
        Mutation(SHARDING, "after_forward=frozen)", "after_forward=True)", "training/test_sharded_loop.py -k gathered"),
        Mutation(
            SHARDING,
            "mesh=mesh, reshard_after_forward=frozen)",
            "mesh=mesh)",
            "training/test_sharded_loop.py -k gathered",
        ),
        # the norms of a window, as often as there were processes
        Mutation(
            STATE,
            '"grad_norms": saved[0]["window"]["grad_norms"]',
            '"grad_norms": sum(each["window"]["grad_norms"] for each in saved)',
            "training/test_sharded_loop.py -k one_process",
        ),
        Mutation(
            STATE,
            "for each in saved]).sum(0)",
            "for each in saved])[0]",
            "training/test_sharded_loop.py -k one_process",
        ),
        # a process that is waited for: for as long as accelerate says, nobody named, or those who wait, too
        Mutation(SETUP, "            InitProcessGroupKwargs(timeout=config.timeout),\n", "", LOST + " -k 'hangs'"),
        Mutation(CONFIG, ", microseconds=1)", ")", LOST + " -k 'timeout'"),
        Mutation(LOOP, "            heartbeat.beat(state.step + 1)\n", "", LOST + " -k 'killed'"),
        Mutation(HEARTBEAT, "            self._say(WAITS)\n", "", LOST + " -k 'killed'"),
        Mutation(HEARTBEAT, "self._say(in_one_line(error)[:1000])", "self._say(WAITS)", LOST + " -k 'of_its_own'"),
        Mutation(HEARTBEAT, "enumerate(found) if at < latest]", "enumerate(found)]", LOST + " -k 'who'"),
        Mutation(HEARTBEAT, "isinstance(error, dist.DistError) or", "", LOST + " -k 'collectives'"),
        # nobody named, but in the steps, or a step 0 that there is not
        Mutation(
            LOOP,
            "    with heartbeat.lost_ones_named(Path(config.output_dir)):\n        run = set_up(config, accelerator)\n",
            "    run = set_up(config, accelerator)\n    with heartbeat.lost_ones_named(Path(config.output_dir)):\n",
            LOST + " -k 'before_the_steps'",
        ),
        Mutation(HEARTBEAT, "sorted(steps) if step)", "sorted(steps))", LOST + " -k 'before_the_steps'"),
        # an error that nothing catches, one that hides another, or that is in the next run's way
        Mutation(
            SAVING,
            "except CheckpointException as error:\n        raise account(what, error) from error",
            "except CheckpointException:\n        raise",
            MEANWHILE + " -k 'alike'",
        ),
        Mutation(
            STATE,
            "self.finish_saving(wait=self.run.accelerator.num_processes == 1)",
            "pass",
            MEANWHILE + " -k 'does_not_hide'",
        ),
        Mutation(
            SETUP,
            "            if self.accelerator.num_processes == 1:\n",
            "            if False:\n",
            MEANWHILE + " -k 'hide'",
        ),
        # a checkpoint that is complete before it is written, of another step, or that nobody misses
        Mutation(SAVING, "[written.result(), complete()]", "complete()", MEANWHILE + " -k 'same_bits'"),
        Mutation(STATE, "state, progress = copy.deepcopy((state, progress))", "pass", MEANWHILE + " -k 'changes'"),
        Mutation(LOOP, "        state.finish_saving()\n", "", MEANWHILE + " -k 'same_bits'"),
        Mutation(LOOP, "            state.finish_saving(wait=False)\n", "", MEANWHILE + " -k 'could_not'"),
        # gradients summed as often as there are micro-batches
        Mutation(
            LOOP, "if is_last or run.sharded else accelerator.no_sync(run.policy)", "", "training/test_communication.py"
        ),
        # ranks that share a head and have other options, and those that share it and split sequences, too
        Mutation(PARALLEL, 'if name == "options" and len(set(values)) > 1:', "if False:", SHARD_TESTS),
        Mutation(SEQUENCES, "if len(shared) > 1:", "if False:", SHARD_TESTS),
        # kernels for whole sequences that nobody has compared
        Mutation(
            MODEL_LAYOUTS, 'whole = _computed(model, "whole")', "whole = shared", "models/test_layouts.py -k compared"
        ),
        # a plan with more or less in shards than ZeRO has
        Mutation(
            STEP, '"zero2": ("gradients", "optimizer"),', '"zero2": ("weights", "gradients", "optimizer"),', ZERO_PLANS
        ),
        Mutation(STEP, "shape.head_parameters + _largest_matrix(shape)", "shape.head_parameters", ZERO_PLANS),
        Mutation(STEP, "_largest_matrix(shape) + shape.hidden**2 if", "shape.hidden**2 if", ZERO_PLANS),
        # processes that were started with what does not go together
        Mutation(SETUP, "    check_settings(config, accelerator)\n", "", ALIKE),
        Mutation(SETUP, "    check_alike(identity, accelerator)\n", "", ALIKE),
        Mutation(SETUP, "        check_shared(Path(config.output_dir), accelerator)\n", "", ALIKE),
        # what accelerate is set up for, forgotten or done twice
        Mutation(LAUNCHED, "hidden = {name: os.environ.pop(name) for name in asked}", "hidden = {}", ACCELERATED),
        Mutation(LAUNCHED, "        os.environ.update(hidden)", "        pass", ACCELERATED),
        Mutation(LAUNCHED, "if not same:", "if False:", ACCELERATED),
        Mutation(LAUNCHED, "yield replace(config, sharding=sharding)", "yield config", ACCELERATED),
        # weights of one name mixed with those of another process
        Mutation(SHARDING, "        check_same_everywhere(model)\n", "", "training/test_sharded_loop.py -k differ"),
        # the best
        Mutation(STATE, "held_out, self.best or self.before)", "held_out, self.before)", STEPS),
        Mutation(
            STATE, "return difference < 0 if", "return difference <= 0 if", "training/test_loop.py -k 'no_better'"
        ),
        # metrics
        Mutation(SIZES, "(1 if shared else found.counts)", "1", SCHEDULED),
        Mutation(
            POLICY,
            "accurate = (chosen_rewards > rejected_rewards)",
            "accurate = (chosen_rewards >= rejected_rewards)",
            LOOP_TESTS,
        ),
        Mutation(
            "dpo_kernels/training/plots.py",
            '_line(rewards, rows, f"eval/rewards/{side}",',
            '_line(rewards, rows, f"rewards/{side}",',
            "training/test_state.py",
        ),
        # the same lengths are not the same tokens
        Mutation(
            SIZES,
            "hasher.update(tokens.astype(np.int64).data)",
            "hasher.update(str(len(tokens)).encode())",
            "training/test_state.py -k 'lengths'",
        ),
        # caches of the reference that lack a part of their key
        Mutation(REFERENCE, '        "model": fingerprint,\n', "", "training/test_state.py -k 'cached'"),
        Mutation(
            REFERENCE,
            '"ld_alpha", "temperature", "impl")',
            '"ld_alpha", "impl")',
            "training/test_state.py -k 'cached'",
        ),
        # errors that come too late
        Mutation(
            SIZES,
            "tokens.max() >= entries",
            "tokens.max() > entries",
            "training/test_loop.py -k 'outside_the_vocabulary'",
        ),
        Mutation(
            SIZES, "(np.maximum, found.responses)", "(np.minimum, found.responses)", "training/test_run.py -k 'as_long'"
        ),
        # settings without effect
        Mutation(POLICY, '            "temperature": config.temperature,\n', "", "training/test_state.py -k 'cached'"),
        Mutation(
            REFERENCE, "                    temperature=config.temperature,\n", "", "training/test_state.py -k 'cached'"
        ),
        Mutation(SETUP, "self.policy_loss.gradients if torch.is_grad_enabled() else ()", "()", PARTS),
        # a first step that learns nothing
        Mutation(SCHEDULE, "(step + 1) / (self.warmup_steps + 1)", "step / (self.warmup_steps + 1)", PARTS),
        # dropout where it is a number, in a layer, in a configuration
        Mutation(POLICY, '("drop" in name.lower() or (is_layer and name == "p"))', '(is_layer and name == "p")', PARTS),
        Mutation(POLICY, ' or (is_layer and name == "p")', "", PARTS),
        Mutation(POLICY, 'elif _is_number(value) and "drop" in str(name).lower():', "elif False:", PARTS),
        Mutation(
            POLICY,
            'options |= {"chunk_bytes": config.chunk_bytes, "mean',
            'options |= {"mean',
            "training/test_loop.py -k 'bound'",
        ),
        Mutation(
            CONFIG,
            '"f_divergence", "f_alpha", "discopop_tau")',
            '"f_divergence", "f_alpha")',
            "training/test_run.py",
        ),
        # what settings mean
        Mutation(
            VALUES,
            "if isinstance(value, bool) or not isinstance(value, (int, float, str)):",
            "if not isinstance(value, (int, float, str)):",
            "training/test_config.py",
        ),
        Mutation(VALUES, '"," not in value or Path(value).expanduser().exists()', "False", "training/test_config.py"),
        Mutation(CONFIG, "and not (values and rest[0].endswith(SETTINGS_FILES))", "", "training/test_config.py"),
        # files that are not named
        Mutation(
            CONFIG,
            "    except UnicodeDecodeError as error:",
            "    except ImportError as error:",
            "training/test_config.py",
        ),
        Mutation(
            TOKENIZER,
            "    except UnicodeDecodeError as error:",
            "    except ImportError as error:",
            "training/test_pairs.py",
        ),
        # the wrong words, and the wrong pairs
        Mutation(PAIRS, "SETTINGS.get(argument, argument)", "argument", "training/test_pairs.py"),
        Mutation(PAIRS, 'f"{which}: no preference", 1)', '"no preference", 1)', "training/test_pairs.py"),
        # what a terminal obeys
        Mutation(PREVIEW, '_INVISIBLE = ("Cc", "Cf",', '_INVISIBLE = ("Cc",', "data/test_preview.py"),
        Mutation(
            PREVIEW,
            "if text.startswith(before) else decode(list(ids[start:end]))",
            "if False else decode(list(ids[start:end]))",
            "data/test_preview.py",
        ),
        Mutation(
            PREVIEW, "if high // width - low // width < BINS)", "if high - low < BINS * width)", "data/test_preview.py"
        ),
        Mutation("dpo_kernels/cli.py", 'and not os.environ.get("NO_COLOR")', "", "test_cli.py -k 'terminal'"),
        # a wrong default
        Mutation(
            CONFIG,
            "add_eos: bool = option(True,",
            "add_eos: bool = option(False,",
            "training/test_run.py",
        ),
    ],
    "TRL and what other libraries call": [
        Mutation(
            f"{TRL}/_dpo.py", "trainer.label_smoothing if smoothed else 0.0,", "trainer.label_smoothing,", FAITHFUL
        ),
        Mutation(f"{TRL}/_dpo.py", "    labels[:, 0] = -100  #", "    #", "trl/test_models.py -k 'virtual'"),
        # metrics of all steps so far, and of none that was read before
        Mutation(f"{TRL}/_metrics.py", "batches, self.batches = self.batches, ()", "batches = self.batches", DPO),
        Mutation(f"{TRL}/_metrics.py", "        self.read()\n            return", "        return", FAITHFUL),
        # tokens counted twice, and never
        Mutation(f"{TRL}/_metrics.py", "vars(trainer).pop(COUNTS, [])", "vars(trainer).get(COUNTS, [])", FAITHFUL),
        # another trainer's autocast
        Mutation(
            f"{TRL}/_dpo.py",
            "with self.accelerator.autocast()",
            "with torch.set_grad_enabled(torch.is_grad_enabled())",
            AGAIN,
        ),
        # a trainer of before
        Mutation(f"{TRL}/_head.py", 'if not hasattr(self, "_dpo_kernels_head"):', "if False:", AGAIN),
        # another's head on top
        Mutation(f"{TRL}/_head.py", "                restore_fused_lm_head(model)", "                pass", AGAIN),
        # what is scored for what TRL counts
        Mutation(f"{TRL}/_dpo.py", "(mask != 0).sum(1)}", "(mask[:, 1:] != 0).sum(1)}", FAITHFUL),
        # a reference summed otherwise
        Mutation(
            f"{TRL}/_dpo.py", "model(**scored, reference=reference).logps", "model(**scored).log_probs.sum(1)", FAITHFUL
        ),
        # a weight of 0 that counts
        Mutation(
            f"{TRL}/_dpo.py", 'mask = mask.masked_fill(weights["token_weights"] == 0, 0)', "pass", "trl/test_weights.py"
        ),
        # a baseline below 0
        Mutation(
            f"{TRL}/_kto.py",
            '(sums["kl"] / sums["processes"]).clamp(min=0) if',
            '(sums["kl"] / sums["processes"]) if',
            OTHERS,
        ),
        Mutation(
            f"{TRL}/_reference_free.py",
            "out.all_mean_logits[:, :-1] if orpo else out.all_mean_logits",
            "out.all_mean_logits",
            OTHERS,
        ),
        Mutation(
            f"{TRL}/_reference_free.py",
            "/ (scored[:pairs, 1:] != -100).sum()",
            "/ (labels[:pairs, 1:] != -100).sum()",
            OTHERS,
        ),
        # TRL's own trainers with our head
        Mutation(
            f"{TRL}/_head.py", "for name, value in before.items():", "for name, value in {}.items():", f"{OTHERS} {DPO}"
        ),
        # a first batch that is not logged
        Mutation(
            f"{TRL}/_verify.py",
            "        trainer._metrics, trainer._total_train_tokens = before",
            "        _, trainer._total_train_tokens = before",
            f"{OTHERS} {DPO}",
        ),
        # NaN agrees with everything
        Mutation(
            f"{TRL}/_verify.py",
            "if not abs(a - b) <= tolerance * max(1.0, abs(b)):",
            "if abs(a - b) > tolerance * max(1.0, abs(b)):",
            "trl/test_verify.py",
        ),
        # scales forgotten
        Mutation(LIGER, "reference[:pairs] = self.gamma / self.beta", "reference[:pairs] = self.gamma", LIGER_TESTS),
        Mutation(
            SCORING, "ref_sums = ref_logps * lengths if average else ref_logps", "ref_sums = ref_logps", LIGER_TESTS
        ),
        Mutation(SCORING, "+ _input.shape[1] * bias_sum", "+ bias_sum", LIGER_TESTS),
        # dropped detaches
        Mutation(
            LIGER,
            "dtype=logps.dtype, device=logps.device).detach()",
            "dtype=logps.dtype, device=logps.device)",
            LIGER_TESTS,
        ),
        Mutation(SCORING, "    with torch.no_grad():", "    with torch.enable_grad():", LIGER_TESTS),
        # tokens of another target
        Mutation(LIGER, "token_logps[:pairs].masked_fill(nll_labels != chosen, 0)", "token_logps[:pairs]", LIGER_TESTS),
        # a wrong reduction
        Mutation(
            TRAINERS,
            "return losses.mean(), chosen_rewards",
            "return losses.sum(), chosen_rewards",
            "compat/test_functions.py",
        ),
    ],
    "planning, bench and the command": [
        Mutation(
            "dpo_kernels/planning/step.py",
            "    return low\n",
            "    return high\n",
            "planning/test_planning.py -k 'largest'",
        ),
        Mutation(
            "dpo_kernels/planning/head_memory.py",
            "else columns * self.h * self.a\n",
            "else columns * self.h * self.e\n",
            "planning/test_planning.py -k 'ours'",
        ),
        Mutation(
            "dpo_kernels/planning/head_memory.py",
            "4 if train_head else 3, scored)",
            "3 if train_head else 2, scored)",
            "planning/test_planning.py",
        ),
        # NaN is right
        Mutation("dpo_kernels/bench/cases.py", "if not error <= limit:", "if error > limit:", "bench/test_harness.py"),
        Mutation(
            "dpo_kernels/bench/cases.py",
            'error[oracle.token_logps != 0] if name == "token_logps" else error',
            "error",
            "bench/test_harness.py",
        ),
        # a second run on what the first left
        Mutation(
            "dpo_kernels/bench/cases.py",
            "            self.logits.detach().copy_(self.original)",
            "            pass",
            "bench/test_harness.py",
        ),
        Mutation("dpo_kernels/measure.py", 'n=4, method="inclusive"', "n=4", "bench/test_harness.py"),
        Mutation(
            "dpo_kernels/bench/report.py",
            'if row["over_ours"] < 1\n',
            'if row["over_ours"] <= 1\n',
            "bench/test_harness.py",
        ),
        # an error that nobody explains
        Mutation(
            "dpo_kernels/cli.py", "ImportError, FloatingPointError) as error:", "ImportError) as error:", "test_cli.py"
        ),
    ],
    "options, arguments and plans": [
        # another argument is named, or one that is there
        Mutation(OPTIONS, "name = min(set(options) - known)", "name = min(options)", OPTION_TESTS),
        Mutation(
            OPTIONS,
            '"f_alpha_divergence_coef": "it is f_alpha"',
            '"f_alpha_divergence_coef": "it is alpha"',
            OPTION_TESTS,
        ),
        Mutation(
            GROUPED_LOSS,
            '(("losses", grads[1]), ("logps", grads[2]))',
            '(("losses", grads[2]), ("logps", grads[1]))',
            DIFFERENTIATED,
        ),
        Mutation(LOGPS, "entries, the first is {int(wrong[0])}", "entries, the first is {int(wrong[-1])}", ARGUMENTS),
        # an unknown one beside a known one
        Mutation(
            OPTIONS, "if known.issuperset(options):", "if not options or not known.isdisjoint(options):", OPTION_TESTS
        ),
        # the signature of what is decorated
        Mutation(OPTIONS, "    @functools.wraps(function)\n", "", OPTION_TESTS),
        # values that are not there, or are waited for
        Mutation(OPTIONS, 'tensor.device.type == "cpu" and type(tensor)', "type(tensor)", OPTION_TESTS),
        Mutation(OPTIONS, "type(tensor) in (Tensor, torch.nn.Parameter)", "isinstance(tensor, Tensor)", OPTION_TESTS),
        Mutation(OPTIONS, "if torch.compiler.is_compiling() or torch._C", "if torch._C", "test_losses.py -k compiles"),
        Mutation(OPTIONS, " or torch._C._functorch.is_functorch_wrapped_tensor(tensor):", ":", OPTION_TESTS),
        # options and arguments that a module takes and does not give on
        Mutation(
            MODULES,
            "rejected_lengths=rejected_lengths,\n            mean_chosen_length=mean_chosen_length,",
            "rejected_lengths=rejected_lengths,",
            MODULE_TESTS,
        ),
        Mutation(
            MODULES,
            "mean_chosen_length=mean_chosen_length,\n            pair_weights=pair_weights,",
            "mean_chosen_length=mean_chosen_length,",
            MODULE_TESTS,
        ),
        Mutation(MODULES, "            token_weights=token_weights,\n", "", MODULE_TESTS),
        Mutation(MODULES, "            lengths=lengths,\n", "", MODULE_TESTS),
        Mutation(MODULES, '"shift": shift,', '"shift": False,', MODULE_TESTS),
        Mutation(MODULES, '"differentiable": differentiable,', '"differentiable": (),', MODULE_TESTS),
        # what is wrong is found at the first step, or never
        Mutation(MODULES, "        check_options(self.options)\n", "", MODULE_TESTS),
        Mutation(MODULES, "        validate_dpo_options(**options)\n", "", MODULE_TESTS),
        Mutation(
            LINEAR_DPO,
            '("shift", "use_weighting", "check_hidden")',
            '("shift", "check_hidden")',
            MODULE_TESTS,
        ),
        Mutation(LINEAR_DPO, '    check_num_labelled(options.get("num_labelled"))\n', "", ASKED),
        Mutation(
            LINEAR_DPO,
            '    check_differentiable(options.get("differentiable", ()))\n',
            "",
            ASKED,
        ),
        Mutation(
            FUSED_FORWARD,
            'for name in ("token_weights", "pair_weights", "lengths"):',
            'for name in ("token_weights", "pair_weights"):',
            ASKED,
        ),
        # True and False as numbers, and numbers as True and False
        Mutation(LOGPS, "torch.SymInt)) or isinstance(ignore_index, bool):", "torch.SymInt)):", ARGUMENTS),
        Mutation(LOGPS, "if not isinstance(value, bool):", "if not isinstance(value, (bool, int)):", ARGUMENTS),
        Mutation(
            LOGPS,
            "isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)",
            "isinstance(value, numbers.Real)",
            ARGUMENTS,
        ),
        Mutation(LOSSES, "lengths.is_complex() or lengths.dtype == torch.bool", "lengths.is_complex()", REFERENCES),
        # infinity, and NaN, as numbers
        Mutation(LOGPS, 'not -float("inf") < logit_scale < float("inf")', "logit_scale != logit_scale", ARGUMENTS),
        Mutation(LOGPS, 'and 0 < softcap < float("inf"))', "and 0 < softcap)", ARGUMENTS),
        Mutation(LOGPS, 'not 0 < temperature < float("inf")', "not 0 < temperature", ARGUMENTS),
        Mutation(LINEAR_DPO, "or not chunk_bytes >= 0:", "or chunk_bytes < 0:", ARGUMENTS),
        # one that is right is enough
        Mutation(
            LINEAR_DPO,
            "names is None or not DIFFERENTIABLE.issuperset(names)",
            "names is None or (names and DIFFERENTIABLE.isdisjoint(names))",
            ARGUMENTS,
        ),
        # weights that are on another device or sparse, and those that are checked on no device
        Mutation(LOGPS, "if weights.device != beside.device:", "if False:", ARGUMENTS),
        Mutation(LOGPS, "not in NUMBERS or weights.layout != torch.strided:", "not in NUMBERS:", ARGUMENTS),
        Mutation(
            LINEAR_DPO,
            'elif waits or weights.device.type == "cpu":',
            'elif waits and weights.device.type == "cpu":',
            ARGUMENTS,
        ),
        # refused where no gradient is recorded
        Mutation(
            LINEAR_DPO, "if weights.requires_grad and torch.is_grad_enabled():", "if weights.requires_grad:", ARGUMENTS
        ),
        # transforms of some arguments
        Mutation(
            LINEAR_DPO,
            "ref_logps, token_weights, pair_weights, lengths)\n    ranks",
            "ref_logps, token_weights)\n    ranks",
            ARGUMENTS,
        ),
        Mutation(
            LOGPS, "refuse_transforms(logits, labels, token_weights)", "refuse_transforms(logits, labels)", ARGUMENTS
        ),
        # heads that are not finite in some entries
        Mutation(LOGPS, "reshape(len(values), -1).all(1)", "reshape(len(values), -1).any(1)", ARGUMENTS),
        Mutation(LOGPS, "values.detach().isnan() | values.detach().isposinf()", "values.detach().isnan()", ARGUMENTS),
        # gradients that are there are refused, and those that are not are nothing
        Mutation(GROUPED_LOSS, "if grad is not None and grad.any():", "if grad is not None:", DIFFERENTIATED),
        Mutation(LINEAR_DPO, "and not differentiable and takes_groups", "and takes_groups", DIFFERENTIATED),
        # references of pairs without weight, and of other pairs
        Mutation(LINEAR_DPO, "ref_logps.masked_fill(~present, 0)", "ref_logps", WEIGHTED),
        Mutation(COMPARISONS, "return t.repeat(2)", "return t.repeat_interleave(2)", WEIGHTED),
        # RPO: 0 / 0, and weights of LD-DPO
        Mutation(
            LOSSES,
            "p.sft_chosen_logps / p.chosen_lengths.clamp(min=1)",
            "p.sft_chosen_logps / p.chosen_lengths",
            REFERENCES,
        ),
        Mutation(
            LOSSES, "return -p.rpo_alpha * p.sft_chosen_logps", "return -p.rpo_alpha * p.chosen_logps", REFERENCES
        ),
        # references that are not finite, and that have a gradient
        Mutation(
            LOSSES,
            '(("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):\n        check',
            '(("ref_rejected_logps", ref_rejected_logps),):\n        check',
            REFERENCES,
        ),
        Mutation(LOSSES, "wrong = ~torch.isfinite(logps)", "wrong = logps.isnan()", REFERENCES),
        Mutation(LOSSES, '    check_finite_logps("ref_logps", ref_logps, "response")\n', "", WRONG_CALLS),
        Mutation(
            LOSSES,
            "    ref_logps = ref_logps.detach()\n    if not isinstance(labels",
            "    if not isinstance(labels",
            REFERENCES,
        ),
        Mutation(LOSSES, "baseline = kl.detach().to(", "baseline = kl.to(", REFERENCES),
        # averages of sums
        Mutation(
            LOSSES,
            '("rejected_lengths", rejected, rejected_lengths),\n    ):',
            '("rejected_lengths", rejected, chosen_lengths),\n    ):',
            REFERENCES,
        ),
        Mutation(LOSSES, "not (type(lengths) is int and lengths == 1)", "not lengths == 1", WRONG_CALLS),
        # labels that are not shifted
        Mutation(
            HEAD,
            "shift: bool = True, **options: Unpack[LogpsOptions]",
            "shift: bool = False, **options: Unpack[LogpsOptions]",
            INPUTS,
        ),
        Mutation(
            HEAD,
            "shift: bool = True,\n        **options: Unpack[LinearDPOOptions],",
            "shift: bool = False,\n        **options: Unpack[LinearDPOOptions],",
            INPUTS,
        ),
        # inputs that are right are refused, and wrong ones not
        Mutation(HEAD, ".intersection(parameters) - set(inputs)", ".intersection(parameters)", INPUTS),
        Mutation(HEAD, " and near and not name.endswith(near[0]):", " and near:", INPUTS),
        Mutation(HEAD, "n=1, cutoff=0.75)", "n=1, cutoff=0.5)", INPUTS),
        Mutation(HEAD, "tokens[(tokens < 0) | (tokens >= room)]", "tokens[tokens >= room]", INPUTS),
        Mutation(HEAD, "| (tokens >= room)]", "| (tokens > room)]", INPUTS),
        Mutation(HEAD, ".unique().tolist() if room else []", ".unique().tolist()", INPUTS),
        Mutation(HEAD, "not set(wrong) <= set(check.numbers_of", "not set(wrong) & set(check.numbers_of", INPUTS),
        # a reference that is asked for what it does not know, and in other tiles than the policy's
        Mutation(
            FUSED_FORWARD,
            "isinstance(gradients, (str, Tensor)) or not set(gradients) <= set(GRADIENTS):",
            "isinstance(gradients, (str, Tensor)):",
            ASKED,
        ),
        Mutation(
            FUSED_FORWARD,
            "not isinstance(options, Mapping) or not set(options) <= set(REFERENCE_OPTIONS):",
            "not isinstance(options, Mapping):",
            ASKED,
        ),
        Mutation(
            FUSED_FORWARD,
            '("loss_type", "ld_alpha", "chunk_bytes", "token_weights")',
            '("loss_type", "ld_alpha", "token_weights")',
            ASKED,
        ),
        Mutation(
            FUSED_FORWARD,
            '("hidden", *sorted(of_head)) if torch.is_grad_enabled() else ()',
            '("hidden", *sorted(of_head))',
            ASKED,
        ),
        # both at once
        Mutation(
            FUSED_FORWARD,
            "if preference is not None and reference is not None:",
            "if False:",
            WRONG_CALLS,
        ),
        # nothing, as a size
        Mutation(
            STEP,
            "type(value) is not int or value < 1:",
            "type(value) is not int or value < 0:",
            PLANS,
        ),
        # gradients of no earlier micro-batch, and those that are counted twice
        Mutation(STEP, "    earlier = gradients if step.keeps_gradients else 0", "    earlier = gradients", PLANS),
        Mutation(STEP, "- earlier - kept - head.peak)", "- kept - head.peak)", PLANS),
        # shards of what is not sharded, units without gradients, and gradients that nobody reduced
        Mutation(STEP, "step.processes) if name in divided else size", "step.processes)", PLANS),
        Mutation(STEP, 'if step.train != "lora" and sharded else 0', "if sharded else 0", PLANS),
        Mutation(STEP, "(dhead if shape.tied or sharded else 0)", "(dhead if shape.tied else 0)", PLANS),
        Mutation(STEP, "    if earlier or sharded:\n", "    if earlier:\n", PLANS),
    ],
    "tuning and the choice of kernels": [
        # a head that is too far, or of another dtype
        Mutation(DISPATCH, "if v <= verdicts.NEAR and h <= verdicts.NEAR and", "if h <= verdicts.NEAR and", TUNE_TESTS),
        Mutation(DISPATCH, "if row.dtype is None or row.dtype == dtype:", "if True:", TUNE_TESTS),
        # the last of equally near ones: the verdict goes before a pin
        Mutation(DISPATCH, "and v * h < least:", "and v * h <= least:", TUNE_TESTS),
        Mutation(
            DISPATCH,
            "return (*(row for row in _pinned if row.device in (None, device.type)), *_known[device])",
            "return _known[device]",
            TUNE_TESTS,
        ),
        Mutation(
            DISPATCH,
            "row for row in _pinned if row.device in (None, device.type)",
            "row for row in _pinned",
            TUNE_TESTS,
        ),
        Mutation(DISPATCH, "_pinned.insert(0, row)", "_pinned.append(row)", TUNE_TESTS),
        # compiled code keeps what it was compiled with
        Mutation(DISPATCH, "_pinned.insert(0, row)\n    _changed()\n", "_pinned.insert(0, row)\n", TUNE_TESTS),
        # an explicit implementation asks the verdict
        Mutation(DISPATCH, '    if name != "auto":\n', '    if name == "torch":\n', TUNE_TESTS),
        # kernels that can run here no more, and those that never could
        Mutation(DISPATCH, '(path, found if found in able else "torch")', "(path, found)", TUNE_TESTS),
        Mutation(
            DISPATCH,
            "return not is_fused(family) or cast(Any, load(family)).has_fused_forward(device)",
            "return True",
            WORKER_TESTS,
        ),
        # fused kernels that nothing takes while they are tried
        Mutation(
            DISPATCH,
            "{path: family if path in paths_of(family) else impl_of(family) for",
            "{path: impl_of(family) for",
            WORKER_TESTS,
        ),
        # a family that was tried is taken from then on
        Mutation(DISPATCH, "    finally:\n        unpin(row)", "    finally:\n        pass", TUNE_TESTS),
        # it is said where nothing can be done, and again and again
        Mutation(
            DISPATCH,
            'return default(device) == "torch" and families(device) != ["torch"]',
            'return families(device) != ["torch"]',
            TUNE_TESTS,
        ),
        Mutation(
            DISPATCH,
            "if needs_tuning(device) and device.type not in _told and",
            "if needs_tuning(device) and",
            TUNE_TESTS,
        ),
        # as fast is fast enough; for some number of rows, or for the few
        Mutation(VERDICTS, "and all(taken * FASTER <= own", "and all(taken <= own", TUNE_TESTS),
        Mutation(VERDICTS, "and all(taken * FASTER <= own", "and any(taken * FASTER <= own", TUNE_TESTS),
        Mutation(
            VERDICTS,
            "<= own for taken, own in zip(found, base, strict=True))\n        }",
            "<= own for taken, own in zip(found[:1], base[:1], strict=True))\n        }",
            TUNE_TESTS,
        ),
        # refused, not verified, or refused in another dtype; or what a fused one goes back to is
        Mutation(VERDICTS, "in self.verified and not self.refuses(family, dtype)", "in self.verified", TUNE_TESTS),
        Mutation(VERDICTS, "return (family, dtype) in self.verified and not", "return not", TUNE_TESTS),
        Mutation(VERDICTS, "and each.dtype in (None, dtype)), None)", "), None)", TUNE_TESTS),
        Mutation(VERDICTS, '{family, family.removesuffix("_fused")}', "{family}", TUNE_TESTS),
        # what there is no memory for is tried in every run
        Mutation(VERDICTS, "not (whole and path in times.untimed)", "path not in times.untimed", TUNE_TESTS),
        # another driver, other kernels, another format
        Mutation(VERDICTS, '**found, "driver": driver(device)})', '**found, "driver": None})', TUNE_TESTS),
        Mutation(VERDICTS, 'if file.exists()] + sorted((here / "impl").glob("*.py"))', "if file.exists()]", TUNE_TESTS),
        Mutation(VERDICTS, 'if found["format"] != FORMAT or found["key"]', 'if found["key"]', TUNE_TESTS),
        # half a file
        Mutation(
            VERDICTS, 'temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")', "temporary = file", TUNE_TESTS
        ),
        # those of other devices
        Mutation(VERDICTS, "if pattern.fullmatch(file.name))", "if pattern)", TUNE_TESTS),
        # both at once
        Mutation(
            VERDICTS,
            "fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)",
            "tuning/test_tune.py -k 'at_once'",
        ),
        # what hung or crashed is tried again
        Mutation(TRIAL, '[each for each in verdict.refused if each.kind != "wrong"]', "[]", TUNE_TESTS),
        Mutation(
            TRIAL,
            "not in verdict.verified and not verdict.refuses(family, dtype)",
            "not in verdict.verified",
            TUNE_TESTS,
        ),
        Mutation(
            TRIAL,
            "[family for family in families if not verdict.refuses(family, head.dtype)] for head",
            "list(families) for head",
            TUNE_TESTS,
        ),
        Mutation(
            TRIAL,
            'it is not tried again")\n            verdicts.write(verdict)',
            'it is not tried again")',
            TUNE_TESTS,
        ),
        # what was found is lost with the process, or found of another device
        Mutation(TRIAL, 'if "ready" not in message:', 'if "finished" in message:', TUNE_TESTS),
        Mutation(TRIAL, 'if "ready" in message and message["ready"] != str(verdict.key):', "if False:", TUNE_TESTS),
        # again: heads that were not asked for, kernels that were, and those of another softcap
        Mutation(TRIAL, "[times for times in verdict.times if times.head[:3] not in asked]", "[]", TUNE_TESTS),
        Mutation(TRIAL, "if times.head[:3] not in asked]", "if times.head not in heads]", TUNE_TESTS),
        Mutation(TRIAL, "            verdict.verified = []\n", "", TUNE_TESTS),
        # fused kernels in fp32, which they do not take
        Mutation(TRIAL, 'if not dispatch.is_fused(family) or dtype in ("bfloat16", "float16")]', "]", TUNE_TESTS),
        # calls go on with what was known before
        Mutation(TRIAL, "    dispatch.forget()\n    return verdict", "    return verdict", TUNE_TESTS),
        # on the first machine alone, in every process, and whatever was asked for
        Mutation(TRIAL, 'os.environ.get("LOCAL_RANK", "0")', 'os.environ.get("RANK", "0")', TUNE_TESTS),
        Mutation(
            TRIAL,
            "dispatch.needs_tuning(device) and is_first_of_machine() and",
            "dispatch.needs_tuning(device) and",
            TUNE_TESTS,
        ),
        Mutation(TRIAL, '    if impl != "auto":\n        return\n', "", TUNE_TESTS),
        Mutation(TRIAL, "    except Exception as error:\n", "    except Untuned as error:\n", TUNE_TESTS),
        # ranks that differ
        Mutation(TRIAL, 'else "torch" for path in first}', "else first[path] for path in first}", TUNE_TESTS),
        Mutation(TRIAL, "everyone = _from_all(now, together)", "everyone = [now]", RANKS_TESTS),
        Mutation(
            TRIAL,
            "in _from_all(self._hindrance(recorded), together) if",
            "in [self._hindrance(recorded)] if",
            RANKS_TESTS,
        ),
        # kept, and not taken; or kept although it hung here, and beyond the run
        Mutation(
            TRIAL,
            "self._row = dispatch.pin(self.families, self.device.type, dtype, self.head.vocab, self.head.hidden)",
            "pass",
            TUNE_TESTS,
        ),
        Mutation(TRIAL, "            if refusal is not None:\n", "            if False:\n", TUNE_TESTS),
        Mutation(TRIAL, "            dispatch.unpin(self._row)\n", "", TUNE_TESTS),
        # no patience, too little of it at the start, and what hangs is left there
        Mutation(PROCESS, "                wait = patience\n", "", TUNE_TESTS),
        Mutation(PROCESS, "wait = max(patience, STARTED)", "wait = patience", TUNE_TESTS),
        Mutation(PROCESS, "            process.kill()\n", "            pass\n", TUNE_TESTS),
        # what ended is done, what was killed by the system is wrong, and what is printed is a message
        Mutation(PROCESS, "raise _end(process, errors)", "return", TUNE_TESTS),
        Mutation(PROCESS, '"SIGTERM", "SIGINT", "SIGHUP", "SIGKILL")', '"SIGTERM", "SIGINT", "SIGHUP")', TUNE_TESTS),
        Mutation(PROCESS, "return found if isinstance(found, dict) else None", "return found", TUNE_TESTS),
        # right once is right; or on the whole, by and large, or on small inputs
        Mutation(WORKER, "if not torch.equal(found[name], again[name]):", "if False:", TUNE_TESTS),
        Mutation(
            WORKER,
            "if reason := _far(found[name], reference[name], oracle[name], name):",
            'if reason := "":',
            WORKER_TESTS,
        ),
        Mutation(WORKER, 'if case.confident and path == "A":', "if False:", WORKER_TESTS),
        Mutation(WORKER, "if not abs(found[name] - theirs) <= limit:", "if False:", WORKER_TESTS),
        # fused kernels that are held against nothing, that took nothing, and are timed where they are not taken
        Mutation(
            WORKER,
            "tuple(path for path in verdicts.PATHS if path in dispatch.paths_of(family))",
            "() if dispatch.is_fused(family) else verdicts.PATHS",
            WORKER_TESTS,
        ),
        Mutation(WORKER, "took = took or any(taken)", "took = True", WORKER_TESTS),
        Mutation(WORKER, "if path in dispatch.paths_of(name)]", "]", WORKER_TESTS),
        # a family that failed goes on, as does one that is wrong
        Mutation(WORKER, 'refused.add(message["failed"])', "pass", TUNE_TESTS),
        Mutation(WORKER, 'refused.add((message["wrong"], message["dtype"]))', "pass", TUNE_TESTS),
        # memory that others have is held against the kernels
        Mutation(WORKER, "            except NO_MEMORY:\n                raise\n", "", TUNE_TESTS),
        Mutation(WORKER, "    except NO_MEMORY:\n        return True  # as is seen when it is timed\n", "", TUNE_TESTS),
        Mutation(
            WORKER,
            '            except NO_MEMORY as error:\n                short = short or f"{family}: '
            '{measure.described(error)}"\n                raise\n',
            "",
            TUNE_TESTS,
        ),
        # with other threads and another precision than calls have, and the luckiest time
        Mutation(WORKER, '        torch.set_num_threads(task["threads"])\n', "        pass\n", WORKER_TESTS),
        Mutation(WORKER, '    torch.set_float32_matmul_precision(task["precision"])\n', "", WORKER_TESTS),
        Mutation(WORKER, "family: sorted(sample)[len(sample) // 2]", "family: min(sample)", WORKER_TESTS),
        # a head in its own dtype, without its softcap, and of the shape of a shard or of packed weights
        Mutation(TIMED_HEADS, "dtype = AUTOCAST.get(mixed_precision, own)", "dtype = own", TRAINER_TESTS),
        Mutation(TIMED_HEADS, "shape[1], shape[0], head.softcap)", "shape[1], shape[0])", TRAINER_TESTS),
        Mutation(TIMED_HEADS, "if len(shape) != 2 or shape[1] != config.hidden_size:", "if False:", TRAINER_TESTS),
        Mutation(
            TIMED_HEADS,
            "own = weight.dtype if weight.dtype.is_floating_point else head.model.dtype",
            "own = weight.dtype",
            TRAINER_TESTS,
        ),
        # options of the command that are not given on
        Mutation(COMMAND, "again=options.again,", "again=False,", TRAINER_TESTS),
        Mutation(COMMAND, ", patience=options.patience)", ")", TRAINER_TESTS),
        Mutation(
            TRIAL, "shown.write(text, file=sys.stderr), **options)", "shown.write(text, file=sys.stderr))", TUNE_TESTS
        ),
        Mutation(COMMAND, "if options.model and (options.hidden or options.vocab):", "if False:", TRAINER_TESTS),
        # TRL's trainers: in another dtype, twice, and what they go on with is not taken, not recorded, or kept for ever
        Mutation(TRL_KERNELS, "head_of(model, precision)", "head_of(model)", TRAINER_TESTS),
        Mutation(
            TRL_KERNELS,
            "    if not any(isinstance(each, DPOKernelsCallback)",
            "    if not all(isinstance(each, DPOKernelsCallback)",
            TRAINER_TESTS,
        ),
        Mutation(TRL_KERNELS, "self._kernels.take(recorded)", "pass", TRAINER_TESTS),
        Mutation(TRL_KERNELS, "        self.families = self._kernels.families\n", "", TRAINER_TESTS),
        Mutation(TRL_KERNELS, "        state.stateful_callbacks[name] = self.state()\n", "", TRAINER_TESTS),
        Mutation(TRL_KERNELS, "            self._kernels.release()\n", "            pass\n", TRAINER_TESTS),
        # the loop: whatever was asked for, and what it goes on with
        Mutation(SETUP, "        wanted=config.tune,\n", "", TRAINER_TESTS),
        Mutation(
            SETUP,
            'recorded=read_progress(checkpoint).get("kernels") if checkpoint else None,',
            "recorded=None,",
            TRAINER_TESTS,
        ),
        Mutation(
            SETUP, 'read_progress(checkpoint).get("kernels")', 'read_progress(checkpoint)["kernels"]', TRAINER_TESTS
        ),
        Mutation(SETUP, "        self.kernels.release()\n", "", TRAINER_TESTS),
        # the reference of other kernels
        Mutation(REFERENCE, '        "kernels": kernels,\n', "", TRAINER_TESTS),
    ],
    "rankings and batches by tokens": [
        # groups that fall apart
        Mutation(
            COMPARISONS,
            "find(rejected)] = find(chosen)",
            "sorted((chosen, rejected))",
            COMPARED,
        ),
        # rejected responses that weigh nothing
        Mutation(COMPARISONS, ".index_add(0, self._rejected, t)", "", COMPARED),
        # parts that number sequences as the whole does, and pairs otherwise than it does
        Mutation(COMPARISONS, "self.order(sequence) - self._begins[of.start]", "self.order(sequence)", COMPARED),
        Mutation(
            COMPARISONS,
            "[self._pairs[n] for numbers in self._pairs_of[of] for n in numbers]",
            "[pair for pair in self._pairs if pair[0] in place]",
            COMPARED,
        ),
        # pairs of what is not there, and responses of no pair
        Mutation(COMPARISONS, "0 <= chosen < sequences and", "chosen < sequences and", COMPARED),
        Mutation(COMPARISONS, "set(range(sequences)).difference(*found)", "set()", COMPARED),
        # a response that competes with itself, and with what is not there
        Mutation(LISTWISE, "[stage[1:] for stage in flat]", "flat", COMPARED),
        Mutation(
            LISTWISE,
            "torch.where(stage >= 0, scores[stage.clamp(min=0)], -torch.inf)",
            "scores[stage.clamp(min=0)]",
            COMPARED,
        ),
        Mutation(
            LISTWISE,
            "torch.where(of_group >= 0, of_stages[of_group.clamp(min=0)], 0)",
            "of_stages[of_group.clamp(min=0)]",
            COMPARED,
        ),
        # rewards with a gradient, and references that are not finite
        Mutation(LISTWISE, "beta * (logps.detach() - ref_logps))", "beta * (logps - ref_logps))", COMPARED),
        Mutation(LISTWISE, 'check_finite_logps("ref_logps", ref_logps, "response")', "pass", COMPARED),
        # losses of groups where those of pairs are meant, and the reverse
        Mutation(GROUPED_LOSS, "return of if self.listwise else self.comparisons.pairs_of(of)", "return of", COMPARED),
        Mutation(GROUPED_LOSS, "if self.shares is None or self.listwise:", "if self.shares is None:", COMPARED),
        # a mean of means
        Mutation(
            GROUPED_LOSS,
            "losses.new_full(losses.shape, 1 / self.losses)",
            "losses.new_full(losses.shape, 1 / len(losses))",
            SLOPES,
        ),
        Mutation(GROUPED_LOSS, "* (1 / given.losses))", "* (1 / given.comparisons.pairs))", SLOPES),
        # a response that is preferred to several
        Mutation(COMPARISONS, "chosen, accumulate=True)", "chosen)", SLOPES),
        # what has no weight, and is not finite
        Mutation(
            GROUPED_LOSS, "torch.where(self.shares > 0, losses * self.shares, 0)", "(losses * self.shares)", COMPARED
        ),
        Mutation(
            GROUPED_LOSS,
            "self.shares[self.comparisons.group_of(sequences)] > 0",
            "self.shares[self.comparisons.group_of(sequences)] >= 0",
            COMPARED,
        ),
        # WPO of sequences, not of pairs
        Mutation(GROUPED_LOSS, "(torch.cat(split(t)) for t in", "(t for t in", COMPARED),
        # one label of a slot teaches it, and what none does has a gradient
        Mutation(GATHER, "flat.index_add_(0, slots[span], dx)", "flat[slots[span]] = dx", PREDICTED),
        Mutation(
            GATHER,
            "flat = dhidden.view(-1, dhidden.shape[-1])",
            "flat = dhidden.fill_(7.0).view(-1, dhidden.shape[-1])",
            PREDICTED,
        ),
        # places one behind the end, and of no label
        Mutation(GATHER, "(predictors >= places)", "(predictors > places)", PREDICTED),
        Mutation(GATHER, "(predictors >= places)) & (labels != ignore_index)", "(predictors >= places))", PREDICTED),
        # rankings in batches: whose pairs are others', or connect some of them, one response, and other weights
        Mutation(BATCHING, "[(first + chosen, first + rejected) for", "[(chosen, rejected) for", BATCH_TESTS),
        Mutation(BATCHING, 'if Groups(pairs, responses, torch.device("cpu")).groups > 1:', "if False:", BATCH_TESTS),
        Mutation(BATCHING, "or len(given) < 2\n", "or len(given) < 1\n", BATCH_TESTS),
        Mutation(BATCHING, "weights if counts is None else weights.repeat_interleave(counts)", "weights", BATCH_TESTS),
        Mutation(BATCHING, "if found and len(found) != len(tokens.responses):", "if False:", BATCH_TESTS),
        # responses that see those before them, and first tokens that these predict
        Mutation(
            PACKING,
            "if sequence is None:\n                    prompt_end = end\n                elif response:",
            "prompt_end = end\n                if response:",
            PACKED,
        ),
        Mutation(PACKING, "before[0] = seen[1] - 1 if prompt else begin", "pass", PACKED),
        Mutation(PACKING, "= row * slots + before", "= before", PACKED),
        # a label that nothing predicts
        Mutation(PACKING, "if position + len(ids) == response:", "if False:", PACKED),
        # rows of what does not hang together, with the prompt of other pairs, or in another order
        Mutation(RANKINGS, "if len(parts) == 1:", "if parts:", GROUPED),
        Mutation(RANKINGS, "prompt = min((pair.prompt for pair in pairs), key=len)", "prompt = self.prompt", GROUPED),
        Mutation(RANKINGS, "    rankings.sort(key=lambda ranking: ranking.pairs[0].row)\n", "", GROUPED),
        # one weight for all, another prompt after BOS, and members the wrong way round
        Mutation(
            RANKINGS, "by_name.setdefault((pair.group, pair.weight),", "by_name.setdefault((pair.group, None),", GROUPED
        ),
        Mutation(RANKINGS, "short[0] in (end[0], long[0])", "short[0] == end[0]", GROUPED),
        Mutation(RANKINGS, "if not sound or not 0 <= members[0] < members[1]:", "if not sound:", GROUPED),
        # pairs of equals, rankings of one pair, and of one name in two files
        Mutation(RANKED, "if ranks[i] < ranks[j]]", "if ranks[i] <= ranks[j]]", LAYOUT_TESTS),
        Mutation(RANKED, "if len(places) > 1 else {})", "if places else {})", LAYOUT_TESTS),
        Mutation(RANKED, "{sources.get(parent, reply).rpartition(', ')[0]}, message", "message", LAYOUT_TESTS),
        # rankings on both sides of a split
        Mutation(
            SPLITTING, 'for name in (column, "group") if', "for name in (column,) if", "data/test_loading.py -k 'split'"
        ),
        # batches over the budget: padded to another length, and not sorted by it
        Mutation(SCHEDULE, "slots + int(sizes.longest[batches[-1][0]])", "slots + int(sizes.longest[row])", SCHEDULED),
        Mutation(
            SCHEDULE,
            'rows[np.argsort(-(sizes.longest if sizes.padded else sizes.tokens)[rows], kind="stable")]',
            "rows",
            SCHEDULED,
        ),
        # where there is most room, so that none of it suffices for long ones
        Mutation(SCHEDULE, "room.pop(place)", "room.pop()", SCHEDULED),
        # an epoch as one window, from the longest to the shortest, and without its rest
        Mutation(SCHEDULE, "// min(WINDOW * self.budget, tokens[-1] + 1)", "// (tokens[-1] + 1)", SCHEDULED),
        Mutation(SCHEDULE, "[batches[n] for n in shuffle.permutation(len(batches))]", "batches", SCHEDULED),
        Mutation(
            SCHEDULE,
            "math.ceil(len(self._batches(epoch)) / (self.accumulation * self.processes))",
            "len(self._batches(epoch)) // (self.accumulation * self.processes)",
            SCHEDULED,
        ),
        # batches of every process; a process that always takes the longest, and one alone that takes them first
        Mutation(SCHEDULE, "[[batches[n] for n in dealt] for", "[batches for", SCHEDULED),
        Mutation(SCHEDULE, 'zip(np.argsort(sums, kind="stable"), ', "zip(range(hands), ", SCHEDULED),
        Mutation(SCHEDULE, "if sizes is None or processes == 1:", "if sizes is None:", SCHEDULED),
        Mutation(SCHEDULE, "    if processes == 1:\n        return [batches]\n", "", SCHEDULED),
        # long micro-batches beside short ones, and batches of like examples in a loss that compares them
        Mutation(SCHEDULE, "        if not sizes.padded:\n", "        if sizes.padded:\n", SCHEDULED),
        Mutation(
            SCHEDULE, "return sizes if BATCH_LOSSES.isdisjoint(config.loss_type) else None", "return sizes", SCHEDULED
        ),
        # an evaluation whose size is not what was asked for
        Mutation(
            SCHEDULE,
            "if config.max_tokens_per_batch is None or size is not None:",
            "if config.max_tokens_per_batch is None:",
            SCHEDULED,
        ),
        # steps of epochs of different lengths
        Mutation(SCHEDULE, "while step >= (steps", "while step > (steps", SCHEDULED),
        Mutation(SCHEDULE, " + math.ceil((epochs - whole) * order.steps(whole))", "", SCHEDULED),
        # a process that is waited for, and counts
        Mutation(SCHEDULE, "if counts else 0.0", "", SCHEDULED),
        # sizes: pairs of the first ranking, rejected responses, and pairs where rankings count
        Mutation(SIZES, "pairs + first[:, None]", "pairs", SCHEDULED),
        Mutation(SIZES, "found.labelled[found.pairs[:, 0]]", "found.labelled[found.pairs[:, 1]]", SCHEDULED),
        Mutation(SIZES, "weight if listwise else weight * found.pair_counts", "weight * found.pair_counts", SCHEDULED),
        # other pairs of the same answers, whose tokens are not looked at
        Mutation(SIZES, "lengths.counts, lengths.pairs, lengths.pair_counts]", "lengths.counts]", RANKED_DATA),
        Mutation(SIZES, '("prompt_ids", "response_ids") if rankings', '("prompt_ids",) if rankings', RANKED_DATA),
        # weights of rankings, of which there are fewer than pairs
        Mutation(POLICY, 'batch.get("group_weights", pair_weights)', "pair_weights", RANKED_RUNS),
        Mutation(
            POLICY,
            'comparisons.groups if weights is None else batch["group_weights"].sum()',
            "comparisons.groups",
            RANKED_RUNS,
        ),
        Mutation(POLICY, "total / comparisons.pairs", "total / comparisons.groups", RANKED_RUNS),
        # hidden states as if they lay as their labels do
        Mutation(POLICY, '            "predictors": batch.get("predictors"),\n', "", RANKED_RUNS),
        Mutation(REFERENCE, '                    predictors=batch.get("predictors"),\n', "", RANKED_RUNS),
        # models whose gradients are others, whose windows are, and that are left changed
        Mutation(
            MODEL_LAYOUTS, '_difference(own, "gradients", shared.gradients, expected.gradients)', '""', ASKED_LAYOUTS
        ),
        Mutation(MODEL_LAYOUTS, "if seen >= expected:", "if True:", ASKED_LAYOUTS),
        Mutation(
            MODEL_LAYOUTS,
            "    if reason:\n        if before is not None:\n            own.set_attn_implementation(before)\n",
            "    if reason:\n",
            ASKED_LAYOUTS,
        ),
        # kernels for whole sequences: with shared prompts, a window of one more, a dtype they do not have
        Mutation(SEGMENTS, "None if is_shared else Sequences(", "Sequences(", BY_SEQUENCES),
        Mutation(SEGMENTS, "-1 if window is None else window - 1", "-1 if window is None else window", BY_SEQUENCES),
        Mutation(SEGMENTS, "window_size=(behind, 0)", "window_size=(behind, behind)", BY_SEQUENCES),
        Mutation(SEGMENTS, "starts.new_tensor([len(slot)])", "starts.new_tensor([len(slot) - 1])", BY_SEQUENCES),
        Mutation(SEGMENTS, "query.dtype in (torch.bfloat16, torch.float16) and ", "", BY_SEQUENCES),
        # a router that counts fewer tokens
        Mutation(SETUP, 'if config.batching == "auto" and LMHead(model).has_router_loss:', "if False:", ASKED_LAYOUTS),
    ],
}


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "liger_kernel", "numpy", "pytest")


class Broken(Exception):
    """The list is wrong, not the tests: a text that is not there once, a mutant that does not compile, no tests."""


class Copy:
    """A copy of the repository that mutations are put into, and everything that its tests leave behind."""

    def __init__(self, folder: Path, revision: str | None) -> None:
        self.root, self.aside = folder / "repository", folder / "aside"
        for path in (self.root, self.aside, folder / "tmp"):
            path.mkdir(parents=True)
        if revision:
            archive = subprocess.run(["git", "archive", revision], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
            subprocess.run(["tar", "-x", "-C", self.root], input=archive, check=True)
        else:
            for name in filter(None, said("git", "ls-files", "-z").split("\0")):
                if (ROOT / name).is_file():
                    (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, self.root / name)
        for module in (ROOT / "dpo_kernels").glob("*.so"):
            shutil.copy2(module, self.root / "dpo_kernels")
        self.cache = folder / "cache"
        self.env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [self.root, self.root / "tests" / "helpers"])),
            "COLUMNS": "250",  # of what pytest says of a failure
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant of the same size and second would be taken for the original
            "TMPDIR": str(folder / "tmp"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self.cache),  # where a mutant's wrong rows would be found by the next one
        }
        self.build("csrc/")  # what was built may be older than the sources
        for name in ("dpo_kernels", "dpo_kernels._native"):
            found = self.python("-c", f"import {name} as module; print(module.__file__)").stdout.strip()
            if not Path(found).is_relative_to(self.root):
                raise Broken(f"{name} is imported from {found}, not from the copy")
        shutil.copy2(self.native, self.aside)

    @property
    def native(self) -> Path:
        return self.root / "dpo_kernels" / f"_native{SUFFIX}"

    def python(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command, env = [sys.executable, *arguments], self.env | more
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True)
        if done.returncode:
            raise Broken((done.stdout + done.stderr)[-4000:])
        return done

    def build(self, file: str) -> None:
        """Compiles what comes of this source: for the CPU, and for the emulation of CUDA, which does so by itself when
        a test asks for it; here an error of the compiler is told from a test that fails."""
        if file.startswith("csrc/") and not file.startswith("csrc/cuda/"):
            self.python("setup.py", "build_ext", "--inplace", DPO_KERNELS_BUILD="cpu")
        if file.startswith("csrc/") and not file.startswith("csrc/cpu/"):
            self.python("-c", "import emulation; emulation.build()")

    @contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        path = self.root / mutation.file
        before = path.read_text()
        path.write_text(before.replace(mutation.old, mutation.new))
        try:
            if path.suffix == ".py":
                compile(path.read_text(), path, "exec")
                self.python("-m", "ruff", "check", "--isolated", "--quiet", "--select=F821", str(path))  # unknown names
            self.build(mutation.file)
            yield
        except SyntaxError as error:
            raise Broken(str(error)) from None
        finally:
            path.write_text(before)
            if mutation.file.startswith("csrc/"):
                shutil.copy2(self.aside / self.native.name, self.native)

    def test(self, tests: str) -> Outcome:
        shutil.rmtree(self.cache, ignore_errors=True)
        words = [f"tests/{word}" if ".py" in word else word for word in shlex.split(tests)]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "0", *words]
        started = time.perf_counter()
        with (self.aside / "output").open("w+") as file:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                status = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            file.seek(0)
            output = file.read()
        return Outcome(status, output, time.perf_counter() - started)


class Outcome(NamedTuple):
    status: int | None  # None: it did not end
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.status == 0

    @property
    def by(self) -> str:
        """What noticed: the first test that fails, with what it says."""
        if self.status is None:
            where = re.findall(r"in (test_\w+)", self.output)
            return f"does not end in {TIMEOUT} s" + f", {where[-1]}" * bool(where)
        if self.status < 0:
            where = re.search(r"in (test_\w+)", self.output)
            return f"crash, {signal.Signals(-self.status).name}" + (f", {where[1]}" if where else "")
        failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.*)$", self.output, re.MULTILINE)
        if self.status != 1 or failed is None:
            raise Broken(f"pytest's exit status {self.status}\n{self.output[-4000:]}")
        return f"{failed[1]:.160}".replace(tempfile.gettempdir(), "TMPDIR")


def said(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def heading(revision: str | None) -> list[str]:
    commit = said("git", "rev-parse", "--short=12", revision or "HEAD")
    changes = not revision and said("git", "status", "--porcelain", "--untracked-files=no")
    versions = (f"{package} {metadata.version(package)}" for package in PACKAGES)
    compiler = said(os.environ.get("CXX", "g++"), "--version").splitlines()[0]
    return [
        f"commit {commit}, {'with changes that are not committed' if changes else 'clean'}",
        f"python {platform.python_version()}, {', '.join(versions)}",
        f"{compiler}; {platform.platform()}, {os.cpu_count()} CPUs",
    ]


def shown(mutation: Mutation) -> str:
    """What changes, with a few characters around it."""
    old, new = (" ".join(text.split()) for text in (mutation.old, mutation.new))
    same = len(os.path.commonprefix([old, new]))
    same_end = len(os.path.commonprefix([old[same:][::-1], new[same:][::-1]]))
    start, end = max(0, same - 24), max(0, same_end - 12)
    cut = [("..." if start else "") + text[start : len(text) - end] + ("..." if end else "") for text in (old, new)]
    return f"{mutation.file}: {cut[0]} -> {cut[1] or 'nothing'}"


def check_list(copy: Copy, mutations: list[Mutation]) -> None:
    problems = []
    for mutation in mutations:
        path = copy.root / mutation.file
        count = path.read_text().count(mutation.old) if path.is_file() else 0
        if count != 1 or mutation.old == mutation.new:
            problems.append(f"{mutation.file} has {count} times: {mutation.old}")
    if problems:
        raise Broken("\n".join(problems))


def wrong_with(copy: Copy, tests: str) -> str:
    """Nothing, where they pass and there are some: else that they fail means nothing."""
    outcome = copy.test(tests)
    print(f"{outcome.seconds:.0f} s: {tests}", file=sys.stderr, flush=True)
    if outcome.passed and re.search(r"\b[1-9]\d* passed", outcome.output):
        return ""
    return f"without a mutation: {tests}\n{outcome.output[-4000:]}"


def outcome_of(copy: Copy, mutation: Mutation, unbroken: dict[str, str]) -> tuple[str, str]:
    """What became of it, and who noticed. `unbroken`: what is wrong with tests where nothing is mutated."""
    if error := unbroken[mutation.tests]:
        return "BROKEN", error
    try:
        with copy.mutated(mutation):
            outcome = copy.test(mutation.tests)
        return ("SURVIVED", mutation.tests) if outcome.passed else ("noticed", outcome.by)
    except Broken as error:
        return "BROKEN", str(error)


def noticed_before(file: Path) -> dict[str, str]:
    """Of an earlier result: each mutation that was noticed there, and by what."""
    lines = file.read_text().splitlines()
    return {
        mutation.removeprefix("  noticed   "): by.strip()
        for mutation, by in pairwise(lines)
        if mutation.startswith("  noticed   ")
    }


def run(
    copies: list[Copy], chosen: dict[str, list[Mutation]], before: dict[str, str], say: Callable[[str], None]
) -> tuple[int, int]:
    """How many survive, and how many entries of the list are broken."""
    everything = list(chain.from_iterable(chosen.values()))
    check_list(copies[0], everything)
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def in_a_copy(function: Callable[..., Result], *arguments: Any) -> Result:
        copy = free.get()
        try:
            return function(copy, *arguments)
        finally:
            free.put(copy)

    counts = {}
    with ThreadPoolExecutor(len(copies)) as pool:
        tests = list(dict.fromkeys(mutation.tests for mutation in everything if shown(mutation) not in before))
        unbroken = dict(zip(tests, pool.map(lambda words: in_a_copy(wrong_with, words), tests), strict=True))

        def outcome(mutation: Mutation) -> tuple[str, str]:
            by = before.get(shown(mutation))
            return ("noticed", by) if by else in_a_copy(outcome_of, mutation, unbroken)

        outcomes = pool.map(outcome, everything)
        for subject, mutations in chosen.items():
            say(f"\n{subject}")
            found = Counter()
            for mutation in mutations:
                kind, by = next(outcomes)
                found[kind] += 1
                say(f"  {kind:<8}  {shown(mutation)}\n            {by}")
            counts[subject] = found
    say(f"\n{'':40}{'mutations':>10}{'noticed':>10}{'survived':>10}{'broken':>10}")
    counts["all"] = sum(counts.values(), Counter())
    for subject, found in counts.items():
        numbers = [found.total(), found["noticed"], found["SURVIVED"], found["BROKEN"]]
        say(f"{subject:40}" + "".join(f"{number:>10}" for number in numbers))
    return counts["all"]["SURVIVED"], counts["all"]["BROKEN"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations whose subject, file or text has this")
    parser.add_argument("--out", type=Path, help="where to write what is printed, too")
    parser.add_argument("--again", type=Path, help="an earlier result: what it says was noticed is taken from there")
    parser.add_argument("--jobs", type=int, default=2, help="copies that work side by side; 2")
    parser.add_argument("--revision", help="break this commit, not the working tree")
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")

    chosen = {
        subject: [m for m in mutations if any(options.only in text for text in (subject, m.file, m.old, m.new))]
        for subject, mutations in MUTATIONS.items()
    }
    chosen = {subject: mutations for subject, mutations in chosen.items() if mutations}
    for line in heading(options.revision):
        say(line)
    if options.again:
        earlier = [line for line in options.again.read_text().splitlines() if "commit " in line]
        say("\n".join(f"noticed before, by tests that are still there: {line.rpartition(': ')[2]}" for line in earlier))
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        try:
            copies = [Copy(Path(folder) / str(i), options.revision) for i in range(options.jobs)]
            survived, broken = run(copies, chosen, noticed_before(options.again) if options.again else {}, say)
        except Broken as error:
            sys.exit(str(error))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    say(f"\n{(used.ru_utime + used.ru_stime) / 60:.0f} minutes of processors")
    return 1 if survived or broken else 0


if __name__ == "__main__":
    sys.exit(main())
