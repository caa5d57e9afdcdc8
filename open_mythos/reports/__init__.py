"""HTML pages: the report of a training run, and the trace of one prompt through the loops."""
