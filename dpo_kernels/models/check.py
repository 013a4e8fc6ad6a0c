"""The head of a model against the model's own logits.

The model is run once, on a short text, with hidden states of our choice in the place of its own, so that nothing hangs
on what it happens to produce: zeros at the first position, which show the bias; at the others in turn what gives logits
of unit size, and logits so large that no softcap goes unnoticed. Every entry of the vocabulary is compared at some
positions, and some entries at every position.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo_kernels.models.operands import HeadOperands, class_of, name_of
from dpo_kernels.models.through_wrappers import is_of_a_library, on_this_rank, without_partial

TOKENS, ENTRIES, BLOCK = 130, 64, 4096
# Where configs keep for how many positions a model has room.
_ROOM = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length")
_LARGE = 30.0  # the usual cap, for the case that the model has one which the config keeps under a name unknown to us


class CheckFailed(ValueError):
    """The model does something else to its logits than its head, as it was found, or does not run on text alone."""


class NotFinite(ValueError):
    """The head's own logits are not finite: there is nothing to compare."""


class Head(Protocol):
    """What is checked: an `LMHead`."""

    model: Any
    at_output_layer: bool
    logit_scale: float
    softcap: float | None

    def output_layer(self) -> Any: ...
    def operands(self, hidden: Tensor) -> HeadOperands: ...
    def no_cache(self) -> dict[str, bool]: ...
    def _transform(self) -> Callable[[Tensor], Tensor] | None: ...
    def with_last_hidden(
        self, function: Callable[[nn.Module, Tensor], Tensor | None]
    ) -> AbstractContextManager[list[nn.Module]]: ...


def readings(
    head: Head, forward: Callable[..., Any], given: dict[str, Any] | None, *, settled: bool
) -> tuple[float, float | None]:
    """logit_scale and softcap with which the head gives the logits of `forward`, which is called as the model is, with
    inputs of our own or, if the model does not run on text alone, with those that are `given`.

    They are the head's own or, where those do not and nothing is `settled`, other readings of its config: a multiplier
    that divides or the reverse, and a value that the model does not use.

    Raises:
        CheckFailed, NotFinite
    """
    run = _first_that_works(head, forward, given)
    run.refuse_other_ways()
    candidates = itertools.product((head.logit_scale, 1 / head.logit_scale, 1.0), (head.softcap, None))
    for scale, cap in [(head.logit_scale, head.softcap)] if settled else candidates:
        if all(bool(each.all()) for pair in run.agreement(scale, cap) for each in pair):
            if any(bool((each.isnan() | each.isposinf()).any()) for each in run.products):
                raise NotFinite(
                    f"the head of {name_of(head.model)} gives logits that are not finite, of hidden states that are: "
                    "there is NaN or infinity in its weights"
                )
            return scale, cap
    raise CheckFailed(run.difference())


def what_is_done_by(*found: nn.Module | Callable[..., Any] | None) -> tuple[Any, ...]:
    """By hooks on modules, and by functions: the same if a hook goes and comes back."""
    done: list[Any] = []
    for each in found:
        if isinstance(each, nn.Module):
            done += map(_does, (*each._forward_pre_hooks.values(), *each._forward_hooks.values()))
        elif each is not None:
            done.append(_does(each))
    return tuple(done)


def _does(hook: Any) -> tuple[Any, ...]:
    """Its code and, if it is no library's, what it is called with: numbers as such, other things as the same ones."""
    function = without_partial(hook)
    code = getattr(function, "__code__", type(function))
    if is_of_a_library(hook):
        return (code,)
    given = [*getattr(hook, "args", ()), *getattr(hook, "keywords", {}).values()]
    given += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
    given += [*(getattr(function, "__defaults__", None) or ()), getattr(function, "__self__", None)]
    if not hasattr(function, "__code__"):
        given.append(function)
    return code, tuple(each if isinstance(each, str | float | int | None) else _One(each) for each in given)


