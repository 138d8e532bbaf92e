"""Whole numbers in proportion to weights, each row with a sum and a bound on its entries: numpy only.

Dims: S rows, E entries of a row.
"""

import numpy as np
from jaxtyping import Int64, Shaped


def apportion(
    weights: Shaped[np.ndarray, "S E"], totals: Int64[np.ndarray, " S"], most: Shaped[np.ndarray, "..."]
) -> Int64[np.ndarray, "S E"]:
    """Rows that sum to `totals`, in proportion to `weights`, but with no entry above `most`, broadcast to (S, E).

    What is cut off goes to the other entries in proportion to theirs, and to all alike where none of them has weight.
    Fractions are rounded by the largest remainder (Hamilton's method); of equals the first entry is rounded up. Where
    weights are whole, below 2^26 and have the right sums and bounds, the result is the weights. Raises ValueError where
    a total does not fit.
    """
    weights = np.asarray(weights, np.float64)
    most = np.broadcast_to(np.asarray(most, np.int64), weights.shape)
    if (totals > most.sum(1)).any() or (totals < 0).any():
        row = int(np.argmax((totals > most.sum(1)) | (totals < 0)))
        raise ValueError(f"row {row}: {totals[row]} do not fit into entries of up to {most[row].max()}")
    free = np.ones(weights.shape, bool)
    while True:  # every turn bounds at least one entry more
        rest = totals - (most * ~free).sum(1)
        shares = weights * free
        shares = np.where(shares.sum(1, keepdims=True) > 0, shares, free)
        scaled = shares * rest[:, None] / np.maximum(shares.sum(1, keepdims=True), np.finfo(float).tiny)
        quotas = np.where(free, scaled, most)
        over = free & (quotas > most)
        if not over.any():
            break
        free &= ~over
    whole = np.floor(quotas).astype(np.int64)
    fractions = np.where(free & (whole < most), quotas - whole, -1.0)
    places = np.empty(weights.shape, np.int64)
    np.put_along_axis(places, np.argsort(-fractions, 1, kind="stable"), np.arange(weights.shape[1])[None], 1)
    return whole + (places < (totals - whole.sum(1))[:, None])
