"""Routed experts: one signature, several backends."""
