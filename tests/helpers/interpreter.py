"""Triton's interpreter cuts fp32 off to bf16, multiplies the bits of bf16 as integers, and rounds twice in a
multiply-add: corrected here. And it puts its own functions in the place of all the language's at each call in a kernel,
not at its start alone. Beside that, most of its time went into types that it made anew for each value, and into asking
for those of operands that are alike.
"""

import operator

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def correct() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            return widened(src)
        return cast(self, src, dst_type)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    def create_fma(self, x, y, z):
        wide = [
            operand.data.astype(np.longdouble if operand.data.dtype == np.float64 else np.float64)
            for operand in (x, y, z)
        ]
        return handle((wide[0] * wide[1] + wide[2]).astype(z.data.dtype), z.dtype.scalar)

    builder.cast_impl, builder.create_dot, builder.create_fma = cast_impl, create_dot, create_fma

    def call(self, *args, **kwargs):
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    keep_types()
    skip_promotion()


def keep_types() -> None:
    """What is the same for all values of a type is made once, and what has one shape is not brought to one."""
    init_block, init_tensor = tl.block_type.__init__, tl.tensor.__init__
    broadcast, np_dtype = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
    blocks, of_sizes, np_dtypes = {}, {}, {}

    def init_block_once(self, element_ty, shape):
        sizes = tuple(size.value if isinstance(size, tl.constexpr) else size for size in shape)
        key = element_ty.name, sizes
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = {**vars(self), "sizes": sizes}
        vars(self).update(blocks[key], element_ty=element_ty)

    def init_tensor_once(self, handle, type):
        sizes = getattr(type, "sizes", ())
        if sizes not in of_sizes:
            init_tensor(self, handle, type)
            of_sizes[sizes] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(of_sizes[sizes], handle=handle, type=type, dtype=type.scalar)

    def broadcast_others(self, lhs, rhs):
        of_one_shape = getattr(lhs.type, "sizes", ()) == getattr(rhs.type, "sizes", ())
        return (lhs, rhs) if of_one_shape else broadcast(self, lhs, rhs)

    def np_dtype_once(of):
        name = of.scalar.name
        if name not in np_dtypes:
            np_dtypes[name] = np_dtype(of)
        return np_dtypes[name]

    tl.block_type.__init__, tl.tensor.__init__ = init_block_once, init_tensor_once
    TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype = broadcast_others, np_dtype_once


def skip_promotion() -> None:
    """Operators of what NumPy promotes and broadcasts as Triton does: numbers of one type, or of one and a number of
    Python's, integers, and pointers."""
    handle, tensor, semantic = interpreter.TensorHandle, tl.tensor, interpreter.interpreter_semantic
    floating, integers, blocks = ("fp32", "fp64"), ("int32", "int64"), {}
    checked, of_tuple = TritonSemantic.binary_op_type_checking_impl, tl.tensor.__getitem__

    def typed(data, scalar, is_block):
        if not is_block:
            return tensor(handle(data, scalar), scalar)
        key = scalar.name, data.shape
        if key not in blocks:
            blocks[key] = tl.block_type(scalar, list(data.shape))
        return tensor(handle(data, scalar), blocks[key])

    def replace(name, numpys, kinds, compares=False):
        original = getattr(tensor, name)

        def method(self, other):
            other = other.value if isinstance(other, tl.constexpr) else other
            a, scalar, kind, is_block = self.handle.data, self.dtype, self.dtype.name, self.type.is_block()
            if isinstance(other, tensor):
                b, theirs, is_block = other.handle.data, other.dtype.name, is_block or other.type.is_block()
                alike = theirs == kind or kind in integers and theirs in integers
                scalar = other.dtype if theirs == "int64" else scalar
            else:
                b, alike = other, type(other) is int or type(other) is float and kind in floating
            if kind not in kinds or not alike:
                return original(self, other, _semantic=semantic)
            return typed(numpys(a, b), tl.int1 if compares else scalar, is_block)

        setattr(tensor, name, method)

    def add_to(numbers):
        def method(self, offset):
            scalar = self.dtype
            if not scalar.is_ptr() or not isinstance(offset, tensor) or offset.dtype.name not in integers:
                return numbers(self, offset)
            size = max(1, scalar.element_ty.primitive_bitwidth // 8)
            data = self.handle.data + size * offset.handle.data.astype(np.uint64)
            return typed(data, scalar, self.type.is_block() or offset.type.is_block())

        return method

    def binary_op_type_checking(self, lhs, rhs, *options, **more):
        if isinstance(lhs, tensor) and isinstance(rhs, tensor) and lhs.dtype.name == rhs.dtype.name in numbers:
            return self.broadcast_impl_value(lhs, rhs)
        return checked(self, lhs, rhs, *options, **more)

    def getitem(self, at):
        plain = type(at) is tuple and all(each is None or each == slice(None) for each in at)
        if plain and self.type.is_block():
            return typed(self.handle.data[at], self.dtype, True)
        return of_tuple(self, at, _semantic=semantic)

    numbers = floating + integers
    for name, numpys in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        replace(f"__{name}__", numpys, numbers)
        replace(f"__r{name}__", lambda a, b, numpys=numpys: numpys(b, a), numbers)
    replace("__truediv__", np.divide, floating)
    replace("__rtruediv__", lambda a, b: np.divide(b, a), floating)
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        replace(f"__{name}__", getattr(operator, name), numbers, compares=True)
    replace("__and__", np.bitwise_and, ("int1",))
    replace("__or__", np.bitwise_or, ("int1",))
    tensor.__add__, tensor.__getitem__ = add_to(tensor.__add__), getitem
    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking
