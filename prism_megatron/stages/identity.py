"""The identity of a run: the settings that change its result, and the content of its input files.

It is stored with each checkpoint and in ``finished.json``. A run folder with another identity is refused or, if
``run.on_change`` is restart, moved to another folder. This module imports no torch, because launchers use it to find
finished stages.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_megatron import config as cfg
from prism_megatron.convert.manifest import MANIFEST, digest_file, read_manifest
from prism_megatron.data.sources import data_files
from prism_megatron.errors import UserError
from prism_megatron.files import read_object, write_atomic
from prism_megatron.optim.schedule import learning_rate
from prism_megatron.overrides import flat, read_old

# Patterns of keys that do not change what is trained. Any other key is part of the identity.
NOT_IDENTITY = (
    *("run.name", "run.dir"),
    *("run.save_interval", "run.keep_checkpoints", "run.log_rollouts_per_iteration"),  # stored during training
    *("run.allow_change", "run.on_change"),
    *("parallel.*", "optimizer.use_distributed_optimizer", "discriminator_optimizer.use_distributed_optimizer"),
    *("model.recompute", "model.max_hidden_size"),
    *("rollout.engine", "rollout.transport", "rollout.timeout_seconds", "rollout.tensor_model_parallel_size"),
    *("rollout.max_num_seqs", "rollout.kv_cache_gib", "rollout.gpu_memory_utilization", "rollout.sleep_level"),
    *(
        "rollout.enforce_eager",
        "rollout.sync_*",
        "rollout.guard_*",
        "rollout.max_logprob_*",
        "rollout.images_per_prompt",
    ),
    *("dataset.cache", "dataset.max_bad_fraction", "dataset.workers"),
    *("run.train_iters", "run.num_epochs"),  # rules in changes()
)
# Stages whose result does not depend on packing; the discriminator's branches are truncated to fit a micro-batch.
NOT_IDENTITY_OF: dict[type[cfg.StageConfig], tuple[str, ...]] = {
    cfg.SFTConfig: ("max_tokens_per_microbatch",),
    cfg.RLVRConfig: ("max_tokens_per_microbatch",),
}
# Keys that change only the evaluation after training: a finished stage is evaluated again.
EVALUATION = ("eval.*",)
EVALUATION_OF: dict[type[cfg.StageConfig], tuple[str, ...]] = {cfg.SFTConfig: ("rollout.*",)}
MODELS = ("model.hf_checkpoint", "discriminator.hf_checkpoint")
INPUTS = (*MODELS, "data", "alignment_data", "candidates", "eval.data")

_MODEL_FILES = (".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")
_FULLY_HASHED_BYTES = 1 << 24  # of a larger file in a directory, only the beginning and samples are hashed
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Identity:
    """Values of ``config`` and ``evaluation`` by key; of ``inputs`` path and checksum, None if the path is missing."""

    config: dict[str, Any]
    evaluation: dict[str, Any]
    inputs: dict[str, dict[str, str | None]]
    train_iters: int
    num_epochs: int = 0

    @classmethod
    def of(cls, config: cfg.StageConfig, hashed: HashedFiles) -> Identity:
        """Return the identity of a run with this configuration on its current inputs."""
        parts: dict[str | None, dict[str, Any]] = {"config": {}, "evaluation": {}, None: {}}
        inputs: dict[str, dict[str, str | None]] = {}
        for key, value in flat(config).items():
            if key not in INPUTS:
                parts[part_of(type(config), key)][key] = value
            elif value:
                sha256 = hashed.fingerprint(Path(value)) if key in MODELS else hashed.of_data(value)
                inputs[key] = {"path": value, "sha256": sha256}
        run = config.run
        length = (run.train_iters, run.num_epochs) if isinstance(run, cfg.RunConfig) else (0, 0)
        return cls(parts["config"], parts["evaluation"], inputs, *length)

    @classmethod
    def stored(cls, content: Mapping[str, Any] | None) -> Identity | None:
        """Read the identity from a manifest or ``finished.json``; None if an old version of the code wrote it."""
        if not content or "identity" not in content:
            return None
        stored = cls(**content["identity"])
        config, evaluation = (
            {key: read_old(key, value) for key, value in part.items()} for part in (stored.config, stored.evaluation)
        )
        return replace(stored, config=config, evaluation=evaluation)

    def is_evaluated_as(self, new: Identity) -> bool:
        """Return whether this run's evaluation is the one that ``new`` requests, or ``new`` requests none."""
        before, now = (identity.inputs.get("eval.data", {}).get("sha256") for identity in (self, new))
        # The stored one may also have keys that a stage no longer has.
        same = self.evaluation | new.evaluation == self.evaluation and (before == now or None in (before, now))
        return same or not new.evaluation.get("eval.num_questions")


