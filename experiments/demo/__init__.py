"""``make demo``: a looped model beside a dense one, on text that every machine has."""
