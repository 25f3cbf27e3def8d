"""Recipes as NeMo-Run knows them: registered by name, open to typed overrides, and equal to the recipe once built."""

from __future__ import annotations

from pathlib import Path

import fiddle
import pytest

from prism_megatron.train import run_and_exit
from recipes import STAGE_RECIPES, factories
from recipes.__main__ import main
from recipes.upstream import nemo_run

run = nemo_run()


def test_every_recipe_is_a_factory_that_builds_it() -> None:
    for name, recipe in STAGE_RECIPES.items():
        task = run.cli.resolve_factory(run_and_exit, name)()
        assert task.__fn_or_cls__ is run_and_exit
        assert fiddle.build(task.config) == recipe()


def test_nemo_run_parses_overrides_of_it_by_type() -> None:
    context = run.cli.RunContext(name="test", factory="tiny_rlvr")
    changes = ["config.optimizer.lr=0.5", "config.run.train_iters=7", "config.model.freeze=['vision']"]
    config = fiddle.build(context.parse_fn(run_and_exit, changes).config)
    assert (config.optimizer.lr, config.run.train_iters, config.model.freeze) == (0.5, 7, ["vision"])
    with pytest.raises(Exception, match="train_iters"):
        context.parse_fn(run_and_exit, ["config.run.train_iters=many"])


def test_slurm_jobs_know_where_their_stage_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PRISM_CLUSTER", raising=False)
    with pytest.raises(ValueError, match="needs PRISM_CLUSTER=FILE"):
        factories.slurm()
    monkeypatch.setenv("PRISM_CLUSTER", str(Path("slurm/clusters/cpu.yaml").resolve()))
    executor = fiddle.build(factories.slurm())
    task = factories.task("tiny_sft")
    task.config.run.name = "elsewhere"
    factories.StageFolder().setup(task, executor)
    assert "export PRISM_STAGE_DIR=runs/elsewhere" in executor.setup_lines
    task.config.global_batch_size = 0
    for anywhere in (executor, fiddle.build(factories.local())):
        with pytest.raises(ValueError, match="global_batch_size must be at least 1, got 0"):
            factories.StageFolder().setup(task, anywhere)
    assert (executor.nodes, executor.srun_args) == (2, ["bash", "slurm/rank.sh"])


def test_help_names_every_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["recipes", "--help"])
    main()
    assert {*STAGE_RECIPES, "--factory", "run.executor=slurm"} <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("config.run.train_iters=0", "error: run.train_iters and run.num_epochs are both 0"),
        ("config.run.train_iters=many", "error: Failed to parse"),
        ("config.run.train=1", "error: Invalid argument"),
        ("run.executor=slurm", "error: run.executor=slurm needs PRISM_CLUSTER=FILE; slurm/clusters/ has examples"),
    ],
)
def test_a_wrong_override_is_refused_by_a_dry_run_too(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PRISM_CLUSTER", raising=False)
    monkeypatch.setattr("sys.argv", ["recipes", "--factory", "tiny_sft", override, "--dryrun"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
