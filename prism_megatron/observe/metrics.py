"""Names of all metrics, defined only here."""

from __future__ import annotations

ROWS = "rows"  # trained on since the start of the stage; with DAPO, prompt groups trained on
EPOCHS = "epochs"  # the same in passes over all rows
TOKENS = "tokens"  # of all sequences that the iteration trains on, prompts included
LOSS = "loss"  # mean cross-entropy of response tokens, nats
GRAD_NORM = "grad_norm"  # policy, before clipping
LEARNING_RATE = "learning_rate"
TOKENS_PER_SECOND = "tokens_per_second"
TFLOPS_PER_RANK = "tflops_per_rank"  # model operations (observe/flops.py) per rank and second, in 1e12
MFU = "mfu"  # the same as a fraction of the GPU's dense BF16 peak, if that is known

REWARD = "reward"  # mean over responses
ACCURACY = "accuracy"  # fraction of sampled responses whose answer is right
FORMAT_VALID = "format_valid"  # fraction of sampled responses inside the grammar
RESPONSE_TOKENS = "response_tokens"  # mean length
CUT_RESPONSES = "cut_responses"  # fraction of sampled responses that reached the length limit
ENTROPY = "entropy"  # mean per response token, nats
VALID_GROUPS = "valid_groups"  # fraction of responses whose prompt group has rewards that differ
POLICY_LOSS = "policy_loss"
CLIP_FRACTION = "clip_fraction"  # of trained tokens, over all updates of an iteration
APPROX_KL = "approx_kl"  # mean k3 estimate of KL(old || new) per token, nats
REFERENCE_KL = "reference_kl"  # mean estimate of KL(policy || initial policy of the stage) per token, nats
TRUNCATED_FRACTION = "truncated_fraction"  # of trained tokens, importance weights above their cap
GENERATED_PROMPTS = "generated_prompts"  # prompts sampled to find enough groups whose rewards differ
LEFTOVER_GROUPS = "leftover_groups"  # prompt groups trained on that an earlier iteration sampled
# Differences of log-probabilities, trainer against engine, of tokens sampled by the current policy, nats
TRAIN_ROLLOUT_LOGPROB_ABS_DIFF = "train_rollout_logprob_abs_diff"  # largest over tokens
TRAIN_ROLLOUT_RESPONSE_ABS_DIFF = "train_rollout_response_abs_diff"  # largest over responses of the mean over tokens
TRAIN_ROLLOUT_MEAN_ABS_DIFF = "train_rollout_mean_abs_diff"  # mean over tokens
TRAIN_ROLLOUT_KL = "train_rollout_kl"  # mean k3 estimate of KL(engine || trainer) per token

DISCRIMINATOR_LOSS = "discriminator_loss"  # Bradley-Terry, both branches
DISCRIMINATOR_GRAD_NORM = "discriminator_grad_norm"
DISCRIMINATOR_LEARNING_RATE = "discriminator_learning_rate"
GRADIENT_PENALTY = "gradient_penalty"  # half the squared gradient norm at demonstration embeddings
REPLAYED_PAIRS = "replayed_pairs"  # past pairs in the loss; the other pair metrics exclude them
CUT_PAIRS = "cut_pairs"  # pairs in the loss that were truncated because a side exceeded the length limit
LOAD_BALANCE_LOSS = "load_balance_loss"  # mean over layers; top-k when perfectly balanced
PERCEPTION_GAP = "perception_gap"  # mean teacher score minus mean student score
REASONING_GAP = "reasoning_gap"
PERCEPTION_PAIR_ACCURACY = "perception_pair_accuracy"  # fraction of pairs with the higher score for the teacher
REASONING_PAIR_ACCURACY = "reasoning_pair_accuracy"
PERCEPTION_PAIRS = "perception_pairs"  # number of pairs of these means
REASONING_PAIRS = "reasoning_pairs"
PERCEPTION_SCORE_LEVEL = "perception_score_level"  # mean score of both sides, which pairs do not determine
REASONING_SCORE_LEVEL = "reasoning_score_level"
PERCEPTION_LENGTH_CORRELATION = "perception_length_correlation"  # Pearson, score against tokens, in a prompt group
REASONING_LENGTH_CORRELATION = "reasoning_length_correlation"
PERCEPTION_ROUTER_ENTROPY = "perception_router_entropy"  # mean over its tokens and layers, nats
REASONING_ROUTER_ENTROPY = "reasoning_router_entropy"


def expert_load(branch: str, expert: int) -> str:
    """Name the fraction of a branch's tokens routed to an expert, over all layers; equal for all when balanced."""
    return f"{branch}_expert_{expert}_load"


# Metrics of a console line in this order, if the stage has them.
ON_CONSOLE = (
    *(EPOCHS, LOSS, REWARD, ACCURACY, FORMAT_VALID, PERCEPTION_GAP, REASONING_GAP, DISCRIMINATOR_LOSS, POLICY_LOSS),
    *(TRAIN_ROLLOUT_LOGPROB_ABS_DIFF, RESPONSE_TOKENS, GRAD_NORM, LEARNING_RATE, TOKENS_PER_SECOND),
)
