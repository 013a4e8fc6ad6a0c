"""What the ranks of a vocabulary-parallel head check, each by itself against the call with the whole head: run by
`test_parallel.py` in several processes. Each check writes what it found wrong, or "", to a file of its rank."""

import contextlib
import json
import pickle
import re
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from two_processes import run_in_two

from dpo_kernels import linear_dpo_loss, linear_sequence_logps
from dpo_kernels.impl import native
from dpo_kernels.impl import torch as plain
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.parallel import AGREED_BYTES, ROW_BYTES
from dpo_kernels.testing import beyond_budget, head_inputs

STATS = ("entropy", "is_top1", "mean_logit", "log_sum_sq_probs")
IMPLS = ("torch", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
V, H = 123, 31
# What requires a gradient decides the path: of hidden, weight and bias. The last: the head alone, without dX.
NEEDS = {"A": (False, False, False), "B": (True, False, False), "D": (True, True, True), "head": (False, True, False)}
# Path C in one part, and in one for each pair; then path D.
PARTS = ("one", "several", "D")
# Of bf16 against the whole head in bf16, as in `assert_within_budget`: dX is rounded to bf16 by both, and sums of other
# orders fall to other sides.
BF16 = 2e-4


def splits(ranks):
    """Numbers of entries: as DTensor cuts 123; few, none in the middle, and the rest; none on the first rank."""
    step = -(-V // ranks)
    yield [max(0, min(step, V - r * step)) for r in range(ranks)]
    yield [7, *[0] * (ranks - 2), V - 7]
    yield [0, *[1] * (ranks - 2), V - ranks + 2]


def chunk_bytes_for(parts, labels, sizes, dtype):
    """ "several": such that the logits of two thirds of the rows fit, those of a pair, and not of both. In bf16 the
    sum of dW in fp32 leaves nothing, and that is path D."""
    if parts != "several":
        return {"one": None, "D": 0}[parts]
    rows = int((labels >= 0).sum())
    assert rows > H  # else they would lie where dW is to be
    return rows * 2 // 3 * max(sizes) * max(4, dtype.itemsize)


class World:
    def __init__(self):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.group = dist.group.WORLD
        self.mesh = init_device_mesh("cpu", (self.ranks,))

    def part(self, sizes):
        first = sum(sizes[: self.rank])
        return slice(first, first + sizes[self.rank])


def leaves(inputs, needs, dtype, part=slice(None)):
    parts = inputs.hidden, inputs.weight[part], inputs.bias[part]
    return [t.detach().to(dtype, copy=True).requires_grad_(need) for t, need in zip(parts, needs, strict=True)]


def results(call, given, of_values, part=slice(None)):
    """Named values and gradients of `call(hidden, weight, bias)`; of the head's gradients, `part`."""
    hidden, weight, bias = given
    out = call(hidden, weight, bias)
    found = of_values(out)
    if any(t.requires_grad for t in given):
        # neither a sum nor a mean: each sequence weighs something else
        (out.loss * 3 if hasattr(out, "loss") else (out.logps * torch.arange(1, len(out.logps) + 1)).sum()).backward()
        grads = {"dhidden": hidden.grad, "dweight": weight.grad, "dbias": bias.grad}
        found |= {name: t if name == "dhidden" else t[part] for name, t in grads.items() if t is not None}
    return {name: t.detach() for name, t in found.items()}


def of_logps(out):
    return {"logps": out.logps, "token_logps": out.token_logps} | {
        name: t.to(out.logps.dtype) for name, t in out.stats.items()
    }


def of_loss(out):
    values = {name: getattr(out, name) for name in ("loss", "losses", "logps", "chosen_rewards", "rejected_rewards")}
    return values | {name: t.to(out.loss.dtype) for name, t in out.stats.items()}


def compare(world, call, inputs, needs, dtype, sizes, of_values, epsilon=1e-6):
    """`call(hidden, weight, bias, **group)`, whole and in parts: in fp64 the same to 1e-12, else as near to fp64."""
    part = world.part(sizes)
    whole = results(call, leaves(inputs, needs, dtype), of_values, part)
    ours = results(lambda *given: call(*given, group=world.group), leaves(inputs, needs, dtype, part), of_values)
    assert ours.keys() == whole.keys()
    if dtype == torch.float64:
        for name, t in ours.items():
            torch.testing.assert_close(
                t, whole[name], rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
            )
        return ours
    rounded = type(inputs)(
        *(t.detach().to(dtype) if t.is_floating_point() else t for t in inputs[:4]), inputs.ref_logps
    )
    oracle = results(call, leaves(rounded, needs, torch.float64), of_values, part)
    for name, t in ours.items():
        assert t.dtype == whole[name].dtype, name
        if t.numel():
            reason = beyond_budget(t, whole[name], oracle[name].double(), name, epsilon)
            assert not reason, reason
    return ours


def check_log_probabilities(world):
    inputs = head_inputs(4, 24, H, V)
    weights = torch.rand(inputs.labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for sizes in splits(world.ranks):
        for path, needs in NEEDS.items():
            for impl in IMPLS:
                for options in (
                    {},
                    {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.8, "reduction": "mean", "shift": True},
                ):
                    for dtype in DTYPES[:1] if options else DTYPES:

                        def call(h, w, b, impl=impl, options=options, **group):
                            return linear_sequence_logps(
                                h,
                                w,
                                inputs.labels,
                                bias=b,
                                stats=STATS,
                                impl=impl,
                                token_weights=weights,
                                **options,
                                **group,
                            )

                        try:
                            compare(
                                world,
                                call,
                                inputs,
                                needs,
                                dtype,
                                sizes,
                                of_logps,
                                BF16 if dtype.itemsize == 2 else 1e-6,
                            )
                        except AssertionError as error:
                            raise AssertionError(f"{sizes} {path} {impl} {options} {dtype}: {error}") from error


def check_losses(world):
    inputs = head_inputs(4, 24, H, V)
    sequences = torch.arange(inputs.labels.numel()).view(inputs.labels.shape)
    cases = [
        {"stats": STATS},
        {"loss_type": ("ipo", "sft"), "loss_weights": (1.0, 0.3), "pair_weights": torch.tensor([2.0, 0.5])},
        {"use_weighting": True, "softcap": 4.0, "temperature": 1.3, "ld_alpha": 0.5, "rpo_alpha": 0.1},
        {"pairs": [(0, 1), (0, 2), (3, 1)], "token_weights": torch.rand(inputs.labels.shape)},
        {"loss_type": "plackett_luce", "pairs": [(0, 1), (1, 2), (2, 3)]},
        {"loss_type": "aot"},  # sorts the batch: path D
        {"predictors": (sequences + 3) % sequences.numel(), "num_labelled": int((inputs.labels >= 0).sum())},
        {"differentiable": ("logps",), "shift": True},
    ]
    first, *others = splits(world.ranks)
    for number, options in enumerate(cases):
        for sizes in (first, *others) if number == 0 else (others[number % 2],):
            for path, needs in NEEDS.items():
                for parts in PARTS if path in ("D", "head") else ["one"]:
                    for dtype in DTYPES if number == 0 else DTYPES[:1]:
                        fixed = options | {
                            "impl": IMPLS[number % 2],
                            "chunk_bytes": chunk_bytes_for(parts, inputs.labels, sizes, dtype),
                        }

                        def call(h, w, b, fixed=fixed, **group):
                            return linear_dpo_loss(h, w, inputs.labels, inputs.ref_logps, bias=b, **fixed, **group)

                        try:
                            compare(
                                world, call, inputs, needs, dtype, sizes, of_loss, BF16 if dtype.itemsize == 2 else 2e-6
                            )
                        except AssertionError as error:
                            raise AssertionError(f"{sizes} {parts} {path} {options} {dtype}: {error}") from error


def check_reference(world):
    """Where policy and reference are one model, rewards are 0 to the bit, on every path, in tiles or not."""
    inputs = head_inputs(4, 24, H, V)
    for sizes in splits(world.ranks):
        for path, gradients in (("A", ()), ("B", ("hidden",)), ("D", ("hidden", "weight", "bias"))):
            for parts in PARTS if path == "D" else ["one"]:
                given = leaves(inputs, NEEDS[path], torch.float32, world.part(sizes))
                fixed = {
                    "chunk_bytes": chunk_bytes_for(parts, inputs.labels, sizes, torch.float32),
                    "group": world.group,
                }
                with small_tiles() if parts == "several" else contextlib.nullcontext():
                    reference = linear_reference_logps(
                        given[0].detach(),
                        given[1].detach(),
                        inputs.labels,
                        bias=given[2].detach(),
                        gradients=gradients,
                        **fixed,
                    )
                    out = linear_dpo_loss(*given[:2], inputs.labels, reference.logps, bias=given[2], **fixed)
                assert not out.chosen_rewards.any() and not out.rejected_rewards.any(), (sizes, path, parts)


@contextlib.contextmanager
def small_tiles():
    before = native.TILE_BYTES, plain.CPU_TILE_BYTES
    native.TILE_BYTES = plain.CPU_TILE_BYTES = 2048  # 5 rows by 64 entries of 20 rows by 123
    try:
        yield
    finally:
        native.TILE_BYTES, plain.CPU_TILE_BYTES = before


def check_many_tiles(world):
    with small_tiles():
        inputs = head_inputs(4, 24, H, V)
        for number, sizes in enumerate(splits(world.ranks)):
            chunk_bytes = chunk_bytes_for("several", inputs.labels, sizes, torch.float64)
            for at, needs in enumerate((NEEDS["B"], NEEDS["D"])):
                fixed = {"impl": IMPLS[(number + at) % 2]}

                def logps(h, w, b, fixed=fixed, **group):
                    return linear_sequence_logps(h, w, inputs.labels, bias=b, stats=STATS, **fixed, **group)

                def loss(h, w, b, fixed=fixed, chunk_bytes=chunk_bytes, **group):
                    own = fixed | {"chunk_bytes": chunk_bytes}
                    return linear_dpo_loss(h, w, inputs.labels, inputs.ref_logps, bias=b, **own, **group)

                compare(world, logps, inputs, needs, torch.float64, sizes, of_logps)
                compare(world, loss, inputs, needs, torch.float64, sizes, of_loss)


def check_confident_rows(world):
    """p_y is so near 1 that lse - z_y cancels: what is left of it in fp32 is compared number by number, relative to
    itself."""
    inputs = head_inputs(4, 24, H, V, confident=1.0, logit_std=3.0)
    inputs = inputs._replace(hidden=inputs.hidden.detach() * 3)
    double = results(
        lambda h, w, b: linear_sequence_logps(h, w, inputs.labels, bias=b, stats=STATS),
        leaves(inputs, NEEDS["B"], torch.float64),
        of_logps,
    )
    labelled = inputs.labels >= 0
    exact = double["token_logps"][labelled]
    assert exact.abs().median() < 1e-5, exact.abs().median()  # where 1 - p would have no digit left of fp32
    for sizes in splits(world.ranks):
        part = world.part(sizes)
        for impl in IMPLS:
            for name in ("B", "D"):
                for options in ({}, {"chunk_bytes": None}):

                    def call(h, w, b, impl=impl, options=options, **group):
                        if options:
                            return linear_dpo_loss(h, w, inputs.labels, inputs.ref_logps, bias=b, impl=impl, **group)
                        return linear_sequence_logps(h, w, inputs.labels, bias=b, impl=impl, **group)

                    of_values = of_loss if options else of_logps
                    ours, whole, oracle = (
                        results(call_, leaves(inputs, NEEDS[name], dtype, p), of_values, cut)
                        for call_, dtype, p, cut in (
                            (lambda *t: call(*t, group=world.group), torch.float32, part, slice(None)),
                            (call, torch.float32, slice(None), part),
                            (call, torch.float64, slice(None), part),
                        )
                    )
                    if not options:
                        error = ((ours["token_logps"] - double["token_logps"])[labelled] / exact).abs()
                        assert error.max() < 1e-4, error.max()
                    rows = oracle["dhidden"][labelled]
                    errors = [(t["dhidden"][labelled] - rows).norm(dim=1) / rows.norm(dim=1) for t in (ours, whole)]
                    assert errors[0].max() <= 1.5 * errors[1].max() + 1e-6, (impl, name, [e.max() for e in errors])
                    if name == "D" and part.start != part.stop:
                        reason = beyond_budget(ours["dweight"], whole["dweight"], oracle["dweight"], "dweight")
                        assert not reason, reason


def check_labels_on_one_rank(world):
    inputs = head_inputs(4, 24, H, V)
    sizes = next(iter(splits(world.ranks)))
    for rank in range(world.ranks):
        first = sum(sizes[:rank])
        labels = torch.where(inputs.labels >= 0, first + inputs.labels % sizes[rank], inputs.labels)
        for needs in NEEDS.values():
            for chunk_bytes in (None, 0):

                def call(h, w, b, labels=labels, chunk_bytes=chunk_bytes, **group):
                    return linear_dpo_loss(h, w, labels, inputs.ref_logps, bias=b, chunk_bytes=chunk_bytes, **group)

                compare(world, call, inputs, needs, torch.float64, sizes, of_loss)


def check_ties(world):
    """Equal rows of the head: the label is the first largest only where no rank before has an equal one."""
    hidden, weight = (t.detach().mul(4).round() for t in head_inputs(4, 24, H, V)[:2])  # whose products are exact
    weight = weight[:1].expand(V, H).clone()
    labels = torch.arange(96).view(4, 24) * V // 96
    for sizes in splits(world.ranks):
        for impl in IMPLS:
            out = linear_sequence_logps(
                hidden, weight[world.part(sizes)], labels, stats=("is_top1",), impl=impl, group=world.group
            )
            assert torch.equal(out.stats["is_top1"], labels == 0), sizes


def check_ranks_have_the_same_bits(world):
    for seed in range(2):
        inputs = head_inputs(4, 24, H, V, seed=seed)
        for dtype in (torch.float32, torch.bfloat16):
            for sizes in splits(world.ranks):
                for needs in (NEEDS["B"], NEEDS["D"]):
                    for chunk_bytes in (None, 0):
                        found = results(
                            lambda h, w, b, inputs=inputs, chunk_bytes=chunk_bytes: linear_dpo_loss(
                                h,
                                w,
                                inputs.labels,
                                inputs.ref_logps,
                                bias=b,
                                chunk_bytes=chunk_bytes,
                                stats=STATS,
                                group=world.group,
                            ),
                            leaves(inputs, needs, dtype, world.part(sizes)),
                            of_loss,
                        )
                        for name in {*found} - {"dweight", "dbias"}:
                            same(world, found[name], name)


def same(world, t, name):
    everywhere = [torch.empty_like(t) for _ in range(world.ranks)]
    dist.all_gather(everywhere, t.contiguous())
    assert all(torch.equal(t, other) for other in everywhere), f"{name} differs by rank"


@contextlib.contextmanager
def counted():
    """[name, bytes that a rank hands in] of each collective, whichever it is."""
    names = [
        name
        for name in dir(dist)
        if name.startswith(("all_", "reduce", "broadcast", "scatter", "gather", "send", "isend"))
    ]
    originals, seen = {name: getattr(dist, name) for name in names if callable(getattr(dist, name))}, []

    def wrapped(name):
        def call(*args, **kwargs):
            tensors = [t for t in args if isinstance(t, torch.Tensor)]
            objects = [pickle.dumps(args[1])] if name == "all_gather_object" else []
            seen.append((name, sum(t.numel() * t.element_size() for t in tensors) + sum(map(len, objects))))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, wrapped(name))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def check_collectives(world):
    """Their number and bytes are those that docs/scaling.md says."""
    inputs = head_inputs(4, 24, H, V)
    sizes = next(iter(splits(world.ranks)))
    of_pairs = (inputs.labels >= 0).sum(1).view(2, 2).sum(0).tolist()
    agree = ("all_gather", AGREED_BYTES)

    def exchange(n):
        return ("all_gather", ROW_BYTES * n)

    def dx(n, dtype):
        return ("all_reduce", n * H * (8 if dtype == torch.float64 else 4))

    for dtype in DTYPES:
        for path, needs in NEEDS.items():
            for parts in PARTS:
                given = leaves(inputs, needs, dtype, world.part(sizes))
                with counted() as seen:
                    out = linear_dpo_loss(
                        given[0],
                        given[1],
                        inputs.labels,
                        inputs.ref_logps,
                        bias=given[2],
                        chunk_bytes=chunk_bytes_for(parts, inputs.labels, sizes, dtype),
                        group=world.group,
                    )
                    if out.loss.requires_grad:
                        out.loss.backward()
                if parts == "several" and dtype == torch.bfloat16:  # too little for the sum of dW: path D
                    parts = "D"
                if parts == "several" and path in ("D", "head"):  # the rows of each pair by themselves
                    expected = [agree]
                    for n in of_pairs:
                        expected += [exchange(n), *([dx(n, dtype)] if needs[0] else [])]
                else:
                    expected = [agree, exchange(sum(of_pairs)), *([dx(sum(of_pairs), dtype)] if needs[0] else [])]
                assert seen == expected, (dtype, path, parts, seen, expected)


def check_dtensors(world):
    """As `distribute_tensor` cuts them; a tied weight, whose gradient is a sum."""
    inputs = head_inputs(4, 24, H, V, dtype=torch.float64)
    for chunk_bytes in (None, 0):
        hidden, weight, bias = leaves(inputs, NEEDS["D"], torch.float64)
        out = linear_dpo_loss(hidden, weight, inputs.labels, inputs.ref_logps, bias=bias, chunk_bytes=chunk_bytes)
        (out.loss + weight.square().sum()).backward()
        x = hidden.detach().clone().requires_grad_()
        w, b = (distribute_tensor(t.detach(), world.mesh, [Shard(0)]).requires_grad_() for t in (weight, bias))
        ours = linear_dpo_loss(x, w, inputs.labels, inputs.ref_logps, bias=b, chunk_bytes=chunk_bytes)
        (ours.loss + w.to_local().square().sum()).backward()
        assert isinstance(w.grad, DTensor) and w.grad.placements == (Shard(0),), w.grad
        for t, expected in (
            (ours.loss, out.loss),
            (x.grad, hidden.grad),
            (w.grad.full_tensor(), weight.grad),
            (b.grad.full_tensor(), bias.grad),
        ):
            torch.testing.assert_close(t, expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        logps = linear_sequence_logps(x, w, inputs.labels, bias=b, stats=STATS)
    expected = linear_sequence_logps(hidden.detach(), weight.detach(), inputs.labels, bias=bias.detach(), stats=STATS)
    torch.testing.assert_close(logps, expected, rtol=1e-12, atol=1e-13)


def check_no_labels(world):
    """Nothing to exchange but what the ranks agree on; zeros."""
    inputs = head_inputs(4, 24, H, V)
    labels = torch.full_like(inputs.labels, -100)
    for needs in NEEDS.values():
        given = leaves(inputs, needs, torch.float32, world.part(next(iter(splits(world.ranks)))))
        with counted() as seen:
            out = linear_sequence_logps(given[0], given[1], labels, bias=given[2], stats=STATS, group=world.group)
            if out.logps.requires_grad:
                out.logps.sum().backward()
        assert seen == [("all_gather", AGREED_BYTES)], seen
        assert not out.logps.any() and not any(t.grad.any() for t in given if t.grad is not None)


def check_autocast(world):
    inputs = head_inputs(4, 24, H, V)

    def call(h, w, b, **group):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_dpo_loss(h, w, inputs.labels, inputs.ref_logps, bias=b, **group)

    for needs in NEEDS.values():
        part = world.part(next(iter(splits(world.ranks))))
        whole = results(call, leaves(inputs, needs, torch.float32), of_loss, part)
        ours = results(lambda *t: call(*t, group=world.group), leaves(inputs, needs, torch.float32, part), of_loss)
        for name, t in ours.items():  # the same roundings of the same operands
            torch.testing.assert_close(t, whole[name], rtol=1e-4, atol=1e-5)


def check_errors(world):
    """Each on all ranks, in the same words, and without one that waits for the others."""
    inputs = head_inputs(4, 24, H, V)
    hidden, weight, bias = (t.detach() for t in (inputs.hidden, inputs.weight, inputs.bias))
    labels, last = inputs.labels, world.rank == world.ranks - 1
    sizes = next(iter(splits(world.ranks)))
    part = world.part(sizes)
    shard, group = weight[part], world.group

    def distributed(t, placement):
        return distribute_tensor(t, world.mesh, [placement])

    def logps(hidden, weight, labels=labels, **options):
        return lambda: linear_sequence_logps(hidden, weight, labels, **options)

    def loss(weight, labels=labels, **options):
        return lambda: linear_dpo_loss(hidden, weight, labels, inputs.ref_logps, **options)

    whole = distributed(weight, Shard(0))
    if last:  # a row less than it should have
        uneven = DTensor.from_local(shard[:-1], world.mesh, [Shard(0)], run_check=False, shape=(V, H), stride=(H, 1))
    else:
        uneven = whole
    outside, broken = labels.clone(), shard.clone()
    outside[1, 2] = V
    if last:
        broken[-1, 3] = float("nan")
    half = dist.new_group([0])
    two = distribute_tensor(weight, init_device_mesh("cpu", (1, world.ranks)), [Replicate(), Shard(0)])
    not_sharded = "weight: expected a DTensor with the placement"
    alike = "expected the same on all ranks that share a head"
    cases = (
        (logps(hidden, distributed(weight, Shard(1))), not_sharded),
        (logps(hidden, distributed(weight, Replicate())), not_sharded),
        (loss(DTensor.from_local(weight, world.mesh, [Partial()])), not_sharded),
        (logps(hidden, two), not_sharded),
        (logps(hidden, uneven), "weight: expected .* of the 123 entries that the DTensor says"),
        (logps(hidden, whole, group=group), "group: expected None with a DTensor"),
        (logps(hidden, shard, group="tp"), "group: expected a process group with this rank"),
        (logps(hidden, whole, bias=bias), "bias: expected a DTensor"),
        (logps(hidden, whole, bias=distributed(bias, Replicate())), "bias: expected a DTensor with"),
        (logps(hidden, weight, bias=distributed(bias, Shard(0))), "bias: expected a plain tensor"),
        (logps(hidden, shard, bias=bias, group=group), "bias: expected .* entries on the ranks of the group"),
        (logps(distributed(hidden, Replicate()), whole), "hidden: expected a plain tensor"),
        (
            loss(shard, outside, group=group),
            r"labels: expected values in \[0, 123\) .* got 123 for sequence 1, position 2",
        ),
        (logps(hidden, shard, labels.roll(world.rank, 1), group=group), "labels: expected the same on all ranks"),
        (
            logps(hidden[:, world.rank :], shard, labels[:, world.rank :], group=group),
            "hidden: expected the same shape on all ranks",
        ),
        (
            logps(hidden, shard.clone().requires_grad_(last), group=group),
            "hidden: expected that hidden, weight and bias",
        ),
        (logps(hidden, shard.double() if last else shard, group=group), "weight: expected the same dtypes"),
        (logps(hidden, shard[:, 1:] if last else shard, group=group), "weight: expected parts of one head"),
        (logps(hidden, shard[:0], group=group), "weight: expected at least one vocabulary entry"),
        (logps(hidden, broken, group=group), "weight: expected finite numbers.* in 1 of 123 .* the first is 122"),
        (loss(broken.clone().requires_grad_(), group=group), "weight: expected finite numbers.* the first is 122"),
        (loss(shard, group=group, beta=0.2 if last else 0.1), f"beta: {alike}, got 0.1 on rank 0 and 0.2 on rank"),
        (loss(shard, group=group, loss_type="ipo" if last else "sigmoid"), f"loss_type: {alike}"),
        (loss(shard, group=group, token_weights=labels.clone().fill_(1 + last)), f"token_weights: {alike}"),
        (logps(hidden, shard, group=group, temperature=2.0 if last else 1.0), f"temperature: {alike}"),
        (lambda: linear_dpo_loss(hidden, shard, labels, inputs.ref_logps + last, group=group), f"ref_logps: {alike}"),
        (
            (loss(shard, group=group) if last else logps(hidden, shard, group=group)),
            f"beta: {alike}, got a call of another function on rank 0 and 0.1 on rank",
        ),
        (logps(hidden, shard, group=group, sequence_group=group), "sequence_group: expected no rank but this one"),
        (logps(hidden, whole, sequence_group=group), "sequence_group: expected no rank but this one"),
    )
    for call, pattern in cases:
        try:
            call()
        except ValueError as error:
            text = str(error)
        else:
            text = "no error"
        texts = [None] * world.ranks
        dist.all_gather_object(texts, text)
        assert re.search(pattern, text), f"{pattern}: {text}"
        assert len(set(texts)) == 1, f"{pattern}: {texts}"
    # of a group that it is not in, or alone in
    if world.rank == 0:
        out = linear_sequence_logps(hidden, weight, labels, group=half)
        torch.testing.assert_close(out.logps, linear_sequence_logps(hidden, weight, labels).logps)
    else:
        try:
            linear_sequence_logps(hidden, weight, labels, group=half)
        except ValueError as error:
            assert "group: expected a process group with this rank" in str(error), error
        else:
            raise AssertionError("no error")


def assert_ranks_found_nothing(module, folder, processes):
    """Runs the script that this module is in so many processes, and reads what its checks found."""
    run_in_two(module.__file__, folder, processes=processes)
    for rank in range(processes):
        found = json.loads((folder / f"{rank}.json").read_text())
        outcomes = {check: found.get(check, "not run, after an earlier failure") for check in module.CHECKS}
        assert not any(outcomes.values()), (rank, {check: said for check, said in outcomes.items() if said})


def checks_of(module):
    return {name.removeprefix("check_"): check for name, check in module.items() if name.startswith("check_")}


CHECKS = checks_of(globals())


def main(folder, checks):
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    torch.set_num_threads(1)
    world, found = World(), {}
    for name, check in checks.items():
        try:
            check(world)
            found[name] = ""
        except Exception:
            # the others may wait for what this rank does not send, until their group's timeout: they come no further
            found[name] = traceback.format_exc()[-3000:]
            break
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], CHECKS)
