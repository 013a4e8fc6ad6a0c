"""Runs every native kernel, for every instruction set and storage type, over shapes with every tail, on tensors whose
neighbourhood is forbidden: `edges.py malloc` under AddressSanitizer, where each tensor has an allocation of its very
size; `behind` and `before` with each tensor at the end or the beginning of pages beside which one cannot be read.

At last each kernel steps over the edge by one entry, in a child that must die of it.
"""

import contextlib
import ctypes
import mmap
import os
import sys

import torch

from dpo_kernels import _native
from dpo_kernels.impl import native
from dpo_kernels.impl.interface import STATS, LogitTransform

PAGE = mmap.PAGESIZE
TRANSFORMS = [(LogitTransform(), False), (LogitTransform(-0.5, 5.0, 1.7), True), (LogitTransform(0.3), False)]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def allocated(t):
    return t.clone(memory_format=torch.contiguous_format)


def at_pages_edge(t, behind, keep):
    """A contiguous copy of t between two pages without access, at the end or the beginning of what lies between."""
    size = t.numel() * t.itemsize
    room = max(1, -(-size // PAGE)) * PAGE
    base = libc.mmap(
        None, room + 2 * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0
    )
    assert base not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    for page in (base, base + PAGE + room):
        assert libc.mprotect(page, PAGE, 0) == 0, os.strerror(ctypes.get_errno())
    keep.append((base, room + 2 * PAGE))
    if size == 0:
        return t.clone()
    begin = base + PAGE + (room - size if behind else 0)
    buffer = (ctypes.c_char * size).from_address(begin)
    return torch.frombuffer(buffer, dtype=t.dtype).view(t.shape).copy_(t)


class Edges:
    def __init__(self, where):
        self.where, self.mapped = where, []
        self.over = 0  # by how many entries the kernels are told to step over the edge
        self.dtype = torch.float32
        self.threads = 1

    def put(self, t):
        return allocated(t) if self.where == "malloc" else at_pages_edge(t, self.where == "behind", self.mapped)

    @contextlib.contextmanager
    def tensors(self):
        """Unmaps at the end what was put in between."""
        yield
        for base, size in self.mapped:
            libc.munmap(base, size, 0)
        self.mapped.clear()

    def randn(self, *shape):
        return self.put(torch.randn(*shape).to(self.dtype))

    def address(self, t):
        """One entry early where the beginning is the edge."""
        return t.data_ptr() - (self.over * t.itemsize if self.where == "before" else 0)

    def width(self, v):
        """One entry more where the end is the edge."""
        return v + (0 if self.where == "before" else self.over)

    def fold(self, n, v, transform, with_bias, rescale, stats):
        labels = self.put(torch.arange(n) % (v + 2) + 2)
        fold = native.new_fold(labels, self.dtype, STATS if stats else ())
        fold.state, fold.argmax, fold.y = self.put(fold.state), self.put(fold.argmax), labels
        a, factor = self.randn(n, v), self.randn(n)
        tile = self.tile(a, labels, self.randn(v) if with_bias else None, transform)
        args = native._state(fold, 0), factor.data_ptr() if rescale else 0, stats, self.threads
        _native.fold(native._type(a), tile, *args)

    def tile(self, a, y, bias, transform):
        scale, softcap, temperature = transform
        self.alive = a, y, bias
        address = 0 if bias is None else bias.data_ptr()
        place = self.address(a), a.shape[0], self.width(a.shape[1]), 3, y.data_ptr(), address
        return _native.Tile(*place, _native.Transform(scale, softcap or 0.0, temperature))

    def dlogits(self, n, v, transform, with_bias, inplace):
        labels = self.put(torch.arange(n) % (v + 2) + 2)
        a, norm, logp, g, value = self.randn(n, v), self.randn(2, n), self.randn(n), self.randn(n), self.randn(n)
        tile = self.tile(a, labels, self.randn(v) if with_bias else None, transform)
        out = a if inplace else self.randn(n, v)
        rows = out.data_ptr(), norm.data_ptr(), norm.stride(0), logp.data_ptr(), g.data_ptr(), value.data_ptr()
        _native.dlogits(native._type(a), tile, *rows, self.threads)

    def rows(self, n, v):
        """n rows in two sequences of logits [2, T, V], the first and the last entry among them."""
        self.kept = self.put(torch.arange(n) % 2), self.put(torch.arange(n) // 2), self.put(torch.arange(n) % v)
        return _native.Rows(*(t.data_ptr() for t in self.kept), n, self.width(v))

    def logits(self, t):
        strides = t.stride()
        return _native.LogitsRows(self.address(t), *strides)

    def some_logits(self, n, v, transposed):
        """[2, T, V] whose vocabulary stride is 1, or T."""
        if not transposed:
            return self.randn(2, n // 2, v)
        return self.randn(2, v, n // 2).transpose(1, 2)

    def logits_fold(self, n, v, transposed, stats):
        logits = self.some_logits(n, v, transposed)
        fold = native.new_fold(torch.zeros(n, dtype=torch.int64), self.dtype, ())
        fold.state, fold.argmax = self.put(fold.state), self.put(fold.argmax)
        _native.logits_fold(
            native._type(logits), self.logits(logits), self.rows(n, v), native._state(fold, 0), stats, self.threads
        )

    def logits_bwd(self, n, v, transposed, out_transposed, inplace):
        logits = self.some_logits(n, v, transposed)
        out = logits if inplace else self.some_logits(n, v, out_transposed)
        acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        norm, logp, g = (self.put(torch.randn(*shape, dtype=acc)) for shape in ((2, n), (n,), (n,)))
        rows = norm.data_ptr(), norm.stride(0), logp.data_ptr(), g.data_ptr()
        _native.logits_bwd(
            native._type(logits), self.logits(logits), self.logits(out), self.rows(n, v), *rows, self.threads
        )

    def transpose(self, n, v):
        a, out = self.put(torch.randn(n, v)), self.put(torch.empty(v, n))
        _native.transpose(self.address(a), out.data_ptr(), n, self.width(v), self.threads)

    def elementwise(self, v):
        x, slope = self.put(torch.randn(v)), self.put(torch.randn(v))
        _native.exp(self.address(x), self.width(v))
        _native.tanh(self.address(x), slope.data_ptr(), self.width(v))


def every_kernel(edges):
    # all tails of one vector and of four, of the widest kind; then those of a segment
    sizes = [*range(1, 36), *range(63, 70), 2047, 2048, 2049, 4119]
    for dtype in (torch.float32, torch.float64):
        edges.dtype = dtype
        for i, v in enumerate(sizes):
            edges.threads = 2 if v > 2000 else 1
            for j, (transform, with_bias) in enumerate(TRANSFORMS):
                n = 1 + (i + j) % 4
                with edges.tensors():
                    for rescale in (False, True):
                        edges.fold(n, v, transform, with_bias, rescale, stats=i % 2 == 0)
                    edges.dlogits(n, v, transform, with_bias, inplace=i % 2 == 0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        edges.dtype = dtype
        for i, v in enumerate(sizes):
            edges.threads = 2 if v > 2000 else 1
            n = 2 + 2 * (i % 3)
            with edges.tensors():
                for transposed in (False, True):
                    edges.logits_fold(n, v, transposed, stats=i % 2 == 0)
                    edges.logits_bwd(n, v, transposed, transposed, inplace=True)
                    edges.logits_bwd(n, v, transposed, not transposed, inplace=False)
    for v in sizes[:40]:
        with edges.tensors():
            edges.elementwise(v)
            for n in (1, 3, 4, 17, 33):
                edges.transpose(n, v)


def oversteps(edges):
    """One entry over the edge, kernel by kernel and storage type by storage type."""
    plain = LogitTransform()
    edges.over = 1
    tile_kernels = [
        lambda: edges.fold(2, 16, plain, False, False, False),
        lambda: edges.fold(2, 7, plain, False, True, True),
        lambda: edges.dlogits(2, 19, plain, False, True),
        lambda: edges.dlogits(2, 19, plain, False, False),
    ]
    logits_kernels = [
        lambda: edges.logits_fold(2, 32, False, False),
        lambda: edges.logits_fold(2, 5, True, True),
        lambda: edges.logits_bwd(2, 19, False, False, True),
        lambda: edges.logits_bwd(2, 19, False, True, False),
    ]
    others = [lambda: edges.transpose(3, 7), lambda: edges.elementwise(33)]
    yield from ((d, k) for d in (torch.float32, torch.float64) for k in tile_kernels)
    yield from ((d, k) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) for k in logits_kernels)
    yield from ((torch.float32, k) for k in others)


def dies(action):
    child = os.fork()
    if child == 0:
        os.close(2)  # the report of a sanitizer
        action()
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


if __name__ == "__main__":
    torch.manual_seed(0)
    edges = Edges(sys.argv[1])
    # before the kernels start threads, which a forked child has not
    for i, (dtype, action) in enumerate(list(oversteps(edges))):
        for isa in _native.isas():
            _native.use_isa(isa)
            edges.dtype = dtype
            assert dies(action), f"overstep {i} in {dtype} with {isa} went unnoticed"
    edges.over = 0
    assert not dies(lambda: None)
    for isa in _native.isas():
        _native.use_isa(isa)
        every_kernel(edges)
    print("all kernels stayed inside, all oversteps were noticed")
