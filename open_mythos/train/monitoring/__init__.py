"""Monitoring of a training run: metrics and loggers, loss spikes, loop alarms, utilization."""
