"""``open-mythos report``: what became of a run, as one HTML page."""
