"""Numerics on a GPU: parameter names, parity with HF, and FP8."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_megatron.config import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_megatron.data.chat import ChatProcessor
from recipes.tiny_model import make_tiny_model
from tools.gpu_check import models
from tools.gpu_check.models import Scale, Variants
from tools.parity.cases import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, Case, compare
from tools.parity.hf import hf_results
from tools.parity.inputs import default_chats, encode_rows
from tools.parity.trainer import policy_results

_ROUNDING_FACTOR = 2.0  # the trainer's difference from float32 may be this many times HF's
_LOSS_TOLERANCE = 0.1  # relative difference of the last losses from the baseline's
_LAST = 5  # losses to average


def names(scale: Scale) -> Variants:
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    for kind in ("dense", "experts", "discriminator"):
        yield kind, partial(round_trip, kind, scale)
    groups.shutdown()


def round_trip(kind: str, scale: Scale) -> dict[str, Any]:
    """Import, export and import HF tensors bit by bit; the checkpoint's keys must be those of the table."""
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.load_checkpoint import sharded_weights
    from prism_megatron.convert.qwen3_vl import discriminator_table, policy_table
    from prism_megatron.convert.torch_dist import whole_shapes
    from prism_megatron.convert.transfer import InMemory, TensorSource, export_weights, load_weights, named_parameters
    from prism_megatron.convert.upcycle import UpcycledWeights
    from prism_megatron.model.build import build_discriminator, build_policy
    from prism_megatron.model.sizes import read_sizes

    base = make_tiny_model(scale.folder / kind, seed=1, moe=kind == "experts")
    sizes, model = read_sizes(base), ModelConfig(str(base), scale.precision)
    with HFWeights(base) as weights:
        source: TensorSource = weights
        chunks: Sequence[torch.nn.Module]
        if kind == "discriminator":
            upcycling = DiscriminatorConfig(str(base), 4, 2, upcycle_noise=0.1, load_balance_coeff=0)
            source, table = UpcycledWeights(weights, sizes, upcycling, seed=1), discriminator_table(sizes, 4, 2)
            chunks = build_discriminator(model, ParallelConfig(), upcycling, sizes)
        else:
            table, chunks = policy_table(sizes), build_policy(model, ParallelConfig(), sizes)
        load_weights(chunks, table, source)
        exported = {name: tensor.clone() for name, tensor in export_weights(chunks, table)}
        wrong = [n for n, tensor in exported.items() if not torch.equal(tensor.cpu(), source[n].to(tensor.dtype))]
        imported = {name: parameter.detach().clone() for name, parameter in named_parameters(chunks).items()}
        for parameter in named_parameters(chunks).values():
            parameter.data.zero_()
        load_weights(chunks, table, InMemory(exported))
        wrong += [n for n, parameter in named_parameters(chunks).items() if not torch.equal(parameter, imported[n])]
    keys = {value.key for value in sharded_weights(chunks, "")["model0"].values()}
    unexpected = {key for key in keys ^ whole_shapes(table).keys() if not key.endswith("_extra_state")}
    return {
        "hf_tensors": len(exported),
        "parameters": len(imported),
        "linears": sorted({type(m).__name__ for name, m in chunks[0].named_modules() if name.endswith("linear_fc1")}),
        "fault": f"{len(wrong)} tensors differ, {len(unexpected)} checkpoint keys: {[*wrong, *sorted(unexpected)][:3]}"
        if wrong or unexpected
        else None,
    }


def parity_with_hf(scale: Scale) -> Variants:
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    for name, sizes in (("tiny", {}), ("two_layers", scale.shallow(2))):
        checkpoint = make_tiny_model(scale.folder / name, seed=1, overrides=sizes)
        rows = encode_rows(checkpoint, default_chats())
        reference = hf_results(checkpoint, rows, gradients=True, aux_coeff=0.0)
        for precision in ("fp32", "bf16") if scale.dry else ("bf16",):
            yield f"{name} {precision}", partial(compared, checkpoint, rows, reference, precision)
    groups.shutdown()


def compared(checkpoint: Path, rows: Sequence[Any], reference: dict[str, Tensor], precision: str) -> dict[str, Any]:
    """Compare trainer and HF at ``precision`` with float32; the trainer's error may be twice HF's."""
    from prism_megatron.parallel import groups

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    spec = ChatProcessor(checkpoint).input_spec
    ours = compare(policy_results(checkpoint, rows, spec, Case(precision=precision)), reference)
    hf = compare(hf_results(checkpoint, rows, True, 0.0, dtype, groups.device()), reference)
    exact = {"logits_relative": LOGITS_TOLERANCE, "gradients_relative": GRADIENT_TOLERANCE}
    far = [
        f"{name} is {ours[name]:.2g}, HF's own in {precision} {hf[name]:.2g}"
        for name, least in exact.items()
        if not ours[name] <= max(_ROUNDING_FACTOR * hf[name], least)
    ]
    return {"rows": len(rows), "ours": ours, "hf": hf, "fault": "; ".join(far) or None}


