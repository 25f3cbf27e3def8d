"""Optimizer, schedule and the training step."""
