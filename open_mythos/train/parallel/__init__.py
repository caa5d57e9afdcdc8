"""How the processes of a run start, share a model and agree."""
