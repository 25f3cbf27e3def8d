"""After kills, damage and a full disk the newest intact checkpoint is loaded, and no other one."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prism_megatron.checkpoint.checkpointer import Checkpointer
from prism_megatron.convert.manifest import first_fault

ROOT = Path(__file__).resolve().parents[3]
WORKER = str(Path(__file__).with_name("saving_worker.py"))
SEED, KILLS = 7, 32


def run_worker(prefix: list[str], *arguments: str, timeout: float = 900) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*prefix, sys.executable, WORKER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:  # type: ignore[type-arg]
    """Run many times, each run killed and resumed by the next; return the checkpoints and each run's report."""
    directory = tmp_path_factory.mktemp("killed") / "checkpoints"
    report = directory.with_name("report.json")
    run_worker([], "kill", str(directory), str(report), str(SEED), str(KILLS))
    return directory, json.loads(report.read_text())


def test_every_killed_run_is_resumed_from_its_last_save(killed: tuple[Path, list[dict]]) -> None:  # type: ignore[type-arg]
    directory, runs = killed
    assert len(runs) >= KILLS
    finished = 0
    for number, run in enumerate(runs):
        assert run["resumed"] is not None, f"seed {SEED}, run {number} did not start"
        assert run["resumed"]["right"], f"seed {SEED}, run {number}: state is not that of its iteration"
        assert run["resumed"]["iteration"] >= finished, f"seed {SEED}, run {number} lost a finished checkpoint"
        finished = max([run["resumed"]["iteration"], *run["finished"]])
    assert sum(run["during_save"] for run in runs) >= KILLS // 4, "kills fell into saves"
    assert finished >= KILLS // 4, "and saves were finished too"
    assert len(list(directory.glob("iter_*"))) <= 2 + 1  # one more while an old one is being removed


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "removed"])
def test_a_damaged_file_is_never_loaded(
    damage: str,
    killed: tuple[Path, list[dict]],  # type: ignore[type-arg]
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(damage)
    older, newer = two_intact(killed[0], tmp_path / "intact")
    names = sorted(path.name for path in newer.iterdir())
    assert {".metadata", "metadata.json", "manifest.json", "__0_0.distcp"} <= set(names)
    for name in names:
        for trial in range(8 if damage == "flipped" else 1):
            directory = tmp_path / f"{name}-{trial}"
            shutil.copytree(tmp_path / "intact", directory, copy_function=os.link)
            damage_file(directory / newer.name / name, damage, rng)
            assert first_fault(directory / newer.name) is not None, (name, trial)
            assert Checkpointer(directory, keep=2).latest() == int(older.name[5:])
            said = capsys.readouterr().out
            assert f"skipped {newer.name} (" in said
            assert f"resuming from iteration {int(older.name[5:])}" in said
            assert name in said


def two_intact(directory: Path, copy: Path) -> tuple[Path, Path]:
    """Copy the two newest intact checkpoints; a run may have been killed while it removed an older one."""
    intact = [path for path in sorted(directory.glob("iter_*")) if first_fault(path) is None][-2:]
    for path in intact:
        shutil.copytree(path, copy / path.name)
    return intact[0], intact[1]


def damage_file(path: Path, damage: str, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()  # it is a link
    if damage == "removed":
        return
    if damage == "truncated":
        del content[rng.randrange(len(content)) :]
    elif damage == "emptied":
        content.clear()
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_no_intact_checkpoint_is_an_error(killed: tuple[Path, list[dict]], tmp_path: Path) -> None:  # type: ignore[type-arg]
    two_intact(killed[0], tmp_path)
    for path in tmp_path.glob("iter_*/.metadata"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"is intact: iter_\d+ \(\.metadata is missing\); iter_\d+ \(\.meta.*Remove them"
    ):
        Checkpointer(tmp_path, keep=2).latest()


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none", keep=2).latest() == 0
    (tmp_path / ".iter_0000005.1234abcd.partial").mkdir()
    assert Checkpointer(tmp_path, keep=2).latest() == 0


def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path: Path) -> None:
    small = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64m tmpfs {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run([*small, mount], check=False, capture_output=True).returncode:
        pytest.skip("a small file system of one's own cannot be mounted here")
    report = tmp_path.parent / f"{tmp_path.name}.json"
    run_worker([*small, f'{mount} && exec "$@"', "sh"], "full", str(tmp_path), str(report))
    found = json.loads(report.read_text())
    assert found["errno"] == errno.ENOSPC
    assert found["left"] == ["ballast", "iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
    assert found["latest_when_full"] == 2
    assert found["latest_after"] == 3
    assert found["right"]
