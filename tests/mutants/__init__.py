"""One-place changes of the code that a named test must notice: ``python -m mutants``."""
