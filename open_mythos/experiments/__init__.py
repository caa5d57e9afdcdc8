"""Claims of the field as experiments: ``open-mythos reproduce CLAIM``.

A claim is a folder here and a line in ``table.py``. The folder is a module that offers what
:class:`open_mythos.experiments.claim.Experiment` lists: the words, the cells, how one cell is run,
and how the verdict follows from all of them. Running, resuming, recording and reporting are common
to all claims.
"""
