"""Stateless tensor ops; each fast path has a reference implementation."""
