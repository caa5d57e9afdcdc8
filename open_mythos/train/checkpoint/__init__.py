"""Checkpoints: what they hold, how they are written so that one is always whole, the way back."""
