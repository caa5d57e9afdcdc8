"""Layers of a looped model, usable on their own."""
