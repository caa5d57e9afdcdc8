"""The parts of a looped model, one concept a file, usable in anybody's own model."""
