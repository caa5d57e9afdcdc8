"""Speed of the fast paths against their plain twins, dense models and what the machine allows.

``python -m benchmarks`` runs every suite; no figure is taken before fast and plain agree.
``python -m benchmarks.report`` makes docs/speed.md and its plots from what was measured.
"""
