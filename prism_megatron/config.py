"""Typed configurations of the stages. A recipe fills them in, dotted overrides change them, unknown keys are errors.

Defaults here and in ``sections.py`` are neutral or Megatron's. Settings that depend on the method or the model size
(learning rates, group sizes, lengths) have no default; recipes set them. Each field declares its range (``ranges.py``),
a section's ``check`` refuses values that contradict each other, and ``apply_overrides`` calls both.
"""

# Annotations are types here, not strings: NeMo-Run's command line (recipes/factories.py) reads them.
from dataclasses import dataclass, field, replace
from pathlib import Path

from prism_megatron.errors import UserError
from prism_megatron.overrides import MISSING as MISSING
from prism_megatron.overrides import Section, fill, flat
from prism_megatron.overrides import apply_overrides as apply_overrides
from prism_megatron.ranges import PATH, above, at_least, between, one_of, ruled, setting, some_of
from prism_megatron.sections import PARTS as PARTS
from prism_megatron.sections import DatasetConfig as DatasetConfig
from prism_megatron.sections import EngineRollout as EngineRollout
from prism_megatron.sections import EvalConfig as EvalConfig
from prism_megatron.sections import FP8Config as FP8Config
from prism_megatron.sections import ModelConfig as ModelConfig
from prism_megatron.sections import OptimizerConfig as OptimizerConfig
from prism_megatron.sections import ParallelConfig as ParallelConfig
from prism_megatron.sections import RolloutConfig as RolloutConfig
from prism_megatron.sections import RolloutLengths as RolloutLengths
from prism_megatron.sections import RunConfig as RunConfig
from prism_megatron.sections import RunFolderConfig as RunFolderConfig
from prism_megatron.sections import SampledRollout as SampledRollout

FINISHED = "finished.json"  # the last file that a stage writes
REFERENCE_TEACHER_TOKENS = 512  # length to which the paper's code cuts a demonstration's branch (spec 1.3)
MIN_BRANCH_TOKENS = 2  # one, and the terminator
_SECTIONS = {"run": RunConfig(), "rollout": RolloutConfig(), "optimizer": OptimizerConfig(), "eval": EvalConfig()}
_ONCE_IN_EVERY_STAGE = {
    "max_tokens_per_microbatch",
    *(f"{name}.{key}" for name, section in _SECTIONS.items() for key in flat(section)),
}


@dataclass
class StageConfig(Section):
    """Settings of every stage."""

    stage: str = setting(MISSING, one_of("sft", "collect", "warmup", "align", "rlvr"))
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutLengths = field(default_factory=RolloutLengths)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)

    def ignores(self, key: str) -> bool:
        """Return whether ``key`` is a setting that this stage had in earlier versions and never used."""
        return key in _ONCE_IN_EVERY_STAGE and key not in flat(self)


@dataclass
class TrainingConfig(StageConfig):
    """Settings of stages that train a model."""

    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    max_tokens_per_microbatch: int = setting(MISSING, at_least(1))


@dataclass
class PolicyTrainingConfig(TrainingConfig):
    """Settings of stages that train the policy and evaluate it."""

    rollout: EngineRollout = field(default_factory=EngineRollout)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass
class SFTConfig(PolicyTrainingConfig):
    """Supervised fine-tuning: cross-entropy on the answers (spec 2), ``every`` one of a chat or the ``last``."""

    stage: str = setting("sft", one_of("sft"))
    data: str = setting(MISSING, PATH)
    global_batch_size: int = setting(MISSING, at_least(1))
    train_answers: str = setting("every", one_of("every", "last"))

    def check(self, at: str) -> None:
        _check_something_trains("model.freeze", self.model.freeze)


@dataclass
class CollectConfig(StageConfig):
    """Sampling after SFT: student responses for the warm-up (spec 1.5) and pass rates for RLVR (spec 1.4)."""

    stage: str = setting("collect", one_of("collect"))
    rollout: SampledRollout = field(default_factory=SampledRollout)
    alignment_data: str = setting(MISSING, PATH)
    pair_samples_per_prompt: int = setting(MISSING, at_least(1))
    candidates: str = setting(MISSING, PATH)
    num_candidates: int | None = setting(None, at_least(1, off="all"))
    band_low: float = setting(MISSING, between(0, 1))
    band_high: float = setting(MISSING, between(0, 1))

    def check(self, at: str) -> None:
        if self.band_low > self.band_high:
            raise UserError(
                f"{at}band_low ({self.band_low:g}) must be at most {at}band_high ({self.band_high:g}): they bound the "
                "pass rates of the selected prompts; swap them"
            )


