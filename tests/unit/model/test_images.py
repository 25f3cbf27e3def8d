"""An image in several sequences is encoded once, and its gradient is summed over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from prism_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.types import EncodedPrompt, Visual
from tools.parity.inputs import default_chats, encode_rows


def built(checkpoint: Path, freeze: Sequence[str] = ()) -> torch.nn.Module:
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import load_weights
    from prism_megatron.model.build import build_policy
    from prism_megatron.model.sizes import read_sizes

    sizes = read_sizes(checkpoint)
    chunks = build_policy(ModelConfig(str(checkpoint), freeze=list(freeze)), ParallelConfig(), sizes)
    with HFWeights(checkpoint) as weights:
        load_weights(chunks, policy_table(sizes), weights)
    return chunks[0]


def vision_gradients(model: torch.nn.Module, sequences: Sequence[TrainingSequence], spec: object) -> dict[str, Tensor]:
    model.zero_grad()
    (-model(pack(sequences, spec)).logprobs.sum()).backward()  # type: ignore[arg-type]
    return {n: p.grad.clone() for n, p in model.named_parameters() if n.startswith("vision.") and p.grad is not None}


def test_a_shared_image_is_encoded_once(tiny_checkpoint: Path) -> None:
    model = built(tiny_checkpoint)
    spec = ChatProcessor(tiny_checkpoint).input_spec
    row = encode_rows(tiny_checkpoint, default_chats())[1]
    encoded = []
    model.vision.register_forward_hook(lambda _m, inputs, _o: encoded.append(len(inputs[0])))  # type: ignore[operator]
    answers = [(40, 41, 42), (50, 51), (60,)]
    shared = vision_gradients(model, [TrainingSequence(row, answer) for answer in answers], spec)
    (visual,) = row.visuals
    assert encoded == [len(visual.patches)]

    summed: dict[str, Tensor] = {}
    for answer in answers:
        for name, gradient in vision_gradients(model, [TrainingSequence(row, answer)], spec).items():
            summed[name] = summed.get(name, torch.zeros_like(gradient)) + gradient
    assert shared.keys() == summed.keys()
    for name, gradient in shared.items():
        scale = summed[name].abs().max()
        assert float((gradient - summed[name]).abs().max() / scale) < 1e-5, name


def test_a_shared_images_gradient_is_the_same_every_time(tiny_checkpoint: Path) -> None:
    """A resumed run equals an uninterrupted one only if sums over threads have a fixed order."""
    model = built(tiny_checkpoint)
    spec = ChatProcessor(tiny_checkpoint).input_spec
    row = encode_rows(tiny_checkpoint, default_chats())[1]
    sequences = [TrainingSequence(row, tuple(range(40 + i, 100 + i))) for i in range(48)]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    first, *others = (vision_gradients(model, sequences, spec) for _ in range(5))
    torch.set_num_threads(threads)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_a_batch_of_text_gives_the_vision_tower_a_gradient_of_zero(tiny_checkpoint: Path) -> None:
    model = built(tiny_checkpoint)
    spec = ChatProcessor(tiny_checkpoint).input_spec
    gradients = vision_gradients(model, [TrainingSequence(EncodedPrompt((40, 41)), (42, 43))], spec)
    assert gradients.keys() == {n for n, _ in model.named_parameters() if n.startswith("vision.")}
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_frozen_tensor_has_no_gradient_and_no_optimizer_state(tiny_checkpoint: Path) -> None:
    from prism_megatron.model.build import wrap_for_training
    from prism_megatron.optim.optimizer import build_optimizer
    from prism_megatron.optim.step import Stats, train_step

    model = built(tiny_checkpoint, freeze=("vision", "merger"))
    spec = ChatProcessor(tiny_checkpoint).input_spec
    (wrapped,) = chunks = wrap_for_training([model], use_distributed_optimizer=False)
    optimizer = build_optimizer(OptimizerConfig(lr=1.0, weight_decay=0.5), chunks)
    row = encode_rows(tiny_checkpoint, default_chats())[1]
    batch = pack([TrainingSequence(row, (40, 41))], spec)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train_step(
        chunks, optimizer, [batch], lambda chunk, b: chunk(b), lambda b, s: (-s.logprobs.sum(), Stats({})), lr=0.01
    )
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    in_buffers = {id(p) for buffer in wrapped.buffers for p in buffer.params}
    for name, parameter in model.named_parameters():
        frozen = name.startswith("vision.")
        assert torch.equal(parameter, before[name]) == frozen, name
        assert (id(parameter) not in in_buffers) == frozen, name
        if frozen:
            assert parameter.grad is None
            assert id(parameter) not in trained
            assert not hasattr(parameter, "main_grad")


def test_visuals_are_compared_by_identity() -> None:
    visual = Visual(torch.zeros(4, 2), (1, 2, 2))
    assert dataclasses.replace(visual) != visual
