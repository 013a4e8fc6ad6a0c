"""Triton's interpreter cuts fp32 off to bf16, multiplies the bits of bf16 as integers, and rounds twice in a
multiply-add: corrected here. And it puts its own functions in the place of all the language's at each call in a kernel,
not at its start alone."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def correct() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
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
