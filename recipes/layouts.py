"""Nodes of eight 80 GB GPUs and parallel degrees for every stage and size, by ``recipes/estimate``.

Degrees obey what the stages ask of them: in alignment policy and discriminator share one layout (at most 4-way expert
parallelism, and pipeline stages that divide both), and the ranks of a rollout engine hold the same rows, so its tensor
parallelism is at most tensor times context parallelism. Not verified on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_megatron.config import ParallelConfig

SIZES = ("2b", "4b", "8b", "32b", "30b_a3b", "235b_a22b")
GPUS_PER_NODE = 8
VISION = ("vision", "merger")


@dataclass(frozen=True)
class Layout:
    """Where a recipe runs; ``engine`` is the rollout engine's tensor parallelism and its share of the memory."""

    nodes: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    engine: tuple[int, float] = (0, 0.5)
    first_and_last: int = 0  # layers of the first and of the last pipeline stage, 0 for an even split
    freeze: tuple[str, ...] = ()  # what the paper trains and there is no room to train

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


_BF16: dict[tuple[str, str], Layout] = {
    ("sft", "2b"): Layout(1, tp=1, engine=(0, 0.5)),
    ("sft", "4b"): Layout(1, tp=1, engine=(0, 0.4)),
    ("sft", "8b"): Layout(1, tp=2, engine=(0, 0.3)),
    ("sft", "32b"): Layout(2, tp=8, engine=(0, 0.2)),
    ("sft", "30b_a3b"): Layout(2, tp=4, ep=8, engine=(0, 0.25)),
    ("sft", "235b_a22b"): Layout(16, tp=4, pp=4, ep=16, first_and_last=23),
    ("collect", "2b"): Layout(1, tp=1, engine=(1, 0.9)),
    ("collect", "4b"): Layout(1, tp=1, engine=(1, 0.9)),
    ("collect", "8b"): Layout(1, tp=1, engine=(1, 0.9)),
    ("collect", "32b"): Layout(1, tp=4, engine=(4, 0.9)),
    ("collect", "30b_a3b"): Layout(1, tp=4, engine=(4, 0.9)),
    ("collect", "235b_a22b"): Layout(2, tp=4, cp=4, engine=(16, 0.9)),
    **{("warmup", size): Layout(1, tp=1, ep=4) for size in SIZES},
    ("align", "2b"): Layout(1, tp=2, ep=4, engine=(2, 0.25)),
    ("align", "4b"): Layout(1, tp=2, ep=4, engine=(2, 0.25)),
    ("align", "8b"): Layout(2, tp=4, ep=4, engine=(4, 0.25)),
    ("align", "32b"): Layout(4, tp=8, ep=4, engine=(8, 0.25)),
    ("align", "30b_a3b"): Layout(4, tp=4, pp=2, ep=4, etp=2, engine=(4, 0.3)),
    ("align", "235b_a22b"): Layout(32, tp=4, pp=2, cp=8, ep=4, etp=32, engine=(16, 0.43), freeze=VISION),
    ("rlvr", "2b"): Layout(1, tp=1, engine=(1, 0.4)),
    ("rlvr", "4b"): Layout(1, tp=2, engine=(2, 0.4)),
    ("rlvr", "8b"): Layout(1, tp=4, engine=(4, 0.3)),
    ("rlvr", "32b"): Layout(4, tp=8, engine=(8, 0.3)),
    ("rlvr", "30b_a3b"): Layout(4, tp=4, ep=8, engine=(4, 0.3)),
    ("rlvr", "235b_a22b"): Layout(32, tp=4, pp=8, cp=4, ep=16, engine=(16, 0.44), first_and_last=11, freeze=VISION),
}

# FP8 adds rounded copies of the weights. What is not here does not fit, trains nothing, or is too small to gain.
_SAME = (
    *(("sft", size) for size in ("8b", "32b", "235b_a22b")),
    ("align", "8b"),
    *(("rlvr", size) for size in ("8b", "235b_a22b")),
)
_FP8 = {stage_and_size: _BF16[stage_and_size] for stage_and_size in _SAME} | {
    ("sft", "30b_a3b"): Layout(2, tp=4, ep=8, engine=(0, 0.242)),
    ("align", "32b"): Layout(4, tp=8, pp=2, ep=4, engine=(8, 0.25)),
    ("align", "30b_a3b"): Layout(4, tp=4, pp=2, ep=4, etp=2, engine=(4, 0.28)),
    ("rlvr", "32b"): Layout(4, tp=8, pp=2, engine=(8, 0.3)),
    ("rlvr", "30b_a3b"): Layout(4, tp=4, pp=2, ep=8, engine=(4, 0.3)),
}

LAYOUTS = {"bf16": _BF16, "fp8": _FP8}  # by precision, then by stage and size
