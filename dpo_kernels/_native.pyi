"""The compiled module of csrc/cpu: addresses and strides as integers, dtypes by PyTorch's names."""

class Transform:
    def __init__(self, scale: float, softcap: float, temperature: float) -> None: ...

class FoldState:
    def __init__(self, data: int, stride: int, argmax: int) -> None: ...

class Tile:
    def __init__(self, a: int, n: int, v: int, start: int, y: int, bias: int, transform: Transform) -> None: ...

class Positions:
    def __init__(self, data: int, stride_s: int, stride_t: int) -> None: ...

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

class LogitsRows:
    def __init__(self, data: int, stride_s: int, stride_t: int, stride_v: int) -> None: ...

class Rows:
    def __init__(self, sequence: int, position: int, y: int, n: int, v: int) -> None: ...

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(name: str) -> None: ...
def is_intel() -> bool: ...
def set_openmp(parallel: int, get_thread_num: int, get_num_threads: int) -> None: ...
def fold(dtype: str, tile: Tile, state: FoldState, rescale: int, stats: bool, threads: int) -> None: ...
def dlogits(
    dtype: str, tile: Tile, out: int, norm: int, norm_stride: int, logp: int, g: int, value: int, threads: int
) -> None: ...
def begin(state: FoldState, n: int) -> None: ...
def put_labels(dtype: str, tile: Tile, value: int) -> None: ...
def logits_fold(dtype: str, logits: LogitsRows, rows: Rows, state: FoldState, stats: bool, threads: int) -> None: ...
def logits_bwd(
    dtype: str,
    logits: LogitsRows,
    out: LogitsRows,
    rows: Rows,
    norm: int,
    norm_stride: int,
    logp: int,
    g: int,
    threads: int,
) -> None: ...
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
    threads: int,
) -> None: ...
def transpose(a: int, out: int, n: int, v: int, threads: int) -> None: ...
def find_rows(
    dtype: str, search: Search, rows: int, capacity: int, logp: int, values: int, stats: int, notes: int
) -> None: ...
def gather_rows(
    dtype: str, hidden: LogitsRows, of_sequence: int, h: int, slots: int, n: int, out: int, broken: int, threads: int
) -> None: ...
def compare(dtype: str, of: Comparison, rows: PairRows) -> None: ...
def exp(x: int, n: int) -> None: ...
def tanh(x: int, slope: int, n: int) -> None: ...
