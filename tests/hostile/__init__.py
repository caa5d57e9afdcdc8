"""``make hostile``: every file that a command reads, made hostile in every way that fits it."""
