"""Padding of packed batches: at any layout each rank's tokens divide for context parallelism and FP8."""

from __future__ import annotations

import random

from prism_megatron.config import FP8Config, ModelConfig, ParallelConfig
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.stages.batcher import padding_for
from prism_megatron.types import EncodedPrompt, InputSpec

SPEC = InputSpec(image_token_id=9, video_token_id=8, merge_size=1, patch_dim=1, max_positions=1000)
ALIGNMENT = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}


def test_ten_thousand_packings() -> None:
    draw = random.Random(8)
    for _ in range(10_000):
        recipe = draw.choice(list(ALIGNMENT))
        tp, cp = draw.choice((1, 2, 3, 4, 8)), draw.choice((1, 2, 3, 4))
        parallel = ParallelConfig(
            tensor_model_parallel_size=tp, context_parallel_size=cp, sequence_parallel=draw.random() < 0.5
        )
        lengths = [draw.randint(2, 40) for _ in range(draw.randint(0, 4))]
        sequences = [TrainingSequence(EncodedPrompt((1,)), (2,) * (length - 1)) for length in lengths]
        model = ModelConfig("", precision="fp8", fp8=FP8Config(recipe))
        batch = pack(sequences, SPEC, padding_for(parallel, model))

        case = (recipe, tp, cp, lengths)
        assert len(batch.tokens) > 0, case
        assert len(batch.tokens) % (cp * tp * ALIGNMENT[recipe]) == 0, case
        assert batch.cu_seqlens[-1] == len(batch.tokens), case
        if cp > 1:
            assert not (batch.cu_seqlens % (2 * cp)).any(), case
        starts = batch.cu_seqlens[: len(lengths)]
        assert (batch.last_tokens - starts + 1).tolist() == lengths, case
        assert int(batch.loss_mask.sum()) == sum(lengths) - len(lengths), case


def test_other_precisions_need_no_fp8_padding() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    padding = padding_for(parallel, ModelConfig("", precision="bf16"))
    assert (padding.sequence_multiple, padding.batch_multiple) == (4, 8)
