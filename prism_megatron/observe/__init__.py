"""Metrics, logs, timers, progress bars and the report of a run."""
