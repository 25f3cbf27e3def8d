"""Typed configuration of every stage. A recipe fills it in; dotted overrides change it; unknown keys are errors.

Defaults here are what is neutral or what Megatron uses. Everything the method or a model size decides (learning rates,
group sizes, lengths) has no default and lives in the recipe. A field declares what it may hold (``ranges.py``), a
section's ``check`` says which of its values go together; ``apply_overrides`` calls both.
"""

# Annotations are types here, not strings: NeMo-Run's command line (recipes/factories.py) reads them.
import json
from dataclasses import dataclass, field
from pathlib import Path

from prism_megatron.errors import UserError
from prism_megatron.overrides import MISSING as MISSING
from prism_megatron.overrides import Section
from prism_megatron.overrides import apply_overrides as apply_overrides
from prism_megatron.ranges import NAME, OPTIONAL_PATH, PATH, above, at_least, between, one_of, ruled, setting, some_of

FINISHED = "finished.json"  # written last into a stage's folder
REFERENCE_TEACHER_TOKENS = 512  # of a demonstration's branch, all that the paper's code shows (spec 1.3)
MIN_BRANCH_TOKENS = 2  # one, and the terminator
PARTS = ("vision", "merger", "language_model")  # of a model, which may be frozen


@dataclass
class ParallelConfig(Section):
    """Megatron's parallel degrees. Data parallelism is what is left of the world.

    Layers are split evenly over pipeline stages, but for the stages given a number of their own (0: none). The first
    stage also runs the vision tower.
    """

    tensor_model_parallel_size: int = setting(1, at_least(1))
    pipeline_model_parallel_size: int = setting(1, at_least(1))
    virtual_pipeline_model_parallel_size: int = setting(1, at_least(1))  # model chunks per pipeline stage
    num_layers_in_first_pipeline_stage: int = setting(0, at_least(0))
    num_layers_in_last_pipeline_stage: int = setting(0, at_least(0))
    context_parallel_size: int = setting(1, at_least(1))
    expert_model_parallel_size: int = setting(1, at_least(1))
    expert_tensor_parallel_size: int = setting(1, at_least(1))
    sequence_parallel: bool = setting(False)


@dataclass
class FP8Config(Section):
    """How the decoder's linear layers are scaled with ``model.precision`` fp8; ``model/fp8.py`` says what stays BF16.

    ``delayed`` scales a tensor by what earlier steps saw, ``tensorwise`` by its own largest value, ``blockwise`` and
    ``mxfp8`` (Blackwell only) each block by its own.
    """

    recipe: str = setting("tensorwise", one_of("delayed", "tensorwise", "blockwise", "mxfp8"))
    first_layers_bf16: int = setting(0, at_least(0))  # of the decoder, kept in BF16
    last_layers_bf16: int = setting(0, at_least(0))

    def check(self, at: str) -> None:
        first, last = self.first_layers_bf16, self.last_layers_bf16
        if self.recipe == "delayed" and (first or last):
            raise UserError(
                f"{at}recipe delayed keeps one history for all layers, so first_layers_bf16 ({first}) and "
                f"last_layers_bf16 ({last}) must be 0; use recipe tensorwise"
            )


@dataclass
class ModelConfig(Section):
    """Which checkpoint to start from, and how to run it. Sizes are read from its ``config.json``."""

    hf_checkpoint: str = setting(MISSING, PATH)
    precision: str = setting("fp32", one_of("fp32", "bf16", "fp8"))
    fp8: FP8Config = field(default_factory=FP8Config)
    freeze: list[str] = field(default_factory=list, metadata=ruled(some_of(*PARTS)))
    recompute: bool = setting(False)  # recompute every transformer layer in the backward pass
    moe_aux_loss_coeff: float = setting(0.0, at_least(0))  # load balancing of a mixture-of-experts policy


