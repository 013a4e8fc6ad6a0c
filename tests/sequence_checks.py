"""What ranks with a part of every sequence check, each by itself against the call with whole sequences: run by
`test_sequence_parallel.py` in several processes, as `parallel_checks.py` is."""

import contextlib
import re
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from heads import build
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.append(str(Path(__file__).parent))
import parallel_checks
from parallel_checks import (
    BF16,
    DTYPES,
    IMPLS,
    NEEDS,
    PARTS,
    STATS,
    H,
    V,
    checks_of,
    counted,
    leaves,
    main,
    of_logps,
    results,
    same,
    small_tiles,
)

from dpo_kernels import linear_dpo, linear_dpo_loss, linear_reference, linear_sequence_logps, sequence_logps
from dpo_kernels.linear_reference import linear_reference_logps
from dpo_kernels.models import LMHead
from dpo_kernels.testing import beyond_budget, head_inputs

T = 72
PER_TOKEN = {"token_logps", "dhidden", *STATS}
# What ranks agree on: names of arguments and what they are, and of each sequence its reference and its tokens.
AGREED_BYTES, AGREED_BYTES_A_SEQUENCE = 1024, 25


def of_loss(out):
    return parallel_checks.of_loss(out) | {"num_tokens": out.num_tokens.to(out.loss.dtype)}


def splits(ranks):
    """Numbers of positions: as even as may be, uneven with none in the middle, none on the first rank."""
    step = -(-T // ranks)
    yield [max(0, min(step, T - r * step)) for r in range(ranks)]
    yield [7, *[0] * (ranks - 2), T - 7]
    yield [0, *[1] * (ranks - 2), T - ranks + 2]


def chunk_bytes_for(parts, labels, sizes, dtype):
    """ "several": two thirds of what the rank with most rows has, so that each pair fits and both do not. In bf16 the
    sum of dW in fp32 leaves nothing, and that is path D."""
    if parts != "several":
        return {"one": None, "D": 0}[parts]
    rows = max(int((part >= 0).sum()) for part in labels.split(sizes, 1))
    assert rows > H  # else they would lie where dW is to be
    return rows * 2 // 3 * V * max(4, dtype.itemsize)


def compare(world, call, inputs, needs, dtype, sizes, of_values, epsilon=1e-6):
    """`call(hidden, weight, bias, here, **group)`, of whole sequences and of parts: in fp64 the same to 1e-12, else as
    near to fp64. Gradients of the head are summed over the ranks; what is of whole sequences has the same bits. `sizes`
    may be the positions themselves."""
    here, everything = sizes if isinstance(sizes, torch.Tensor) else world.part(sizes), slice(None)

    def found(given, dtype, here, **group):
        hidden, *head = leaves(given, needs, dtype)
        hidden = hidden.detach()[:, here].clone().requires_grad_(hidden.requires_grad)
        return results(lambda h, w, b: call(h, w, b, here, **group), (hidden, *head), of_values)

    def part_of(whole):
        return {name: t[:, here] if name in PER_TOKEN else t for name, t in whole.items()}

    whole = part_of(found(inputs, dtype, everything))
    ours = found(inputs, dtype, here, sequence_group=world.group)
    assert ours.keys() == whole.keys(), (ours.keys(), whole.keys())
    for name, t in ours.items():
        assert t.dtype == whole[name].dtype and t.shape == whole[name].shape, (name, t.shape)
        if name in ("dweight", "dbias"):
            ours[name] = t.double()
            dist.all_reduce(ours[name])
        elif name not in PER_TOKEN:
            same(world, t, name)
    if dtype == torch.float64:
        for name, t in ours.items():
            torch.testing.assert_close(
                t, whole[name], rtol=1e-12, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}"
            )
        return
    oracle = part_of(found(inputs.to(dtype), torch.float64, everything))
    for name, t in ours.items():
        if t.numel():
            # the head's gradients are rounded once more by each rank, before they are summed
            more = 2**-9 if dtype.itemsize == 2 and name in ("dweight", "dbias") else epsilon
            reason = beyond_budget(t, whole[name], oracle[name].double(), name, more)
            assert not reason, reason


