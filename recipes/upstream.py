"""Private and undocumented names of NeMo-Run. Nothing else in this repository uses such a name.

Each entry says what it is for and what breaks without it. ``tests/unit/test_upstream.py`` compares ``CHECKED_ON`` with
the installed version, and each name with the signature that is used. Of NeMo-Run's command line, ``__main__.py`` also
overrides three methods of ``RunContext``: their signatures are checked there, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHECKED_ON = "0.11.1"

# Without a container NeMo-Run replaces this path in every script by the job's folder, inside longer paths as well.
REPLACED_PATH = "/nemo_run"
# In that folder, the code that the packager copied: slurm/job.sh is sourced from there.
CODE_FOLDER = "code"
# In it, too, what srun prints; slurm/job.sh merges it. Without the name, a failed job's report has no log.
CONSOLE_FILES = "log-*_${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}.out"


def nemo_run() -> Any:
    """NeMo-Run, imported when it is needed: it takes seconds. It reads NEMORUN_HOME once, when it is imported."""
    os.environ.setdefault("NEMORUN_HOME", str(Path("runs/.nemo_run").resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in what NeMo-Run imports
        import nemo_run as run

    return run


def cli_error() -> type[Exception]:
    """Exception of its command line for a wrong argument, to be printed as one line. All others it calls unexpected."""
    from nemo_run.cli.cli_parser import CLIException

    error: type[Exception] = CLIException
    return error


def newest_scripts(home: Path, title: str, jobs: Iterable[str]) -> list[Path]:
    """The sbatch scripts of the last experiment of this title, which --dryrun shows. Their place is not documented."""
    folder = max((home / "experiments" / title).iterdir(), key=lambda path: path.stat().st_mtime)
    return [folder / f"{job}_sbatch.sh" for job in jobs]