@dataclass
class OptimizerConfig(Section):
    """AdamW and its schedule. ``warmup_fraction`` and the decay are over the stage's ``train_iters``."""

    lr: float = setting(MISSING, at_least(0))
    min_lr: float = setting(0.0, at_least(0))
    weight_decay: float = setting(0.0, at_least(0))
    adam_beta1: float = setting(0.9, between(0, 1, "[)"))
    adam_beta2: float = setting(0.999, between(0, 1, "[)"))
    adam_eps: float = setting(1e-8, above(0))
    clip_grad: float = setting(1.0, at_least(0), hint="0 turns clipping off")  # largest norm of the gradient
    warmup_fraction: float = setting(0.0, between(0, 1))
    decay_style: str = setting("constant", one_of("constant", "cosine", "linear"))
    use_distributed_optimizer: bool = setting(False)

    def check(self, at: str) -> None:
        if self.decay_style != "constant" and self.min_lr > self.lr:
            raise UserError(
                f"{at}min_lr ({self.min_lr:g}) must be at most {at}lr ({self.lr:g}), which decays to it; "
                f"lower it too, or give {at}decay_style=constant"
            )


@dataclass
class RolloutConfig(Section):
    """Sampling, where the engine runs and its own sizes. ``tensor_model_parallel_size`` 0 means the trainer's.

    ``engine`` colocated: inside the training ranks. child: in processes of its own on the same host, which are started
    again, once, if they die. ``transport`` says how weights reach these: shared_memory of the host, which is auto; a
    collective of the rank and its engine, gloo or, on GPUs that no rank trains on, NCCL; cuda_ipc, memory of the
    rank's GPU.
    """

    engine: str = setting("colocated", one_of("colocated", "child"))
    transport: str = setting("auto", one_of("auto", "shared_memory", "collective", "cuda_ipc"))  # for a child
    timeout_seconds: float = setting(0.0, above(0, zero="none"))  # for one batch of responses
    samples_per_prompt: int = setting(1, at_least(1))
    temperature: float = setting(1.0, at_least(0))
    top_p: float = setting(1.0, between(0, 1, "(]"))
    max_response_tokens: int = setting(MISSING, at_least(1))
    max_model_len: int = setting(MISSING, at_least(2))
    max_num_seqs: int = setting(256, at_least(1))
    images_per_prompt: int = setting(8, at_least(1))  # at most
    kv_cache_gib: float = setting(1.0, above(0))  # on a CPU
    # The engine's part of each GPU; recipes/memory.py says if the rest is enough.
    gpu_memory_utilization: float = setting(0.5, between(0, 1, "(]"))
    # While the policy trains, on a GPU: 1 moves weights to the host, 2 drops them; 0: stay.
    sleep_level: int = setting(0, one_of(0, 1, 2))
    enforce_eager: bool = setting(True)
    tensor_model_parallel_size: int = setting(0, at_least(1, zero="the trainer's"))
    # Stop where trainer and engine differ by more nats than this.
    max_logprob_abs_diff: float = setting(0.0, above(0, zero="only log it"))
    # Weights on their way to the engine; at least twice the largest module is used.
    sync_bucket_mib: int = setting(256, at_least(1))
    sync_checksums: bool = setting(False)  # after each sync, compare on all ranks what every one of them was given
    guard_interval: int = setting(100, at_least(1, zero="never"))  # syncs between comparisons of engine and trainer
    # Nats that the comparison lets pass.
    guard_max_logprob_diff: float = setting(0.0, above(0, zero="what the precision needs"))

    def check(self, at: str) -> None:
        if self.transport != "auto" and self.engine != "child":
            raise UserError(
                f"{at}transport ({self.transport}) is for {at}engine=child; leave it at auto: an engine inside "
                "the ranks is given their own tensors"
            )
        if self.max_response_tokens >= self.max_model_len:
            raise UserError(
                f"{at}max_response_tokens ({self.max_response_tokens}) must be below {at}max_model_len "
                f"({self.max_model_len}), which holds the prompt too; raise {at}max_model_len"
            )


