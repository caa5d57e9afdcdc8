"""``make demo``: compare looped and dense models on chains and on text."""
