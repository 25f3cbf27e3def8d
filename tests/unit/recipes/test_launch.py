"""The launcher's command line: help, and one line for every mistake before anything is submitted or written."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest

from prism_megatron.config import apply_overrides, read_yaml
from recipes import STAGE_RECIPES
from recipes.launch import main
from recipes.local_run import ranks_here
from recipes.pipeline import PIPELINES, steps_of

SLURM = ["--executor", "slurm", "--cluster"]
SFT_8B = "sft_qwen3_vl_8b_1n8g_h100_bf16"
SFT_32B = "sft_qwen3_vl_32b_2n8g_h100_bf16"
FEW_CORES = 1 if any(Path("/dev").glob("nvidia[0-9]*")) else 2
LINEAGE = ["tiny_sft", "tiny_collect", "tiny_warmup", "tiny_align", "tiny_rlvr"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["launch", *arguments])
    return main()


def test_help_names_every_pipeline_and_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out.split()
    assert {*PIPELINES, *STAGE_RECIPES, "--cluster", "--dryrun", "--detach", "--estimate"} <= set(printed)


@pytest.mark.parametrize("where", [[], [*SLURM, "slurm/clusters/cpu.yaml", "--dryrun"]], ids=["local", "slurm"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_stf"], "unknown recipe or pipeline 'tiny_stf'; there are tiny_sft, tiny_"),
        (["sft_qwen3_vl_8b_2n8g_h100_bf16"], "there are sft_qwen3_vl_8b_1n8g_h100_bf16"),
        (["pipeline_ppo_qwen3_vl_8b_h100_bf16"], "_qwen3_vl_8b_h100_bf16, pipeline_"),
        ([SFT_8B, "--estimate", "--ranks", "4"], "--estimate takes the GPUs that the recipe's name says"),
        (["x"], "unknown recipe or pipeline 'x'; --help lists them all"),
        (["sft"], "unknown recipe or pipeline 'sft'; there are tiny_sft, sft_qwen3_vl_2b_1n8g_h100_bf16, sft_"),
        (["RLVR_8b"], "there are rlvr_grpo_qwen3_vl_8b_1n8g_h100_bf16, rlvr_"),
        (["tiny_pipeline", "rlvr.run.name=x"], "override 'rlvr.run.name=x' would take rlvr out of the pipeline's fold"),
        (["tiny_pipeline", "sft.run.dir=x"], "give the pipeline a folder of its own with --name"),
        (["tiny_pipeline", "--name", "../x"], "run.name must be a name, or names joined by /"),
        (["tiny_sft", "--name", "../x"], "run.name must be a name, or names joined by /"),
        (["tiny_sft", "global_batch_size=0"], "global_batch_size must be at least 1, got 0; the recipe has 32"),
        (["tiny_pipeline", "rlvr.run.train_iters=0"], "run.train_iters and run.num_epochs are both 0"),
        (
            [SFT_8B, "--estimate", "rollout.gpu_memory_utilization=7"],
            "rollout.gpu_memory_utilization must be in (0, 1]",
        ),
        (["tiny_sft", "optimizer.rl=1"], "unknown key 'optimizer.rl': optimizer has adam_beta1"),
        (["tiny_sft", "optimizer.lr=fast"], "override 'optimizer.lr=fast' is refused: optimizer.lr takes a number"),
        (
            ["tiny_sft", "run.train_iters=1.5"],
            "override 'run.train_iters=1.5' is refused: run.train_iters takes a",
        ),
        (["tiny_sft", "lr"], "override 'lr' is not of the form key=value"),
        (["tiny_pipeline", "lr=1"], "override 'lr=1' must start with a stage (sft, collect, warmup, align, rlvr)"),
        (["tiny_pipeline", "rlvr.lr=1"], "unknown key 'lr': this recipe has accuracy_weight"),
        (["tiny_sft", "--estimate"], "--estimate is for recipes of published sizes, not 'tiny_sft'"),
        ([SFT_8B, "--estimate", "parallel.context_parallel_size=3"], "world size 8 is not a multiple of"),
    ],
)
def test_a_wrong_name_or_override(
    arguments: list[str],
    message: str,
    where: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments, *where) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert message in said.splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny_sft", "--executor", "slurm"], "--executor slurm needs --cluster FILE; slurm/clusters/ has examples"),
        (["tiny_sft", *SLURM, "nowhere.yaml"], "no cluster file nowhere.yaml; slurm/clusters/ has examples"),
        (["tiny_study", *SLURM, "slurm/clusters/cpu.yaml"], "tiny_study runs here only"),
        (["pipeline_grpo_qwen3_vl_8b_h100_bf16"], "is for SLURM: its stages take different numbers of GPUs"),
        (["tiny_sft", "--cluster", "slurm/clusters/cpu.yaml"], "--cluster is for SLURM; add --executor slurm"),
        (["tiny_pipeline", "--detach"], "--detach is for SLURM; add --executor slurm, or leave it out to run here"),
        ([SFT_32B], "needs 2 nodes of 8 GPUs; give --executor slurm --cluster FILE, or --ranks N to run it here"),
        (["tiny_sft", *SLURM, "slurm/clusters/cpu.yaml", "--ranks", "2"], "--ranks is for a run here; on SLURM"),
        (["tiny_sft", "--ranks", "0"], "--ranks is 0; it must be at least 1"),
        (["tiny_pipeline", *SLURM, "slurm/clusters/h100_ssh.yaml"], "makes its data here; submit it from the cluster"),
        ([SFT_8B, *SLURM, "slurm/clusters/h100_pyxis.yaml"], "workdir /lustre/me/prism is not here; submit where"),
        ([SFT_8B, *SLURM, "FILE"], "the recipe needs 8 GPUs per node, the cluster file says gpus_per_node 4"),
    ],
)
def test_a_wrong_machine_to_run_on(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("{account: a, partition: b, gpus_per_node: 4}")
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "home"))
    assert run(monkeypatch, *(str(file) if word == "FILE" else word for word in arguments)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "ranks", "recipes"),
    [
        (["tiny_sft", "run.train_iters=3"], FEW_CORES, ["tiny_sft"]),
        (["tiny_align", "--ranks", "4"], 4, ["tiny_align"]),
        (["tiny_sft", "--name", "first", "run.train_iters=3"], FEW_CORES, ["tiny_sft"]),
        (["tiny_pipeline", "sft.run.train_iters=3"], FEW_CORES, LINEAGE),
        (["tiny_study", "--ranks", "2"], 2, 3 * [*LINEAGE, "tiny_rlvr"]),
        ([SFT_8B], 8, [SFT_8B]),
        ([SFT_32B, "--ranks", "4"], 4, [SFT_32B]),
    ],
)
def test_a_dry_run_here_prints_the_commands_and_runs_nothing(
    arguments: list[str],
    ranks: int,
    recipes: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 2})
    assert run(monkeypatch, *arguments, "--dryrun") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    start = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "recipes.train"]
    assert [words[:7] for words in commands] == [[*start, recipe] for recipe in recipes]
    assert ("run.name=first" in commands[0]) == ("first" in arguments)
    assert ("run.train_iters=3" in commands[0]) == any("train_iters" in word for word in arguments)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_on_slurm_prints_the_script_as_it_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # read while NeMo-Run copies the code
    wider_than_a_terminal = "a" * 100
    command = ["tiny_sft", "--name", wider_than_a_terminal, *SLURM, "slurm/clusters/cpu.yaml", "--dryrun"]
    assert run(monkeypatch, *command) == 0
    printed, _, script = capsys.readouterr().out.partition("\nscripts:\n")
    assert printed.endswith(Path(script.strip()).read_text())
    assert f"\nexport PRISM_STAGE_DIR=runs/{wider_than_a_terminal}\n" in printed


def test_show_prints_every_stage_as_config_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "pipeline_gspo_qwen3_vl_8b_h100_bf16", "rlvr.optimizer.lr=2e-6", "--show") == 0
    documents = capsys.readouterr().out.split("---\n")
    assert [document.splitlines()[0] for document in documents] == [
        "# sft: sft_qwen3_vl_8b_1n8g_h100_bf16",
        "# collect: collect_qwen3_vl_8b_1n8g_h100_bf16",
        "# warmup: warmup_qwen3_vl_8b_1n8g_h100_bf16",
        "# align: align_qwen3_vl_8b_2n8g_h100_bf16",
        "# rlvr: rlvr_gspo_qwen3_vl_8b_1n8g_h100_bf16",
    ]
    file = tmp_path / "my_rlvr.yaml"
    file.write_text(documents[-1])
    steps = steps_of("pipeline_gspo_qwen3_vl_8b_h100_bf16", "pipeline_gspo_qwen3_vl_8b_h100_bf16", [])
    expected = apply_overrides(steps[-1].config(), ["optimizer.lr=2e-6"])
    assert read_yaml(file) == expected
    command = ["--config", str(file), "--name", "first", "run.train_iters=3", "--ranks", "2"]
    assert run(monkeypatch, *command, "--dryrun") == 0
    assert capsys.readouterr().out == (
        f"torchrun --standalone --nproc-per-node 2 -m recipes.train --config {file} run.name=first run.train_iters=3\n"
    )


def test_a_recipe_or_a_file_must_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "--dryrun")
    assert ended.value.code == 2
    assert "give the NAME of a recipe or pipeline, or --config FILE.yaml" in capsys.readouterr().err
    assert run(monkeypatch, "--config", "nowhere.yaml") == 2
    assert "error: configuration nowhere.yaml cannot be read: [Errno 2] No such file" in capsys.readouterr().err


def test_one_rank_on_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})
    assert ranks_here("tiny_pipeline", requested=None) == 1
    assert ranks_here("tiny_pipeline", requested=2) == 2


def test_estimate_of_a_pipeline(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "pipeline_gspo_qwen3_vl_30b_a3b_h100_fp8", "--estimate") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "qwen3" in line] == [
        "sft_qwen3_vl_30b_a3b_2n8g_h100_fp8",
        "collect_qwen3_vl_30b_a3b_1n8g_h100_bf16",
        "warmup_qwen3_vl_30b_a3b_1n8g_h100_bf16",
        "align_qwen3_vl_30b_a3b_4n8g_h100_fp8",
        "rlvr_gspo_qwen3_vl_30b_a3b_4n8g_h100_fp8",
    ]
    assert sum(line.startswith("total") for line in lines) == 5
    assert run(monkeypatch, SFT_32B, "--estimate", "parallel.tensor_model_parallel_size=4") == 2
    assert re.search(r"the most loaded GPU needs \d+ GB of 80", capsys.readouterr().err)
