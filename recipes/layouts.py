"""Production recipes by name, with the parallel layout of each on nodes of eight 80 GB GPUs.

A name gives stage (and RLVR algorithm), size, nodes and GPUs, and precision; ``recipes/qwen3_vl.py`` has the
hyper-parameters. Layouts were chosen with ``recipes/estimate``. The stages restrict them: in alignment, policy and
discriminator share one layout (at most 4-way expert parallelism, and pipeline stages that divide both); the ranks of a
rollout engine hold the same prompts, so its tensor parallelism is at most tensor times context parallelism. Not
verified on GPUs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prism_megatron.config import ParallelConfig

SIZES = ("2b", "4b", "8b", "32b", "30b_a3b", "235b_a22b")
VISION = ("vision", "merger")
_NAME = re.compile(r"(\w+)_qwen3_vl_(\w+)_\d+n8g_h100_(bf16|fp8)")


@dataclass(frozen=True)
class Layout:
    """Parallel degrees. ``engine``: tensor parallelism of the rollout engine and its share of the GPU's memory."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    engine: tuple[int | None, float] = (None, 0.5)
    first_and_last: int = 0  # layers of the first and of the last pipeline stage, 0 for an even split
    freeze: tuple[str, ...] = ()  # parts that the paper trains and that do not fit

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            num_layers_in_first_pipeline_stage=self.first_and_last,
            num_layers_in_last_pipeline_stage=self.first_and_last,
            context_parallel_size=self.cp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
            sequence_parallel=self.tp > 1,
        )


