"""The compiled module of csrc/cuda: addresses and strides are integers, and PyTorch's names stand for dtypes."""

CUDA_VERSION: int
CLUSTER_BLOCKS: int
CLUSTER_ROWS: int
BLOCK_COLUMNS: int
PART_FIELDS: int
PART_STATS_FIELDS: int
LABEL_FIELDS: int
LABEL_STATS_FIELDS: int
FACTORS: int
ROW_FIELDS: int
NOTES: int

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

class LinearProduct:
    def __init__(
        self, x: Matrix, w: Matrix, bias: int, y: int, first: int, transform: Transform, splits: int
    ) -> None: ...

class Parts:
    def __init__(self, data: int, split_stride: int, field_stride: int, label: int, label_stride: int) -> None: ...

class Weighed:
    def __init__(self, e: Matrix, weights: Matrix, first: int, first_block: int) -> None: ...

class Positions:
    def __init__(self, data: int, stride_s: int, stride_t: int) -> None: ...

class Labels:
    def __init__(
        self, data: int, stride_s: int, stride_t: int, sequences: int, length: int, ignore_index: int
    ) -> None: ...

class Search:
    def __init__(
        self,
        labels: Positions,
        sequences: int,
        length: int,
        shift: int,
        ignore_index: int,
        v: int,
        expected: int,
        predictors: Positions,
        slots: int,
        asserts: bool,
    ) -> None: ...

class Comparison:
    def __init__(
        self,
        token_logps: int,
        length: int,
        weights: Positions,
        sums: int,
        slopes: int,
        counts: int,
        references: int,
        losses: int,
        chosen_rewards: int,
        rejected_rewards: int,
        loss: int,
        beta: float,
        pairs: int,
        first: int,
        stop: int,
    ) -> None: ...

class PairRows:
    def __init__(self, sequence: int, position: int, logps: int, slopes: int, n: int) -> None: ...

def find_rows(
    dtype: str,
    search: Search,
    rows: int,
    capacity: int,
    logp: int,
    values: int,
    stats: int,
    notes: int,
    stream: int,
) -> None: ...
def gather_rows(
    dtype: str, hidden: LogitsRows, of_sequence: int, slots: int, out: Matrix, broken: int, stream: int
) -> None: ...
def put_rows(
    out_dtype: str, rows: Matrix, g: Positions, sequence: int, position: int, length: int, out: int, stream: int
) -> None: ...
def compare(dtype: str, of: Comparison, rows: PairRows, begins: int, ends: int, stream: int) -> None: ...
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
def scale(dtype: str, rows: Matrix, factor: int, stream: int) -> None: ...
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
    dtype: str, product: LinearProduct, parts: Parts, stats: bool, far: int, processors: int, stream: int
) -> None: ...
def linear_exp(
    product: LinearProduct,
    parts: Parts,
    first_split: int,
    e: Matrix,
    packed: bool,
    shift: int,
    shift_stride: int,
    far: int,
    far_above: float,
    again: bool,
    all_splits: int,
    stats: bool,
    processors: int,
    stream: int,
) -> None: ...
def linear_dlogits(
    product: LinearProduct, out: Matrix, grad: GradRows, missing: int, processors: int, stream: int
) -> None: ...
def join(
    transform: Transform,
    parts: Parts,
    splits: int,
    n: int,
    v: int,
    stats: list[int],
    shift: int,
    far_above: float,
    logp: int,
    norm: int,
    values: int,
    top: int,
    scale: int,
    label: int,
    places: int,
    positions: int,
    stream: int,
) -> None: ...
def weigh(
    transform: Transform, weights: Matrix, y: int, top: int, scale: int, label: int, g: int, own: int, stream: int
) -> None: ...
def linear_dhidden(
    of: Weighed, rest: Weighed, w: Matrix, out: Matrix, parts: int, processors: int, stream: int
) -> None: ...
def linear_dweight(
    of: Weighed, x: Matrix, out_dtype: str, out: Matrix, add: bool, bias: int, processors: int, stream: int
) -> None: ...
def dhidden(out_dtype: str, sums: Matrix, w: Matrix, y: int, scale: int, label: int, out: int, stream: int) -> None: ...
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
