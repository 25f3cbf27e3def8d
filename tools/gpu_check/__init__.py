"""Numerics, FP8 and speed on one GPU: ``python -m tools.gpu_check``."""
