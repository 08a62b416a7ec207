"""Triton kernels of the row work: the only place of this repository that imports triton."""
