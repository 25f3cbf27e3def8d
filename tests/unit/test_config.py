"""Recipes, overrides, and configurations of earlier versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from prism_megatron import config as cfg
from prism_megatron.errors import UserError
from prism_megatron.overrides import ZERO_WAS_OFF, flat
from prism_megatron.stages.identity import HashedFiles, Identity, changes
from recipes import STAGE_RECIPES
from recipes.train import load


@pytest.mark.parametrize("name", sorted(STAGE_RECIPES))
def test_every_recipe_is_complete(name: str) -> None:
    config = cfg.apply_overrides(STAGE_RECIPES[name](), [])
    assert cfg.to_yaml(config) == cfg.to_yaml(cfg.apply_overrides(config, []))


def test_dotted_override() -> None:
    config = load("tiny_sft", ["optimizer.lr=3e-3", "parallel.tensor_model_parallel_size=2", "model.freeze=[vision]"])
    assert config.optimizer.lr == 3e-3
    assert config.parallel.tensor_model_parallel_size == 2
    assert config.model.freeze == ["vision"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimiser.lr=1"], "unknown key 'optimiser.lr': this recipe has data, dataset, eval"),
        (["optimizer.learning_rate=1"], "unknown key 'optimizer.learning_rate': optimizer has adam_beta1"),
        (["optimizer.lr"], "override 'optimizer.lr' is not of the form key=value"),
        (["optimizer.lr=fast"], "override 'optimizer.lr=fast' is refused"),
    ],
)
def test_bad_overrides_say_what_is_wrong(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load("tiny_sft", overrides)
    assert message in str(error.value)


def test_a_router_that_could_not_learn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"discriminator.topk must be at least 2, got 1; the router learns nothing"):
        load("tiny_align", ["discriminator.topk=1"])


def test_balancing_experts_that_are_all_chosen_is_refused() -> None:
    """Every token takes both experts of its branch: the load-balancing loss is constant, its gradient zero."""
    coefficient, four = "discriminator.load_balance_coeff=0.01", "discriminator.num_experts=4"
    with pytest.raises(
        ValueError,
        match=r"load_balance_coeff must be 0, got 0.01: with dedicated experts and discriminator.topk \(2\) half of "
        r"discriminator.num_experts \(4\) .* set it to 0, or raise discriminator.num_experts",
    ):
        load("tiny_align", [coefficient, four])
    for allowed in ("discriminator.num_experts=8", "discriminator.experts=shared"):
        config = load("tiny_align", [coefficient, four, allowed])
        assert isinstance(config, cfg.AlignConfig)
        assert config.discriminator.load_balance_coeff == 0.01


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rollout.temperature=0",
            r"rollout.temperature \(0\) must be above 0 and rollout.top_p \(1\) 1 for a policy",
        ),
        ("rollout.top_p=0.9", r"rollout.top_p \(0.9\) 1 for a policy gradient"),
        ("rollout.engine=server", "rollout.engine must be colocated or child, got 'server'"),
        (
            "rollout.transport=rdma",
            "rollout.transport must be auto or shared_memory or collective or cuda_ipc, got 'rdma'",
        ),
        ("rollout.transport=collective", r"rollout.transport \(collective\) is for rollout.engine=child; leave it at"),
        ("rollout.timeout_seconds=-1", r"rollout.timeout_seconds must be none \(no limit\) or above 0, got -1"),
        ("rollout.sleep_level=3", "rollout.sleep_level must be 0 or 1 or 2, got 3"),
    ],
)
def test_rollouts_that_cannot_be_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("tiny_rlvr", [override])


def test_data_may_be_collected_at_any_sampling() -> None:
    rollout = load("tiny_collect", ["rollout.top_p=0.9", "rollout.temperature=0.7"]).rollout
    assert (rollout.top_p, rollout.temperature) == (0.9, 0.7)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("tiny_align", ["gradient_penalty=1"], r"gradient_penalty \(1\) needs a gradient_penalty_std above 0"),
        (
            "tiny_align",
            ["replay.prompts=8"],
            r"replay.responses_per_iteration \(0\) must be at least 1 with replay.prompts \(8\); .* replay.prompts=n",
        ),
        ("tiny_align", ["compat=reference", "label_smoothing=0.1"], "which has no label_smoothing"),
        (
            "tiny_rlvr",
            ["algorithm=dapo", "oversampling=2"],
            "an importance_cap, got algorithm=dapo, importance_cap=none",
        ),
        ("tiny_rlvr", ["oversampling=0.5"], "oversampling must be at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(recipe: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(recipe, overrides)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "tiny_warmup",
            ["discriminator.max_branch_tokens=3000"],
            r"max_tokens_per_microbatch \(6144\) .* 6192 tokens with prompts of up to 96 .* raise it to 6192, or lower "
            r"discriminator.max_branch_tokens",
        ),
        ("tiny_warmup", ["max_tokens_per_microbatch=190"], r"\(190\) .* 196 tokens .* raise it to 196"),
        (
            "tiny_align",
            ["gradient_penalty=1", "gradient_penalty_std=1", "discriminator.max_branch_tokens=2000"],
            "raise it to 6288",
        ),
        (
            "tiny_align",
            ["compat=reference", "max_tokens_per_microbatch=800"],
            "raise it to 864, or lower rollout.max_r",
        ),
        (
            "tiny_align",
            ["compat=reference", "discriminator.max_branch_tokens=9"],
            "or discriminator.max_branch_tokens;",
        ),
        ("tiny_align", ["discriminator.max_branch_tokens=1"], r"must be none \(all that fits\) or at least 2, got 1"),
    ],
)
def test_pairs_that_would_not_fit_are_refused(recipe: str, overrides: list[str], message: str) -> None:
    """Two (three) sequences of 96 prompt tokens; the paper's cuts demonstrations at 512 and responses never."""
    with pytest.raises(ValueError, match=message):
        load(recipe, overrides)


