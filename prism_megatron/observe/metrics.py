"""The name of every metric. People grep for these: a name is changed here or nowhere."""

from __future__ import annotations

ROWS = "rows"  # seen since the stage began; where DAPO samples further ones, groups trained on
EPOCHS = "epochs"  # rows seen, in passes over all rows
TOKENS = "tokens"  # of all sequences that the iteration trains on, prompts included
LOSS = "loss"  # mean cross-entropy of response tokens, nats
GRAD_NORM = "grad_norm"  # policy, before clipping
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"
TFLOPS_PER_RANK = "tflops_per_rank"  # model operations (observe/flops.py) of a rank in a second, in 1e12
MFU = "mfu"  # these as a part of the GPU's dense BF16 peak, where that is known

REWARD = "reward"  # mean over responses
ACCURACY = "accuracy"  # fraction of sampled responses whose answer is right
FORMAT_VALID = "format_valid"  # fraction of sampled responses inside the grammar
RESPONSE_TOKENS = "response_tokens"  # mean length
CUT_RESPONSES = "cut_responses"  # fraction of sampled responses that reached the length limit
ENTROPY = "entropy"  # mean per response token, nats
VALID_GROUPS = "valid_groups"  # fraction of responses whose group has rewards that differ
POLICY_LOSS = "policy_loss"
CLIP_FRACTION = "clip_fraction"  # of trained tokens, over all updates of an iteration
APPROX_KL = "approx_kl"  # mean k3 estimate of KL(old || new) per token, nats
REFERENCE_KL = "reference_kl"  # mean estimate of KL(policy || where the stage started) per token, nats
TRUNCATED_FRACTION = "truncated_fraction"  # of trained tokens, importance weights above their cap
GENERATED_PROMPTS = "generated_prompts"  # prompts sampled to find enough groups whose rewards differ
CARRIED_GROUPS = "carried_groups"  # trained on, sampled in an earlier iteration
# Of trainer and engine on the tokens sampled by this iteration's policy, nats
TRAIN_ROLLOUT_LOGPROB_ABS_DIFF = "train_rollout_logprob_abs_diff"  # largest over tokens
TRAIN_ROLLOUT_RESPONSE_ABS_DIFF = "train_rollout_response_abs_diff"  # largest over responses of the mean over tokens
TRAIN_ROLLOUT_MEAN_ABS_DIFF = "train_rollout_mean_abs_diff"  # mean over tokens
TRAIN_ROLLOUT_KL = "train_rollout_kl"  # mean k3 estimate of KL(engine || trainer) per token

DISCRIMINATOR_LOSS = "discriminator_loss"  # Bradley-Terry, both branches
DISCRIMINATOR_GRAD_NORM = "discriminator_grad_norm"
DISCRIMINATOR_LEARNING_RATE = "discriminator_learning_rate"
GRADIENT_PENALTY = "gradient_penalty"  # half the squared slope in a demonstration's embeddings, branches as weighted
REPLAYED_PAIRS = "replayed_pairs"  # past pairs in the loss; what is measured of pairs leaves them out
CUT_PAIRS = "cut_pairs"  # in the loss, with a side over the limit on its length, so that both were cut
LOAD_BALANCE_LOSS = "load_balance_loss"  # mean over layers; top-k when perfectly balanced
PERCEPTION_GAP = "perception_gap"  # mean teacher score minus student score
REASONING_GAP = "reasoning_gap"
PERCEPTION_PAIR_ACCURACY = "perception_pair_accuracy"  # fraction of pairs with the teacher ahead
REASONING_PAIR_ACCURACY = "reasoning_pair_accuracy"
PERCEPTION_PAIRS = "perception_pairs"  # how many pairs these are means over
REASONING_PAIRS = "reasoning_pairs"
PERCEPTION_SCORE_LEVEL = "perception_score_level"  # mean of both sides' scores; no pair fixes it, so it can only drift
REASONING_SCORE_LEVEL = "reasoning_score_level"
PERCEPTION_LENGTH_CORRELATION = "perception_length_correlation"  # Pearson, of a score and tokens within a group
REASONING_LENGTH_CORRELATION = "reasoning_length_correlation"
PERCEPTION_ROUTER_ENTROPY = "perception_router_entropy"  # mean over its tokens and layers, nats
REASONING_ROUTER_ENTROPY = "reasoning_router_entropy"


def expert_load(branch: str, expert: int) -> str:
    """Part of a branch's routed tokens that an expert gets, over all layers: 1 / its experts when balanced."""
    return f"{branch}_expert_{expert}_load"


# What a line on the console shows, in this order, of whatever the stage has.
ON_CONSOLE = (
    *(EPOCHS, LOSS, REWARD, ACCURACY, FORMAT_VALID, PERCEPTION_GAP, REASONING_GAP, DISCRIMINATOR_LOSS, POLICY_LOSS),
    *(TRAIN_ROLLOUT_LOGPROB_ABS_DIFF, RESPONSE_TOKENS, GRAD_NORM, LEARNING_RATE, TOKENS_PER_SECOND),
)