@dataclass
class EvalConfig(Section):
    """Greedy evaluation on held-out questions after the stage. ``num_questions`` 0 turns it off."""

    data: str = setting("", OPTIONAL_PATH)
    num_questions: int = setting(0, at_least(1, zero="no evaluation"))

    def check(self, at: str) -> None:
        if self.num_questions and not self.data:
            raise UserError(
                f"{at}num_questions ({self.num_questions}) needs {at}data, which is empty; give {at}data=FILE.parquet, "
                f"or {at}num_questions=0"
            )


@dataclass
class RunConfig(Section):
    """Where a stage writes, how long it runs and how often it saves."""

    name: str = setting(MISSING, NAME, hint="run.dir says which folder it is in")
    dir: str = setting("runs", PATH)
    seed: int = setting(1, at_least(0))
    train_iters: int = setting(MISSING, at_least(1))
    save_interval: int = setting(100, at_least(1), hint="a number above run.train_iters saves only at the end")
    keep_checkpoints: int = setting(2, at_least(1), hint="a stage goes on from the last one")
    log_rollouts_per_iteration: int = setting(4, at_least(0))


@dataclass
class StageConfig(Section):
    """What every stage has."""

    stage: str = setting(MISSING, one_of("sft", "collect", "warmup", "align", "rlvr"))
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    max_tokens_per_microbatch: int = setting(MISSING, at_least(1))


@dataclass
class SFTConfig(StageConfig):
    """Supervised fine-tuning: cross-entropy on the response (spec 2)."""

    stage: str = setting("sft", one_of("sft"))
    data: str = setting(MISSING, PATH)
    global_batch_size: int = setting(MISSING, at_least(1))

    def check(self, at: str) -> None:
        _check_something_trains("model.freeze", self.model.freeze)


@dataclass
class CollectConfig(StageConfig):
    """After SFT: student responses for the discriminator's warm-up (spec 1.5), pass rates for RLVR (spec 1.4)."""

    stage: str = setting("collect", one_of("collect"))
    alignment_data: str = setting(MISSING, PATH)
    pair_samples_per_prompt: int = setting(MISSING, at_least(1))
    candidates: str = setting(MISSING, PATH)
    num_candidates: int = setting(0, at_least(1, zero="all of them"))
    band_low: float = setting(MISSING, between(0, 1))
    band_high: float = setting(MISSING, between(0, 1))

    def check(self, at: str) -> None:
        _check_no_evaluation(self)
        if self.band_low > self.band_high:
            raise UserError(
                f"{at}band_low ({self.band_low:g}) must be at most {at}band_high ({self.band_high:g}): they bound the "
                "pass rate of the prompts that are kept; swap them"
            )


@dataclass
class DiscriminatorConfig(Section):
    """The mixture-of-experts discriminator (spec 3).

    ``experts`` dedicated: perception tokens route only to the perception experts, reasoning tokens only to the
    reasoning experts, one score head each. shared: one pool and one head, as in the paper's released code.
    ``load_balance_coeff`` weighs the load-balancing loss; 0: it is only measured.
    """

    hf_checkpoint: str = setting(MISSING, PATH)  # the dense model that is upcycled, or an already upcycled directory
    num_experts: int = setting(MISSING, at_least(2))
    topk: int = setting(MISSING, at_least(2), hint="the router learns nothing from a single expert's weight of 1")
    experts: str = setting("dedicated", one_of("dedicated", "shared"))
    upcycle_noise: float = setting(MISSING, at_least(0))  # std of expert noise relative to each weight's own std
    load_balance_coeff: float = setting(MISSING, at_least(0))
    freeze: list[str] = field(default_factory=list, metadata=ruled(some_of(*PARTS)))
    # Of a branch's response; a pair with a longer one has both sides cut.
    max_branch_tokens: int = setting(0, at_least(MIN_BRANCH_TOKENS, zero="all that fits"))

    def check(self, at: str) -> None:
        dedicated = self.experts == "dedicated"
        if dedicated and self.num_experts % 2:
            raise UserError(
                f"{at}num_experts ({self.num_experts}) must be even with dedicated experts, half of them for each "
                f"branch; give {at}num_experts={self.num_experts + 1}"
            )
        pool = self.num_experts // 2 if dedicated else self.num_experts
        if self.topk > pool:
            raise UserError(
                f"{at}topk ({self.topk}) is more than the {pool} experts a token may use; raise {at}num_experts "
                f"({self.num_experts})"
            )
        if dedicated and self.topk == pool and self.load_balance_coeff > 0:
            raise UserError(
                f"{at}load_balance_coeff must be 0, got {self.load_balance_coeff:g}: with dedicated experts "
                f"and {at}topk ({self.topk}) half of {at}num_experts ({self.num_experts}) a token "
                f"takes every expert of its branch, and there is nothing to balance; set it to 0, or raise "
                f"{at}num_experts"
            )


