"""Triton kernels, a file each; one is imported when it first serves a call, never before."""
