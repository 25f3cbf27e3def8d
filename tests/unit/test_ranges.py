"""Every field of every stage says what it may hold, and whatever else is given is refused by its key."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Iterator
from types import NoneType
from typing import Any, get_args

import pytest

from prism_megatron import config as cfg
from prism_megatron.errors import UserError
from prism_megatron.ranges import NAME, RULE, ColumnsRule, KeysRule, OneOf, PathRule, Range, Some
from recipes import tiny

STAGES = {
    "sft": tiny.tiny_sft,
    "collect": tiny.tiny_collect,
    "warmup": tiny.tiny_warmup,
    "align": tiny.tiny_align,
    "rlvr": tiny.tiny_rlvr,
}


def fields(section: Any, at: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(section):
        if dataclasses.is_dataclass(field.type):
            yield from fields(getattr(section, field.name), f"{at}{field.name}.")
        else:
            yield f"{at}{field.name}", field


def kind(field: dataclasses.Field[Any]) -> Any:
    return next(one for one in (*get_args(field.type), field.type) if one is not NoneType)


def outside(rule: Any, kind: Any) -> list[Any]:
    """A value beyond each bound, the nearest where that is one; and what is no value at all."""
    if isinstance(rule, Range):
        step = 1 if kind is int else 1e-3
        # Where none is allowed, 0 is read as none: earlier versions wrote it so.
        low = rule.low if rule.open_low else rule.low - step
        values = [-step if rule.off and low == 0 else low]
        if rule.high != math.inf:
            values.append(rule.high if rule.open_high else rule.high + step)
        return values + ([math.nan, math.inf, -math.inf] if kind is float else [])
    if isinstance(rule, OneOf):
        return [max(rule.values) + 1 if kind is int else "nonsense", *([""] if kind is str else [])]
    if isinstance(rule, Some):
        return ["nonsense", f"{rule.values[0]},{rule.values[0]}"]
    if isinstance(rule, KeysRule):
        return ["not a key", "optimizer.,x", "optimizer.lr,optimizer.lr"]
    if isinstance(rule, ColumnsRule):
        return ["messages", "messages=", "=dialog"]
    assert isinstance(rule, PathRule)
    values = ["a\nb", "a\x00", "\ud800", 256 * "x", *([] if rule.optional else ["", " "])]
    return values + (["../x", "/x", "a/../x", "a//b", "a/", "."] if rule.inside else [])


@pytest.mark.parametrize("stage", STAGES)
def test_every_field_declares_its_range(stage: str) -> None:
    undeclared = [k for k, f in fields(STAGES[stage]()) if f.type is not bool and f.metadata.get(RULE) is None]
    assert not undeclared


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_outside_its_range_is_refused_by_its_key(stage: str) -> None:
    for key, field in fields(STAGES[stage]()):
        if field.type is bool:
            continue
        for value in outside(field.metadata[RULE], kind(field)):
            with pytest.raises(UserError) as refused:
                cfg.apply_overrides(STAGES[stage](), [f"{key}={value}"])
            assert str(refused.value).startswith(f"{key} must be "), (key, value)
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("sft", "global_batch_size=0", "global_batch_size must be at least 1, got 0; the recipe has 32"),
        (
            "sft",
            "run.train_iters=-3",
            "run.train_iters must be at least 0, got -3; the recipe has 800",
        ),
        ("sft", "optimizer.lr=nan", "optimizer.lr must be at least 0, got nan; the recipe has 0.002"),
        ("sft", "optimizer.warmup_fraction=2", "optimizer.warmup_fraction must be in [0, 1], got 2; the recipe has "),
        ("sft", "optimizer.clip_grad=-1", "optimizer.clip_grad must be at least 0, got -1; 0 turns clipping off"),
        ("sft", "run.keep_checkpoints=0", "run.keep_checkpoints must be at least 1, got 0; a stage resumes from"),
        ("rlvr", "dual_clip=1", "dual_clip must be none (off) or above 1, got 1"),
        ("rlvr", "rollout.sleep_level=3", "rollout.sleep_level must be 0 or 1 or 2, got 3; the recipe has 0"),
        ("sft", "run.name=../x", "run.name must be a name, or names joined by /, none of them empty, '.' or '..'"),
        (
            "sft",
            "model.freeze=[vision,vision]",
            "model.freeze must be a list of any of vision, merger, language_model, each once, got [vision,vision]; "
            "the recipe has []",
        ),
    ],
)
def test_an_error_has_key_rule_value_and_remedy(stage: str, override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        cfg.apply_overrides(STAGES[stage](), [override])
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        (
            "sft",
            ["model.freeze=[vision,merger,language_model]"],
            "model.freeze names every part of the model, so that nothing is left to train; leave one out",
        ),
        ("rlvr", ["model.freeze=language_model,merger,vision"], "model.freeze names every part"),
        ("sft", ["optimizer.lr=1e-5"], "optimizer.min_lr (0.0001) must be at most optimizer.lr (1e-05), which decays"),
        (
            "align",
            ["discriminator_optimizer.min_lr=1", "discriminator_optimizer.decay_style=linear"],
            "discriminator_optimizer.min_lr (1) must be at most discriminator_optimizer.lr (0.0001)",
        ),
        ("sft", ["eval.data="], "eval.num_questions (512) needs eval.data, which is empty; give eval.data=FILE"),
        (
            "sft",
            ["run.train_iters=0"],
            "run.train_iters and run.num_epochs are both 0, so that nothing would run",
        ),
        ("sft", ["run.train_iters=5", "run.num_epochs=2"], "run.train_iters (5) and run.num_epochs (2) both set the"),
        ("collect", ["band_low=0.9"], "band_low (0.9) must be at most band_high (0.8)"),
        ("warmup", ["discriminator.num_experts=7"], "discriminator.num_experts (7) must be even with dedicated"),
        ("align", ["discriminator.topk=9"], "discriminator.topk (9) is more than the 4 experts a token may use; raise"),
        ("rlvr", ["rollout.max_response_tokens=256"], "rollout.max_response_tokens (256) must be below rollout.max_mo"),
        ("rlvr", ["max_tokens_per_microbatch=255"], "max_tokens_per_microbatch (255) must hold a prompt and its resp"),
        ("rlvr", ["accuracy_weight=0", "format_weight=0"], "accuracy_weight and format_weight must not both be 0"),
        ("rlvr", ["overlong_buffer_tokens=161"], "overlong_buffer_tokens (161) must be at most rollout.max_response"),
    ],
)
def test_values_that_do_not_go_together_are_refused(stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        cfg.apply_overrides(STAGES[stage](), overrides)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["first", "a/b", "my run", "запуск 2", "試行", "a b/c", "..x", "x=1"])
def test_a_run_may_have_any_other_name(name: str) -> None:
    assert NAME.allows(name)
    assert cfg.apply_overrides(tiny.tiny_sft(), [f"run.name={name}"]).run.name == name


@pytest.mark.parametrize("text", ["2024_01_01", "010", "1e5", "no", "null", "a #b", "a: b", "[x", "{x}", "'x'", "a=b"])
def test_a_text_is_taken_as_it_stands(text: str) -> None:
    config = cfg.apply_overrides(tiny.tiny_sft(), [f"data={text}"])
    assert config.data == text
    assert cfg.to_yaml(cfg.apply_overrides(config, [])) == cfg.to_yaml(config)


@pytest.mark.parametrize("text", ["vision", "[vision]", "['vision']", '["vision"]', " [ vision ] "])
def test_a_list_may_be_a_single_word(text: str) -> None:
    assert cfg.apply_overrides(tiny.tiny_sft(), [f"model.freeze={text}"]).model.freeze == ["vision"]
    assert cfg.apply_overrides(tiny.tiny_sft(), ["model.freeze=vision,merger"]).model.freeze == ["vision", "merger"]
    for empty in ("", "[]"):
        assert cfg.apply_overrides(tiny.tiny_sft(), [f"model.freeze={empty}"]).model.freeze == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=fast", "optimizer.lr takes a number, got 'fast'; for example optimizer.lr=0.002"),
        ("run.train_iters=1.5", "run.train_iters takes a whole number, got '1.5'; for example run.train_iters=800"),
        ("run.save_interval=", "run.save_interval takes a whole number, got ''; for example run.save_interval=200"),
        (
            "model.recompute=maybe",
            "model.recompute takes true or false, got 'maybe'; for example model.recompute=false",
        ),
    ],
)
def test_a_value_of_another_type_says_what_to_write(override: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        cfg.apply_overrides(tiny.tiny_sft(), [override])
    assert str(refused.value) == f"override {override!r} is refused: {message}"


@pytest.mark.parametrize("order", [1, -1])
def test_epochs_replace_iterations_and_back(order: int) -> None:
    """A setting on the command line replaces the other, in either order."""
    run = cfg.apply_overrides(tiny.tiny_sft(), ["run.num_epochs=3", "optimizer.lr=1e-3"][::order]).run
    assert (run.train_iters, run.num_epochs) == (0, 3)
    run = cfg.apply_overrides(cfg.apply_overrides(tiny.tiny_sft(), ["run.num_epochs=3"]), ["run.train_iters=7"]).run
    assert (run.train_iters, run.num_epochs) == (7, 0)
    run = cfg.apply_overrides(tiny.tiny_sft(), ["run.num_epochs=2", "run.train_iters=0"][::order]).run
    assert (run.train_iters, run.num_epochs) == (0, 2)


def test_a_group_of_keys_takes_no_value() -> None:
    with pytest.raises(UserError, match=r"'run' is a group of keys, not a value; .* for example run.name=VALUE"):
        cfg.apply_overrides(tiny.tiny_sft(), ["run=3"])
    with pytest.raises(UserError, match=r"unknown key 'run.name.x': run.name has no keys"):
        cfg.apply_overrides(tiny.tiny_sft(), ["run.name.x=3"])


def test_a_recipe_with_a_value_of_another_type_is_refused() -> None:
    config = tiny.tiny_sft()
    config.model.freeze = "vision"  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"model.freeze takes a list of words, got 'vision'"):
        cfg.apply_overrides(config, [])


def test_a_configuration_needs_neither_torch_nor_omegaconf() -> None:
    code = "import sys, prism_megatron.config; print({'torch', 'omegaconf', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"set()"
