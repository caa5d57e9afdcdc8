"""Families of public looped models: what their configurations mean, and where their tensors go."""
