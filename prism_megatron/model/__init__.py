"""Qwen3-VL and the discriminator on Megatron-core."""
