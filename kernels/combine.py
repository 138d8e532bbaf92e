"""Add weighted rows back to tokens, in plain torch.

Sums run in a fixed order, without atomics, in fp32 or better, so equal inputs give equal bits on every device. Rows of
a token are found through CSR offsets; where every token has the same number of rows a reshape replaces them.

Dims: T tokens, R rows, D width, K rows per token.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which values of `dtype` are summed: fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def sum_rows(
    rows: Float[Tensor, "R D"],
    where: Int[Tensor, " R"],
    offsets: Int[Tensor, " T1"],
    weights: Float[Tensor, " R"] | None = None,
    *,
    per_token: int | None = None,
) -> Float[Tensor, "T D"]:
    """`y[t] = sum of weights[a] * rows[where[a]]` over the assignments a in `offsets[t]:offsets[t + 1]`.

    `weights` and `where` follow the assignments, which are sorted by token. Tokens without assignments get zeros.
    """
    total = accumulation_dtype(rows.dtype)
    if per_token is not None:
        picks = where.unflatten(0, (-1, per_token)).unbind(1)  # K of (T,)
        out = rows.index_select(0, picks[0]).to(total)
        if weights is None:
            for pick in picks[1:]:
                out.add_(rows.index_select(0, pick))
            return out.to(rows.dtype)
        scales = weights.to(total).unflatten(0, (-1, per_token)).unsqueeze(-1).unbind(1)  # K of (T, 1)
        out.mul_(scales[0])
        for pick, scale in zip(picks[1:], scales[1:], strict=True):
            out.addcmul_(rows.index_select(0, pick), scale)
        return out.to(rows.dtype)
    picked = rows.index_select(0, where).to(total)
    if weights is not None:
        picked = picked * weights.to(total)[:, None]
    # initial=0 also fills tokens without rows
    return torch.segment_reduce(picked, "sum", offsets=offsets, axis=0, initial=0).to(rows.dtype)