def fp8(scale: Scale) -> Variants:
    from prism_megatron.parallel import groups

    groups.initialize(ParallelConfig(), seed=1)
    run = Training(scale)
    yield scale.precision, run.base
    for model in scale.alternatives():
        yield models.label(model), partial(run.compared_with_base, model)
    yield from models.fp8_settings(scale)
    groups.shutdown()


class Training:
    """Training runs of the same steps from the same start, one per precision."""

    def __init__(self, scale: Scale) -> None:
        self.steps = 4 if scale.dry else 50
        self.every = self.steps // 2 if scale.dry else 10
        self.lr = 1e-3 if scale.dry else 1e-4
        self.precision = scale.precision
        self.checkpoint = make_tiny_model(scale.folder / "base", seed=1, overrides=scale.shallow(4))
        self.processor = ChatProcessor(self.checkpoint)
        rows, held_out = (8, 4) if scale.dry else (64, 16)
        drawn = models.task_rows(self.processor, scale.folder / "data", rows + held_out)
        self.held_out, size = drawn[rows:], rows // 4
        self.batches = [drawn[start : start + size] for start in range(0, rows, size)]
        self.reference: dict[str, Any] = {}
        self.logprobs: list[Tensor] = []

    def base(self) -> dict[str, Any]:
        """Run the baseline precision."""
        self.reference, self.logprobs = self._train(ModelConfig("", self.precision))
        return dict(self.reference)

    def compared_with_base(self, model: ModelConfig) -> dict[str, Any]:
        """Run ``model``'s precision, and compare losses, gradient norms and log-probabilities with the baseline's."""
        if reason := models.unsupported(model):
            return {"needs": reason}
        assert self.logprobs, "the base run has failed"
        measured, logprobs = self._train(model)
        pairs = list(zip(self.logprobs, logprobs, strict=True))
        kl = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
        norms = zip(measured["grad_norm"], self.reference["grad_norm"], strict=True)
        last, expected = (sum(run["loss"][-_LAST:]) / len(run["loss"][-_LAST:]) for run in (measured, self.reference))
        first = pairs[0]
        difference = abs(last - expected) / expected
        return {
            **measured,
            "kl_nats_per_token": dict(zip(range(0, self.steps + 1, self.every), kl, strict=True)),
            "logprob_max_abs_difference_at_start": float((first[0] - first[1]).abs().max()),
            "grad_norm_max_relative_difference": max(abs(a - b) / b for a, b in norms),
            "last_loss_relative_difference": difference,
            "fault": None
            if difference <= _LOSS_TOLERANCE and all(map(math.isfinite, kl))
            else f"the last losses' mean is {last:.4g}, {self.precision}'s {expected:.4g}; divergences {kl}",
        }

    def _train(self, model: ModelConfig) -> tuple[dict[str, Any], list[Tensor]]:
        """Return losses and gradient norms, and log-probabilities of held-out tokens during training."""
        from prism_megatron.observe import metrics
        from prism_megatron.stages.batcher import Batcher
        from prism_megatron.stages.policy import sft_step
        from prism_megatron.stages.setup import load_policy

        config = models.sft_config(self.checkpoint, model, self.lr)
        policy, batcher = load_policy(config), Batcher.from_config(self.processor.input_spec, config)
        measured: list[dict[str, Any]] = []
        logprobs = [self._held_out_logprobs(policy, config)]
        for number in range(self.steps):
            batch = self.batches[number % len(self.batches)]
            measured.append(sft_step(policy, batcher.sft(batch, models.sample_ids(batch)), self.lr))
            if (number + 1) % self.every == 0:
                logprobs.append(self._held_out_logprobs(policy, config))
        return {
            "loss": [m[metrics.LOSS] for m in measured],
            "grad_norm": [m[metrics.GRAD_NORM] for m in measured],
        }, logprobs

    def _held_out_logprobs(self, policy: Any, config: Any) -> Tensor:
        """Return log-probabilities of held-out rows, [response tokens, vocabulary]."""
        from prism_megatron.optim.step import evaluate_step
        from prism_megatron.stages.batcher import Batcher

        batch = Batcher.from_config(self.processor.input_spec, config).pack(self.held_out)
        (logits,) = evaluate_step(policy.chunks, [batch], lambda chunk, packed: chunk(packed, return_logits=True))
        return logits[batch.loss_mask.bool().to(logits.device)].log_softmax(-1)


PARTS: dict[str, Callable[[Scale], Variants]] = {"names": names, "parity": parity_with_hf, "fp8": fp8}
