"""Speed of the fast paths against their reference implementations, dense models and the roofline.

``python -m benchmarks`` runs every suite; nothing is timed before fast path and reference agree.
``python -m benchmarks.report`` makes docs/speed.md and its plots from what was measured.
"""
