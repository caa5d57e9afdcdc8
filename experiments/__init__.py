"""Published claims as experiments: ``python -m experiments run CLAIM``.

Each claim is a package here, registered in ``table.py``, that exports the interface of
:class:`experiments.claim.Experiment`: its description, its cells, how to run one cell, and how to
derive the verdict. Running, resuming, recording and reporting are shared.
"""
