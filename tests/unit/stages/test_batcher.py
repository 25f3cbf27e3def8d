"""Micro-batches of the batcher, compared with their sequences token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from prism_megatron.config import ModelConfig, ParallelConfig, RLVRConfig
from prism_megatron.data.pack import TrainingSequence
from prism_megatron.data.pairs import Pair
from prism_megatron.data.samples import Sample
from prism_megatron.parallel import groups
from prism_megatron.stages.batcher import Batcher
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, Example, InputSpec, Rollout
from recipes.train import load

SPEC = InputSpec(image_token_id=9, video_token_id=8, merge_size=1, patch_dim=1, max_positions=1000)
LENGTHS = (2, 3, 1, 4)  # response tokens of four samples, of two prompt groups


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.shutdown()


def batcher(max_tokens: int) -> Batcher:
    return Batcher(SPEC, ParallelConfig(), ModelConfig(""), max_tokens)


def samples() -> list[Sample]:
    """Return samples whose log-probabilities count all response tokens; the second is from an older policy."""
    made, start = [], 0
    for number, length in enumerate(LENGTHS):
        logprobs = tuple(-float(start + i) for i in range(length))
        rollout = Rollout((7,) * length, logprobs, "", finished=True, policy_version=4 if number == 1 else 5)
        example = Example(f"row {number // 2}", (), (), "")
        made.append(Sample(example, EncodedPrompt((1, 2)), rollout, None, False, group=number // 2))
        start += length
    return made


def config(*overrides: str) -> RLVRConfig:
    loaded = load("tiny_rlvr", list(overrides))
    assert isinstance(loaded, RLVRConfig)
    return loaded


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("max_tokens", [9, 100])
def test_every_token_has_its_samples_values(max_tokens: int) -> None:
    (batches,) = batcher(max_tokens).policy(samples(), [0.5, -1.0, 2.0, 3.0], config(), version=5)
    assert len(batches) == (2 if max_tokens == 9 else 1)
    trained = [(batch, batch.packed.loss_mask.bool()) for batch in batches]
    expected = torch.repeat_interleave(torch.tensor([0.5, -1.0, 2.0, 3.0]), torch.tensor(LENGTHS))
    assert torch.equal(torch.cat([batch.advantages[mask] for batch, mask in trained]), expected)
    assert torch.equal(torch.cat([b.rollout_logprobs[mask] for b, mask in trained]), -torch.arange(10.0))
    on_policy = torch.cat([batch.is_on_policy[mask] for batch, mask in trained])
    assert on_policy.tolist() == [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]
    assert torch.allclose(torch.cat([batch.weights[mask] for batch, mask in trained]), torch.tensor(0.1))
    for batch, mask in trained:
        assert not batch.is_on_policy[~mask].any()
        assert not batch.weights[~mask].any()
    assert [i for batch in batches for i in batch.sample_ids] == ["row 0", "row 0", "row 1", "row 1"]
    assert sum(batch.token_share for batch in batches) == pytest.approx(1)


@pytest.mark.usefixtures("one_rank")
def test_mini_batches_have_one_sample_of_each_group() -> None:
    parts = batcher(100).policy(samples(), [0.5, -1.0, 2.0, 3.0], config("mini_batches_per_iteration=2"), version=5)
    assert [part[0].sample_ids for part in parts] == [("row 0", "row 1")] * 2
    assert [float(part[0].packed.loss_mask.sum()) for part in parts] == [2 + 1, 3 + 4]


def pair(teacher: TrainingSequence, length: int, *, valid: bool = True, is_on_policy: bool = True) -> Pair:
    assert teacher.branch is not None
    student = TrainingSequence(teacher.prompt, (6,) * length, teacher.branch)
    return Pair(teacher, student, f"{length}", valid=valid, is_on_policy=is_on_policy)


def read(tokens: torch.Tensor, last: torch.Tensor, positions: Sequence[int]) -> list[int]:
    return [int(tokens[last[i]]) for i in positions]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("repeat_teachers", [False, True])
def test_a_shared_teacher_is_packed_once(repeat_teachers: bool) -> None:
    perception, reasoning = (TrainingSequence(EncodedPrompt((1,)), (5,) * 3, b) for b in (PERCEPTION, REASONING))
    pairs = [pair(perception, 1), pair(perception, 2, is_on_policy=False), pair(reasoning, 4, valid=False)]
    batch = batcher(1000).pairs(pairs, (0.8, 1.2), repeat_teachers=repeat_teachers)
    assert (batch.rows, batch.valid, batch.on_policy, batch.cut) == (1.5, [2, 0], [1, 0], 0)
    (microbatch,) = batch.microbatches
    packed = microbatch.packed
    assert len(packed.last_tokens) == (7 if repeat_teachers else 5), "two teachers, three students"
    assert read(packed.tokens, packed.last_tokens, microbatch.teacher.tolist()) == [5, 5, 5]
    assert read(packed.tokens, packed.last_tokens, microbatch.student.tolist()) == [6, 6, 6]
    assert microbatch.teacher[0] == microbatch.teacher[1] != microbatch.teacher[2]
    assert microbatch.weights.tolist() == pytest.approx([0.4, 0.4, 1.2])
    if repeat_teachers:
        assert microbatch.perturbed is not None
        assert microbatch.perturbed.tolist() == [5, 5, 6], "second copies of the teachers come last"
    else:
        assert microbatch.perturbed is None


@pytest.mark.usefixtures("one_rank")
def test_without_pairs_there_are_no_microbatches() -> None:
    batch = batcher(10).pairs([], (1.0, 1.0))
    assert (batch.rows, batch.microbatches) == (0, [])


@pytest.mark.usefixtures("one_rank")
def test_scoring_packs_a_shared_prompt_once_per_branch() -> None:
    prompt = EncodedPrompt((1, 2, 3))
    sequences = [TrainingSequence(prompt, (5,) * n, branch) for n in (1, 2) for branch in (PERCEPTION, REASONING)]
    (shared,) = batcher(100).scoring(sequences)
    assert len(shared.tokens) == 2 * 3 + 2 * (1 + 2)
    (separate,) = batcher(100).scoring(sequences[:2])
    assert separate.prefix is None
    assert len(separate.tokens) == 2 * (3 + 1)
