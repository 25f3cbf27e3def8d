"""What makes a run the same experiment: the configuration that changes its result, and the content of its inputs.

It is stored with each checkpoint and in ``finished.json``. A run folder with another identity is refused, or, where
``run.on_change`` is restart, moved aside and begun anew. Imports no torch: launchers ask what is finished.
"""

from __future__ import annotations

import dataclasses
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

# Patterns of keys that do not change what is trained. A key that matches none is part of the identity.
NOT_IDENTITY = (
    *("run.name", "run.dir"),  # where
    *("run.save_interval", "run.keep_checkpoints", "run.log_rollouts_per_iteration"),  # what is stored on the way
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
    *("run.train_iters", "run.num_epochs"),  # changes() has their rule
)
# Where packing does not decide what is seen of a row; the discriminator's branches are cut to fit.
NOT_IDENTITY_OF: dict[type[cfg.StageConfig], tuple[str, ...]] = {
    cfg.SFTConfig: ("max_tokens_per_microbatch",),
    cfg.CollectConfig: ("max_tokens_per_microbatch", "optimizer.*"),
    cfg.RLVRConfig: ("max_tokens_per_microbatch",),
}
# What changes the evaluation after training only: a finished stage is evaluated again.
EVALUATION = ("eval.*",)
EVALUATION_OF: dict[type[cfg.StageConfig], tuple[str, ...]] = {
    cfg.SFTConfig: ("rollout.*",),
    cfg.WarmupConfig: ("rollout.samples_per_prompt", "rollout.temperature", "rollout.top_p"),
}
MODELS = ("model.hf_checkpoint", "discriminator.hf_checkpoint")
INPUTS = (*MODELS, "data", "alignment_data", "candidates", "eval.data")

_MODEL_FILES = (".json", ".txt", ".jinja", ".model", ".safetensors", ".bin", ".pt", ".pth", ".distcp", ".metadata")
_HASHED_WHOLE = 1 << 24  # bytes; of a larger file in a directory, its start and samples
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Identity:
    """``config`` and ``evaluation``: values by key. ``inputs``: path and checksum by key, None of what is not there."""

    config: dict[str, Any]
    evaluation: dict[str, Any]
    inputs: dict[str, dict[str, str | None]]
    train_iters: int
    num_epochs: int = 0

    @classmethod
    def of(cls, config: cfg.StageConfig, hashed: HashedFiles) -> Identity:
        """That of a run of this configuration, on its inputs as they are now."""
        parts: dict[str | None, dict[str, Any]] = {"config": {}, "evaluation": {}, None: {}}
        inputs: dict[str, dict[str, str | None]] = {}
        for key, value in flat(config).items():
            if key not in INPUTS:
                parts[part_of(type(config), key)][key] = value
            elif value:
                sha256 = hashed.fingerprint(Path(value)) if key in MODELS else hashed.of_data(value)
                inputs[key] = {"path": value, "sha256": sha256}
        train_iters = 0 if isinstance(config, cfg.CollectConfig) else config.run.train_iters
        return cls(parts["config"], parts["evaluation"], inputs, train_iters, config.run.num_epochs)

    @classmethod
    def stored(cls, content: Mapping[str, Any] | None) -> Identity | None:
        """What was stored under ``identity``; None of a run that was before there was any."""
        return cls(**content["identity"]) if content and "identity" in content else None

    def is_evaluated_as(self, new: Identity) -> bool:
        """Whether ``new`` asks for no evaluation but this one's."""
        before, now = (identity.inputs.get("eval.data", {}).get("sha256") for identity in (self, new))
        alike = self.evaluation == new.evaluation and (before == now or None in (before, now))
        return alike or not new.evaluation["eval.num_questions"]


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values of a configuration by dotted key."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{field.name}.")
        else:
            values[prefix + field.name] = value
    return values


def part_of(kind: type[cfg.StageConfig], key: str) -> str | None:
    """``config`` or ``evaluation``: the part of the identity that a key belongs to. None if to neither."""

    def is_in(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)

    if is_in(NOT_IDENTITY) or is_in(NOT_IDENTITY_OF.get(kind, ())):
        return None
    return "evaluation" if is_in(EVALUATION) or is_in(EVALUATION_OF.get(kind, ())) else "config"


