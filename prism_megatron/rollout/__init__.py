"""Sampling responses with vLLM inside the training ranks."""