@dataclass
class WarmupConfig(StageConfig):
    """Pairwise warm-up of the discriminator (spec 3.3)."""

    stage: str = setting("warmup", one_of("warmup"))
    data: str = setting(MISSING, PATH)
    global_batch_size: int = setting(MISSING, at_least(1))  # lines of the pair file; each is a pair of each branch
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def check(self, at: str) -> None:
        _check_no_evaluation(self)
        _check_pairs_fit(self)


@dataclass
class PolicyGradientConfig(StageConfig):
    """What alignment and RLVR share: sampled responses, group advantages, clipped updates (spec 4.6, 5).

    An iteration's samples are used ``epochs_per_iteration`` times, in ``mini_batches_per_iteration`` updates each. With
    one of either the policy is the one that sampled, every ratio is 1 and no clip acts. ``compat`` reference repeats
    what the paper's code does, mistakes included (prism_megatron/README.md lists them).

    ``algorithm`` is the loss: grpo and dapo average over tokens, gspo over sequences, with a ratio per sequence.
    """

    data: str = setting(MISSING, PATH)
    prompts_per_iteration: int = setting(MISSING, at_least(1))
    algorithm: str = setting("grpo", one_of("grpo", "dapo", "gspo"))
    mini_batches_per_iteration: int = setting(1, at_least(1))  # each has its part of every prompt's responses
    epochs_per_iteration: int = setting(1, at_least(1))
    advantage_eps: float = setting(1e-6, above(0))
    clip_low: float = setting(0.2, between(0, 1, "[)"))
    clip_high: float = setting(0.2, at_least(0))
    dual_clip: float = setting(0.0, above(1, zero="off"))
    kl_coeff: float = setting(0.0, at_least(0))  # KL to the policy the stage started from
    kl_estimator: str = setting("k3", one_of("k1", "k2", "k3"))
    # Truncates the correction for trainer and engine differing.
    importance_cap: float = setting(0.0, at_least(1, zero="no correction"))
    compat: str = setting("fixed", one_of("fixed", "reference"))

    def check(self, at: str) -> None:
        _check_something_trains("model.freeze", self.model.freeze)
        rollout, room = self.rollout, self.max_tokens_per_microbatch
        if rollout.temperature <= 0 or rollout.top_p != 1:
            raise UserError(
                f"rollout.temperature ({rollout.temperature:g}) must be above 0 and rollout.top_p "
                f"({rollout.top_p:g}) 1 where a policy gradient is taken: it is that of the policy that samples, "
                "and greedy or cut-off sampling has none; leave both at 1"
            )
        parts, samples = self.mini_batches_per_iteration, rollout.samples_per_prompt
        if samples % parts:
            raise UserError(
                f"mini_batches_per_iteration ({parts}) must divide rollout.samples_per_prompt ({samples}), "
                "since each mini-batch has its part of every prompt's responses"
            )
        if rollout.max_model_len > room:
            raise UserError(
                f"max_tokens_per_microbatch ({room}) must hold a prompt and its response, rollout.max_model_len "
                f"({rollout.max_model_len}) tokens; raise it to {rollout.max_model_len}, or lower rollout.max_model_len"
            )


