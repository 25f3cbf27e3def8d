"""HF transformers' side of the parity check: logits, log-probabilities, entropies and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.data.chat import ChatProcessor
from prism_megatron.types import EncodedPrompt, InputSpec
from tools.parity.cases import training_sequence

_CPU = torch.device("cpu")


def hf_results(
    checkpoint: Path,
    rows: Sequence[EncodedPrompt],
    gradients: bool,
    aux_coeff: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """Return logits, log-probabilities and entropies of every row, and gradients of the mean loss, from HF's model.

    Rows run one at a time; results are float32 on the CPU.

    Args:
        checkpoint: HF directory.
        rows: encoded chats.
        gradients: whether to compute gradients, and with them log-probabilities and entropies.
        aux_coeff: coefficient of the load-balancing loss, computed here from HF's router logits.
        dtype: of the model.
        device: of the model.
    """
    from transformers import AutoModelForImageTextToText

    spec = ChatProcessor(checkpoint).input_spec
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").to(device)
    routers: list[Tensor] = []
    for name, module in hf.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: routers.append(output[0]))
    sequences = [training_sequence(row, spec) for row in rows]
    trained = sum(len(s.response_ids) for s in sequences)
    tokens = sum(map(len, sequences))
    results: dict[str, Tensor] = {}
    for number, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        routers.clear()
        with torch.set_grad_enabled(gradients):
            inputs = {name: value.to(device) for name, value in _hf_inputs(row, spec).items()}
            logits = hf(**inputs).logits[0].float()
            results[f"row_{number}"] = logits.detach().cpu()
            if gradients:
                start = len(sequence.prompt.token_ids) - 1
                logprobs = logits[start:-1].log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(sequence.response_ids, device=device)[:, None])
                results[f"logprobs_{number}"] = chosen[:, 0].detach().cpu()
                results[f"entropy_{number}"] = -(logprobs.exp() * logprobs).sum(-1).detach().cpu()
                loss = -chosen.sum() / trained
                for router_logits in routers if aux_coeff else ():
                    balance = _switch_loss(router_logits, hf.config.text_config.num_experts_per_tok)
                    loss = loss + aux_coeff * balance / len(routers) * len(sequence) / tokens
                loss.backward()
    if gradients:
        for name, parameter in hf.named_parameters():
            assert parameter.grad is not None, name
            gradient = parameter.grad.float().cpu()
            # HF's stacked experts are transposed in the checkpoint.
            results[f"grad:{name}"] = gradient.mT if ".mlp.experts." in name else gradient
    return results


def _switch_loss(router_logits: Tensor, topk: int) -> Tensor:
    """Return E * sum_e f_e P_e over the tokens of a row; f counts every chosen expert."""
    probs = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(topk, dim=-1).indices, 1.0)
    return probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()


def _hf_inputs(row: EncodedPrompt, spec: InputSpec) -> dict[str, Tensor]:
    ids = torch.tensor([row.token_ids])
    kinds = (ids == spec.image_token_id).int() + 2 * (ids == spec.video_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for is_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        visuals = [v for v in row.visuals if v.is_video == is_video]
        if visuals:
            inputs[pixels] = torch.cat([v.patches for v in visuals])
            inputs[grid] = torch.tensor([v.grid for v in visuals])
    return inputs
