"""Parity cases: how the trainer is run, which tokens are scored, and how two sets of results are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from prism_megatron.config import ParallelConfig
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.types import EncodedPrompt, InputSpec

LOGITS_TOLERANCE = 2e-5  # relative to the largest logit
GRADIENT_TOLERANCE = 1e-4  # relative to the largest entry of each tensor


@dataclass(frozen=True)
class Case:
    """Run of the trainer. ``batching``: single (one row per micro-batch), packed or padded (all rows of a rank)."""

    ranks: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batching: str = "single"
    recompute: bool = False
    gradients: bool = True
    distributed_optimizer: bool = False
    moe_aux_loss_coeff: float = 0.0
    experts: str = ""  # dedicated or shared: run the checkpoint upcycled to a discriminator, not the policy
    precision: str = "fp32"

    @property
    def name(self) -> str:
        short = {"tensor_model": "tp", "pipeline_model": "pp", "virtual_pipeline_model": "vpp", "context": "cp"}
        short |= {"expert_model": "ep", "expert_tensor": "etp"}
        degrees = [f"{s}{n}" for k, s in short.items() if (n := getattr(self.parallel, f"{k}_parallel_size")) > 1]
        parallel = self.parallel
        split = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
        flags = {"sp": parallel.sequence_parallel, f"split{split}": any(split), "recompute": self.recompute}
        flags |= {"distopt": self.distributed_optimizer, self.batching: self.batching != "single"}
        flags |= {self.experts: bool(self.experts), "balanced": bool(self.experts and self.moe_aux_loss_coeff)}
        return "-".join([f"{self.ranks}x", *degrees, *(name for name, on in flags.items() if on)])


def training_sequence(row: EncodedPrompt, spec: InputSpec) -> TrainingSequence:
    """Return the row as a training sequence with loss on all tokens after its last image (or first token)."""
    visual = (spec.image_token_id, spec.video_token_id)
    start = 1 + max((i for i, token in enumerate(row.token_ids) if token in visual), default=0)
    return TrainingSequence(EncodedPrompt(row.token_ids[:start], row.visuals), row.token_ids[start:])


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Return the largest differences: of logits and log-probabilities over all rows, of gradients per tensor.

    ``*_relative`` divides by the largest value of the reference (for gradients, of the same tensor).
    """
    assert reference.keys() <= ours.keys(), f"missing: {sorted(reference.keys() - ours.keys())[:3]}"
    measured: dict[str, Any] = {}
    for kind, prefix in {"logits": "row_", "logprobs": "logprobs_", "entropy": "entropy_"}.items():
        names = [name for name in reference if name.startswith(prefix)]
        if not names:
            continue
        worst = max(float((ours[name] - reference[name]).abs().max()) for name in names)
        largest = max(float(reference[name].abs().max()) for name in names)
        measured |= {f"{kind}_max_abs": worst, f"{kind}_relative": worst / largest}
    relative = {}
    for name in (name for name in reference if name.startswith("grad:")):
        worst, largest = float((ours[name] - reference[name]).abs().max()), float(reference[name].abs().max())
        relative[name.removeprefix("grad:")] = worst / largest if largest else worst
        measured["gradients_max_abs"] = max(measured.get("gradients_max_abs", 0.0), worst)
    if relative:
        measured["gradients_worst_tensor"] = max(relative, key=lambda name: relative[name])
        measured["gradients_relative"] = max(relative.values())
    return measured
