"""Matrix products of consecutive groups of rows, each group with a matrix of its own, in plain torch.

Knows nothing of tokens, routing or devices' number: rows come sorted by group, `counts` says how many each has.
Runs in every dtype, float64 included, allocates exact rows (the library's `grouped_mm` leaves rows beyond the last
offset uninitialised) and asks for no alignment.

Dims: N rows, M groups, I inputs, O outputs.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moesaic.kernels.backend import Backend
from moesaic.kernels.library import library_outer, library_product, library_serves


def grouped_product(
    rows: Float[Tensor, "N I"],
    weights: Float[Tensor, "M O I"],
    counts: Int[Tensor, " M"],
    backend: Backend = "auto",
) -> Float[Tensor, "N O"]:
    """Multiply the first `counts[0]` rows by `weights[0].T`, the next `counts[1]` by `weights[1].T`, and so on.

    `counts` must sum to N; a group may be empty. Rows and weights share one dtype.
    """
    out = rows.new_empty(rows.shape[0], weights.shape[1])
    if library_serves(counts, rows, weights):
        return library_product(rows.contiguous(), weights.transpose(1, 2), counts, backend)
    sizes = counts.tolist()  # on an accelerator the host waits here
    for size, part, matrix, into in zip(
        sizes, rows.split(sizes), weights.transpose(1, 2).unbind(), out.split(sizes), strict=True
    ):
        if size:
            torch.mm(part, matrix, out=into)
    return out


def grouped_outer(
    left: Float[Tensor, "N O"],
    right: Float[Tensor, "N I"],
    counts: Int[Tensor, " M"],
    backend: Backend = "auto",
) -> Float[Tensor, "M O I"]:
    """Per group, the transposed left rows times the right rows; zero where a group is empty."""
    out = left.new_empty(counts.shape[0], left.shape[1], right.shape[1])
    if library_serves(counts, left, right):
        return library_outer(left.contiguous(), right.contiguous(), counts, backend)
    sizes = counts.tolist()  # on an accelerator the host waits here
    for size, one, other, into in zip(
        sizes, left.split(sizes), right.split(sizes), out.unbind(), strict=True
    ):
        if size:
            torch.mm(one.T, other, out=into)
        else:
            into.zero_()
    return out
