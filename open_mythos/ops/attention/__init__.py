"""Attention over keys and values, over latents, and masks."""
