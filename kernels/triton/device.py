"""Kernels run on the device of what they are given, whichever is current."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """A launcher whose kernels run on the device of its first argument."""

    @wraps(launch)
    def run(first: Tensor, /, *args: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launch(first, *args, **named)

    return run
