"""Record what a model computes, operation by operation, beneath its Python code.

A torch dispatch mode sees every ATen operation that a forward pass runs, whether it was written as a module, a function
or a method, reused or in place. So nothing that depends on the input can be overlooked as a symbolic trace would.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from lvlmva_core.attribution.axes import FIRST, SampleAxis
from lvlmva_core.compute import attention_as_its_parts, eval_mode
from lvlmva_core.errors import InputError


class UnsupportedOperationError(InputError):
    """A model does something for which no exact attribution rule is known; the message names it and its place."""


class Value(NamedTuple):
    """A tensor that depends on the input: output `slot` of node `node` (node -1 is the input itself)."""

    node: int
    slot: int


INPUT = Value(-1, 0)


@dataclass(eq=False)
class Node:
    """One operation of a forward pass of n samples; an axis of every tensor that depends on the input holds these."""

    op: OpOverload  # always the variant that is not in place
    args: tuple[Any, ...]  # values in the place of tensors that depend on the input
    kwargs: dict[str, Any]
    inputs: tuple[Value, ...]
    input_shapes: tuple[torch.Size, ...]
    input_axes: tuple[SampleAxis, ...]
    output_shapes: tuple[torch.Size | None, ...]
    place: str
    axis: SampleAxis = FIRST  # of every output
    saved: list[Tensor] = field(default_factory=list)

    @property
    def output_shape(self) -> torch.Size:
        """Shape of the first output, which is a tensor in every operation that has a rule."""
        return self.output_shapes[0] or torch.Size()


@dataclass(eq=False)
class Tape:
    """A forward pass: its nodes in order, its output (n, K), and which value the output is.

    samples: that ran; of these the first n, the inputs, are wanted.
    """

    samples: int
    inputs: Tensor
    nodes: list[Node]
    output: Tensor
    result: Value

    @property
    def axes(self) -> list[SampleAxis]:
        """Where the samples stand in what each node gives."""
        return [node.axis for node in self.nodes]


class Keep(Enum):
    """What of an operation is kept of a forward pass for its backward step."""

    NOTHING = "nothing"
    INPUTS = "inputs"
    FACTORS = "inputs, where two of them depend on the model's input"
    ALL = "inputs and outputs"


class Rule(NamedTuple):
    """How one operation is attributed: what is kept of a forward pass, where samples go, and the backward step.

    follow: tells from a node and the number of samples where these stand in the outputs; raises
        UnsupportedOperationError where the operation works across samples, or has no rule in this use.
    one_output: only the first output counts; the others are statistics that models do not use.
    identity: the operation moves memory at most (PyTorch does so as the batch size demands), and is not recorded.
    """

    keep: "Keep | Callable[[Node], Keep]"
    follow: Callable[[Node, int], SampleAxis]
    backward: Callable[..., Any]
    one_output: bool = False
    identity: bool = False


def record(
    model: nn.Module,
    inputs: Tensor,
    rules: Mapping[OpOverload, Rule],
    constant_ops: frozenset[Any],
    axes: Sequence[SampleAxis] | None = None,
) -> Tape:
    """Run `model` in eval mode on `inputs` and record every operation that depends on them.

    The model is left as it was found: no parameter, buffer, gradient, hook or mode is changed. The forward runs with
    gradients enabled so that PyTorch takes its differentiable, decomposed paths (fused attention would hide its
    products) and refuses detours through numpy, but nothing is saved for an autograd backward. For the same reason
    the fast path of torch's own attention layers is off.

    Args:
        inputs: (n, ...) floating point, not written to.
        axes: of another tape of the model, for the case of one sample, whose place shapes do not tell: after
            (4, 1, 5) -> (4, 5) more of them might make more rows or more columns. Without it, one sample runs twice.

    Raises:
        UnsupportedOperationError: an operation has no rule, or mixes samples.
    """
    run = inputs if len(inputs) > 1 or axes is not None else torch.cat([inputs, inputs])
    recorder = _Recorder(model, len(run), rules, constant_ops, axes)
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(inputs.device.type, enabled=False))
        stack.enter_context(attention_as_its_parts())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_drop, _never_needed))
        # a clone that is no leaf, so that a model may work on its input in place
        start = run.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        start = torch.ops.aten.alias(start)
        recorder.values[start] = INPUT
        stack.enter_context(recorder)
        output = model(start)
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(run):
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"the model returned {found} for {len(run)} samples, expected logits (n, K); wrap it")
    if output not in recorder.values:
        raise UnsupportedOperationError(
            "the model's output does not depend on its input through operations that can be followed; "
            "return logits computed by torch operations on the input"
        )
    result = recorder.values[output]
    if recorder.axes[result] != FIRST:
        raise UnsupportedOperationError("the model's output does not hold the samples in its first dimension alone")
    return Tape(len(run), inputs, recorder.nodes, output.detach()[: len(inputs)], result)


class _Recorder(TorchDispatchMode):
    def __init__(
        self,
        model: nn.Module,
        samples: int,
        rules: Mapping[OpOverload, Rule],
        constant_ops: frozenset[Any],
        known_axes: Sequence[SampleAxis] | None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = samples
        self.known_axes = known_axes
        self.axes: dict[Value, SampleAxis] = {INPUT: FIRST}
        self.rules = rules
        self.constant_ops = constant_ops
        self.nodes: list[Node] = []
        self.values: Any = WeakTensorKeyDictionary()
        self._stale: Any = WeakTensorKeyDictionary()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
        self._kept: dict[int, list[tuple[Node, int]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # else PyTorch wraps each call below in its compiler's switch, which takes seconds to import and slows each call
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # ATen's arguments nest no deeper than a list of tensors
        followed = [leaf for each in (*args, *kwargs.values()) for leaf in _leaves(each) if self._follows(leaf)]
        if not followed:
            self._refuse_writing_to_the_model(func, args)
            return func(*args, **kwargs)
        if func in self.constant_ops:
            return func(*args, **kwargs)
        functional, in_place = _out_of_place(func)
        rule = self.rules.get(functional)
        place = _place(self._names)
        if func in _READS_A_VALUE:
            raise UnsupportedOperationError(
                f"{place}: {_readable(func)} reads a value that depends on the input, as a condition does; "
                "attribution needs a model that computes the same for every input"
            )
        if rule is None or (func._schema.is_mutable and not in_place):
            raise UnsupportedOperationError(f"{place}: no attribution rule for {_readable(func)}; {_ADVICE}")
        for tensor in followed:
            if tensor in self._stale:
                raise UnsupportedOperationError(
                    f"{place}: {_readable(func)} reads a tensor whose memory was changed in place through another "
                    f"view; use the operation that is not in place"
                )
        if in_place and not self._follows(args[0]):
            raise UnsupportedOperationError(
                f"{place}: {_readable(func)} writes what depends on the input into a tensor that does not; "
                "build the result with torch.cat, torch.stack or torch.where instead"
            )
        inputs = tuple(self.values[tensor] for tensor in followed)
        node = Node(
            functional,
            tuple(self._with_values(each) for each in args),
            {name: self._with_values(each) for name, each in kwargs.items()},
            inputs,
            tuple(tensor.shape for tensor in followed),
            tuple(self.axes[value] for value in inputs),
            (),
            place,
        )
        keep = rule.keep if isinstance(rule.keep, Keep) else rule.keep(node)
        if keep in (Keep.INPUTS, Keep.ALL) or (keep is Keep.FACTORS and len(followed) > 1):
            self._keep(node, followed)
        if rule.identity:
            out = func(*args, **kwargs)
            if out.shape != followed[0].shape:
                raise refuse(node, "changes the shape")
            if functional is torch.ops.aten.as_strided.default and out.stride() != followed[0].stride():
                raise refuse(node, "reads the elements in another order; use permute or transpose")
            self.values[args[0] if in_place else out] = self.values[followed[0]]
            return out
        if in_place:
            self._unshare(args[0])
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, list | tuple) else (out,)
        if rule.one_output:
            outputs = outputs[:1]
        node.output_shapes = tuple(o.shape if isinstance(o, Tensor) else None for o in outputs)
        node.axis = self._axis(node, rule)
        if keep is Keep.ALL:
            self._keep(node, [o for o in outputs if isinstance(o, Tensor)])
        self.nodes.append(node)
        for index, tensor in enumerate(outputs):
            if isinstance(tensor, Tensor):
                value = Value(len(self.nodes) - 1, index)
                self.values[args[0] if in_place else tensor] = value
                self.axes[value] = node.axis
        return out

    def _refuse_writing_to_the_model(self, func: Any, args: Any) -> None:
        if func._schema.is_mutable and any(
            isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in self._own for leaf in args[:1]
        ):
            raise UnsupportedOperationError(
                f"{_place(self._names)}: {_readable(func)} changes a parameter or buffer of the model in its forward, "
                "so that the model would not come back as it was; make the forward free of such effects in eval mode"
            )

    def _follows(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf in self.values

    def _with_values(self, argument: Any) -> Any:
        if isinstance(argument, list | tuple):
            return [self._with_values(leaf) for leaf in argument]
        return self.values[argument] if self._follows(argument) else argument

    def _keep(self, node: Node, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            kept = tensor.detach()
            self._kept.setdefault(kept.untyped_storage().data_ptr(), []).append((node, len(node.saved)))
            node.saved.append(kept)

    def _unshare(self, tensor: Tensor) -> None:
        """Before `tensor` changes in place: copy what was kept of its memory, and mark its other views."""
        address = tensor.untyped_storage().data_ptr()
        for node, slot in self._kept.pop(address, []):
            node.saved[slot] = node.saved[slot].clone(memory_format=torch.preserve_format)
        for other in list(self.values):
            if other is not tensor and other.untyped_storage().data_ptr() == address:
                self._stale[other] = True

    def _axis(self, node: Node, rule: Rule) -> SampleAxis:
        if any(shape is not None and 0 in shape for shape in node.output_shapes):
            raise refuse(node, "gives an empty tensor")
        if self.known_axes is None or self.samples > 1:
            axis = rule.follow(node, self.samples)
        elif len(self.nodes) < len(self.known_axes):
            axis = self.known_axes[len(self.nodes)]
        else:
            raise refuse(node, "runs for one sample, but not for several")
        if not all(shape is None or axis.fits(shape, self.samples) for shape in node.output_shapes):
            raise refuse(node, "gives a tensor that does not keep the samples apart")
        return axis


def _leaves(argument: Any) -> Any:
    return argument if isinstance(argument, list | tuple) else (argument,)


_READS_A_VALUE = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default})

_ADVICE = "replace it by a supported operation (docs/attribution.md lists them) or choose another attribute.method"


def refuse(node: Node, why: str) -> UnsupportedOperationError:
    """The error for a recorded operation that is known, but not in this use."""
    return UnsupportedOperationError(f"{node.place}: {_readable(node.op)} {why}; {_ADVICE}")


def _readable(func: Any) -> str:
    return str(func).removesuffix(".default")


def _out_of_place(func: Any) -> tuple[OpOverload, bool]:
    """The variant of an operation that is not in place, and whether `func` was in place."""
    schema_name = func._schema.name
    if not (func._schema.is_mutable and schema_name.endswith("_") and not schema_name.endswith("__")):
        return func, False
    namespace, _, name = schema_name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    overload = getattr(packet, func._overloadname, None) if packet is not None else None
    return (overload, True) if overload is not None else (func, False)


def _place(names: dict[int, str]) -> str:
    """Where in the model the call that is running stands: the innermost module of it, and the line of code."""
    module = line = None
    frame = sys._getframe(2)
    while frame is not None and (module is None or line is None):
        owner = frame.f_locals.get("self")
        if module is None and isinstance(owner, nn.Module) and id(owner) in names:
            module = f"{names[id(owner)] or 'the model'} ({type(owner).__name__})"
        file = frame.f_code.co_filename
        if line is None and "/torch/" not in file and "/attribution/" not in file and not file.startswith("<frozen"):
            line = f"{file.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ", ".join(part for part in (module, line) if part) or "the model"


def _drop(tensor: Tensor) -> None:
    return None


def _never_needed(packed: None) -> Tensor:
    raise RuntimeError("the model calls backward inside its forward, which attribution does not support")
