"""Commands import nothing that takes seconds for their help, for estimates and for plans."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("torch", "torchvision", "megatron", "transformers", "vllm", "networkx", "sympy", "matplotlib", "tensorboard"),
    *("nemo_run", "torchx"),
)
SECONDS = 2.0  # of CPU time that a command may take
WORKERS = ("tools.gpu_check.worker",)  # started by a command, never by a user


def modules() -> list[str]:
    """Every command of the repository: a module that parses arguments."""
    paths = [path for folder in ("prism_megatron", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = [path.relative_to(ROOT).with_suffix("") for path in paths if "ArgumentParser(" in path.read_text()]
    return sorted(".".join(path.parts).removesuffix(".__main__") for path in found)


COMMANDS = [
    *([module, "--help"] for module in modules() if module not in WORKERS),
    ["recipes.train", "--help"],
    ["recipes.pipeline", "--help"],
    ["recipes.launch", "pipeline_gspo_qwen3_vl_8b_h100_bf16", "--show"],
    ["recipes.launch", "tiny_pipeline", "--dryrun"],
    ["recipes.launch", "rlvr_gspo_qwen3_vl_8b_1n8g_h100_bf16", "--estimate"],
    ["tools.plan", "--model", "2b", "--top", "1"],
    ["recipes.launch", "tiny_sft", "run.name=never"],  # a launcher lives as long as its stages
]
# Runs every command in one process. A heavy module is refused, so that the next command meets it anew.
RUNNER = """
import contextlib, io, json, runpy, sys, time

heavy, commands = json.loads(sys.argv[1])
asked = []


class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in heavy:
            asked.append(name)
            raise ImportError(f"a command imports {name}")


sys.meta_path.insert(0, Refuses())
sys.executable = "/bin/true"  # the processes that a command starts are their own affair
results = []
for module, *arguments in commands:
    asked.clear()
    sys.argv = [module, *arguments]
    error, start_time = "", time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            error = "" if not end.code else f"exit status {end.code}"
        except Exception as raised:
            error = repr(raised)
    seconds = time.process_time() - start_time
    results.append([" ".join([module, *arguments]), sorted(set(asked)), error, seconds])
print(json.dumps(results))
"""


def test_help_estimates_and_plans_import_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, json.dumps([HEAVY, COMMANDS])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == len(COMMANDS)
    ended = {command: error for command, _, error, _ in results if error}
    assert ended == {"recipes.launch tiny_sft run.name=never": "exit status 1"}  # nothing has run
    assert [(command, heavy) for command, heavy, *_ in results if heavy] == []
    assert [(command, seconds) for command, *_, seconds in results if seconds >= SECONDS] == []