LAYOUTS: dict[str, Layout] = {
    "sft_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1),
    "sft_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=1, engine=(None, 0.4)),
    "sft_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=2, engine=(None, 0.3)),
    "sft_qwen3_vl_32b_2n8g_h100_bf16": Layout(tp=8, engine=(None, 0.2)),
    "sft_qwen3_vl_30b_a3b_2n8g_h100_bf16": Layout(tp=4, ep=8, engine=(None, 0.25)),
    "sft_qwen3_vl_235b_a22b_16n8g_h100_bf16": Layout(tp=4, pp=4, ep=16, first_and_last=23),
    "collect_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.9)),
    "collect_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.9)),
    "collect_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.9)),
    "collect_qwen3_vl_32b_1n8g_h100_bf16": Layout(tp=4, engine=(4, 0.9)),
    "collect_qwen3_vl_30b_a3b_1n8g_h100_bf16": Layout(tp=4, engine=(4, 0.9)),
    "collect_qwen3_vl_235b_a22b_2n8g_h100_bf16": Layout(tp=4, cp=4, engine=(16, 0.9)),
    "warmup_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "warmup_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "warmup_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "warmup_qwen3_vl_32b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "warmup_qwen3_vl_30b_a3b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "warmup_qwen3_vl_235b_a22b_1n8g_h100_bf16": Layout(tp=1, ep=4),
    "align_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=2, ep=4, engine=(2, 0.25)),
    "align_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=2, ep=4, engine=(2, 0.25)),
    "align_qwen3_vl_8b_2n8g_h100_bf16": Layout(tp=4, ep=4, engine=(4, 0.25)),
    "align_qwen3_vl_32b_4n8g_h100_bf16": Layout(tp=8, ep=4, engine=(8, 0.25)),
    "align_qwen3_vl_30b_a3b_4n8g_h100_bf16": Layout(tp=4, pp=2, ep=4, etp=2, engine=(4, 0.3)),
    "align_qwen3_vl_235b_a22b_32n8g_h100_bf16": Layout(
        tp=4, pp=2, cp=8, ep=4, etp=32, engine=(16, 0.43), freeze=VISION
    ),
    "rlvr_grpo_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.4)),
    "rlvr_grpo_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=2, engine=(2, 0.4)),
    "rlvr_grpo_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_grpo_qwen3_vl_32b_4n8g_h100_bf16": Layout(tp=8, engine=(8, 0.3)),
    "rlvr_grpo_qwen3_vl_30b_a3b_4n8g_h100_bf16": Layout(tp=4, ep=8, engine=(4, 0.3)),
    "rlvr_grpo_qwen3_vl_235b_a22b_32n8g_h100_bf16": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
    "rlvr_dapo_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.4)),
    "rlvr_dapo_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=2, engine=(2, 0.4)),
    "rlvr_dapo_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_dapo_qwen3_vl_32b_4n8g_h100_bf16": Layout(tp=8, engine=(8, 0.3)),
    "rlvr_dapo_qwen3_vl_30b_a3b_4n8g_h100_bf16": Layout(tp=4, ep=8, engine=(4, 0.3)),
    "rlvr_dapo_qwen3_vl_235b_a22b_32n8g_h100_bf16": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
    "rlvr_gspo_qwen3_vl_2b_1n8g_h100_bf16": Layout(tp=1, engine=(1, 0.4)),
    "rlvr_gspo_qwen3_vl_4b_1n8g_h100_bf16": Layout(tp=2, engine=(2, 0.4)),
    "rlvr_gspo_qwen3_vl_8b_1n8g_h100_bf16": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_gspo_qwen3_vl_32b_4n8g_h100_bf16": Layout(tp=8, engine=(8, 0.3)),
    "rlvr_gspo_qwen3_vl_30b_a3b_4n8g_h100_bf16": Layout(tp=4, ep=8, engine=(4, 0.3)),
    "rlvr_gspo_qwen3_vl_235b_a22b_32n8g_h100_bf16": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
    # FP8 adds rounded copies of the weights. Rows that are missing do not fit, train nothing, or gain too little.
    "sft_qwen3_vl_8b_1n8g_h100_fp8": Layout(tp=2, engine=(None, 0.3)),
    "sft_qwen3_vl_32b_2n8g_h100_fp8": Layout(tp=8, engine=(None, 0.2)),
    "sft_qwen3_vl_30b_a3b_2n8g_h100_fp8": Layout(tp=4, ep=8, engine=(None, 0.242)),
    "sft_qwen3_vl_235b_a22b_16n8g_h100_fp8": Layout(tp=4, pp=4, ep=16, first_and_last=23),
    "align_qwen3_vl_8b_2n8g_h100_fp8": Layout(tp=4, ep=4, engine=(4, 0.25)),
    "align_qwen3_vl_32b_4n8g_h100_fp8": Layout(tp=8, pp=2, ep=4, engine=(8, 0.25)),
    "align_qwen3_vl_30b_a3b_4n8g_h100_fp8": Layout(tp=4, pp=2, ep=4, etp=2, engine=(4, 0.28)),
    "rlvr_grpo_qwen3_vl_8b_1n8g_h100_fp8": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_grpo_qwen3_vl_32b_4n8g_h100_fp8": Layout(tp=8, pp=2, engine=(8, 0.3)),
    "rlvr_grpo_qwen3_vl_30b_a3b_4n8g_h100_fp8": Layout(tp=4, pp=2, ep=8, engine=(4, 0.3)),
    "rlvr_grpo_qwen3_vl_235b_a22b_32n8g_h100_fp8": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
    "rlvr_dapo_qwen3_vl_8b_1n8g_h100_fp8": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_dapo_qwen3_vl_32b_4n8g_h100_fp8": Layout(tp=8, pp=2, engine=(8, 0.3)),
    "rlvr_dapo_qwen3_vl_30b_a3b_4n8g_h100_fp8": Layout(tp=4, pp=2, ep=8, engine=(4, 0.3)),
    "rlvr_dapo_qwen3_vl_235b_a22b_32n8g_h100_fp8": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
    "rlvr_gspo_qwen3_vl_8b_1n8g_h100_fp8": Layout(tp=4, engine=(4, 0.3)),
    "rlvr_gspo_qwen3_vl_32b_4n8g_h100_fp8": Layout(tp=8, pp=2, engine=(8, 0.3)),
    "rlvr_gspo_qwen3_vl_30b_a3b_4n8g_h100_fp8": Layout(tp=4, pp=2, ep=8, engine=(4, 0.3)),
    "rlvr_gspo_qwen3_vl_235b_a22b_32n8g_h100_fp8": Layout(
        tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION
    ),
}


def parse_name(name: str) -> tuple[str, str, str]:
    """Return family (stage, or rlvr_ALGORITHM), size and precision of a production recipe."""
    found = _NAME.fullmatch(name)
    assert found is not None, name
    return found[1], found[2], found[3]


def recipe_name(family: str, size: str, precision: str) -> str | None:
    """Return the name of the production recipe, None if there is no such recipe."""
    return next((name for name in LAYOUTS if parse_name(name) == (family, size, precision)), None)
