"""Private and undocumented names of megatron-core. Nothing else in this repository uses such a name.

Each entry says what it is for and what breaks without it. ``tests/unit/test_upstream.py`` compares ``CHECKED_ON`` with
the installed version, and each name with the signature that is used.
"""

from __future__ import annotations

from megatron.core.dist_checkpointing import core

CHECKED_ON = "0.19.2"

# `metadata.json` of a converted checkpoint, which load() refuses to be without; save() writes it only with ranks.
CheckpointingConfig = core.CheckpointingConfig
save_config = core.save_config

CheckpointingException = core.CheckpointingException  # what load() raises for another model's checkpoint
