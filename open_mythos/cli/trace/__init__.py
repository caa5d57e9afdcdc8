"""``open-mythos trace``: what a looped model makes of a prompt, loop by loop, as one HTML page."""
