"""The compiled module of csrc/cuda: addresses and strides are integers, and PyTorch's names stand for dtypes."""

CUDA_VERSION: int
CLUSTER_BLOCKS: int
CLUSTER_ROWS: int
BLOCK_COLUMNS: int
PART_FIELDS: int
PART_STATS_FIELDS: int

class Transform:
    def __init__(self, scale: float, softcap: float, temperature: float) -> None: ...

class FoldState:
    def __init__(self, data: int, stride: int, argmax: int) -> None: ...

class Tile:
    def __init__(self, a: int, n: int, v: int, start: int, y: int, bias: int, transform: Transform) -> None: ...

class LogitsRows:
    def __init__(self, data: int, stride_s: int, stride_t: int, stride_v: int) -> None: ...

class GradRows:
    def __init__(self, norm: int, norm_stride: int, logp: int, g: int) -> None: ...

class Matrix:
    def __init__(self, data: int, rows: int, columns: int, stride: int) -> None: ...

class Positions:
    def __init__(self, data: int, stride_s: int, stride_t: int) -> None: ...

class Labels:
    def __init__(
        self, data: int, stride_s: int, stride_t: int, sequences: int, length: int, ignore_index: int
    ) -> None: ...

def fold(
    dtype: str,
    tile: Tile,
    state: FoldState,
    out_dtype: str,
    out: Matrix,
    sums: Matrix,
    stats: bool,
    stream: int,
) -> None: ...
def dlogits(dtype: str, tile: Tile, out_dtype: str, out: Matrix, grad: GradRows, value: int, stream: int) -> None: ...
def finish(
    dtype: str,
    state: FoldState,
    y: int,
    n: int,
    v: int,
    stats: list[int],
    logp: int,
    norm: int,
    values: int,
    stream: int,
) -> None: ...
def logits_fwd(
    dtype: str,
    logits: LogitsRows,
    labels: Labels,
    v: int,
    num_labelled: int,
    stats: list[int],
    logp: int,
    norm: int,
    values: int,
    fit: int,
    stream: int,
) -> None: ...
def logits_bwd(
    dtype: str,
    logits: LogitsRows,
    out: LogitsRows,
    labels: Labels,
    v: int,
    norm: int,
    logp: int,
    g: Positions,
    stream: int,
) -> None: ...
def linear_fold(
    dtype: str,
    x: Matrix,
    w: Matrix,
    bias: int,
    y: int,
    transform: Transform,
    state: FoldState,
    splits: int,
    part: int,
    part_argmax: int,
    stats: bool,
    processors: int,
    stream: int,
) -> None: ...
def sum_tokens(
    dtype: str,
    logps: Positions,
    labels: Labels,
    weights: Positions,
    mean: bool,
    sums: int,
    counts: int,
    stream: int,
) -> None: ...
def sum_tokens_bwd(
    dtype: str,
    grad: int,
    grad_stride: int,
    logps: Positions,
    labels: Labels,
    weights: Positions,
    counts: int,
    dlogps: int,
    dweights: int,
    stream: int,
) -> None: ...
