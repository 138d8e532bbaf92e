"""What the files beside this one ship: kernels with the constants that they are compiled with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on tensors of the CPU. It multiplies the bits of bf16 as integers, so
kernels take a constant UPCAST and then compute products in fp32."""


@dataclass(frozen=True)
class Variant:
    """One kernel, one set of constants: what an ahead-of-time compiler needs, and what the launcher passes."""

    name: str
    kernel: Any
    """A function under `triton.jit`."""
    signature: Mapping[str, str]
    """Type of every argument that is not constant, in order: `*bf16`, `*fp32`, `*i64`, `i32`, ..."""
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 3
    aligned: frozenset[str] = field(default_factory=frozenset)
    """Scalars that are multiples of 16; pointers always are."""
    matrix: bool = False
    """Whether tensor cores must appear in the machine code."""
    targets: tuple[str, ...] = ()
    """The targets of bench/triton_table.py that the launcher uses it on; none named: all."""
