"""Stage 3: reinforcement learning with verifiable rewards (spec 5)."""

from __future__ import annotations

from pathlib import Path

import torch

from prism_megatron.advantage import grpo_advantage, informative_groups
from prism_megatron.config import RLVRConfig
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.loss.policy import PolicyLossConfig
from prism_megatron.observe import metrics as names
from prism_megatron.parallel.collectives import sum_over_data_parallel
from prism_megatron.reward.verifiable import verifiable_reward
from prism_megatron.stages.evaluate import conclude, judge, response_metrics
from prism_megatron.stages.policy import Objective, policy_gradient_step
from prism_megatron.stages.rollouts import Sample, gallery_row, push_weights, sample_responses, start_engine
from prism_megatron.stages.setup import load_policy, load_processor, open_stage, rows_of_iteration


def run_rlvr(config: RLVRConfig) -> None:
    rows = read_rlvr(Path(config.data))
    run = config.run
    objective = Objective(PolicyLossConfig("grpo", config.clip_low, config.clip_high, None), "token_mean")
    with open_stage(config) as stage:
        processor = load_processor(config)
        policy = load_policy(config)
        parts = {"policy": policy}
        stage.resume(parts)

        engine = start_engine(config, policy.source)
        for iteration in range(stage.start, run.train_iters):
            mine = rows_of_iteration(rows, config.prompts_per_iteration, iteration, run.seed)
            with stage.timers("sync"):
                push_weights(engine, policy, iteration)
            with stage.timers("rollout"):
                samples = sample_responses(engine, processor, mine, iteration, config)
            rewards = torch.tensor([reward(sample, config) for sample in samples])
            groups = torch.tensor([sample.group for sample in samples])
            advantages = grpo_advantage(rewards, groups, eps=config.advantage_eps).tolist()
            with stage.timers("train"):
                lr = policy.learning_rate(iteration, run.train_iters)
                measured = policy_gradient_step(policy, samples, advantages, processor, objective, config, lr)
            total, useful, count = sum_over_data_parallel(
                float(rewards.sum()), float(informative_groups(rewards, groups).sum()), len(samples)
            )
            measured |= {names.REWARD: total / count, names.VALID_GROUPS: useful / count}
            measured |= response_metrics(samples)
            stage.log.log(iteration + 1, measured | stage.timers.pop())
            shown = range(min(run.log_rollouts_per_iteration, len(samples)))
            stage.log.rollouts(
                iteration + 1,
                [gallery_row(samples[i], "rlvr", iteration + 1, judge(samples[i]), advantages[i]) for i in shown],
            )
            stage.save_if_due(iteration + 1, parts)

        conclude(stage, policy, processor, engine)


def reward(sample: Sample, config: RLVRConfig) -> float:
    """accuracy_weight * accuracy + format_weight * format; a response cut at the length limit has no format (Eq. 5)."""
    if not sample.rollout.finished:
        return 0.0
    assert sample.example.answer is not None
    return verifiable_reward(
        sample.rollout.text,
        sample.example.answer,
        accuracy_weight=config.accuracy_weight,
        format_weight=config.format_weight,
    ).score
