"""Synthetic tasks: rows drawn fresh for every step, a pure function of the step."""
