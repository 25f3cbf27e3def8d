"""PRISM (arXiv 2604.28123) on Megatron-core: SFT, adversarial alignment and RLVR for Qwen3-VL."""

import os
from pathlib import Path

__version__ = "0.1.0"

# On a CPU, compiling the small functions of Megatron and vLLM takes longer than it ever saves. torch reads this when
# they are imported.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