@dataclass
class GatingConfig(Section):
    """How verified answers come into the alignment's advantage, so that it may go on in RLVR (spec 4.5).

    ``advantage.alignment_advantage`` has the formula of each mode.
    """

    mode: str = setting("none", one_of("none", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align"))
    align_coeff: float = setting(1.0, at_least(0))  # weight of the discriminator's part
    wrong_penalty: float = setting(1.0, at_least(0))  # for a response in the grammar with a wrong answer
    format_penalty: float = setting(0.0, at_least(0))  # for one outside the grammar, in place of the stage's own
    accuracy_weight: float = setting(1.0, at_least(0))  # of the verifiable reward
    format_weight: float = setting(1.0, at_least(0))


@dataclass
class ReplayConfig(Section):
    """Past responses shown to the discriminator again: kept of the last ``prompts`` (0: none), the newest of each."""

    prompts: int = setting(0, at_least(1, zero="none"))
    responses_per_prompt: int = setting(1, at_least(1))
    responses_per_iteration: int = setting(0, at_least(0))

    def check(self, at: str) -> None:
        if self.prompts and not self.responses_per_iteration:
            raise UserError(
                f"{at}responses_per_iteration (0) must be at least 1 with {at}prompts ({self.prompts}); raise it, "
                f"or turn replay off with {at}prompts=0"
            )


@dataclass
class AlignConfig(PolicyGradientConfig):
    """Adversarial alignment (spec 4).

    ``algorithm`` is the loss and nothing else: dapo's dynamic sampling and overlong penalty are for verifiable rewards,
    and RLVR's, so that dapo here is grpo.
    ``gradient_penalty`` weighs an R1-style penalty on the demonstrations' embedded responses, measured with noise of
    ``gradient_penalty_std``.
    """

    stage: str = setting("align", one_of("align"))
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_steps: int = setting(1, at_least(1))  # per policy step, on the same pairs; the first one's are logged
    perception_weight: float = setting(MISSING, between(0, 1))  # alpha of Eq. 1
    format_penalty: float = setting(MISSING, at_least(0))
    score_regularizer: float = setting(MISSING, at_least(0))
    label_smoothing: float = setting(0.0, between(0, 0.5, "[)"))
    gradient_penalty: float = setting(0.0, at_least(0))
    gradient_penalty_std: float = setting(0.0, at_least(0))
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    # per_branch as in the released code, weighted_sum as in the paper's Eq. 1 and 3
    combine: str = setting("per_branch", one_of("per_branch", "weighted_sum"))
    gating: GatingConfig = field(default_factory=GatingConfig)

    def check(self, at: str) -> None:
        super().check(at)
        if self.gradient_penalty and not self.gradient_penalty_std:
            raise UserError(
                f"gradient_penalty ({self.gradient_penalty:g}) needs a gradient_penalty_std above 0, got 0; "
                "give one, or gradient_penalty=0"
            )
        knobs = (self.label_smoothing, self.gradient_penalty, self.replay.prompts, self.discriminator.max_branch_tokens)
        if self.compat == "reference" and any(knobs):
            raise UserError(
                "compat=reference is the paper's code, which has no label_smoothing, gradient_penalty, replay or "
                "discriminator.max_branch_tokens; turn them off, or use compat=fixed"
            )
        _check_pairs_fit(self)


@dataclass
class RLVRConfig(PolicyGradientConfig):
    """Reinforcement learning with verifiable rewards (spec 5).

    ``algorithm`` dapo samples further prompts, up to ``max_sampling_rounds`` times, until every group it trains on has
    rewards that differ, and takes ``overlong_penalty`` times a response's part in the last ``overlong_buffer_tokens``
    from its reward. Each round samples ``oversampling`` prompts for a group still missing; the surplus is carried over
    to the next iterations, in which it is no longer of the policy's own making, so that this needs an
    ``importance_cap``.
    """

    stage: str = setting("rlvr", one_of("rlvr"))
    accuracy_weight: float = setting(MISSING, at_least(0))
    format_weight: float = setting(MISSING, at_least(0))
    max_sampling_rounds: int = setting(10, at_least(1))
    oversampling: float = setting(1.0, at_least(1))
    overlong_buffer_tokens: int = setting(0, at_least(1, zero="no such penalty"))
    overlong_penalty: float = setting(1.0, at_least(0))

    def check(self, at: str) -> None:
        super().check(at)
        if self.oversampling > 1 and (self.algorithm != "dapo" or not self.importance_cap):
            raise UserError(
                f"oversampling above 1 needs algorithm=dapo and an importance_cap, got {self.oversampling:g}, "
                f"{self.algorithm} and {self.importance_cap:g}; give these, or oversampling=1"
            )
        if not self.accuracy_weight + self.format_weight:
            raise UserError("accuracy_weight and format_weight must not both be 0: nothing would be rewarded")
        if self.overlong_buffer_tokens > self.rollout.max_response_tokens:
            raise UserError(
                f"overlong_buffer_tokens ({self.overlong_buffer_tokens}) must be at most rollout.max_response_tokens "
                f"({self.rollout.max_response_tokens}), whose last part it is; lower it"
            )


def sequences_per_pair(config: WarmupConfig | AlignConfig) -> int:
    """How many sequences a pair lays down: both sides and, under a gradient penalty, the demonstration once more."""
    return 3 if isinstance(config, AlignConfig) and config.gradient_penalty else 2


def _check_pairs_fit(config: WarmupConfig | AlignConfig) -> None:
    """Refuse micro-batches that could not take a pair of the longest prompt and branches at their limit."""
    rollout, room, limit = config.rollout, config.max_tokens_per_microbatch, config.discriminator.max_branch_tokens
    prompt = rollout.max_model_len - rollout.max_response_tokens
    needed = sequences_per_pair(config) * (prompt + (limit or MIN_BRANCH_TOKENS))
    remedy = "discriminator.max_branch_tokens"
    if isinstance(config, AlignConfig) and config.compat == "reference":
        needed = 2 * prompt + REFERENCE_TEACHER_TOKENS + rollout.max_response_tokens
        remedy = "rollout.max_response_tokens and max_model_len"
    if needed > room:
        raise UserError(
            f"max_tokens_per_microbatch ({room}) must hold a demonstration beside a response, {needed} tokens with "
            f"prompts of up to {prompt} (rollout.max_model_len - max_response_tokens) and "
            f"discriminator.max_branch_tokens {limit}; raise it to {needed}, or lower {remedy}"
        )


def _check_something_trains(key: str, freeze: list[str]) -> None:
    if set(freeze) == set(PARTS):
        raise UserError(f"{key} names every part of the model, so that nothing is left to train; leave one out")


def _check_no_evaluation(config: StageConfig) -> None:
    if config.eval.num_questions:
        raise UserError(
            f"eval.num_questions ({config.eval.num_questions}) must be 0 in {config.stage}, which trains no policy; "
            "evaluate after sft, align or rlvr"
        )


def to_yaml(config: StageConfig) -> str:
    """The resolved configuration as YAML, as it is kept in the run's folder."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def stage_dir(config: StageConfig) -> Path:
    """Folder of this stage: ``<run.dir>/<run.name>``; a pipeline names its stages ``<name>/<stage>``."""
    return Path(config.run.dir) / config.run.name


def is_finished(config: StageConfig) -> bool:
    """Whether this stage has ended before, with this very configuration."""
    marker = stage_dir(config) / FINISHED
    return marker.is_file() and bool(json.loads(marker.read_text())["config"] == to_yaml(config))
