"""Routed experts: one signature, several ways to compute it."""
