"""Attention: over keys and values of heads, and over latents; what a query may see."""