@contextlib.contextmanager
def where(*what):
    """Says in which case."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{' '.join(map(str, what))}: {error}") from error


def check_log_probabilities(world):
    inputs = head_inputs(4, T, H, V)
    weights = torch.rand(inputs.labels.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    others = {"softcap": 5.0, "logit_scale": 1.7, "temperature": 0.8, "reduction": "mean"}
    for number, sizes in enumerate(splits(world.ranks)):
        for path, needs in NEEDS.items():
            for options in ({}, others):
                for dtype in DTYPES[:1] if options else DTYPES:
                    fixed = options | {"stats": STATS, "impl": IMPLS[number % 2]}

                    def call(h, w, b, here, fixed=fixed, **group):
                        return linear_sequence_logps(
                            h, w, inputs.labels[:, here], bias=b, token_weights=weights[:, here], **fixed, **group
                        )

                    with where(sizes, path, options, dtype):
                        epsilon = BF16 if dtype.itemsize == 2 else 1e-6
                        compare(world, call, inputs, needs, dtype, sizes, of_logps, epsilon)


def check_logits(world):
    inputs = head_inputs(4, T, H, V)
    logits = (inputs.hidden @ inputs.weight.T).detach()
    for sizes in splits(world.ranks):
        here = world.part(sizes)
        for inplace in (False, True):
            found = []
            for part, group in ((here, {"sequence_group": world.group}), (slice(None), {})):
                given = logits.double()[:, part].clone().requires_grad_()
                out = sequence_logps(
                    given * 1, inputs.labels[:, part], reduction="mean", inplace_backward=inplace, **group
                )
                (out.logps * torch.arange(1, 5)).sum().backward()
                found.append((out.logps.detach(), out.num_tokens, given.grad))
            ours, whole = found
            same(world, ours[0], "logps")
            torch.testing.assert_close(ours[:2], whole[:2], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(ours[2], whole[2][:, here], rtol=1e-12, atol=1e-13)


def check_losses(world):
    inputs = head_inputs(4, T, H, V)
    cases = [
        {"stats": STATS},
        {"loss_type": ("ipo", "sft"), "loss_weights": (1.0, 0.3), "pair_weights": torch.tensor([2.0, 0.5])},
        {"use_weighting": True, "softcap": 4.0, "temperature": 1.3, "ld_alpha": 0.5, "rpo_alpha": 0.1},
        {"pairs": [(0, 1), (0, 2), (3, 1)], "use_weighting": True, "loss_type": "sigmoid_norm"},
        {"loss_type": "plackett_luce", "pairs": [(0, 1), (1, 2), (2, 3)]},
        {"loss_type": "aot"},  # sorts the batch: path D
        {"loss_type": "ipo", "lengths": torch.tensor([3, 9, 4, 7]), "differentiable": ("logps",)},
        {"pair_weights": torch.tensor([0.0, 1.0]), "loss_type": "sft"},
        {"pairs": [(2, 0), (1, 3)], "loss_type": ("ipo", "sft"), "use_weighting": True, "rpo_alpha": 0.2},
    ]
    weights = torch.rand(inputs.labels.shape, generator=torch.Generator().manual_seed(2))
    first, *others = splits(world.ranks)
    for number, options in enumerate(cases):
        for sizes in (first, *others) if number == 0 else (others[number % 2],):
            for path, needs in NEEDS.items():
                for parts in PARTS if path in ("D", "head") else ["one"]:
                    for dtype in DTYPES if number == 0 else DTYPES[:1]:
                        chunk_bytes = chunk_bytes_for(parts, inputs.labels, sizes, dtype)
                        fixed = options | {"impl": IMPLS[number % 2], "chunk_bytes": chunk_bytes}

                        def call(h, w, b, here, fixed=fixed, number=number, **group):
                            own = {"token_weights": weights[:, here]} if number in (2, 4) else {}
                            return linear_dpo_loss(
                                h, w, inputs.labels[:, here], inputs.ref_logps, bias=b, **own, **fixed, **group
                            )

                        with where(sizes, parts, path, options, dtype):
                            epsilon = BF16 if dtype.itemsize == 2 else 2e-6
                            compare(world, call, inputs, needs, dtype, sizes, of_loss, epsilon)


def check_where_labels_lie(world):
    """All on one rank, none on one, none at all; one pair on the first rank alone, so that others have no row of it."""
    inputs = head_inputs(4, T, H, V)
    sizes = next(iter(splits(world.ranks)))
    none = torch.full_like(inputs.labels, -100)
    cases = []
    for rank in range(world.ranks):
        first = sum(sizes[:rank])
        part = slice(first, first + sizes[rank])
        alone, without = none.clone(), inputs.labels.clone()
        alone[:, part], without[:, part] = inputs.labels[:, part], -100
        cases += [alone, without]
    first_pair = inputs.labels.clone()
    first_pair[::2, sizes[0] :] = -100
    torch.use_deterministic_algorithms(True)  # which fills with NaN what nobody writes to
    for labels in (*cases, first_pair, first_pair.roll(1, 0), none):
        for name, needs in NEEDS.items():
            for parts in ("one", "D", "several") if name in ("D", "head") and (labels >= 0).any() else ["one"]:
                for dtype in (torch.float64, torch.bfloat16) if parts == "one" and name == "D" else (torch.float64,):
                    chunk_bytes = chunk_bytes_for(parts, labels, sizes, dtype)

                    def call(h, w, b, here, labels=labels, chunk_bytes=chunk_bytes, **group):
                        own = {"ld_alpha": 0.3, "chunk_bytes": chunk_bytes}
                        return linear_dpo_loss(h, w, labels[:, here], inputs.ref_logps, bias=b, **own, **group)

                    with where((labels >= 0).sum(1).tolist(), name, parts, dtype):
                        compare(world, call, inputs, needs, dtype, sizes, of_loss, BF16)
    torch.use_deterministic_algorithms(False)


def check_positions_in_any_order(world):
    """Dealt one by one, as cards are."""
    inputs = head_inputs(4, T, H, V)
    for needs in NEEDS.values():
        for chunk_bytes in (None, 0):

            def call(h, w, b, here, chunk_bytes=chunk_bytes, **group):
                own = {"chunk_bytes": chunk_bytes, "use_weighting": True, "stats": STATS}
                return linear_dpo_loss(h, w, inputs.labels[:, here], inputs.ref_logps, bias=b, **own, **group)

            compare(world, call, inputs, needs, torch.float64, torch.arange(world.rank, T, world.ranks), of_loss)


def check_autocast(world):
    inputs = head_inputs(4, T, H, V)
    sizes = next(iter(splits(world.ranks)))

    def call(h, w, b, here, **group):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_dpo_loss(h, w, inputs.labels[:, here], inputs.ref_logps, bias=b, **group)

    for needs in NEEDS.values():
        compare(world, call, inputs, needs, torch.float32, sizes, of_loss, 1e-4)


def check_one_position(world):
    """And no sequence."""
    inputs = head_inputs(4, 1, H, V, labelled=1.0)
    none = linear_sequence_logps(inputs.hidden[:0], inputs.weight, inputs.labels[:0], sequence_group=world.group)
    assert none.logps.shape == (0,) and none.num_tokens.dtype == torch.int64
    for rank in range(world.ranks):
        for needs in NEEDS.values():

            def call(h, w, b, here, **group):
                return linear_dpo_loss(h, w, inputs.labels[:, here], inputs.ref_logps, bias=b, **group)

            compare(world, call, inputs, needs, torch.float64, [int(r == rank) for r in range(world.ranks)], of_loss)


def check_packed_rows(world):
    """Hidden states that lie otherwise than labels: backwards, in other numbers of rows and positions."""
    inputs = head_inputs(4, T, H, V)
    for sizes in splits(world.ranks):
        number = [torch.arange(4 * size).flip(0).view(4, size) for size in sizes]
        flat = torch.arange(4 * T).view(4, T).split(sizes, 1)  # where these lie among whole sequences
        whole = torch.cat([of_rank.reshape(-1)[n] for of_rank, n in zip(flat, number, strict=True)], 1)

        def call(h, w, b, here, whole=whole, number=number, **group):
            own = number[world.rank] if group else whole
            count = {"num_labelled": int((inputs.labels[:, here] >= 0).sum())}
            packed = h.reshape(1, -1, H) if group else h
            return linear_dpo_loss(
                packed, w, inputs.labels[:, here], inputs.ref_logps, bias=b, predictors=own, **count, **group
            )

        for needs in NEEDS.values():
            compare(world, call, inputs, needs, torch.float64, sizes, of_loss)


def check_many_tiles(world):
    inputs = head_inputs(4, T, H, V)
    with small_tiles():
        for sizes in [*splits(world.ranks)][:2]:
            for parts in PARTS[:2]:
                chunk_bytes = chunk_bytes_for(parts, inputs.labels, sizes, torch.float64)

                def call(h, w, b, here, chunk_bytes=chunk_bytes, **group):
                    own = {"chunk_bytes": chunk_bytes}
                    return linear_dpo_loss(h, w, inputs.labels[:, here], inputs.ref_logps, bias=b, **own, **group)

                compare(world, call, inputs, NEEDS["D"], torch.float64, sizes, of_loss)


@contextlib.contextmanager
def plans():
    """What the reference and the loss plan, in turns."""
    found, plan = [], linear_dpo.plan_groups

    def planned(*args, **options):
        found.append(plan(*args, **options))
        return found[-1]

    linear_dpo.plan_groups = linear_reference.plan_groups = planned
    try:
        yield found
    finally:
        linear_dpo.plan_groups = linear_reference.plan_groups = plan


def check_reference(world):
    """Where policy and reference are one model, rewards are 0 to the bit on every path, with ld_alpha or without."""
    inputs = head_inputs(4, T, H, V)
    for sizes in splits(world.ranks):
        here = world.part(sizes)
        for path, gradients in (("A", ()), ("B", ("hidden",)), ("D", ("hidden", "weight", "bias"))):
            for parts in PARTS if path == "D" else ["one"]:
                hidden, weight, bias = leaves(inputs, NEEDS[path], torch.float32)
                fixed = {
                    "chunk_bytes": chunk_bytes_for(parts, inputs.labels, sizes, torch.float32),
                    "sequence_group": world.group,
                    "ld_alpha": 0.5,
                }
                given = hidden[:, here], weight, inputs.labels[:, here]
                with small_tiles() if parts == "several" else contextlib.nullcontext(), plans() as found:
                    reference = linear_reference_logps(*given, bias=bias, gradients=gradients, **fixed)
                    out = linear_dpo_loss(*given, reference.logps, bias=bias, **fixed)
                assert not out.chosen_rewards.any() and not out.rejected_rewards.any(), (sizes, path, parts)
                assert torch.equal(reference.num_tokens, (inputs.labels >= 0).sum(1))
                assert found[::2] == found[1::2] and len(found) == 2 * (path == "D"), found


def check_collectives(world):
    """Their number and bytes are those that docs/scaling.md says, none of them in the backward."""
    inputs = head_inputs(4, T, H, V)
    for sizes in splits(world.ranks):
        here = world.part(sizes)
        for path, needs in NEEDS.items():
            for parts in PARTS:
                for ld_alpha in (None, 0.5):
                    hidden, weight, bias = leaves(inputs, needs, torch.float32)
                    chunk_bytes = chunk_bytes_for(parts, inputs.labels, sizes, torch.float32)
                    with counted() as seen:
                        out = linear_dpo_loss(
                            hidden[:, here],
                            weight,
                            inputs.labels[:, here],
                            inputs.ref_logps,
                            bias=bias,
                            ld_alpha=ld_alpha,
                            chunk_bytes=chunk_bytes,
                            sequence_group=world.group,
                        )
                        forward = len(seen)
                        if out.loss.requires_grad:
                            out.loss.backward()
                    assert len(seen) == forward, seen
                    (agreed, agreed_bytes), *sums = seen
                    assert (
                        agreed == "all_gather_object" and agreed_bytes <= AGREED_BYTES + 4 * AGREED_BYTES_A_SEQUENCE
                    ), seen
                    parted = parts == "several" and path in ("D", "head")
                    of_sequences = [2, 2] if parted else [4]  # a pair at a time
                    each = 1 if ld_alpha is None else 2
                    expected = [("all_gather", 8 * n) for n in of_sequences for _ in range(each)]
                    assert sums == expected, (path, parts, seen)


def check_a_sum_that_ddp_divides(world):
    """Through a model whose gradients DDP takes the mean of."""
    inputs = head_inputs(4, T, H, V, dtype=torch.float64)
    sizes = next(iter(splits(world.ranks)))
    here = world.part(sizes)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)

        def forward(self, x, labels, **group):
            return linear_dpo_loss(
                self.layer(x), self.head.weight, labels, inputs.ref_logps, bias=self.head.bias, **group
            ).loss

    torch.manual_seed(0)
    model = Model().double()
    x = inputs.hidden.detach()
    model(x, inputs.labels).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    parallel = DistributedDataParallel(model)
    loss = parallel(x[:, here], inputs.labels[:, here], sequence_group=world.group)
    (loss * world.ranks).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], whole, rtol=1e-11, atol=1e-13)


def check_heads_in_shards(world):
    """Two by two: the vocabulary over one dimension of a mesh, positions over the other."""
    if world.ranks != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    inputs = head_inputs(4, T, H, V, dtype=torch.float64)
    sizes = [50, T - 50]
    here = slice(0, 50) if mesh.get_local_rank("cp") == 0 else slice(50, T)
    for needs in NEEDS.values():
        for parts in PARTS:
            chunk_bytes = chunk_bytes_for(parts, inputs.labels, sizes, torch.float64)
            fixed = {"chunk_bytes": chunk_bytes if chunk_bytes is None else chunk_bytes // 2, "stats": STATS}

            hidden, weight, bias = leaves(inputs, needs, torch.float64)
            whole = linear_dpo_loss(hidden, weight, inputs.labels, inputs.ref_logps, bias=bias, **fixed)
            x = hidden.detach()[:, here].clone().requires_grad_(needs[0])
            w, b = (
                distribute_tensor(t.detach(), mesh["tp"], [Shard(0)]).requires_grad_(need)
                for t, need in ((weight, needs[1]), (bias, needs[2]))
            )
            labels = inputs.labels[:, here]
            group = mesh.get_group("cp")
            ours = linear_dpo_loss(x, w, labels, inputs.ref_logps, bias=b, sequence_group=group, **fixed)
            for name in ("loss", "losses", "logps", "chosen_rewards"):
                same(world, getattr(ours, name).detach(), name)
                torch.testing.assert_close(getattr(ours, name), getattr(whole, name), rtol=1e-12, atol=1e-13)
            for name in STATS:
                torch.testing.assert_close(ours.stats[name], whole.stats[name][:, here], rtol=1e-12, atol=1e-13)
            if any(needs):
                whole.loss.backward()
                ours.loss.backward()
            if needs[0]:
                torch.testing.assert_close(x.grad, hidden.grad[:, here], rtol=1e-12, atol=1e-13)
            for shard, t in ((w, weight), (b, bias)):
                if t.grad is not None:
                    summed = shard.grad.to_local().clone()
                    dist.all_reduce(summed, group=group)
                    first, last = [(0, 62), (62, V)][mesh.get_local_rank("tp")]
                    torch.testing.assert_close(summed, t.grad[first:last], rtol=1e-12, atol=1e-13)


def check_errors(world):
    """Each on all ranks, in the same words: of what they are given otherwise, and of what one of them refuses."""
    inputs = head_inputs(4, T, H, V)
    hidden, weight, bias = (t.detach() for t in (inputs.hidden, inputs.weight, inputs.bias))
    last = world.rank == world.ranks - 1
    sizes = next(iter(splits(world.ranks)))
    here = world.part(sizes)
    x, labels, ref = hidden[:, here], inputs.labels[:, here], inputs.ref_logps
    group = {"sequence_group": world.group}

    def logps(x=x, weight=weight, labels=labels, **options):
        return lambda: linear_sequence_logps(x, weight, labels, **options, **group)

    def loss(x=x, weight=weight, labels=labels, ref_logps=ref, **options):
        return lambda: linear_dpo_loss(x, weight, labels, ref_logps, **options, **group)

    def reference(x=x, weight=weight, labels=labels, **options):
        return lambda: linear_reference_logps(x, weight, labels, **options, **group)

    outside, broken, broken_head = labels.clone(), x.clone(), weight.clone()
    if last:
        outside[1, 2], broken[labels >= 0] = V, float("inf")
    broken_head[7, 3] = float("nan")
    on_last = labels if last else torch.full_like(labels, -100)
    all_alike = "expected the same on all ranks of sequence_group"
    of_last = rf"\(on rank {world.ranks - 1} of sequence_group\)"
    trained = weight.clone().requires_grad_()
    head, of_model = LMHead.from_model(build("llama")), torch.zeros(*labels.shape, 32)
    small = labels.clamp(max=9)
    cases = (
        (lambda: head.sequence_logps(of_model[0] if last else of_model, small, shift=False, **group),
         rf"hidden: expected floating-point \[S, T, H\].*{of_last}"),
        (lambda: head.dpo_loss(of_model[0] if last else of_model, small, ref, shift=False, **group),
         rf"hidden: expected floating-point \[S, T, H\].*{of_last}"),
        (logps(x[:3] if last else x, labels=labels[:3] if last else labels), f"labels: {all_alike}, got 4 sequences"),
        (logps(reduction="mean" if last else "sum"), f"reduction: {all_alike}, got sum on rank 0 and mean on rank"),
        (logps(x.double() if last else x, weight.double() if last else weight), f"hidden: {all_alike}"),
        (logps(weight=weight[1:] if last else weight, labels=labels.clamp(max=9)), f"weight: {all_alike}"),
        (logps(bias=bias if last else None), f"bias: {all_alike}, got None on rank 0"),
        (logps(temperature=2.0 if last else 1.0), f"temperature: {all_alike}, got 1.0 on rank 0 and 2.0 on rank"),
        (logps(x.clone().requires_grad_(last)), f"hidden: {all_alike}.* with a gradient on rank"),
        (loss(weight=weight.clone().requires_grad_(last)), f"weight: {all_alike}.* with a gradient on rank"),
        (loss(beta=0.2 if last else 0.1), f"beta: {all_alike}, got 0.1 on rank 0 and 0.2 on rank"),
        (loss(ref_logps=ref + 1 if last else ref), f"ref_logps: {all_alike}"),
        (loss(pairs=[(0, 1), (2, 3)] if last else [(0, 2), (1, 3)]), f"pairs: {all_alike}"),
        (loss(weight=trained, chunk_bytes=0 if last else None), f"chunk_bytes: {all_alike}, got None on rank 0 and 0"),
        (loss(pair_weights=torch.tensor([1.0, 2.0 if last else 1.0])), f"pair_weights: {all_alike}"),
        (loss(impl=IMPLS[last]), f"impl: {all_alike}"),
        (reference(gradients=["weight"] if last else []), f"gradients: {all_alike}"),
        (loss() if last else logps(), "a call of another function"),
        (loss(shift=True), "shift: expected False with sequence_group"),
        (logps(shift=last), rf"shift: expected False with sequence_group.*{of_last}"),
        (loss(labels=outside), rf"labels: expected values in \[0, 123\) .* for sequence 1, position 2 .*{of_last}"),
        (logps(labels=outside), rf"labels: expected values in .*{of_last}"),
        (lambda: sequence_logps(x @ weight.T, outside, **group), rf"labels: expected values in .*{of_last}"),
        (reference(labels=outside, gradients=()), rf"labels: expected values in .*{of_last}"),
        (loss(broken), rf"hidden: expected finite values .*{of_last}"),
        (loss(broken, weight=trained, softcap=3.0), rf"hidden: expected finite values .*{of_last}"),
        (logps(broken, softcap=3.0), rf"hidden: expected finite values .*{of_last}"),
        (reference(broken, gradients=("weight",)), rf"hidden: expected finite values .*{of_last}"),
        (loss(ref_logps=ref[:3] if last else ref), rf"ref_logps: expected shape .*{of_last}"),
        (loss(betta=1.0) if last else loss(), rf"no argument 'betta'.*{of_last}"),
        (logps(None if last else x), rf"hidden: expected a tensor.*{of_last}"),
        (logps(token_weights=torch.full(labels.shape, float("nan")) if last else None), f"token_weights: .*{of_last}"),
        (loss(weight=broken_head, labels=on_last), "weight: expected finite numbers"),
        (loss(weight=broken_head.clone().requires_grad_(), labels=on_last), "weight: expected finite numbers"),
        (logps(weight=broken_head, labels=on_last), rf"weight: expected finite numbers.*{of_last}"),
    )  # fmt: skip
    for number, (call, pattern) in enumerate(cases):
        try:
            call()
        except (ValueError, TypeError) as error:
            assert isinstance(error, TypeError) == ("betta" in pattern and last), error
            text = str(error)
        else:
            text = "no error"
        texts = [None] * world.ranks
        dist.all_gather_object(texts, text)
        assert re.search(pattern, text), f"{number}, {pattern}: {text}"
        assert len(set(texts)) == 1, f"{number}, {pattern}: {texts}"


CHECKS = checks_of(globals())

if __name__ == "__main__":
    main(sys.argv[1], CHECKS)
