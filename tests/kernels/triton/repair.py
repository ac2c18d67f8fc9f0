"""What Triton's interpreter gets wrong about bf16, put right for tests.

The interpreter keeps bf16 as its 16 raw bits. It multiplies those bits as integers in ``tl.dot``
and cuts them off in fp32 -> bf16, where a GPU multiplies in fp32 and rounds to nearest even.
Elementwise arithmetic on bf16 stays wrong: kernels convert to fp32 first, and must on a GPU too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """fp32 from the bits of bf16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.reshape(values.shape))


def install() -> None:
    """Repair the interpreter of this process."""
    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(widen(handle.data), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, wide(a), wide(b), d, *rest)

    def convert_float(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return round_to_bf16(values)
        return convert(values, source, target, mode)

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
