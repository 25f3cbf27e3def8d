"""Sections of the stages' configurations: layout, model, optimizer, rollouts, data sets, evaluation and run."""

# Annotations are types here, not strings: NeMo-Run's command line (recipes/factories.py) reads them.
from dataclasses import dataclass, field

from prism_megatron.errors import UserError
from prism_megatron.overrides import MISSING, Section
from prism_megatron.ranges import (
    COLUMNS,
    KEYS,
    NAME,
    OPTIONAL_PATH,
    PATH,
    above,
    at_least,
    between,
    one_of,
    ruled,
    setting,
    some_of,
)

PARTS = ("vision", "merger", "language_model")  # of a model; each may be frozen


@dataclass
class ParallelConfig(Section):
    """Megatron's parallel degrees; the remaining ranks are data-parallel.

    Layers are split evenly over pipeline stages, except the first and last stage if they have a number of their own
    (0: none). The first stage also runs the vision tower.
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
    """Scaling of the decoder's linear layers with ``model.precision`` fp8; ``model/fp8.py`` lists what stays BF16.

    ``delayed`` scales a tensor by the largest values of earlier steps, ``tensorwise`` by its own largest value,
    ``blockwise`` and ``mxfp8`` (Blackwell only) each block by its own.
    """

    recipe: str = setting("tensorwise", one_of("delayed", "tensorwise", "blockwise", "mxfp8"))
    first_layers_bf16: int = setting(0, at_least(0))  # of the decoder, not in FP8
    last_layers_bf16: int = setting(0, at_least(0))

    def check(self, at: str) -> None:
        first, last = self.first_layers_bf16, self.last_layers_bf16
        if self.recipe == "delayed" and (first or last):
            raise UserError(
                f"{at}recipe delayed has one history for all layers, so first_layers_bf16 ({first}) and "
                f"last_layers_bf16 ({last}) must be 0; use recipe tensorwise"
            )


@dataclass
class ModelConfig(Section):
    """The initial checkpoint and its precision. Sizes are read from its ``config.json``."""

    hf_checkpoint: str = setting(MISSING, PATH)
    precision: str = setting("fp32", one_of("fp32", "bf16", "fp8"))
    fp8: FP8Config = field(default_factory=FP8Config)
    freeze: list[str] = field(default_factory=list, metadata=ruled(some_of(*PARTS)))
    max_hidden_size: int | None = setting(None, at_least(1, off="any"))  # of checkpoints that a recipe is meant for
    recompute: bool = setting(False)  # recompute every transformer layer in the backward pass
    moe_aux_loss_coeff: float = setting(0.0, at_least(0))  # load balancing, for mixture-of-experts policies


@dataclass
class OptimizerConfig(Section):
    """AdamW and its learning rates. ``warmup_fraction`` and the decay refer to all iterations of the stage."""

    lr: float = setting(MISSING, at_least(0))
    min_lr: float = setting(0.0, at_least(0))
    weight_decay: float = setting(0.0, at_least(0))
    adam_beta1: float = setting(0.9, between(0, 1, "[)"))
    adam_beta2: float = setting(0.999, between(0, 1, "[)"))
    adam_eps: float = setting(1e-8, above(0))
    clip_grad: float = setting(1.0, at_least(0), hint="0 turns clipping off")  # largest gradient norm
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
class RolloutLengths(Section):
    """Lengths of responses and sequences, of stages that sample nothing themselves."""

    max_response_tokens: int = setting(MISSING, at_least(1))
    max_model_len: int = setting(MISSING, at_least(2))  # of prompt and response

    def check(self, at: str) -> None:
        if self.max_response_tokens >= self.max_model_len:
            raise UserError(
                f"{at}max_response_tokens ({self.max_response_tokens}) must be below {at}max_model_len "
                f"({self.max_model_len}), which includes the prompt; raise {at}max_model_len"
            )


@dataclass
class EngineRollout(RolloutLengths):
    """The rollout engine: where it runs, its sizes, and how weights are pushed to it.

    ``engine`` colocated runs it in the training ranks; child runs it in subprocesses on the same host, which are
    restarted once if they die. ``transport`` moves weights to the subprocesses: shared_memory (auto), collective (a
    gloo or, on GPUs that no rank trains on, NCCL group of the rank and its subprocesses), or cuda_ipc.
    """

    engine: str = setting("colocated", one_of("colocated", "child"))
    transport: str = setting("auto", one_of("auto", "shared_memory", "collective", "cuda_ipc"))
    timeout_seconds: float | None = setting(None, above(0, off="no limit"))  # for one batch of responses
    max_num_seqs: int = setting(256, at_least(1))
    images_per_prompt: int = setting(8, at_least(1))  # at most
    kv_cache_gib: float = setting(1.0, above(0))  # on a CPU
    # The engine's share of each GPU; recipes/estimate/memory.py checks that the rest is enough for training.
    gpu_memory_utilization: float = setting(0.5, between(0, 1, "(]"))
    enforce_eager: bool = setting(True)
    tensor_model_parallel_size: int | None = setting(None, at_least(1, off="the trainer's"))
    sync_bucket_mib: int = setting(256, at_least(1))  # buffer of a push; at least twice the largest module is used
    sync_checksums: bool = setting(False)  # compare what all ranks received after each push

    def check(self, at: str) -> None:
        super().check(at)
        if self.transport != "auto" and self.engine != "child":
            raise UserError(
                f"{at}transport ({self.transport}) is for {at}engine=child; leave it at auto: an engine in the ranks "
                "uses their tensors"
            )


@dataclass
class SampledRollout(EngineRollout):
    """The rollout engine and how responses are sampled."""

    samples_per_prompt: int = setting(1, at_least(1))
    temperature: float = setting(1.0, at_least(0))
    top_p: float = setting(1.0, between(0, 1, "(]"))


@dataclass
class RolloutConfig(SampledRollout):
    """Rollouts of a policy that is trained on them, and comparisons of the trainer with the engine.

    ``max_logprob_abs_diff`` stops a run if log-probabilities of trainer and engine differ by more, averaged over a
    response. The sync guard compares them after every ``guard_interval`` pushes. Both are in nats.
    """

    # Of the engine during training, on a GPU: 1 moves its weights to the host, 2 drops them.
    sleep_level: int = setting(0, one_of(0, 1, 2))
    max_logprob_abs_diff: float | None = setting(
        None, above(0, off="default of the precision"), hint="1e9 only logs the difference"
    )
    guard_interval: int | None = setting(100, at_least(1, off="never"))
    guard_max_logprob_diff: float | None = setting(None, above(0, off="default of the precision"))


@dataclass
class DatasetConfig(Section):
    """Options of reading data files.

    An index of each data set is built once, in ``cache``: ``data_cache`` of ``run.dir`` where it is empty. A row that
    cannot be used is listed in ``skipped_rows.jsonl`` of the stage's folder with ``bad_rows`` skip, and ends the stage
    where more than ``max_bad_fraction`` of the rows cannot be used; with ``bad_rows`` error the first one ends it.
    Pictures of a data set of up to ``check_images_max_rows`` rows are decoded once when the index is built; those of a
    larger one are checked as they are used. ``workers`` processes of each rank read and encode the rows of the next
    iterations; 0: the rank does it itself, when they are due.

    A row longer than what the engine takes, or in SFT than a micro-batch, is left out and listed in that file with
    ``overlong`` drop, and ends the stage with error. With truncate SFT cuts the demonstration; prompts are not
    cut but dropped.

    Trainer and engine scale images to between ``min_pixels`` and ``max_pixels``, as Qwen's smart_resize does.

    ``columns`` are of files with names of their own, each "name=column": ``messages=dialog``. Paths of images start
    from ``image_root``, and may not leave it, or else from the folder of their file.
    """

    cache: str = setting("", OPTIONAL_PATH)
    bad_rows: str = setting("skip", one_of("skip", "error"))
    max_bad_fraction: float = setting(0.001, between(0, 1))
    check_images_max_rows: int = setting(20_000, at_least(0))
    workers: int = setting(0, at_least(0))
    min_pixels: int | None = setting(None, at_least(1, off="the checkpoint's limit"))
    max_pixels: int | None = setting(None, at_least(1, off="the checkpoint's limit"))
    columns: list[str] = field(default_factory=list, metadata=ruled(COLUMNS))
    image_root: str = setting("", OPTIONAL_PATH)
    overlong: str = setting("drop", one_of("drop", "truncate", "error"))


@dataclass
class EvalConfig(Section):
    """Greedy evaluation on held-out questions after the stage."""

    data: str = setting("", OPTIONAL_PATH)
    num_questions: int | None = setting(None, at_least(1, off="no evaluation"))

    def check(self, at: str) -> None:
        if self.num_questions and not self.data:
            raise UserError(
                f"{at}num_questions ({self.num_questions}) needs {at}data, which is empty; give {at}data=FILE.parquet, "
                f"or {at}num_questions=none"
            )


@dataclass
class RunFolderConfig(Section):
    """The folder of a run, ``dir``/``name``, and its random seed.

    A folder of another experiment is refused (``stages/identity.py`` lists the keys that make one), except for
    differences in ``allow_change``; with ``on_change`` restart it is moved aside and the stage starts again.
    """

    name: str = setting(MISSING, NAME, hint="run.dir is the folder it is in")
    dir: str = setting("runs", PATH)
    seed: int = setting(1, at_least(0))
    allow_change: list[str] = field(default_factory=list, metadata=ruled(KEYS))
    on_change: str = setting("refuse", one_of("refuse", "restart"))


@dataclass
class RunConfig(RunFolderConfig):
    """A training run: its length, in ``train_iters`` or in ``num_epochs`` (the other is 0), and its checkpoints."""

    train_iters: int = setting(0, at_least(0), replaces="num_epochs")
    num_epochs: int = setting(0, at_least(0), replaces="train_iters")
    save_interval: int = setting(100, at_least(1), hint="a number above run.train_iters saves only at the end")
    keep_checkpoints: int = setting(2, at_least(1), hint="a stage resumes from the last one")
    log_rollouts_per_iteration: int = setting(4, at_least(0))

    def check(self, at: str) -> None:
        if self.train_iters and self.num_epochs:
            raise UserError(
                f"{at}train_iters ({self.train_iters}) and {at}num_epochs ({self.num_epochs}) both set the length of "
                "the run; set one of them to 0"
            )
        if not self.train_iters and not self.num_epochs:
            raise UserError(
                f"{at}train_iters and {at}num_epochs are both 0, so that nothing would run; give one of them, for "
                f"example {at}num_epochs=1"
            )
