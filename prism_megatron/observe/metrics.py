"""The name of every metric. People grep for these: a name is changed here or nowhere."""

from __future__ import annotations

LOSS = "loss"  # mean cross-entropy of response tokens, nats
GRAD_NORM = "grad_norm"  # policy, before clipping
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"

REWARD = "reward"  # mean over responses
ACCURACY = "accuracy"  # fraction of sampled responses whose answer is right
FORMAT_VALID = "format_valid"  # fraction of sampled responses inside the grammar
RESPONSE_TOKENS = "response_tokens"  # mean length
ENTROPY = "entropy"  # mean per response token, nats
VALID_GROUPS = "valid_groups"  # fraction of responses whose group has rewards that differ
POLICY_LOSS = "policy_loss"
CLIP_FRACTION = "clip_fraction"
TRAIN_ROLLOUT_LOGPROB_ABS_DIFF = "train_rollout_logprob_abs_diff"  # largest over sampled tokens, nats

DISCRIMINATOR_LOSS = "discriminator_loss"  # Bradley-Terry, both branches
DISCRIMINATOR_GRAD_NORM = "discriminator_grad_norm"
DISCRIMINATOR_LEARNING_RATE = "discriminator_learning_rate"
LOAD_BALANCE_LOSS = "load_balance_loss"  # mean over layers; top-k when perfectly balanced
PERCEPTION_GAP = "perception_gap"  # mean teacher score minus student score
REASONING_GAP = "reasoning_gap"
PERCEPTION_PAIR_ACCURACY = "perception_pair_accuracy"  # fraction of pairs with the teacher ahead
REASONING_PAIR_ACCURACY = "reasoning_pair_accuracy"

# What a line on the console shows, in this order, of whatever the stage has.
ON_CONSOLE = (
    *(LOSS, REWARD, ACCURACY, FORMAT_VALID, PERCEPTION_GAP, REASONING_GAP, DISCRIMINATOR_LOSS, POLICY_LOSS),
    *(TRAIN_ROLLOUT_LOGPROB_ABS_DIFF, RESPONSE_TOKENS, GRAD_NORM, LEARNING_RATE, TOKENS_PER_SECOND),
)
