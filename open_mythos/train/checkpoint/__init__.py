"""Checkpoints of a training run: content, atomic writing, verification, loading."""
