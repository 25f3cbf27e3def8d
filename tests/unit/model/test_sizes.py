"""config.json: a key that is missing or has an invalid value is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prism_megatron.errors import UserError
from prism_megatron.model import sizes
from prism_megatron.model.sizes import Rotary, read_sizes

PUBLISHED = Path(__file__).parents[3] / "recipes" / "published"
REQUIRED = {
    "2b": {"text_config": sizes._TEXT_KEYS, "vision_config": (*sizes._VISION_KEYS, "deepstack_visual_indexes")},
    "30b_a3b": {"text_config": ("num_experts", *sizes._EXPERT_KEYS)},
}
CASES = [(size, part, key) for size, parts in REQUIRED.items() for part, keys in parts.items() for key in keys]


def read_changed(folder: Path, size: str, change: Callable[[dict[str, Any]], Any]) -> sizes.HFSizes:
    config = json.loads((PUBLISHED / f"{size}.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return read_sizes(folder)


@pytest.mark.parametrize(("size", "part", "key"), CASES)
def test_a_missing_key_is_named(size: str, part: str, key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"config.json: {part} has no {key}"):
        read_changed(tmp_path, size, lambda config: config[part].pop(key))


@pytest.mark.parametrize(("size", "part", "key"), [case for case in CASES if case[2] != "deepstack_visual_indexes"])
@pytest.mark.parametrize("value", ["16", 0, -1, 1.5, True, [16, 16]])
def test_a_value_that_is_no_size_is_named(size: str, part: str, key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{part}\.{key} must be a positive whole number, got "):
        read_changed(tmp_path, size, lambda config: config[part].update({key: value}))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "text_config",
            {"num_key_value_heads": 3},
            "num_attention_heads (16) must be a multiple of",
        ),
        ("text_config", {"head_dim": 127}, "head_dim (127) must be a multiple of 2"),
        ("text_config", {"num_hidden_layers": 2}, "3 DeepStack levels need as many layers, not 2"),
        ("text_config", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ("text_config", {"attention_bias": True}, "text_config.attention_bias is True"),
        ("text_config", {"num_experts": 4}, "text_config has experts; a model with experts is a qwen3_vl_moe"),
        ("text_config", {"rope_theta": "1e6"}, "rope_theta must be a positive number, got '1e6'"),
        ("text_config", {"rope_scaling": {"rope_type": "linear", "factor": 2}}, "of type 'linear' is not supported"),
        ("text_config", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "of type 'dynamic' is not supported"),
        ("text_config", {"rope_scaling": {"rope_type": "llama3"}}, "of type 'llama3' is not supported"),
        ("text_config", {"rope_scaling": {"rope_type": "longrope"}}, "of type 'longrope' is not supported"),
        (
            "text_config",
            {"rope_scaling": {"rope_type": "yarn"}},
            "factor of yarn rope scaling must be a positive",
        ),
        ("text_config", {"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "must be at least 1, got 0.5"),
        ("text_config", {"rope_scaling": {"mrope_section": [24, 40]}}, "three positive whole numbers, got [24, 40]"),
        ("text_config", {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ("vision_config", {"hidden_act": "silu"}, "vision_config.hidden_act is 'silu'"),
        (
            "vision_config",
            {"num_heads": 24},
            "hidden_size (1024) must be a multiple of 4 * num_heads (96)",
        ),
        ("vision_config", {"out_hidden_size": 3584}, "out_hidden_size (3584) must be text_config.hidden_size (2048)"),
        ("vision_config", {"num_position_embeddings": 2303}, "num_position_embeddings (2303) must be a square number"),
        ("vision_config", {"deepstack_visual_indexes": [5, 24]}, "must be different layers of the 24"),
        ("vision_config", {"deepstack_visual_indexes": [5, 5]}, "must be different layers of the 24"),
        ("vision_config", {"deepstack_visual_indexes": []}, "at least one level"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(part: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_changed(tmp_path, "2b", lambda config: config[part].update(change))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '{"model_type": "qwen3_vl"}', '{"model_type": "llama"}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_sizes(tmp_path)


@pytest.mark.parametrize(
    ("size", "leave_out", "expected"),
    [
        ("2b", ("rope_scaling", "rope_theta"), Rotary(500_000.0, (24, 20, 20))),
        ("2b", ("rope_scaling",), Rotary(5e6, (24, 20, 20))),
        ("30b_a3b", ("rope_theta",), Rotary(500_000.0, (24, 20, 20))),
    ],
)
def test_rotary_settings_left_out_are_transformers_defaults(
    size: str, leave_out: tuple[str, ...], expected: Rotary, tmp_path: Path
) -> None:
    found = read_changed(tmp_path, size, lambda config: [config["text_config"].pop(key) for key in leave_out])
    assert found.rotary == expected


@pytest.mark.parametrize(
    ("size", "key", "expected"),
    [("2b", "head_dim", 128), ("30b_a3b", "head_dim", 2048 // 32), ("2b", "rms_norm_eps", 1e-6)],
)
def test_a_key_left_out_has_transformers_default(size: str, key: str, expected: float, tmp_path: Path) -> None:
    assert read_changed(tmp_path, size, lambda config: config["text_config"].pop(key)).text[key] == expected


@pytest.mark.parametrize(
    ("whole", "text", "ties"),
    [(True, None, True), (False, True, False), (None, True, True), (None, None, False), (None, False, False)],
)
def test_tied_as_the_whole_model_says(whole: bool | None, text: bool | None, ties: bool, tmp_path: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = whole, text

    assert read_changed(tmp_path, "2b", change).tie_embeddings is ties