def changes(stored: Identity, new: Identity, config: cfg.StageConfig, trained: int) -> dict[str, str]:
    """What changed so that the run would not go on as it began: "old -> new" by key, without ``run.allow_change``.

    ``train_iters`` may rise where the iterations ``trained`` had the learning rates that it gives them now.
    """
    defaults = flat(type(config)())
    found: dict[str, str] = {}
    for key, value in new.config.items():
        before = stored.config.get(key, defaults[key])  # a key that is newer than what was stored
        if before not in (value, cfg.MISSING):
            found[key] = f"{_short(before)} -> {_short(value)}"
    for key, now in new.inputs.items():
        was = stored.inputs.get(key, now)
        if key != "eval.data" and was["sha256"] != now["sha256"] and None not in (was["sha256"], now["sha256"]):
            paths = now["path"] if was["path"] == now["path"] else f"{was['path']} -> {now['path']}"
            found[key] = f"{paths} (other content)"
    iterations = f"{stored.train_iters} -> {new.train_iters}"
    if new.train_iters < trained:
        found["run.train_iters"] = f"{iterations}, fewer than the {trained} that are trained"
    elif not _has_rates(config, stored.train_iters, trained):
        found["run.train_iters"] = f"{iterations} changes the learning rates of the {trained} iterations trained"
    return {key: text for key, text in found.items() if not _is_allowed(key, config.run.allow_change)}


def is_finished(config: cfg.StageConfig) -> bool:
    """Whether this very stage has ended before, on the same inputs.

    Raises UserError if what has ended in its folder is another experiment, unless ``run.on_change`` is restart.
    """
    directory = cfg.stage_dir(config)
    stored = Identity.stored(read_object(directory / cfg.FINISHED))
    if stored is None:
        return False
    as_long = bool(config.run.train_iters) or stored.num_epochs == config.run.num_epochs
    if not config.run.train_iters:  # the iterations of these epochs are known when the rows are counted
        config = replace(config, run=replace(config.run, train_iters=stored.train_iters))
    new = Identity.of(config, HashedFiles(directory))
    if found := changes(stored, new, config, stored.train_iters):
        if config.run.on_change == "restart":
            return False
        raise refusal(directory, found)
    return as_long and stored.train_iters == new.train_iters and stored.is_evaluated_as(new)


def refusal(directory: Path, found: Mapping[str, str]) -> UserError:
    """The one line about a run folder with another experiment."""
    said = "; ".join(f"{key}: {text}" for key, text in found.items())
    return UserError(
        f"{directory} holds another experiment ({said}); give this one another run.name, remove the folder, or, to go "
        f"on in it all the same, add run.allow_change=[{','.join(found)}]"
    )


class HashedFiles:
    """Checksums of inputs. Those of files are stored in a run folder, so that a start need not read them again."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "inputs.json"
        self._known = read_object(self._path) or {}

    def write(self) -> None:
        write_atomic(self._path, json.dumps(self._known, indent=2) + "\n")

    def fingerprint(self, path: Path) -> str | None:
        """Checksum of the content of a file or of a directory of weights. None if it is not there."""
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
        """Checksum of what the files of a data setting hold, in their order. None if there is none.

        Pictures that rows name by their paths are not read.
        """
        try:
            files = data_files(data)
        except UserError:  # a start says it; what is finished does not need its data
            return None
        found = [str(self.fingerprint(file)) for file in files]
        return found[0] if len(found) == 1 else hashlib.sha256(" ".join(found).encode()).hexdigest()


def _of_directory(directory: Path) -> str:
    """That of the manifest, where there is one: of names, sizes and samples of the files otherwise."""
    if (directory / MANIFEST).is_file():
        return str(read_manifest(directory)["sha256"])
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name.endswith(_MODEL_FILES):
            size = path.stat().st_size
            digest.update(f"{path.name}\0{size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HASHED_WHOLE))
                for number in range(_SAMPLES) if size > _HASHED_WHOLE else ():
                    file.seek((size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _has_rates(config: cfg.StageConfig, before: int, trained: int) -> bool:
    """Whether the first ``trained`` iterations have the learning rates that they had with ``before`` to come."""
    if before == config.run.train_iters:
        return True
    optimizers = [value for value in vars(config).values() if isinstance(value, cfg.OptimizerConfig)]
    return all(
        learning_rate(optimizer, iteration, before) == learning_rate(optimizer, iteration, config.run.train_iters)
        for optimizer in optimizers
        for iteration in range(trained)
    )


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in allowed)


def _short(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)
