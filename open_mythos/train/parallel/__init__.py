"""Process groups, parallelism and compilation."""
