"""The identity of a run, folders that hold another experiment, and finished stages."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prism_megatron import config as cfg
from prism_megatron.convert.manifest import digest_file, write_manifest
from prism_megatron.errors import UserError
from prism_megatron.stages.identity import (
    EVALUATION,
    EVALUATION_OF,
    INPUTS,
    NOT_IDENTITY,
    NOT_IDENTITY_OF,
    HashedFiles,
    Identity,
    changes,
    flat,
    is_finished,
    part_of,
)
from prism_megatron.stages.run_folder import prepare
from recipes import stage_recipe

STAGES = (cfg.SFTConfig, cfg.CollectConfig, cfg.WarmupConfig, cfg.AlignConfig, cfg.RLVRConfig)
# All keys by their effect on a run. A new field fails the test until it is listed here and, if it does not change what
# is trained, in stages/identity.py.
MODEL = {
    *("stage", "run.seed", "model.precision", "model.freeze", "model.moe_aux_loss_coeff", "model.fp8.recipe"),
    *("model.fp8.first_layers_bf16", "model.fp8.last_layers_bf16"),
    *(
        "dataset.bad_rows",
        "dataset.check_images_max_rows",
        "dataset.overlong",
        "dataset.columns",
        "dataset.image_root",
        "dataset.min_pixels",
        "dataset.max_pixels",
    ),
}
OPTIMIZER = {
    *("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad", "warmup_fraction"),
    "decay_style",
}
LENGTHS = {"rollout.max_response_tokens", "rollout.max_model_len"}
SAMPLING = {"rollout.samples_per_prompt", "rollout.temperature", "rollout.top_p", *LENGTHS}
DISCRIMINATOR = {
    *("num_experts", "topk", "experts", "upcycle_noise", "load_balance_coeff", "freeze", "max_branch_tokens"),
}
PAIRS = {*(f"discriminator.{name}" for name in DISCRIMINATOR), "max_tokens_per_microbatch"}
POLICY_GRADIENT = {
    *("prompts_per_iteration", "algorithm", "mini_batches_per_iteration", "epochs_per_iteration", "advantage_eps"),
    *("clip_low", "clip_high", "dual_clip", "kl_coeff", "kl_estimator", "importance_cap", "compat"),
}
ALIGN = {
    *("discriminator_steps", "perception_weight", "format_penalty", "score_regularizer", "label_smoothing"),
    *("gradient_penalty", "gradient_penalty_std", "combine", "replay.prompts", "replay.responses_per_prompt"),
    *("replay.responses_per_iteration", "gating.mode", "gating.align_coeff", "gating.wrong_penalty"),
    *("gating.format_penalty", "gating.accuracy_weight", "gating.format_weight", "score_std_floor"),
}
RLVR = {
    *("accuracy_weight", "format_weight", "max_sampling_rounds", "oversampling", "overlong_buffer_tokens"),
    *("overlong_penalty", "mask_truncated"),
}
POLICY_OPTIMIZER = {f"optimizer.{name}" for name in OPTIMIZER}
IDENTITY = {
    cfg.SFTConfig: MODEL | POLICY_OPTIMIZER | {"global_batch_size", "train_answers"},
    cfg.CollectConfig: MODEL | SAMPLING | {"pair_samples_per_prompt", "num_candidates", "band_low", "band_high"},
    cfg.WarmupConfig: MODEL | POLICY_OPTIMIZER | LENGTHS | PAIRS | {"global_batch_size"},
    cfg.AlignConfig: MODEL | POLICY_OPTIMIZER | SAMPLING | PAIRS | POLICY_GRADIENT | ALIGN
    | {f"discriminator_optimizer.{name}" for name in OPTIMIZER},
    cfg.RLVRConfig: MODEL | POLICY_OPTIMIZER | SAMPLING | POLICY_GRADIENT | RLVR,
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
def test_every_key_has_a_decision(kind: type[cfg.StageConfig]) -> None:
    keys = {key for key in flat(kind()) if key not in INPUTS and part_of(kind, key) == "config"}
    assert keys == IDENTITY[kind]


def test_every_pattern_matches_a_key() -> None:
    of_kind = {kind: NOT_IDENTITY_OF.get(kind, ()) + EVALUATION_OF.get(kind, ()) for kind in STAGES}
    used = {key for kind in STAGES for key in flat(kind())}
    assert set(INPUTS) <= used
    for pattern in NOT_IDENTITY + EVALUATION:
        assert any(Path(key).match(pattern) for key in used), pattern
    for kind, patterns in of_kind.items():
        for pattern in patterns:
            assert any(Path(key).match(pattern) for key in flat(kind())), pattern


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """An SFT run on a model and data in ``tmp_path``."""
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen3_vl"}')
    (model / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "data.jsonl").write_text("row\n")
    (tmp_path / "heldout.parquet").write_text("questions")
    return [
        *(f"run.dir={tmp_path}", "run.name=run", f"model.hf_checkpoint={model}", f"data={tmp_path}/data.jsonl"),
        *(f"eval.data={tmp_path}/heldout.parquet", "eval.num_questions=7", "run.train_iters=10"),
        *("optimizer.decay_style=constant", "optimizer.warmup_fraction=0"),
    ]


def configured(arguments: list[str], *more: str) -> cfg.StageConfig:
    return cfg.apply_overrides(stage_recipe("tiny_sft")(), [*arguments, *more])


def mark_finished(config: cfg.StageConfig) -> None:
    """Write the ``finished.json`` of a finished stage."""
    directory = cfg.stage_dir(config)
    directory.mkdir(exist_ok=True)
    content = {"identity": prepare(config)}
    (directory / "finished.json").write_text(json.dumps(content))


def save(config: cfg.StageConfig, iteration: int) -> None:
    """Write the part of a checkpoint that the identity check reads."""
    directory = cfg.stage_dir(config)
    directory.mkdir(exist_ok=True)
    about = {"identity": prepare(config), "iteration": iteration}
    folder = directory / "checkpoints" / f"iter_{iteration:07d}"
    folder.mkdir(parents=True)
    write_manifest(folder, {}, about=about)


OTHER_VALUES = [
    ("optimizer.lr=0.5", "optimizer.lr: "),
    ("global_batch_size=3", "global_batch_size: "),
    ("run.seed=9", "run.seed: 1 -> 9"),
    ("model.freeze=[vision]", 'model.freeze: [] -> ["vision"]'),
    ("model.precision=bf16", "model.precision: fp32 -> bf16"),
    ("run.train_iters=9", "run.train_iters: 10 -> 9, fewer than the 10 already trained"),
    ("optimizer.decay_style=cosine", "optimizer.decay_style: constant -> cosine"),
]


@pytest.mark.parametrize("state", ["finished", "saved"])
@pytest.mark.parametrize(("change", "message"), OTHER_VALUES)
def test_another_experiment_is_refused_and_the_error_names_the_difference(
    state: str, change: str, message: str, arguments: list[str]
) -> None:
    config = configured(arguments)
    if state == "finished":
        mark_finished(config)
    else:
        save(config, 10)
    before = snapshot(cfg.stage_dir(config))
    key = change.partition("=")[0]
    with pytest.raises(UserError) as refused:
        is_finished(configured(arguments, change)) or prepare(configured(arguments, change))
    assert message in str(refused.value)
    remedy = "give this one another run.name, remove the folder, or, to resume it all the same, add run.allow_change="
    assert f"{remedy}[{key}]" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert snapshot(cfg.stage_dir(config)) == before, "nothing is written"
    prepare(configured(arguments, change, f"run.allow_change=[{key}]"))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


CHANGED_INPUTS = {
    "data": ("data.jsonl", b"other row\n"),
    "model.hf_checkpoint": ("base/model.safetensors", bytes(99) + b"\1"),
}


@pytest.mark.parametrize("key", CHANGED_INPUTS)
def test_an_input_with_other_content_is_refused(key: str, arguments: list[str], tmp_path: Path) -> None:
    mark_finished(configured(arguments))
    name, content = CHANGED_INPUTS[key]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"another experiment \({key}: \S+ \(other content\)\)"):
        is_finished(configured(arguments))
    assert not is_finished(configured(arguments, "run.on_change=restart")), "so that a pipeline makes it anew"


def test_settings_without_effect_on_the_result_are_not_compared(arguments: list[str], tmp_path: Path) -> None:
    save(configured(arguments), 10)
    moved = tmp_path / "elsewhere"
    for name in ("base", "data.jsonl"):
        moved.mkdir(exist_ok=True)
        (tmp_path / name).rename(moved / name)
    paths = [f"model.hf_checkpoint={moved}/base", f"data={moved}/data.jsonl"]
    other = ["run.save_interval=3", "run.keep_checkpoints=1", "parallel.tensor_model_parallel_size=2"]
    engine = ["rollout.kv_cache_gib=2", "rollout.engine=child", "rollout.transport=shared_memory"]
    assert prepare(configured(arguments, *paths, *other, *engine, "max_tokens_per_microbatch=4096"))


def test_a_finished_stage_stays_finished_without_its_inputs(arguments: list[str], tmp_path: Path) -> None:
    mark_finished(configured(arguments))
    for name in ("data.jsonl", "heldout.parquet"):
        (tmp_path / name).unlink()
    assert is_finished(configured(arguments))


def test_a_changed_evaluation_runs_without_training_again(arguments: list[str], tmp_path: Path) -> None:
    mark_finished(configured(arguments))
    assert is_finished(configured(arguments, "eval.num_questions=0"))
    more = configured(arguments, "eval.num_questions=8")
    assert not is_finished(more)
    prepare(more)
    assert not (cfg.stage_dir(more) / "finished.json").exists()
    mark_finished(configured(arguments))
    (tmp_path / "heldout.parquet").write_text("other questions")
    assert not is_finished(configured(arguments))


def test_train_iters_may_rise_if_past_learning_rates_stay_the_same(arguments: list[str]) -> None:
    """A constant schedule can be extended; one that decays over all iterations would have had other rates before."""
    mark_finished(configured(arguments))
    longer = configured(arguments, "run.train_iters=20")
    assert not is_finished(longer)
    prepare(longer)
    decaying = [*arguments, "optimizer.decay_style=cosine", "run.name=decays"]
    mark_finished(configured(decaying))
    with pytest.raises(UserError, match=r"run.train_iters: 10 -> 20 changes the learning rates of the 10 iterations"):
        is_finished(configured(decaying, "run.train_iters=20"))
    save(configured([*decaying, "run.name=stopped"]), 4)
    with pytest.raises(UserError, match=r"run.train_iters: 10 -> 3, fewer than the 4 already trained"):
        prepare(configured([*decaying, "run.name=stopped"], "run.train_iters=3"))


def test_epochs_are_compared_before_their_iterations_are_known(arguments: list[str]) -> None:
    arguments = [word for word in arguments if not word.startswith("run.train_iters=")]
    counted = configured(arguments, "run.num_epochs=3")
    counted = replace(counted, run=replace(counted.run, train_iters=12))
    mark_finished(counted)
    assert is_finished(configured(arguments, "run.num_epochs=3"))
    assert not is_finished(configured(arguments, "run.num_epochs=4"))
    assert is_finished(configured(arguments, "run.train_iters=12"))
    with pytest.raises(UserError, match="global_batch_size: "):
        is_finished(configured(arguments, "run.num_epochs=3", "global_batch_size=3"))


def test_a_stale_stage_starts_again_with_on_change_restart(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(arguments)
    save(config, 10)
    mark_finished(config)
    directory = cfg.stage_dir(config)
    (directory / "logs").mkdir()
    for number in (1, 2):
        stale = configured(arguments, f"optimizer.lr=0.{number}", "run.on_change=restart")
        assert not is_finished(stale)
        mark_finished(stale)
        aside = directory.with_name(f"run.stale-{number}")
        assert {path.name for path in aside.iterdir()} >= {"finished.json", "config.yaml", "versions.json"}
        assert re.search(rf"sft: stale \(optimizer.lr: 0.\d+ -> 0.{number}\); starts again", capsys.readouterr().out)
        assert is_finished(stale)
    assert (directory.with_name("run.stale-1") / "checkpoints" / "iter_0000010").is_dir()
    assert (directory / "logs").is_dir(), "those of the job that runs"
    assert not (directory / "checkpoints").exists()


def test_every_start_leaves_its_configuration(arguments: list[str]) -> None:
    rates = ("0.1", "0.2", "0.2", "0.3")
    for rate in rates:
        config = configured(arguments, f"optimizer.lr={rate}")
        cfg.stage_dir(config).mkdir(exist_ok=True)
        prepare(config)
    stored = [cfg.stage_dir(config) / name for name in ("config.1.yaml", "config.2.yaml", "config.yaml")]
    assert [f"lr: {rate}" in path.read_text() for rate, path in zip(("0.1", "0.2", "0.3"), stored, strict=True)] == [
        True, True, True,
    ]  # fmt: skip
    assert not (cfg.stage_dir(config) / "config.3.yaml").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_damaged_finished_json_counts_as_none(
    content: bytes, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured(arguments)
    mark_finished(config)
    (cfg.stage_dir(config) / "finished.json").write_bytes(content)
    assert not is_finished(config)
    assert "finished.json is damaged (not a JSON object) and is ignored" in capsys.readouterr().out
    prepare(config)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "finished.json"])
def test_a_folder_where_a_file_belongs(name: str, arguments: list[str]) -> None:
    config = configured(arguments)
    (cfg.stage_dir(config) / name).mkdir(parents=True)
    assert not is_finished(config)
    with pytest.raises(UserError, match=rf"{name} must be a file; move or remove it"):
        prepare(config)


def test_a_run_without_an_identity_is_resumed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(arguments)
    folder = cfg.stage_dir(config) / "checkpoints" / "iter_0000004"
    folder.mkdir(parents=True)
    write_manifest(folder, {}, about={"iteration": 4})
    prepare(config)
    assert "has no identity; it is taken as this experiment's" in capsys.readouterr().out


def test_a_key_added_after_a_run_had_its_default_value(arguments: list[str]) -> None:
    config = configured(arguments)
    new = Identity.of(config, HashedFiles(cfg.stage_dir(config)))
    content: dict[str, Any] = json.loads(json.dumps(asdict(new)))
    del content["config"]["optimizer.adam_eps"]
    assert changes(Identity(**content), new, config, 10) == {}
    other = configured(arguments, "optimizer.adam_eps=0.1")
    assert changes(Identity(**content), Identity.of(other, HashedFiles(cfg.stage_dir(other))), other, 10) == {
        "optimizer.adam_eps": "1e-08 -> 0.1"
    }


def test_fingerprints(tmp_path: Path) -> None:
    """A directory has its manifest's checksum, or one of samples; a file's checksum is cached."""
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    large = bytearray(40 << 20)
    (directory / "model.safetensors").write_bytes(large)
    hashed = HashedFiles(tmp_path)
    first = hashed.fingerprint(directory)
    (directory / "README.md").write_text("what it is")
    assert hashed.fingerprint(directory) == first
    large[5] = large[-5] = 1
    (directory / "model.safetensors").write_bytes(large)
    assert hashed.fingerprint(directory) != first
    write_manifest(directory, {"config.json": digest_file(directory / "config.json")})
    stored = json.loads((directory / "manifest.json").read_text())["sha256"]
    assert hashed.fingerprint(directory) == stored

    data = tmp_path / "data.jsonl"
    data.write_text("a")
    assert hashed.fingerprint(data) == digest_file(data).sha256
    hashed.write()
    stamp = json.loads((tmp_path / "inputs.json").read_text())[str(data)]
    assert stamp["sha256"] == digest_file(data).sha256
    (tmp_path / "inputs.json").write_text(json.dumps({str(data): stamp | {"sha256": "known"}}))
    assert HashedFiles(tmp_path).fingerprint(data) == "known"
    data.write_text("bc")
    assert HashedFiles(tmp_path).fingerprint(data) == digest_file(data).sha256
    assert HashedFiles(tmp_path).fingerprint(tmp_path / "nothing") is None


def test_data_in_several_files_is_identified_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("a")
    hashed = HashedFiles(tmp_path)
    alone = hashed.of_data(str(folder / "a.jsonl"))
    assert alone == hashed.of_data(str(folder)) == digest_file(folder / "a.jsonl").sha256
    (folder / "b.jsonl").write_text("b")
    names = [str(folder), f"{folder}/*.jsonl", f"{folder}/a.jsonl,{folder}/b.jsonl"]
    both = {hashed.of_data(name) for name in names}
    assert len(both) == 1
    assert both != {alone}
    (folder / "b.jsonl").write_text("other")
    assert {HashedFiles(tmp_path).of_data(name) for name in names}.isdisjoint(both)
    assert hashed.of_data(f"{folder}/none.jsonl") is None
