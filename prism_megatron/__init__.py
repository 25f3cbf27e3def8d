"""PRISM (arXiv 2604.28123) on Megatron-core: SFT, adversarial alignment and RLVR for Qwen3-VL."""

__version__ = "0.1.0"
