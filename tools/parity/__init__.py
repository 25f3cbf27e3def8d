"""Comparison with HF transformers at any parallel layout: ``python -m tools.parity``."""
