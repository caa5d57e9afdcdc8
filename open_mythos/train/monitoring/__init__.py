"""What a run is watched by: metrics and where they go, spikes, faults of the loops, utilisation."""
