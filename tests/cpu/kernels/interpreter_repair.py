"""Test-only repair of Triton's interpreter (3.6): numpy 2.4 loop bounds, and bfloat16.

The stock interpreter keeps bfloat16 as its bit pattern in uint16 and computes on the patterns, without an error.
Here casts round to nearest even, dots are exact products summed in float32, and any other bfloat16 arithmetic raises:
a kernel has to convert what it loads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


class Bf16ArithmeticError(AssertionError):
    pass


def _to_float32(data: np.ndarray) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(data: np.ndarray) -> np.ndarray:
    rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16)


def _is_bf16(*handles: Any) -> bool:
    return any(h.dtype.scalar == tl.bfloat16 for h in handles)


def apply() -> None:
    """Patch the interpreter of this process; TRITON_INTERPRET=1 must have been set before triton was imported."""
    builder = interpreter.InterpreterBuilder
    stock_cast, stock_fp_to_fp, stock_dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    stock_binary, stock_unary, stock_ternary = builder.binary_op, builder.unary_op, builder.ternary_op
    stock_check, stock_patch = interpreter.ReduceScanOpInterface.check_tensor, interpreter._patch_lang_tensor

    def cast(self: Any, src: Any, dst_type: Any, stock: Any, *rest: Any) -> Any:
        old, new = src.dtype.scalar, dst_type.scalar
        if tl.bfloat16 not in (old, new) or old == new:
            return stock(self, src, dst_type, *rest)
        if old == tl.bfloat16:
            widened = interpreter.TensorHandle(_to_float32(src.data), tl.float32)
            return widened if new == tl.float32 else stock_cast(self, widened, dst_type)
        return interpreter.TensorHandle(_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    def refuse(stock: Any, first: int, last: int) -> Any:
        def op(self: Any, *args: Any) -> Any:
            if _is_bf16(*args[first:last]) and args[-1] is not np.where:
                raise Bf16ArithmeticError("arithmetic on bfloat16; convert to float32 when loading")
            return stock(self, *args)

        return op

    def dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        a, b = (interpreter.TensorHandle(_to_float32(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return stock_dot(self, a, b, d, *rest)

    def check(self: Any, inputs: Any) -> None:
        stock_check(self, inputs)
        if any(x.dtype.scalar == tl.bfloat16 for x in inputs):
            raise Bf16ArithmeticError("reduction or scan of bfloat16; convert to float32 first")

    def patch_tensor(tensor: Any, scope: Any) -> None:
        stock_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl = lambda self, src, dst: cast(self, src, dst, stock_cast)
    builder.create_fp_to_fp = lambda self, src, dst, mode: cast(self, src, dst, stock_fp_to_fp, mode)
    builder.create_dot = dot
    builder.binary_op, builder.unary_op = refuse(stock_binary, 0, 2), refuse(stock_unary, 0, 1)
    builder.ternary_op = refuse(stock_ternary, 0, 3)
    interpreter.ReduceScanOpInterface.check_tensor = check
    interpreter._patch_lang_tensor = patch_tensor
