"""Triton kernels of the operators: the only place of this repository that imports triton."""
