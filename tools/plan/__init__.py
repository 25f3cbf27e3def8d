"""Predicted step time and memory of parallel layouts: ``python -m tools.plan``."""