def part_of(kind: type[cfg.StageConfig], key: str) -> str | None:
    """Return the part of the identity that a key belongs to, "config" or "evaluation"; None if to neither."""

    def is_in(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    if is_in(NOT_IDENTITY) or is_in(NOT_IDENTITY_OF.get(kind, ())):
        return None
    return "evaluation" if is_in(EVALUATION) or is_in(EVALUATION_OF.get(kind, ())) else "config"


def changes(stored: Identity, new: Identity, config: cfg.StageConfig, trained: int) -> dict[str, str]:
    """Return changes that would make a resumed run another experiment, as "old -> new" by key.

    Keys of ``run.allow_change`` are left out. ``train_iters`` may be raised if the learning rates of the ``trained``
    iterations stay the same.
    """
    defaults = flat(type(config)())
    found: dict[str, str] = {}
    for key, value in new.config.items():
        before = stored.config.get(key, defaults[key])  # a key newer than the stored identity
        if before not in (value, cfg.MISSING):
            found[key] = f"{_short(before)} -> {_short(value)}"
    for key, now in new.inputs.items():
        was = stored.inputs.get(key, now)
        if key != "eval.data" and was["sha256"] != now["sha256"] and None not in (was["sha256"], now["sha256"]):
            paths = now["path"] if was["path"] == now["path"] else f"{was['path']} -> {now['path']}"
            found[key] = f"{paths} (other content)"
    iterations = f"{stored.train_iters} -> {new.train_iters}"
    if new.train_iters < trained:
        found["run.train_iters"] = f"{iterations}, fewer than the {trained} already trained"
    elif stored.train_iters != new.train_iters and not _same_rates(config, (stored, new), trained):
        found["run.train_iters"] = (
            f"{iterations} changes the learning rates of the {trained} iterations already trained"
        )
    return {key: text for key, text in found.items() if not _is_allowed(key, config.run.allow_change)}


def is_finished(config: cfg.StageConfig) -> bool:
    """Return whether this stage has finished before, on the same inputs.

    Raises UserError if another experiment has finished in its folder, unless ``run.on_change`` is restart.
    """
    directory = cfg.stage_dir(config)
    stored = Identity.stored(read_object(directory / cfg.FINISHED))
    if stored is None:
        return False
    as_long = True
    if isinstance(config.run, cfg.RunConfig) and config.run.num_epochs:  # its iterations: once the rows are counted
        as_long = stored.num_epochs == config.run.num_epochs
        config = replace(config, run=replace(config.run, train_iters=stored.train_iters))
    new = Identity.of(config, HashedFiles(directory))
    if found := changes(stored, new, config, stored.train_iters):
        if config.run.on_change == "restart":
            return False
        raise refusal(directory, found)
    return as_long and stored.train_iters == new.train_iters and stored.is_evaluated_as(new)


def refusal(directory: Path, found: Mapping[str, str]) -> UserError:
    """Return the error for a run folder that belongs to another experiment."""
    summary = "; ".join(f"{key}: {text}" for key, text in found.items())
    return UserError(
        f"{directory} holds another experiment ({summary}); give this one another run.name, remove the folder, or, to "
        f"resume it all the same, add run.allow_change=[{','.join(found)}]"
    )


class HashedFiles:
    """Checksums of inputs; those of files are cached in the run folder by size, time and inode."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "inputs.json"
        self._known = read_object(self._path) or {}

    def write(self) -> None:
        write_atomic(self._path, json.dumps(self._known, indent=2) + "\n")

    def fingerprint(self, path: Path) -> str | None:
        """Return the checksum of a file or of a directory of weights; None if there is none."""
        if path.is_dir():
            return _of_directory(path)
        if not path.is_file():
            return None
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(str(path.resolve()))
        if not isinstance(known, dict) or known.get("stamp") != stamp:
            known = {"stamp": stamp, "sha256": digest_file(path).sha256}
            self._known[str(path.resolve())] = known
        return str(known["sha256"])

    def of_data(self, data: str) -> str | None:
        """Return the checksum of the files of a data setting, in order; None if there are none.

        Image files that rows refer to by path are not read.
        """
        try:
            files = data_files(data)
        except UserError:  # reported at a start; a finished stage does not need its data
            return None
        found = [str(self.fingerprint(file)) for file in files]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def _of_directory(directory: Path) -> str:
    """Return the manifest's checksum; without a manifest, one of names, sizes and samples of the files."""
    if (directory / MANIFEST).is_file():
        return str(read_manifest(directory)["sha256"])
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name.endswith(_MODEL_FILES):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_FULLY_HASHED_BYTES))
                for number in range(_SAMPLES) if size > _FULLY_HASHED_BYTES else ():
                    file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _same_rates(config: cfg.StageConfig, identities: tuple[Identity, Identity], trained: int) -> bool:
    """Return whether the first ``trained`` iterations have the same learning rates in both runs."""
    first, second = (identity.train_iters for identity in identities)
    optimizers = [value for value in vars(config).values() if isinstance(value, cfg.OptimizerConfig)]
    return all(
        learning_rate(optimizer, iteration, first) == learning_rate(optimizer, iteration, second)
        for optimizer in optimizers
        for iteration in range(trained)
    )


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in allowed)


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