def test_unknown_recipe() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'tiny_stf'; there are tiny_sft"):
        load("tiny_stf", [])


def test_a_value_left_out_is_named() -> None:
    with pytest.raises(ValueError, match="unset; give data=VALUE"):
        cfg.apply_overrides(
            cfg.SFTConfig(
                stage="sft",
                run=cfg.RunConfig(name="x", train_iters=1),
                model=cfg.ModelConfig(hf_checkpoint="x"),
                optimizer=cfg.OptimizerConfig(lr=1.0),
                rollout=cfg.EngineRollout(max_response_tokens=1, max_model_len=2),
                max_tokens_per_microbatch=1,
                global_batch_size=1,
            ),
            [],
        )


EARLIER = Path(__file__).parent / "earlier"  # as commit 85e7a9d wrote them


@pytest.mark.parametrize("stage", cfg.STAGES)
def test_a_configuration_of_an_earlier_version_is_read(stage: str) -> None:
    config = cfg.apply_overrides(cfg.read_yaml(EARLIER / f"{stage}.yaml"), [])
    before = _flat(OmegaConf.to_container(OmegaConf.load(EARLIER / f"{stage}.yaml")))
    defaults = flat(cfg.STAGES[stage]())
    for key, value in flat(config).items():
        old = before.get(key, defaults[key])
        assert value == (None if key in ZERO_WAS_OFF and old == 0 else old), key
    assert {key for key in before if before[key] == 0} & ZERO_WAS_OFF, "it has settings that are off"


