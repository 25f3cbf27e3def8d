"""The paper's released code with its defects (spec 1.1, 1.3, 4.3-4.6, 5.3, 9), to measure their effects.

Its functions have the signatures of those they replace; :mod:`prism_megatron.method` chooses by ``compat``.
"""

from prism_megatron.reference.advantage import alignment_advantage, group_normalize
from prism_megatron.reference.branches import split_samples
from prism_megatron.reference.loss import MAX_SCORE, microbatch_mean, pair_loss
from prism_megatron.reference.verifiable import judge

__all__ = [
    "MAX_SCORE",
    "alignment_advantage",
    "group_normalize",
    "judge",
    "microbatch_mean",
    "pair_loss",
    "split_samples",
]
