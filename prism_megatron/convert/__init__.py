"""Weights between HF names and Megatron shards."""
