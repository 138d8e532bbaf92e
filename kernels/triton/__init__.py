"""Triton kernels, one file per op. Nothing outside imports them before a tensor is on a GPU: triton is optional."""
