"""Seeds of sampled responses."""

from __future__ import annotations

import hashlib


def sample_seed(run_seed: int, iteration: int, prompt_id: str) -> int:
    """Seed of a prompt's samples: depends on run, iteration and prompt, not on the batch or the rank it lands on."""
    digest = hashlib.sha256(f"{run_seed}/{iteration}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1  # vLLM takes a C long; numpy inside it takes 32 bits
