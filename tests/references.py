"""Plain code that tests compare with: one token at a time, no sorting, no tricks."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels import native
from moesaic.moe import MoE, Routing, TopKRouter


def expert_by_hand(kind: str, w1: Tensor, w2: Tensor, x: Tensor) -> Tensor:
    """One vector through one expert: w1 (G, F, D), w2 (D, F), x (D,)."""
    if kind == "swiglu":
        return w2 @ (F.silu(w1[0] @ x) * (w1[1] @ x))
    if kind == "gelu":
        return w2 @ F.gelu(w1[0] @ x)
    return w2 @ F.relu(w1[0] @ x) ** 2


def moe_by_tokens(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """The layer as a loop over tokens and their assignments."""
    assert moe.bank is not None
    rows = []
    for token in range(x.shape[0]):
        y = torch.zeros_like(x[token])
        for assignment in range(routing.tokens.shape[0]):
            if int(routing.tokens[assignment]) == token:
                expert = int(routing.experts[assignment])
                w1, w2 = moe.bank.w1[expert], moe.bank.w2[expert]
                y = y + routing.weights[assignment] * expert_by_hand(moe.config.expert, w1, w2, x[token])
        if moe.shared is not None:
            y = y + expert_by_hand(moe.config.expert, moe.shared.w1, moe.shared.w2, x[token])
        rows.append(y)
    return torch.stack(rows) if rows else x


def largest_error(got: Tensor, want: Tensor) -> float:
    """max|a - b| / max|b|."""
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-300)) if want.numel() else 0.0


def engines() -> list:
    """Parameters backend and device: plain torch, C++, Triton in its interpreter, and on a GPU."""
    compiled = pytest.mark.skipif(not native.serves(torch.ones(1)), reason=native.status())
    interpreted = pytest.mark.skipif(
        find_spec("triton") is None or torch.cuda.is_available(),
        reason="needs triton, interprets without a GPU",
    )
    return [
        pytest.param("torch", "cpu", id="torch"),
        pytest.param("auto", "cpu", id="cpp", marks=compiled),
        pytest.param("triton", "cpu", id="interpreter", marks=interpreted),
        pytest.param("triton", "cuda", id="gpu", marks=pytest.mark.gpu),
    ]


def bias_of(moe: MoE) -> Tensor:
    """The selection bias of a layer whose router has one."""
    assert isinstance(moe.router, TopKRouter)
    return moe.router.bias
