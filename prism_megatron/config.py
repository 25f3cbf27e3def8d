"""Typed configuration of every stage. A recipe fills it in; dotted overrides change it; unknown keys are errors.

Defaults here are what is neutral or what Megatron uses. Everything the method or a model size decides (learning rates,
group sizes, lengths) has no default and lives in the recipe.
"""

# Annotations are types here, not strings: NeMo-Run's command line (recipes/factories.py) reads them.
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_megatron.errors import UserError

MISSING: Any = "???"  # omegaconf's, which only reading overrides and writing YAML need
FINISHED = "finished.json"  # written last into a stage's folder
REFERENCE_TEACHER_TOKENS = 512  # of a demonstration's branch, all that the paper's code shows (spec 1.3)
MIN_BRANCH_TOKENS = 2  # one, and the terminator


@dataclass
class ParallelConfig:
    """Megatron's parallel degrees. Data parallelism is what is left of the world.

    Layers are split evenly over pipeline stages, but for the stages given a number of their own (0: none). The first
    stage also runs the vision tower.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1  # model chunks per pipeline stage
    num_layers_in_first_pipeline_stage: int = 0
    num_layers_in_last_pipeline_stage: int = 0
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass
class FP8Config:
    """How the decoder's linear layers are scaled with ``model.precision`` fp8; ``model/fp8.py`` says what stays BF16.

    ``delayed`` scales a tensor by what earlier steps saw, ``tensorwise`` by its own largest value, ``blockwise`` and
    ``mxfp8`` (Blackwell only) each block by its own.
    """

    recipe: str = "tensorwise"  # delayed | tensorwise | blockwise | mxfp8
    first_layers_bf16: int = 0  # of the decoder, kept in BF16
    last_layers_bf16: int = 0

    def __post_init__(self) -> None:
        _one_of("model.fp8.recipe", self.recipe, "delayed", "tensorwise", "blockwise", "mxfp8")
        first, last = self.first_layers_bf16, self.last_layers_bf16
        if min(first, last) < 0:
            raise UserError(f"model.fp8.first_layers_bf16 and last_layers_bf16 must be at least 0, got {first}, {last}")
        if self.recipe == "delayed" and (first or last):
            raise UserError(
                f"model.fp8.recipe delayed keeps one history for all layers, so first_layers_bf16 ({first}) and "
                f"last_layers_bf16 ({last}) must be 0; use recipe tensorwise"
            )


@dataclass
class ModelConfig:
    """Which checkpoint to start from, and how to run it. Sizes are read from its ``config.json``."""

    hf_checkpoint: str = MISSING
    precision: str = "fp32"  # fp32 | bf16 | fp8
    fp8: FP8Config = field(default_factory=FP8Config)
    freeze: list[str] = field(default_factory=list)  # any of: vision, merger, language_model
    recompute: bool = False  # recompute every transformer layer in the backward pass
    moe_aux_loss_coeff: float = 0.0  # load balancing of a mixture-of-experts policy

    def __post_init__(self) -> None:
        _one_of("model.precision", self.precision, "fp32", "bf16", "fp8")


@dataclass
class OptimizerConfig:
    """AdamW and its schedule. ``warmup_fraction`` and the decay are over the stage's ``train_iters``."""

    lr: float = MISSING
    min_lr: float = 0.0
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    warmup_fraction: float = 0.0
    decay_style: str = "constant"  # constant | cosine | linear
    use_distributed_optimizer: bool = False

    def __post_init__(self) -> None:
        _one_of("decay_style", self.decay_style, "constant", "cosine", "linear")