def _flat(values: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {at.removesuffix("."): values}
    return {key: value for name, inner in values.items() for key, value in _flat(inner, f"{at}{name}.").items()}


@pytest.mark.parametrize("stage", cfg.STAGES)
def test_a_run_of_an_earlier_version_is_resumed(stage: str, tmp_path: Path) -> None:
    config = cfg.apply_overrides(cfg.read_yaml(EARLIER / f"{stage}.yaml"), [f"run.dir={tmp_path}"])
    stored = Identity.stored({"identity": json.loads((EARLIER / f"{stage}.json").read_text())})
    new = Identity.of(config, HashedFiles(tmp_path))
    assert stored is not None
    assert changes(stored, new, config, stored.train_iters) == {}
    assert stored.is_evaluated_as(new)
    other = dataclasses.replace(new, config=new.config | {"run.seed": 2})
    assert changes(stored, other, config, stored.train_iters) == {"run.seed": "1 -> 2"}


def test_zero_on_a_command_line_still_turns_off() -> None:
    for text in ("0", "0.0", "none", "null", "None"):
        config = load("tiny_align", [f"dual_clip={text}", f"rollout.max_logprob_abs_diff={text}"])
        assert isinstance(config, cfg.AlignConfig)
        assert (config.dual_clip, config.rollout.max_logprob_abs_diff) == (None, None)
    with pytest.raises(ValueError, match=r"dual_clip takes a number or none, got 'off'; for example dual_clip=none"):
        load("tiny_align", ["dual_clip=off"])


def test_settings_without_a_use_are_ignored_where_they_once_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert load("tiny_collect", ["optimizer.lr=1", "run.train_iters=1"]) == load("tiny_collect", [])
    assert "note: run.train_iters has no effect in this stage and is ignored" in capsys.readouterr().err
    assert load("tiny_sft", ["rollout.temperature=0.5"]) == load("tiny_sft", [])
    with pytest.raises(ValueError, match=r"unknown key 'rollout.temprature'"):
        load("tiny_sft", ["rollout.temprature=0.5"])


@pytest.mark.parametrize("name", ["tiny_sft", "tiny_collect", "tiny_warmup", "tiny_align", "tiny_rlvr"])
def test_a_configuration_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    config = load(name, ["model.freeze=[vision,merger]", "optimizer.adam_eps=1e-9"])
    (tmp_path / "config.yaml").write_text(cfg.to_yaml(config))
    assert cfg.apply_overrides(cfg.read_yaml(tmp_path / "config.yaml"), []) == config


def test_a_file_may_leave_to_overrides_what_has_no_default(tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text("stage: sft\ndata: rows.jsonl\nmodel: {precision: bf16}\nrun: {name: first, num_epochs: 2}\n")
    with pytest.raises(UserError, match=r"recipe leaves global_batch_size, .* unset"):
        cfg.apply_overrides(cfg.read_yaml(file), [])
    given = ["global_batch_size=8", "max_tokens_per_microbatch=4096", "model.hf_checkpoint=base", "optimizer.lr=1e-5"]
    given += ["rollout.max_response_tokens=64", "rollout.max_model_len=128"]
    config = cfg.apply_overrides(cfg.read_yaml(file), [*given, "model.precision=fp32"])
    assert isinstance(config, cfg.SFTConfig)
    assert (config.data, config.model.precision, config.run.num_epochs) == ("rows.jsonl", "fp32", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: rows.jsonl", "FILE must have stage: one of sft, collect, warmup, align, rlvr, got None"),
        ("[sft]", "FILE must have stage: one of sft, collect, warmup, align, rlvr, got None"),
        ("stage: dpo", "FILE must have stage: one of sft, collect, warmup, align, rlvr, got 'dpo'"),
        ("stage: sft\nlr: 1", "FILE: unknown key 'lr': the configuration has data, "),
        ("stage: sft\noptimizer: {rl: 1}", "FILE: unknown key 'optimizer.rl': optimizer has adam_beta1"),
        ("stage: sft\noptimizer: 1", "FILE: optimizer is a group of keys, not a value; got 1"),
        ("stage: [", "configuration FILE cannot be read: while parsing a flow node"),
    ],
)
def test_a_wrong_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "sft.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        cfg.read_yaml(file)
    assert str(error.value).startswith(message.replace("FILE", str(file)))