@dataclass
class DiscriminatorConfig(Section):
    """The mixture-of-experts discriminator (spec 3).

    ``experts`` dedicated: perception tokens are routed to the perception experts only, reasoning tokens to the
    reasoning experts, with one score head each. shared: one pool and one head, as in the paper's released code.
    ``load_balance_coeff`` weights the load-balancing loss; with 0 it is only logged.
    """

    hf_checkpoint: str = setting(MISSING, PATH)  # a dense model, which is upcycled, or an upcycled one
    num_experts: int = setting(MISSING, at_least(2))
    topk: int = setting(MISSING, at_least(2), hint="the router learns nothing from a single expert's weight of 1")
    experts: str = setting("dedicated", one_of("dedicated", "shared"))
    upcycle_noise: float = setting(MISSING, at_least(0))  # std of the expert noise, relative to the std of each weight
    load_balance_coeff: float = setting(MISSING, at_least(0))
    freeze: list[str] = field(default_factory=list, metadata=ruled(some_of(*PARTS)))
    # Of a branch's response; a pair with a longer one is truncated on both sides.
    max_branch_tokens: int | None = setting(None, at_least(MIN_BRANCH_TOKENS, off="all that fits"))

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
class WarmupConfig(TrainingConfig):
    """Pairwise warm-up of the discriminator (spec 3.3)."""

    stage: str = setting("warmup", one_of("warmup"))
    data: str = setting(MISSING, PATH)
    global_batch_size: int = setting(MISSING, at_least(1))  # lines of the pair file; each is a pair of each branch
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def check(self, at: str) -> None:
        _check_pairs_fit(self)


