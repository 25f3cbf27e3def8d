"""Benchmark the weight sync to the rollout engine: time and memory, compared with a checkpoint that it reloads.

    python -m tools.bench.sync [--hidden 512 --layers 8 --bucket-mib 128 --checksums] [--out NEW.json]
    torchrun --nproc-per-node 2 -m tools.bench.sync     # trainer and engine at tensor parallelism 2

Ways alternate in one process: ``push`` is the sync of every iteration of a stage, ``disk`` exports an HF directory that
vLLM reloads, ``copy`` copies the same bytes once, which is the lower bound. Of a push, ``transfer`` is the time until
the engine has the tensors, and the rest is ``load``: vLLM shards and packs them for its kernels. The model has a
decoder of the requested size, and the tiny model's vocabulary and vision tower.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_megatron.config import RLVRConfig, apply_overrides
from recipes import STAGE_RECIPES
from tools.bench import harness

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement: hidden size and depth of the decoder, and the options of the sync."""

    hidden: int
    layers: int
    bucket_mib: int
    checksums: bool
    steps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the decoder")
    parser.add_argument("--layers", type=int, default=8, help="layers of the decoder")
    parser.add_argument("--bucket-mib", type=int, default=128, help="rollout.sync_bucket_mib")
    parser.add_argument("--checksums", action="store_true", help="set rollout.sync_checksums")
    parser.add_argument("--steps", type=int, default=5, help="measured syncs of each way, at least 2")
    harness.add_output_options(parser)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        print(f"error: --steps must be at least 2 for a median and a p90, got {arguments.steps}", file=sys.stderr)
        return 2
    settings = Settings(arguments.hidden, arguments.layers, arguments.bucket_mib, arguments.checksums, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    return harness.finish(result, arguments, ["disk_over_push"]) if os.environ.get("RANK", "0") == "0" else 0


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Measure the seconds of each way, and bytes of weights per second."""
    from recipes.tiny_model import make_tiny_model

    make_tiny_model(folder / "base", seed=1, overrides=model_overrides(settings.hidden, settings.layers))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    overrides = [
        f"model.hf_checkpoint={folder}/base",
        f"rollout.sync_checksums={str(settings.checksums).lower()}",
        f"rollout.sync_bucket_mib={settings.bucket_mib}",
        f"parallel.tensor_model_parallel_size={ranks}",
    ]
    config = apply_overrides(STAGE_RECIPES["tiny_rlvr"](), overrides)
    assert isinstance(config, RLVRConfig)

    from prism_megatron.parallel import groups

    groups.initialize(config.parallel, seed=1)
    from prism_megatron.convert.transfer import export_weights
    from prism_megatron.stages.setup import load_policy

    policy = load_policy(config)
    size = sum(tensor.nbytes for _, tensor in export_weights(policy.chunks, policy.table))
    sides = Sides(config, policy, folder)
    seconds = harness.interleaved(
        {"push": sides.push, "disk": sides.disk, "copy": sides.copy}, settings.steps, warmup=1
    )
    seconds["transfer"] = sides.transfer_seconds[1:]
    seconds["load"] = [push - transfer for push, transfer in zip(seconds["push"], seconds["transfer"], strict=True)]
    sides.after_each_tensor = harness.release_freed
    extra = harness.extra_peak_bytes(lambda: sides.push(0))
    groups.shutdown()
    result: dict[str, Any] = {"benchmark": "sync", "config": vars(settings), "ranks": ranks, "weight_bytes": size}
    result |= harness.provenance() | {"peak_bytes_of_all_ways": harness.peak_bytes()}
    for name, values in seconds.items():
        result[name] = {
            "seconds": harness.median_and_p90(values),
            "gigabytes_per_second": size / statistics.median(values) / 1e9,
        }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    bucket = settings.bucket_mib << 20
    return result | {
        "push_extra_peak_bytes": extra,
        "push_extra_peak_buckets": extra / bucket,
        "disk_over_push": median["disk"] / median["push"],
        "push_over_copy": median["push"] / median["copy"],
        "transfer_over_copy": median["transfer"] / median["copy"],
    }


def model_overrides(hidden: int, layers: int) -> dict[str, dict[str, Any]]:
    """Return the sizes of the random model that differ from the tiny one's."""
    text = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    return {"text_config": text, "vision_config": {"out_hidden_size": hidden}}


class Sides:
    """Ways to transfer the policy's weights to one engine, which is started here."""

    def __init__(self, config: RLVRConfig, policy: Any, folder: Path) -> None:
        from prism_megatron.convert.transfer import named_parameters
        from prism_megatron.parallel.collectives import gather_over_ranks
        from prism_megatron.rollout.engine import RolloutEngine
        from prism_megatron.stages.rollouts import start_engine

        engine = start_engine(config, policy.source)
        assert isinstance(engine, RolloutEngine)
        self._engine = engine
        self._config, self._policy, self._directory = config, policy, gather_over_ranks(folder)[0] / "hf"
        self._parameters = [parameter.detach() for parameter in named_parameters(policy.chunks).values()]
        self._copies = [parameter.clone() for parameter in self._parameters]
        self.transfer_seconds: list[float] = []
        self.after_each_tensor: Callable[[], None] = lambda: None

    def push(self, number: int) -> None:
        from prism_megatron.convert.transfer import export_manifest, export_weights
        from prism_megatron.rollout.weight_sync import WeightSync

        policy, rollout = self._policy, self._config.rollout
        sync = WeightSync(number, export_manifest(policy.chunks, policy.table), rollout.sync_checksums)
        exported = export_weights(policy.chunks, policy.table, rollout.sync_bucket_mib << 20)
        self._engine.update_weights(self._timed(exported), sync)

    def disk(self, number: int) -> None:
        self._policy.export(self._directory)
        self._engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(self._directory)})

    def copy(self, number: int) -> None:
        for _ in range(self._config.parallel.tensor_model_parallel_size):  # all bytes, once per rank, like a push
            for parameter, target in zip(self._parameters, self._copies, strict=True):
                target.copy_(parameter)

    def _timed(self, named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        self.transfer_seconds.append(0.0)
        while True:
            start_time = time.perf_counter()
            item = next(named, None)
            self.transfer_seconds[-1] += time.perf_counter() - start_time
            if item is None:
                return
            yield item
            self.after_each_tensor()


if __name__ == "__main__":
    sys.exit(main())
