"""Claims of the field as experiments: ``python -m experiments run CLAIM``.

A claim is a folder here and a line in ``table.py``. The folder is a module that offers what
:class:`experiments.claim.Experiment` lists: the words, the cells, how one cell is run,
and how the verdict follows from all of them. Running, resuming, recording and reporting are common
to all claims.
"""