@dataclass
class RolloutConfig:
    """Sampling, where the engine runs and its own sizes. ``tensor_model_parallel_size`` 0 means the trainer's.

    ``engine`` colocated: inside the training ranks. child: in processes of its own on the same host, which are started
    again, once, if they die. ``transport`` says how weights reach these: shared_memory of the host, which is auto; a
    collective of the rank and its engine, gloo or, on GPUs that no rank trains on, NCCL; cuda_ipc, memory of the
    rank's GPU.
    """

    engine: str = "colocated"  # colocated | child
    transport: str = "auto"  # auto | shared_memory | collective | cuda_ipc; for a child
    timeout_seconds: float = 0.0  # for one batch of responses; 0: none
    samples_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = MISSING
    max_model_len: int = MISSING
    max_num_seqs: int = 256
    images_per_prompt: int = 8  # at most
    kv_cache_gib: float = 1.0  # on a CPU
    gpu_memory_utilization: float = 0.5  # the engine's part of each GPU; recipes/memory.py says if the rest is enough
    sleep_level: int = 0  # while the policy trains, on a GPU: 1 moves weights to the host, 2 drops them; 0: stay
    enforce_eager: bool = True
    tensor_model_parallel_size: int = 0
    max_logprob_abs_diff: float = 0.0  # stop where trainer and engine differ by more nats than this; 0: only log it
    sync_bucket_mib: int = 256  # weights on their way to the engine; at least twice the largest module is used
    sync_checksums: bool = False  # after each sync, compare on all ranks what every one of them was given
    guard_interval: int = 100  # syncs from one comparison of engine and trainer to the next; 0: never
    guard_max_logprob_diff: float = 0.0  # nats that the comparison lets pass; 0: what the precision needs

    def __post_init__(self) -> None:
        _one_of("rollout.engine", self.engine, "colocated", "child")
        _one_of("rollout.transport", self.transport, "auto", "shared_memory", "collective", "cuda_ipc")
        if self.transport != "auto" and self.engine != "child":
            raise UserError(
                f"rollout.transport ({self.transport}) is for rollout.engine=child; leave it at auto: an engine inside "
                "the ranks is given their own tensors"
            )
        if self.sleep_level not in (0, 1, 2):
            raise UserError(f"rollout.sleep_level must be 0, 1 or 2, got {self.sleep_level}")
        if self.timeout_seconds < 0:
            raise UserError(f"rollout.timeout_seconds must be at least 0 (none), got {self.timeout_seconds}")
        for name in ("sync_bucket_mib", "images_per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"rollout.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("guard_interval", "guard_max_logprob_diff"):
            if getattr(self, name) < 0:
                raise UserError(f"rollout.{name} must be 0 or more, got {getattr(self, name)}")
        if self.tensor_model_parallel_size < 0:
            raise UserError(
                f"rollout.tensor_model_parallel_size must be 0 (the trainer's) or more, got "
                f"{self.tensor_model_parallel_size}"
            )


@dataclass
class EvalConfig:
    """Greedy evaluation on held-out questions after the stage. ``num_questions`` 0 turns it off."""

    data: str = ""
    num_questions: int = 0


@dataclass
class RunConfig:
    """Where a stage writes, how long it runs and how often it saves."""

    name: str = MISSING
    dir: str = "runs"
    seed: int = 1
    train_iters: int = MISSING
    save_interval: int = 100
    keep_checkpoints: int = 2
    log_rollouts_per_iteration: int = 4


@dataclass
class StageConfig:
    """What every stage has."""

    stage: str = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    max_tokens_per_microbatch: int = MISSING


@dataclass
class SFTConfig(StageConfig):
    """Supervised fine-tuning: cross-entropy on the response (spec 2)."""

    data: str = MISSING
    global_batch_size: int = MISSING


@dataclass
class CollectConfig(StageConfig):
    """After SFT: student responses for the discriminator's warm-up (spec 1.5), pass rates for RLVR (spec 1.4)."""

    alignment_data: str = MISSING
    pair_samples_per_prompt: int = MISSING
    candidates: str = MISSING
    num_candidates: int = 0  # 0: all of them
    band_low: float = MISSING
    band_high: float = MISSING


@dataclass
class DiscriminatorConfig:
    """The mixture-of-experts discriminator (spec 3).

    ``experts`` dedicated: perception tokens route only to the perception experts, reasoning tokens only to the
    reasoning experts, one score head each. shared: one pool and one head, as in the paper's released code.
    ``load_balance_coeff`` weighs the load-balancing loss; 0: it is only measured.
    """

    hf_checkpoint: str = MISSING  # the dense model that is upcycled, or an already upcycled directory
    num_experts: int = MISSING
    topk: int = MISSING
    experts: str = "dedicated"  # dedicated | shared
    upcycle_noise: float = MISSING  # std of expert noise relative to each weight's own std
    load_balance_coeff: float = MISSING
    freeze: list[str] = field(default_factory=list)
    max_branch_tokens: int = 0  # of a branch's response; a pair with a longer one has both sides cut; 0: all that fits

    def __post_init__(self) -> None:
        _one_of("discriminator.experts", self.experts, "dedicated", "shared")
        if self.max_branch_tokens and self.max_branch_tokens < MIN_BRANCH_TOKENS:
            raise UserError(
                f"discriminator.max_branch_tokens must be 0 (all that fits) or at least {MIN_BRANCH_TOKENS}, got "
                f"{self.max_branch_tokens}"
            )
        if self.topk != MISSING and self.topk < 2:
            raise UserError(
                f"discriminator.topk must be at least 2, got {self.topk}: a single expert's weight is always 1, "
                "from which the router learns nothing; raise it, and discriminator.num_experts if need be"
            )
        known = MISSING not in (self.num_experts, self.topk, self.load_balance_coeff)
        if known and self.experts == "dedicated" and 2 * self.topk == self.num_experts and self.load_balance_coeff > 0:
            raise UserError(
                f"discriminator.load_balance_coeff must be 0, got {self.load_balance_coeff:g}: with dedicated experts "
                f"and discriminator.topk ({self.topk}) half of discriminator.num_experts ({self.num_experts}) a token "
                "takes every expert of its branch, and there is nothing to balance; set it to 0, or raise "
                "discriminator.num_experts"
            )


@dataclass
class WarmupConfig(StageConfig):
    """Pairwise warm-up of the discriminator (spec 3.3)."""

    data: str = MISSING
    global_batch_size: int = MISSING  # lines of the pair file; each gives a caption pair and a reasoning pair
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        _check_pairs_fit(self)


@dataclass
class PolicyGradientConfig(StageConfig):
    """What alignment and RLVR share: sampled responses, group advantages, clipped updates (spec 4.6, 5).

    An iteration's samples are used ``epochs_per_iteration`` times, in ``mini_batches_per_iteration`` updates each. With
    one of either the policy is the one that sampled, every ratio is 1 and no clip acts. ``compat`` reference repeats
    what the paper's code does, mistakes included (prism_megatron/README.md lists them).

    ``algorithm`` is the loss: grpo and dapo average over tokens, gspo over sequences, with a ratio per sequence.
    """

    data: str = MISSING
    prompts_per_iteration: int = MISSING
    algorithm: str = "grpo"  # grpo | dapo | gspo
    mini_batches_per_iteration: int = 1  # each has its part of every prompt's responses
    epochs_per_iteration: int = 1
    advantage_eps: float = 1e-6
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0  # 0: off
    kl_coeff: float = 0.0  # KL to the policy the stage started from
    kl_estimator: str = "k3"  # k1 | k2 | k3
    importance_cap: float = 0.0  # truncates the correction for trainer and engine differing; 0: no correction
    compat: str = "fixed"  # fixed | reference

    def __post_init__(self) -> None:
        _one_of("algorithm", self.algorithm, "grpo", "dapo", "gspo")
        _one_of("kl_estimator", self.kl_estimator, "k1", "k2", "k3")
        _one_of("compat", self.compat, "fixed", "reference")
        if self.epochs_per_iteration < 1:
            raise UserError(f"epochs_per_iteration must be at least 1, got {self.epochs_per_iteration}")
        if self.rollout.temperature <= 0 or self.rollout.top_p != 1:
            raise UserError(
                f"rollout.temperature ({self.rollout.temperature:g}) must be above 0 and rollout.top_p "
                f"({self.rollout.top_p:g}) 1 where a policy gradient is taken: it is that of the policy that samples, "
                "and greedy or cut-off sampling has none; leave both at 1"
            )
        parts, samples = self.mini_batches_per_iteration, self.rollout.samples_per_prompt
        if parts < 1 or samples % parts:
            raise UserError(
                f"mini_batches_per_iteration ({parts}) must divide rollout.samples_per_prompt ({samples}), "
                "since each mini-batch has its part of every prompt's responses"
            )


@dataclass
class GatingConfig:
    """How verified answers come into the alignment's advantage, so that it may go on in RLVR (spec 4.5).

    ``advantage.alignment_advantage`` has the formula of each mode.
    """

    mode: str = "none"  # not at all | acc_gating | gated | rlvr | rlvr_v2 | sign_align
    align_coeff: float = 1.0  # weight of the discriminator's part
    wrong_penalty: float = 1.0  # for a response in the grammar with a wrong answer
    format_penalty: float = 0.0  # for one outside the grammar, in place of the stage's own
    accuracy_weight: float = 1.0  # of the verifiable reward
    format_weight: float = 1.0

    def __post_init__(self) -> None:
        _one_of("gating.mode", self.mode, "none", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align")


@dataclass
class ReplayConfig:
    """Past responses shown to the discriminator again: kept of the last ``prompts`` (0: none), the newest of each."""

    prompts: int = 0
    responses_per_prompt: int = 1
    responses_per_iteration: int = 0

    def __post_init__(self) -> None:
        sizes = (self.prompts, self.responses_per_prompt, self.responses_per_iteration)
        if min(sizes) < 0 or (self.prompts and min(sizes) < 1):
            raise UserError(
                f"replay.prompts, responses_per_prompt and responses_per_iteration must be at least 1, got {sizes}; "
                "replay.prompts=0 turns it off"
            )


@dataclass
class AlignConfig(PolicyGradientConfig):
    """Adversarial alignment (spec 4).

    ``algorithm`` is the loss and nothing else: dapo's dynamic sampling and overlong penalty are for verifiable rewards,
    and RLVR's, so that dapo here is grpo.
    ``gradient_penalty`` weighs an R1-style penalty on the demonstrations' embedded responses, measured with noise of
    ``gradient_penalty_std``.
    """

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_steps: int = 1  # per policy step, on the same pairs; the first one's metrics are logged
    perception_weight: float = MISSING  # alpha of Eq. 1
    format_penalty: float = MISSING
    score_regularizer: float = MISSING
    label_smoothing: float = 0.0
    gradient_penalty: float = 0.0
    gradient_penalty_std: float = 0.0
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    combine: str = "per_branch"  # per_branch (the released code) | weighted_sum (the paper's Eq. 1 and 3)
    gating: GatingConfig = field(default_factory=GatingConfig)

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        _one_of("combine", self.combine, "per_branch", "weighted_sum")
        if self.discriminator_steps < 1:
            raise UserError(f"discriminator_steps must be at least 1, got {self.discriminator_steps}")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.gradient_penalty < 0 or (self.gradient_penalty and self.gradient_penalty_std <= 0):
            raise UserError(
                f"gradient_penalty ({self.gradient_penalty}) must not be negative, and needs a gradient_penalty_std "
                f"above 0, got {self.gradient_penalty_std}"
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

    accuracy_weight: float = MISSING
    format_weight: float = MISSING
    max_sampling_rounds: int = 10
    oversampling: float = 1.0
    overlong_buffer_tokens: int = 0  # 0: no such penalty
    overlong_penalty: float = 1.0

    def __post_init__(self) -> None:
        PolicyGradientConfig.__post_init__(self)
        if self.max_sampling_rounds < 1:
            raise UserError(f"max_sampling_rounds must be at least 1, got {self.max_sampling_rounds}")
        if self.oversampling < 1 or (self.oversampling > 1 and (self.algorithm != "dapo" or not self.importance_cap)):
            raise UserError(
                f"oversampling must be at least 1, and above it needs algorithm=dapo and an importance_cap, got "
                f"{self.oversampling}, {self.algorithm} and {self.importance_cap}"
            )


def apply_overrides[ConfigT: StageConfig](config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """Apply dotted overrides such as ``optimizer.lr=1e-5`` and check that nothing is missing.

    Raises UserError naming the override, its key and the keys that exist there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    tree = OmegaConf.structured(config)
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r} is not of the form key=value, for example optimizer.lr=1e-5")
        _check_key(config, key)
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except OmegaConfBaseException as error:
            raise UserError(f"override {override!r} is refused: {str(error).splitlines()[0]}") from error
    missing = sorted(OmegaConf.missing_keys(tree))
    if missing:
        raise UserError(f"recipe leaves {', '.join(missing)} unset; give {missing[0]}=VALUE on the command line")
    resolved = OmegaConf.to_object(tree)
    assert isinstance(resolved, type(config))
    return resolved


def sequences_per_pair(config: WarmupConfig | AlignConfig) -> int:
    """How many sequences a pair lays down: both sides and, under a gradient penalty, the demonstration once more."""
    return 3 if isinstance(config, AlignConfig) and config.gradient_penalty else 2


def _check_pairs_fit(config: WarmupConfig | AlignConfig) -> None:
    """Refuse micro-batches that could not take a pair of the longest prompt and branches at their limit."""
    rollout, room, limit = config.rollout, config.max_tokens_per_microbatch, config.discriminator.max_branch_tokens
    if MISSING in (room, rollout.max_model_len, rollout.max_response_tokens):
        return
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


def _one_of(key: str, value: str, *allowed: str) -> None:
    if value not in allowed:
        raise UserError(f"{key} must be {' or '.join(allowed)}, got {value!r}")


def _check_key(config: Any, key: str) -> None:
    node: Any = config
    walked: list[str] = []
    for part in key.split("."):
        names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if part not in names:
            place = ".".join(walked) or "this recipe"
            raise UserError(f"unknown key {key!r}: {place} has {', '.join(sorted(names)) or 'no keys'}")
        walked.append(part)
        node = getattr(node, part, None)


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
