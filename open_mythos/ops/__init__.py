"""Tensor functions without parameters; each fast path stands beside its plain twin."""
