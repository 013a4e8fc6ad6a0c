"""The custom operators: schemas, fakes, autograd registration, and whole-graph compilation."""

import pytest
import torch
from grids import IMPLS, covering
from torch.autograd import gradcheck

from dpo_kernels import linear_dpo_loss, linear_sequence_logps, ops, sequence_logps
from dpo_kernels.dispatch import default
from dpo_kernels.testing import head_inputs

pytestmark = pytest.mark.usefixtures("impl")
STATS = ["entropy", "is_top1", "mean_logit", "log_sum_sq_probs"]


def linear_args(inputs, bias, with_dhidden, stats, dtype):
    return (
        *(inputs.hidden, inputs.weight, inputs.labels, bias),
        *(0.7, 4.0, 1.3, -100, ops.UNKNOWN, dtype, stats, with_dhidden, default(torch.get_default_device())),
    )


@pytest.mark.parametrize(
    ("impl", "with_bias", "frozen", "dtype"),
    covering(IMPLS, [False, True], [False, True], [torch.float32, torch.bfloat16], full=2),
    indirect=["impl"],
)
def test_opcheck_linear(with_bias, frozen, dtype):
    inputs = head_inputs(dtype=dtype)
    if frozen:
        inputs.weight.requires_grad_(False), inputs.bias.requires_grad_(False)
    args = linear_args(inputs, inputs.bias if with_bias else None, frozen, STATS if with_bias else [], dtype)
    torch.library.opcheck(ops.linear_token_logps, args)


def test_opcheck_linear_backward():
    for dtype, *need in (
        (torch.float32, True, True, True),
        (torch.bfloat16, True, False, False),  # gradients have the dtype of what they are of, all else is fp32
        (torch.bfloat16, False, True, False),
    ):
        inputs = head_inputs(dtype=dtype)
        hidden, weight, labels, bias, _ = (t.detach() for t in inputs)
        logps, norm, _, _ = ops.linear_token_logps(*linear_args(inputs, inputs.bias, False, [], dtype))
        scalars = (0.7, 4.0, 1.3, -100, ops.UNKNOWN, dtype, *need, default(torch.get_default_device()))
        args = (torch.rand(labels.shape), hidden, weight, labels, bias, norm.detach(), logps.detach(), *scalars)
        torch.library.opcheck(ops.linear_token_logps_bwd, args)


@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck_logits(inplace):
    labels = head_inputs().labels
    logits = torch.randn(*labels.shape, 123, requires_grad=True)
    torch.library.opcheck(
        ops.token_logps, (logits, labels, -100, ops.UNKNOWN, STATS, False, default(torch.get_default_device()))
    )
    logps, norm, _ = ops.token_logps(
        logits.detach(), labels, -100, ops.UNKNOWN, [], False, default(torch.get_default_device())
    )
    backward = ops.token_logps_bwd_ if inplace else ops.token_logps_bwd
    torch.library.opcheck(
        backward,
        (
            torch.rand(labels.shape),
            logits.detach(),
            labels,
            norm,
            logps,
            -100,
            ops.UNKNOWN,
            default(torch.get_default_device()),
        ),
    )


@pytest.mark.parametrize(("impl", "weighted"), [("triton", False), ("triton", True), ("cuda", True)], indirect=["impl"])
def test_opcheck_sums(weighted):
    labels, name = head_inputs(2, 5).labels, default(torch.get_default_device())
    logps = -torch.rand(labels.shape)
    weights = torch.rand(labels.shape) if weighted else None
    leaves = [None if t is None else t.clone().requires_grad_() for t in (logps, weights)]
    torch.library.opcheck(ops.sum_tokens, (leaves[0], labels, leaves[1], -100, weighted, name))
    _, counts = ops.sum_tokens(logps, labels, weights, -100, weighted, name)
    torch.library.opcheck(
        ops.sum_tokens_bwd, (torch.rand(2), logps, labels, weights, counts, -100, weighted, weighted, name)
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(frozen):
    inputs = head_inputs(2, 3, 3, 5, dtype=torch.float64)
    trained = [inputs.hidden] if frozen else [inputs.hidden, inputs.weight, inputs.bias]

    frozen_head = inputs.weight.detach(), inputs.bias.detach()

    def fn(hidden, *head):
        weight, bias = head or frozen_head
        options = {"bias": bias, "logit_scale": 0.7, "softcap": 4.0, "temperature": 1.3}
        out = linear_sequence_logps(hidden, weight, inputs.labels, **options)
        return out.logps, out.token_logps

    assert gradcheck(fn, trained)


def test_gradcheck_logits():
    labels = head_inputs(2, 3).labels % 7
    labels[0, 0] = -100
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda t: sequence_logps(t, labels).logps, [logits])


def loss_from_hidden(hidden, weight, labels, bias, ref_logps):
    out = linear_sequence_logps(hidden, weight, labels, bias=bias, softcap=4.0, shift=True, stats=("entropy",))
    return (out.logps - ref_logps).square().sum() + out.token_logps.sum() + 0 * out.stats["entropy"].sum()


def loss_from_logits(hidden, weight, labels, bias, ref_logps):
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return (sequence_logps(logits, labels, inplace_backward=True, reduction="mean").logps - ref_logps).square().sum()


def fused_loss(hidden, weight, labels, bias, ref_logps):
    return linear_dpo_loss(hidden, weight, labels, ref_logps, bias=bias, loss_type="sigmoid").loss


@pytest.mark.parametrize(
    ("impl", "loss", "frozen", "dynamic"),
    # one whose sums over tokens are PyTorch's, and one that has an operator for them: a graph knows no other difference
    covering(
        ["torch", "triton"], [loss_from_hidden, loss_from_logits, fused_loss], [False, True], [False, True], full=2
    ),
    indirect=["impl"],
)
def test_compile_fullgraph(loss, frozen, dynamic):
    """Forward and backward in one graph, equal to eager, for shapes and label masks that change between calls."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((4, 9, 31, 123), (6, 5, 31, 123)) if dynamic else ((4, 9, 31, 123),):
        for seed in range(2):  # another mask, another number of labelled rows, same graph
            results = []
            for fn in (compiled, loss):
                inputs = head_inputs(*shape, seed=seed)
                if frozen:
                    inputs.weight.requires_grad_(False), inputs.bias.requires_grad_(False)
                value = fn(*inputs)
                value.backward()
                results.append((value.detach(), *(t.grad for t in inputs[:4:1] if t.grad is not None)))
            assert len(results[0]) == (2 if frozen else 4)
            for mine, other in zip(*results, strict=True):
                torch.testing.assert_close(mine, other)


def test_errors_name_the_position_in_a_compiled_graph_too():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda hidden, weight, labels: linear_sequence_logps(hidden, weight, labels).logps, backend="eager"
    )
    inputs = head_inputs()
    hidden = inputs.hidden.detach().clone()
    s, t = torch.nonzero(inputs.labels != -100)[5].tolist()
    hidden[s, t, 7] = torch.nan
    with pytest.raises(ValueError, match=rf"hidden: expected finite.*sequence {s}, position {t}"):
        compiled(hidden, inputs.weight.detach(), inputs.labels)


def test_compile_with_inductor():
    # one case through the default backend, which generates code around the operators
    torch._dynamo.reset()
    inputs, other = head_inputs(), head_inputs()
    value = torch.compile(loss_from_hidden, fullgraph=True)(*inputs)
    expected = loss_from_hidden(*other)
    torch.testing.assert_close(value, expected)
    value.backward(), expected.backward()
    torch.testing.assert_close(inputs.weight.grad, other.weight.grad)
