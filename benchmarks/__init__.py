"""Speed of the fast paths against their plain twins, behind a correctness gate.

``python -m benchmarks`` runs everything; no figure is taken before fast and plain agree.
"""