class _One:
    """A thing, equal to itself alone: also after it is gone, when another may have its address."""

    def __init__(self, thing: Any) -> None:
        self._address = id(thing)
        try:
            self._get: Callable[[], Any] = weakref.ref(thing)
        except TypeError:  # lists and the like, which are kept
            self._get = lambda: thing

    def __eq__(self, other: object) -> bool:
        mine = self._get()
        return isinstance(other, _One) and mine is not None and mine is other._get()

    def __hash__(self) -> int:
        return self._address

    def __deepcopy__(self, memo: dict[int, Any]) -> _One:
        return self  # of what belongs to the copied model


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _first_that_works(head: Head, forward: Callable[..., Any], given: dict[str, Any] | None) -> _Run:
    """In full precision, or under autocast where the model does not run otherwise: the one that is active, or that
    which a model in several precisions will be under. On less text where it has no room for more."""
    device = _input_device(head.model)
    dtypes = {parameter.dtype for parameter in head.model.parameters()}
    active = torch.is_autocast_enabled(device.type)
    precisions: list[torch.dtype | None] = [None]
    if active:
        precisions.append(torch.get_autocast_dtype(device.type))
    elif torch.float32 in dtypes:
        precisions += [low for low in (torch.bfloat16, torch.float16) if low in dtypes]
    errors: list[Exception] = []
    try:
        for precision, (length, inputs) in itertools.product(precisions, _inputs(head, device, given)):
            run, on = _Run(head, length), precision is not None
            try:
                with torch.autocast(device.type, precision, enabled=on):
                    run.run(forward, inputs)
                return run
            except Exception as error:  # whatever a model's own code raises
                if run.problem is not None:  # goes on without the head's operands, and may not get far
                    return run
                errors.append(error)
    finally:
        torch.clear_autocast_cache()  # of weights cast without a gradient, which older versions go on using
    problem = errors[-1 if active else 0]
    raise CheckFailed(
        f"{name_of(head.model)} raised {name_of(problem)} in the check of its head, which runs it on text alone, as "
        f"input_ids without images, audio or labels: {str(problem).rstrip('. ')}. If it needs more than text, leave "
        "the check out (check=False), and compare with its own logits once"
    ) from problem


def _inputs(head: Head, device: torch.device, given: dict[str, Any] | None) -> list[tuple[int | None, dict[str, Any]]]:
    """What the model is tried with, and on how many tokens; with None as many as it gives, and takes."""
    parameters = inspect.signature(type(head.model).forward).parameters
    types = [name for name in parameters if name.endswith("token_type_ids")]  # some ask for them in training
    found: list[tuple[int | None, dict[str, Any]]] = []
    for length in (_room(head.model), 3):
        tokens = _plain_tokens(head.model, length).to(device)
        found.append((length, {"input_ids": tokens, **head.no_cache()}))
        if types:
            found.append((length, found[-1][1] | dict.fromkeys(types, torch.zeros_like(tokens))))
    return found if given is None else [*found, (None, given | head.no_cache())]


