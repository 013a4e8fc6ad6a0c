"""Triton's interpreter cuts fp32 off to bf16, and multiplies the bits of bf16 as integers: corrected here."""

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

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
