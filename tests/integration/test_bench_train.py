"""The training benchmark and the profile of a step, as a user runs them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prism_megatron.observe.flops import Workload, forward_flops, training_flops
from prism_megatron.parallel.rendezvous import open_rendezvous
from tools.bench.inputs import model_sizes

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("global_batch_size=4",)


def run(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", f"tools.bench.{tool}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.mark.slow
def test_one_process_and_two_pipeline_stages_compared_with_hf(tmp_path: Path) -> None:
    mock = ("--steps", "2", "--warmup", "1", "--images", "mock", "--resolutions", "64x64,96x32", *SMALL)
    sweep = ("--vs", "hf", "--sweep", "ranks:parallel.pipeline_model_parallel_size=1:1,2:2")
    done = run("train", "--out", str(tmp_path), *sweep, *mock)
    assert done.returncode == 0, done.stderr
    one, two = json.loads((tmp_path / "table.json").read_text())["rows"]
    for result in (one["result"], two["result"]):
        # 32 tokens of text, 96 of answer; 64x64 merges to 4 tokens, 96x32 to 3.
        assert result["tokens_per_step"] == 2 * (32 + 96 + 4) + 2 * (32 + 96 + 3)
        assert result["ours"]["tflops_per_rank"] > 0
        assert result["ours"]["hardware_flops_per_step"] > result["ours"]["flops_per_step"], "logits are made twice"
        assert result["ours"]["mfu"] is None or result["ours"]["hfu"] > result["ours"]["mfu"]
        assert len(result["peak_bytes_of_all_sides"]) == result["ranks"]
        # Two ranks of HF train under FSDP2, each its own rows.
        for side in ("ours", "hf"):
            assert result[side]["first_loss"] == pytest.approx(one["result"]["ours"]["first_loss"], rel=1e-5)
        split = result["ours"]["split"]
        assert split["step"] == pytest.approx(sum(value for name, value in split.items() if name != "step"))
        assert min(split["forward"], split["backward"], split["optimizer"], split["layout"]) > 0
    assert two["result"]["ours"]["split"]["pipeline"] > 0
    assert (tmp_path / "plot.svg").stat().st_size > 0

    one["result"]["ours"]["tokens_per_second"] *= 100
    (tmp_path / "faster.json").write_text(json.dumps(one["result"]))
    same = ("--ranks", "1", "--vs", "hf", *mock, "parallel.pipeline_model_parallel_size=1")
    slower = run("train", "--compare", str(tmp_path / "faster.json"), *same)
    assert slower.returncode == 1, slower.stderr
    assert "ours.tokens_per_second is" in slower.stderr


ROLLOUTS = ("prompts_per_iteration=2", "rollout.samples_per_prompt=2")
STAGES = {
    "warmup": ("global_batch_size=2", "parallel.expert_model_parallel_size=2"),
    "align": (*ROLLOUTS, "parallel.pipeline_model_parallel_size=2", "model.freeze=[vision,merger]"),
    "rlvr": (*ROLLOUTS, "algorithm=gspo", "mini_batches_per_iteration=2", "kl_coeff=0.1"),
}


def test_every_stage_on_two_ranks(launch: Callable[..., str], tmp_path: Path) -> None:
    mock = ("--steps", "2", "--warmup", "0", "--images", "mock", "--resolutions", "64x64", "--response-tokens", "60")
    stores = {stage: open_rendezvous()[0] for stage in STAGES}
    runs = [
        (stores[stage].port, ["--recipe", f"tiny_{stage}", "--out", f"{tmp_path}/{stage}.json", *mock, *overrides])
        for stage, overrides in STAGES.items()
    ]
    launch(2, ["tests/integration/bench_train_worker.py", json.dumps(runs)])
    results = {stage: json.loads((tmp_path / f"{stage}.json").read_text()) for stage in STAGES}
    for stage, result in results.items():
        ours = result["ours"]
        assert (result["stage"], result["ranks"]) == (stage, 2)
        assert math.isfinite(ours["first_loss"])
        assert all(math.isfinite(value) for value in ours["first_step"].values())
        assert min(value for name, value in ours["first_step"].items() if "grad_norm" in name) > 0
        split = ours["split"]
        assert split["step"] == pytest.approx(sum(value for name, value in split.items() if name != "step"))
        assert min(split["forward"], split["backward"], split["optimizer"], split["layout"]) > 0
        assert ours["tokens_per_second"] > 0
        assert ours["flops_per_step"] < ours["hardware_flops_per_step"] or stage == "warmup"
        assert ours["mfu"] is None or ours["mfu"] > 0
    # Two prompts of 32 tokens of text and 4 of an image, two responses of 60 tokens each.
    assert [results[stage]["tokens_per_step"] for stage in ("align", "rlvr")] == [4 * (32 + 4 + 60)] * 2
    align = results["align"]["ours"]
    assert align["phases"].keys() == {"score", "discriminator", "train"}
    assert 0 < sum(align["phases"].values()) <= align["split"]["step"]
    assert align["split"]["pipeline"] > 0
    # Each rank has a prompt, each mini-batch one of its responses: updated on once, after two passes forward.
    sizes, work = model_sizes("tiny"), Workload([32 + 4 + 60], [16], scored_tokens=60)
    update, scoring = (count(sizes.text, sizes.vision, work).model for count in (training_flops, forward_flops))
    assert results["rlvr"]["ours"]["flops_per_step"] == pytest.approx(2 * 2 * (update + 2 * scoring))


def test_the_ten_largest_costs_of_a_step(tmp_path: Path) -> None:
    done = run("profile", "--out", str(tmp_path), "--steps", "1", *SMALL)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "costs.json").read_text())
    shares = [cost["share"] for cost in result["costs"]]
    assert len(shares) == 10
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(0.5, abs=0.5)
    assert (tmp_path / "trace.json").stat().st_size > 0


def test_what_cannot_be_run_is_refused() -> None:
    done = run("train", "--images", "nowhere", "--steps", "2", *SMALL)
    assert done.returncode == 2
    assert "error: --images nowhere is neither shapes nor mock nor a directory of .png, .jpg, .jpeg" in done.stderr