class _Run:
    """A forward of the model, and what was seen in it of T positions of a sequence."""

    def __init__(self, head: Head, length: int | None) -> None:
        self.head, self.layer = head, head.output_layer()
        self.is_cut, self.length = length is None, length or TOKENS
        self.calls: Counter[nn.Module] = Counter()
        self.problem: ValueError | None = None
        self.products: list[Tensor] = []
        self.entries = torch.empty(0, dtype=torch.int64)
        self.vocabulary, self.has_bias = 0, False
        self.dtypes: set[torch.dtype] = set()
        self.between: list[str] = []
        self.expected: Tensor | None = None
        self.arrived: Tensor | None = None
        self.logits: Any = None

    @property
    def rows(self) -> list[int]:
        return sorted({t for t in (0, 1, 2, 5, 40, 64, self.length - 2, self.length - 1) if 0 <= t < self.length})

    def run(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> None:
        cuda = [device for device in {p.device for p in self.head.model.parameters()} if device.type == "cuda"]
        self.on_gpu = bool(cuda)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda, device_type="cuda"))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_layers_in_evaluation(self.head.model, self.layer))
            sources = stack.enter_context(self.head.with_last_hidden(self._probed))
            stack.callback(self.layer.register_forward_hook(self._gave).remove)
            if not self.head.at_output_layer:
                self._watch_between(sources, stack)
            output = forward(**inputs)
        self.logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", None)

    def _probed(self, source: nn.Module, hidden: Tensor) -> Tensor | None:
        """What is put in the place of the last hidden states, and what the head makes of it."""
        self.calls[source] += 1
        if self.is_cut:
            hidden = hidden.reshape(-1, *hidden.shape[-2:])[:1, :TOKENS]
            self.length = hidden.shape[1]
        if hidden.shape[:-1] != (1, self.length):
            self.problem = ValueError(
                f"expected hidden states [1, {self.length}, H] of {self.length} tokens, got {list(hidden.shape)}"
            )
            return None
        try:
            probe = self._probe(hidden)
            found = self.head.operands(probe[0])
        except ValueError as error:
            self.problem = error
            return None
        self.entries = _some_entries(found.weight, ENTRIES)
        self.products = [_products(found, self.rows), _products(found, None, self.entries)]
        self.vocabulary, self.has_bias = found.weight.shape[0], found.bias is not None
        self.dtypes |= {found.hidden.dtype, found.weight.dtype}
        self.expected = probe if (transform := self.head._transform()) is None else transform(probe)
        return probe

    def _probe(self, hidden: Tensor) -> Tensor:
        rows = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
        found = self.head.operands(rows[0, :3])
        products = _products(found._replace(bias=None), None, _some_entries(found.weight, BLOCK))
        size = float(products.square().mean().sqrt()) * abs(self.head.logit_scale) or 1.0
        sizes = rows.new_tensor([1.0, self.head.softcap or _LARGE]).repeat(self.length // 2 + 1)[1 : self.length + 1]
        sizes[0] = 0.0
        return rows * sizes.div(size).unsqueeze(-1)

    def _gave(self, layer: nn.Module, args: Any, output: Tensor) -> None:
        self.dtypes.add(output.dtype)  # the logits' own does not show a rounding before an upcast

    def _watch_between(self, sources: list[nn.Module], stack: ExitStack) -> None:
        def arrives(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.arrived = on_this_rank(args[0])

        def runs(name: str, module: nn.Module, args: Any) -> None:
            if self.calls and self.arrived is None:
                self.between.append(f"{name} ({name_of(module)})")

        stack.callback(self.layer.register_forward_pre_hook(arrives).remove)
        inside = {id(module) for source in [*sources, self.layer] for module in source.modules()}
        for name, module in self.head.model.named_modules():
            if id(module) not in inside and next(module.children(), None) is None:
                stack.callback(module.register_forward_pre_hook(functools.partial(runs, name)).remove)

    def refuse_other_ways(self) -> None:
        """Where logits are not made of the last hidden states of a single call, position by position."""
        head, model = self.head, name_of(self.head.model)
        kind = "output layer" if head.at_output_layer else "base model"
        if self.problem is not None:
            raise CheckFailed(f"{model}: {self.problem}{self._met()}") from self.problem
        if not self.calls:
            raise CheckFailed(f"{model} makes its logits without running its {kind}")
        source, calls = self.calls.most_common(1)[0]
        if calls > 1:
            raise CheckFailed(f"{model} runs its {kind} {calls} times in a forward, expected once: {name_of(source)}")
        expected = [1, self.length, self.vocabulary]
        if not isinstance(self.logits, Tensor) or list(self.logits.shape) != expected:
            found = list(self.logits.shape) if isinstance(self.logits, Tensor) else name_of(self.logits)
            raise CheckFailed(
                f"{model} has {self.vocabulary} rows in its output layer {name_of(self.layer)}, and gives as logits of "
                f"{self.length} tokens {found}, expected {expected}"
            )

    @functools.cached_property
    def own(self) -> list[Tensor]:
        """The model's logits, where `products` has the head's."""
        logits = self.logits[0]
        every_entry, every_position = logits[self.rows], logits[:, self.entries.to(logits.device)]
        return [every_entry.cpu().double(), every_position.cpu().double()]

    def given(self, scale: float, cap: float | None) -> list[Tensor]:
        """The head's logits."""
        scaled = [scale * each for each in self.products]
        return scaled if cap is None else [cap * torch.tanh(each / cap) for each in scaled]

    def agreement(self, scale: float, cap: float | None) -> list[tuple[Tensor, Tensor]]:
        """Which of the logits [T, V] are the same, and which rows [T, 1], but for rounding."""
        unit = max(torch.finfo(dtype).eps / 2 for dtype in self.dtypes | {self.logits.dtype})
        if self.on_gpu:
            unit = max(unit, 2.0**-10)  # products in single precision may be TF32, which cuts off
        return [_agree(ours, own, unit) for ours, own in zip(self.given(scale, cap), self.own, strict=True)]

    def difference(self) -> str:
        """What is not the same, in words."""
        head, model = self.head, self.head.model
        ours, own = self.given(head.logit_scale, head.softcap), self.own
        largest = max(float((a - b).abs().nan_to_num(nan=torch.inf).max()) for a, b in zip(ours, own, strict=True))
        (close, _), (some_close, some_rows) = self.agreement(head.logit_scale, head.softcap)
        entries = (~close).any(0).nonzero().flatten().tolist()
        positions = ((~some_close).any(1) | ~some_rows[:, 0]).nonzero().flatten().tolist()
        where = [_listed(entries, self.vocabulary, "entries"), _listed(positions, self.length, "positions")]
        if not entries:
            where[0] = "by a factor on all entries"
        return (
            f"the head found on {name_of(model)} does not give the model's own logits in "
            f"{'training' if model.training else 'evaluation'}: the largest difference is {largest:.3g}, with logits "
            f"up to {float(own[0].abs().max()):.3g}, {' and '.join(filter(None, where))}. Found: output layer "
            f"{name_of(self.layer)}, logit_scale {head.logit_scale:g}, softcap {head.softcap}, "
            f"{'a bias' if self.has_bias else 'no bias'}, "
            f"{'a dense transform' if head._transform() else 'no dense transform'} before it{self._met()}. The model "
            "does something else to its logits. If that is a factor or a cap, set logit_scale or softcap on "
            "LMHead.from_model(model, check=False) and call check(); otherwise compute the logits and pass them to "
            "sequence_logps"
        )

    def _met(self) -> str:
        """What may be why."""
        met, before = [], []
        if hooks := _named_hooks(self.layer):
            met.append(f"its output layer has {hooks}")
        if hooks := _named_hooks(self.head.model, inside=False):
            met.append(f"the model has {hooks}")
        if self.between:
            dense = self.head._transform() is None and any("Linear" in each for each in self.between)
            kind = ", a dense transform that this package does not know" if dense else ""
            before.append(f"between base model and output layer ran {', '.join(self.between)}{kind}")
        if self.arrived is not None and self.expected is not None:
            before += _changed(self.arrived, self.expected)
        if before:
            before.append("add_fused_lm_head computes the head in the output layer's own place, after all that")
        return "".join(f"; {each}" for each in met + before)


def _agree(ours: Tensor, own: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Which of the logits [T, V] are the same if each was rounded a few times, by `unit` of itself and of the sums that
    it came from; and in which rows [T, 1] they are as a whole: rounding is of both signs, so that a factor shows where
    no entry is out of bounds."""
    same = ~ours.isfinite() & ((ours == own) | (ours.isnan() & own.isnan()))  # -inf: no chance, says the bias
    ours, own = ours.masked_fill(same, 0.0), own.masked_fill(same, 0.0)
    squares = ours.square().sum(-1, keepdim=True)
    size = own.abs() + (squares / ours.shape[-1]).sqrt()
    differences = (ours - own).abs()
    close = differences.isfinite() & (differences <= max(1e-4, 8 * unit) * size + 1e-6)
    factor = (ours * own).sum(-1, keepdim=True) / squares.where(squares > 0, 1.0)
    return close, (squares == 0) | ((factor - 1).abs() <= max(1e-4, 2 * unit))


def _products(found: HeadOperands, rows: list[int] | None, entries: Tensor | None = None) -> Tensor:
    """hidden @ weight.T + bias in fp64 [T, V], for some rows and entries of the vocabulary."""
    hidden = found.hidden if rows is None else found.hidden[rows]
    entries = torch.arange(found.weight.shape[0]) if entries is None else entries
    blocks = []
    for block in entries.to(found.weight.device).split(BLOCK):
        products = _fp64(hidden) @ _fp64(found.weight[block]).T
        blocks.append((products if found.bias is None else products + _fp64(found.bias[block])).cpu())
    return torch.cat(blocks, dim=-1)


def _fp64(values: Tensor) -> Tensor:
    """On their device, if it has that precision."""
    return (values if values.device.type in ("cpu", "cuda") else values.cpu()).double()


def _some_entries(weight: Tensor, count: int) -> Tensor:
    """Of the vocabulary, spread over it, the first and the last among them."""
    return torch.linspace(0, weight.shape[0] - 1, min(weight.shape[0], count)).round().long()


def _input_device(model: Any) -> torch.device:
    try:
        device: torch.device = model.get_input_embeddings().weight.device
    except (AttributeError, NotImplementedError):
        device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: hooks move what comes in


def _room(model: Any) -> int:
    """How many positions the check takes, up to where a scale that depends on them would show."""
    config = model.config.get_text_config()
    known = [value for name in _ROOM if type(value := getattr(config, name, None)) is int and value > 0]
    room = min(known, default=TOKENS + 2)
    padding = getattr(config, "pad_token_id", None)
    if type(padding) is int and 0 <= padding < room - 2:  # RoBERTa counts positions from there
        room -= padding
    return max(3, min(TOKENS, room - 2))


def _plain_tokens(model: Any, length: int) -> Tensor:
    """[1, T] ids that stand for text: no other number that the config gives, some of which stand for images."""
    special = set(numbers_of(model.config.to_dict()))
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 3
    plain = list(itertools.islice((each for each in range(vocabulary) if each not in special), 8))
    return torch.tensor(list(itertools.islice(itertools.cycle(plain or [0]), length))).unsqueeze(0)


def numbers_of(config: Any) -> Iterator[int]:
    if isinstance(config, dict | list | tuple):
        for each in config.values() if isinstance(config, dict) else config:
            yield from numbers_of(each)
    elif type(config) is int:
        yield config


@contextmanager
def _layers_in_evaluation(model: Any, output_layer: nn.Module) -> Iterator[None]:
    """Evaluation mode for what has no part in the head, or is random by design: the layers of towers, statistics of
    batches, and adapters on the output layer. Then for each module the mode that it had."""
    base = getattr(model, "base_model", model)
    towers = [base] if isinstance(base, nn.Module) and base is not model else list(model.children())
    lists = [each for tower in towers for each in tower.modules() if isinstance(each, nn.ModuleList)]
    still = [each for found in lists for each in found.modules() if each is not output_layer]
    still += [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    if class_of(output_layer).__module__.startswith("peft."):
        still += output_layer.modules()
    modes = [(module, module.training) for module in still]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _listed(found: list[int], of: int, what: str) -> str:
    if not found:
        return ""
    if len(found) == of:
        return f"at all {what}"
    if found[-1] - found[0] + 1 == len(found):
        first = f"{found[0]} to {found[-1]}" if len(found) > 1 else f"{found[0]}"
    else:
        first = f"{found[0]}, {found[1]}, ..."
    return f"at {len(found)} of {of} {what}, {first}"


def _changed(arrived: Tensor, expected: Tensor) -> list[str]:
    """How what reaches the output layer is not what left the base model."""
    if arrived.shape != expected.shape:
        return [f"what reaches the output layer is {list(arrived.shape)}, and not {list(expected.shape)}"]
    arrived, expected = arrived.double(), expected.double()
    if torch.allclose(arrived, expected, rtol=2e-2, atol=1e-6):
        return []
    zeros = float(((arrived == 0) & (expected != 0)).double().mean())
    why = f": {zeros:.0%} of it is 0, as after dropout" if zeros > 0.01 else ""
    return [f"what reaches the output layer is not what left the base model{why}"]


def _named_hooks(module: nn.Module, *, inside: bool = True) -> str:
    """The hooks of others than libraries, in words; "" if there are none."""
    kinds: dict[str, list[str]] = {"forward pre-hook": [], "forward hook": []}
    for each in module.modules() if inside else [module]:
        for kind, hooks in zip(kinds, (each._forward_pre_hooks, each._forward_hooks), strict=True):
            kinds[kind] += [_named(without_partial(hook)) for hook in hooks.values() if not is_of_a_library(hook)]
    return " and ".join(f"the {kind} {', '.join(names)}" for kind, names in kinds.items() if names)


def _named(function: Any) -> str:
    name = getattr(function, "__qualname__", name_of(function)).rpartition("<locals>.")[2]
    code = getattr(function, "__code__", None)
    return name if code is None else f"{name} ({Path(code.co_filename).name}, line {code.co_firstlineno})"