@dataclass
class PolicyGradientConfig(PolicyTrainingConfig):
    """Policy gradient on sampled responses, with group advantages and clipped ratios (spec 4.6, 5).

    An iteration's samples are used ``epochs_per_iteration`` times, in ``mini_batches_per_iteration`` updates each. With
    1 of both, samples are on-policy, every ratio is 1 and nothing is clipped. ``compat`` reference reproduces the
    paper's code with its defects (prism_megatron/README.md lists them).

    ``algorithm`` is the loss: grpo and dapo average over tokens; gspo over sequences, with one ratio per sequence.
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    data: str = setting(MISSING, PATH)
    prompts_per_iteration: int = setting(MISSING, at_least(1))
    algorithm: str = setting("grpo", one_of("grpo", "dapo", "gspo"))
    mini_batches_per_iteration: int = setting(1, at_least(1))  # each has an equal part of every prompt's responses
    epochs_per_iteration: int = setting(1, at_least(1))
    advantage_eps: float = setting(1e-6, above(0))  # added to the standard deviation of a group's rewards
    clip_low: float = setting(0.2, between(0, 1, "[)"))
    clip_high: float = setting(0.2, at_least(0))
    dual_clip: float | None = setting(None, above(1, off="off"))
    kl_coeff: float = setting(0.0, at_least(0))  # KL to the initial policy of the stage
    kl_estimator: str = setting("k3", one_of("k1", "k2", "k3"))
    # Largest importance weight that corrects for the difference of trainer and engine.
    importance_cap: float | None = setting(None, at_least(1, off="no correction"))
    compat: str = setting("fixed", one_of("fixed", "reference"))

    def check(self, at: str) -> None:
        _check_something_trains("model.freeze", self.model.freeze)
        rollout, room = self.rollout, self.max_tokens_per_microbatch
        if rollout.temperature <= 0 or rollout.top_p != 1:
            raise UserError(
                f"rollout.temperature ({rollout.temperature:g}) must be above 0 and rollout.top_p "
                f"({rollout.top_p:g}) 1 for a policy gradient: it is the gradient of the distribution that is "
                "sampled from, which greedy or truncated sampling does not have; leave both at 1"
            )
        parts, samples = self.mini_batches_per_iteration, rollout.samples_per_prompt
        if samples % parts:
            raise UserError(
                f"mini_batches_per_iteration ({parts}) must divide rollout.samples_per_prompt ({samples}), "
                "since each mini-batch has an equal part of every prompt's responses"
            )
        if rollout.max_model_len > room:
            raise UserError(
                f"max_tokens_per_microbatch ({room}) must hold a prompt and its response, rollout.max_model_len "
                f"({rollout.max_model_len}) tokens; raise it to {rollout.max_model_len}, or lower rollout.max_model_len"
            )


@dataclass
class GatingConfig(Section):
    """Verified answers in the alignment's advantage (spec 4.5).

    ``advantage.alignment_advantage`` has the formula of each mode.
    """

    mode: str = setting("none", one_of("none", "acc_gating", "gated", "rlvr", "rlvr_v2", "sign_align"))
    align_coeff: float = setting(1.0, at_least(0))  # weight of the discriminator's part
    wrong_penalty: float = setting(1.0, at_least(0))  # of a valid response with a wrong answer
    format_penalty: float = setting(0.0, at_least(0))  # of an invalid response, instead of the stage's
    accuracy_weight: float = setting(1.0, at_least(0))  # of the verifiable reward
    format_weight: float = setting(1.0, at_least(0))


@dataclass
class ReplayConfig(Section):
    """Replay of past responses for the discriminator: the newest of each of the last ``prompts``."""

    prompts: int | None = setting(None, at_least(1, off="off"))
    responses_per_prompt: int = setting(1, at_least(1))
    responses_per_iteration: int = setting(0, at_least(0))

    def check(self, at: str) -> None:
        if self.prompts and not self.responses_per_iteration:
            raise UserError(
                f"{at}responses_per_iteration (0) must be at least 1 with {at}prompts ({self.prompts}); raise it, "
                f"or turn replay off with {at}prompts=none"
            )


@dataclass
class AlignConfig(PolicyGradientConfig):
    """Adversarial alignment (spec 4).

    ``algorithm`` is the loss only: dapo's dynamic sampling and overlong penalty need verifiable rewards, so dapo equals
    grpo here. ``gradient_penalty`` weights an R1-style penalty at the demonstrations' embedded responses, estimated
    with noise of ``gradient_penalty_std``. ``score_std_floor`` is the least standard deviation that a group's scores
    are divided by: if the discriminator hardly distinguishes responses, their advantages are small.
    """

    stage: str = setting("align", one_of("align"))
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    discriminator_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    discriminator_steps: int = setting(1, at_least(1))  # per policy step, on the same pairs; the first is logged
    perception_weight: float = setting(MISSING, between(0, 1))  # alpha of Eq. 1
    format_penalty: float = setting(MISSING, at_least(0))
    score_regularizer: float = setting(MISSING, at_least(0))
    score_std_floor: float = setting(0.0, at_least(0))
    label_smoothing: float = setting(0.0, between(0, 0.5, "[)"))
    gradient_penalty: float = setting(0.0, at_least(0))
    gradient_penalty_std: float = setting(0.0, at_least(0))
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    # per_branch: the released code; weighted_sum: the paper's Eq. 1 and 3
    combine: str = setting("per_branch", one_of("per_branch", "weighted_sum"))
    gating: GatingConfig = field(default_factory=GatingConfig)

    def check(self, at: str) -> None:
        super().check(at)
        if self.gradient_penalty and not self.gradient_penalty_std:
            raise UserError(
                f"gradient_penalty ({self.gradient_penalty:g}) needs a gradient_penalty_std above 0, got 0; "
                "give one, or gradient_penalty=0"
            )
        if self.compat == "reference":
            _check_reference(self)
        else:
            _check_pairs_fit(self)


@dataclass
class RLVRConfig(PolicyGradientConfig):
    """Reinforcement learning with verifiable rewards (spec 5).

    ``algorithm`` dapo samples further prompts, for up to ``max_sampling_rounds``, until every prompt group has rewards
    that differ. It subtracts ``overlong_penalty`` times the fraction of the last ``overlong_buffer_tokens`` that a
    response uses. Each round samples ``oversampling`` prompts per missing group. Leftover groups are trained on in
    later iterations, when they are off-policy, which requires an ``importance_cap``. ``mask_truncated`` excludes
    truncated responses from the loss (DAPO's overlong filtering), but not from the advantages of their groups.
    """

    stage: str = setting("rlvr", one_of("rlvr"))
    accuracy_weight: float = setting(MISSING, at_least(0))
    format_weight: float = setting(MISSING, at_least(0))
    max_sampling_rounds: int = setting(10, at_least(1))
    oversampling: float = setting(1.0, at_least(1))
    overlong_buffer_tokens: int | None = setting(None, at_least(1, off="no penalty"))
    overlong_penalty: float = setting(1.0, at_least(0))
    mask_truncated: bool = setting(False)

    def check(self, at: str) -> None:
        super().check(at)
        if self.oversampling > 1 and (self.algorithm != "dapo" or self.importance_cap is None):
            raise UserError(
                f"oversampling ({self.oversampling:g}) above 1 needs algorithm=dapo and an importance_cap, got "
                f"algorithm={self.algorithm}, importance_cap={self.importance_cap or 'none'}; give these, or "
                "oversampling=1"
            )
        if not self.accuracy_weight + self.format_weight:
            raise UserError("accuracy_weight and format_weight must not both be 0: nothing would be rewarded")
        if (self.overlong_buffer_tokens or 0) > self.rollout.max_response_tokens:
            raise UserError(
                f"overlong_buffer_tokens ({self.overlong_buffer_tokens}) must be at most rollout.max_response_tokens "
                f"({self.rollout.max_response_tokens}), which it is a part of; lower it"
            )


STAGES: dict[str, type[StageConfig]] = {
    "sft": SFTConfig,
    "collect": CollectConfig,
    "warmup": WarmupConfig,
    "align": AlignConfig,
    "rlvr": RLVRConfig,
}


def sequences_per_pair(config: WarmupConfig | AlignConfig) -> int:
    """Return the number of sequences of a pair: two and, with a gradient penalty, the demonstration once more."""
    return 3 if isinstance(config, AlignConfig) and config.gradient_penalty else 2


def _check_pairs_fit(config: WarmupConfig | AlignConfig) -> None:
    """Raise UserError if a micro-batch is too small for a pair with the longest prompt and branches."""
    limit = config.discriminator.max_branch_tokens
    needed = sequences_per_pair(config) * (_longest_prompt(config) + (limit or MIN_BRANCH_TOKENS))
    _check_room_for_pairs(config, needed, "discriminator.max_branch_tokens")


def _check_reference(config: AlignConfig) -> None:
    """Raise UserError for settings that the paper's code lacks, or a micro-batch too small for its longest pair."""
    settings = (config.label_smoothing, config.gradient_penalty, config.replay.prompts, config.score_std_floor)
    if any((*settings, config.discriminator.max_branch_tokens)):
        raise UserError(
            "compat=reference is the paper's code, which has no label_smoothing, gradient_penalty, replay, "
            "score_std_floor or discriminator.max_branch_tokens; turn them off, or use compat=fixed"
        )
    needed = 2 * _longest_prompt(config) + REFERENCE_TEACHER_TOKENS + config.rollout.max_response_tokens
    _check_room_for_pairs(config, needed, "rollout.max_response_tokens and max_model_len")


def _longest_prompt(config: StageConfig) -> int:
    return config.rollout.max_model_len - config.rollout.max_response_tokens


def _check_room_for_pairs(config: WarmupConfig | AlignConfig, needed: int, remedy: str) -> None:
    room, limit = config.max_tokens_per_microbatch, config.discriminator.max_branch_tokens or "none"
    if needed > room:
        raise UserError(
            f"max_tokens_per_microbatch ({room}) must hold a demonstration and a response, {needed} tokens with "
            f"prompts of up to {_longest_prompt(config)} (rollout.max_model_len - max_response_tokens) and "
            f"discriminator.max_branch_tokens {limit}; raise it to {needed}, or lower {remedy}"
        )


def _check_something_trains(key: str, freeze: list[str]) -> None:
    if set(freeze) == set(PARTS):
        raise UserError(f"{key} names every part of the model, so that nothing is left to train; leave one out")


def to_yaml(config: StageConfig) -> str:
    """Write the configuration as YAML, as in the run's folder: with ``train_iters`` 0 if ``num_epochs`` is set."""
    from omegaconf import OmegaConf

    if isinstance(config.run, RunConfig) and config.run.num_epochs:
        config = replace(config, run=replace(config.run, train_iters=0))
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_yaml(path: Path) -> StageConfig:
    """Read a stage's configuration, such as the ``config.yaml`` of a run. Overrides may add what is missing.

    Raises UserError for a file that is not there, is not YAML, names no stage, or has unknown keys.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"configuration {path} cannot be read: {' '.join(str(error).split())}") from error
    stage = values.get("stage") if isinstance(values, dict) else None
    if not isinstance(values, dict) or stage not in STAGES:
        raise UserError(f"{path} must have stage: one of {', '.join(STAGES)}, got {stage!r}")
    config = STAGES[stage]()
    try:
        fill(config, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def stage_dir(config: StageConfig) -> Path:
    """Return the folder of a run, ``<run.dir>/<run.name>``; pipelines name their stages ``<name>/<stage>``."""
    return Path(config.run.dir) / config.run.name
