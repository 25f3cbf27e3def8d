"""How long new weights take to reach the rollout engine, beside writing a checkpoint that the engine reads again.

    python tools/bench_sync.py [--hidden 512 --layers 8 --checksums] [--out NEW.json]

Ways alternate in one process: ``push`` is what every iteration of a stage does, ``disk`` exports an HF directory and
has vLLM reload it, ``copy`` copies the same bytes once, the least any way could take. One rank; the tiny model's
vocabulary and vision tower, a decoder of the size asked for.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from prism_megatron.config import RLVRConfig, apply_overrides
from recipes import STAGE_RECIPES
from tools import bench


@dataclass(frozen=True)
class Settings:
    """``hidden`` is the decoder's hidden size, ``layers`` its depth."""

    hidden: int
    layers: int
    checksums: bool
    steps: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="hidden size of the decoder")
    parser.add_argument("--layers", type=int, default=8, help="of the decoder")
    parser.add_argument("--checksums", action="store_true", help="with rollout.sync_checksums")
    parser.add_argument("--steps", type=int, default=5, help="measured syncs of each way, at least 2")
    parser.add_argument("--out", type=Path, help="write the JSON there too")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        print(f"error: --steps must be at least 2 for a median and a p90, got {arguments.steps}", file=sys.stderr)
        return 2
    settings = Settings(arguments.hidden, arguments.layers, arguments.checksums, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, Path(folder))
    bench.write(result, arguments.out)
    return 0


def measure(settings: Settings, folder: Path) -> dict[str, Any]:
    """Seconds of each way, and bytes of weights a second."""
    from tools.make_tiny_model import make_tiny_model

    text = {"hidden_size": settings.hidden, "intermediate_size": 3 * settings.hidden}
    vision = {"out_hidden_size": settings.hidden}
    overrides = {"text_config": text | {"num_hidden_layers": settings.layers}, "vision_config": vision}
    make_tiny_model(folder / "base", seed=1, overrides=overrides)
    wanted = [f"model.hf_checkpoint={folder}/base", f"rollout.sync_checksums={str(settings.checksums).lower()}"]
    config = apply_overrides(STAGE_RECIPES["tiny_rlvr"](), wanted)
    assert isinstance(config, RLVRConfig)

    from prism_megatron.parallel import groups

    groups.initialize(config.parallel, seed=1)
    from prism_megatron.convert.transfer import export_weights
    from prism_megatron.stages.setup import load_policy

    policy = load_policy(config)
    size = sum(tensor.nbytes for _, tensor in export_weights(policy.chunks, policy.table))
    seconds = bench.interleaved(ways(config, policy, folder / "hf"), settings.steps, warmup=1)
    groups.shutdown()
    result: dict[str, Any] = {"benchmark": "sync", "config": vars(settings), "ranks": 1, "weight_bytes": size}
    result |= bench.provenance() | {"peak_bytes_of_all_ways": bench.peak_bytes()}
    for name, values in seconds.items():
        result[name] = {
            "seconds": bench.median_and_p90(values),
            "gigabytes_per_second": size / statistics.median(values) / 1e9,
        }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result |= {"disk_over_push": median["disk"] / median["push"], "push_over_copy": median["push"] / median["copy"]}
    return result


def ways(config: RLVRConfig, policy: Any, directory: Path) -> dict[str, Callable[[int], None]]:
    """Each way to give the policy's weights to one engine, started here."""
    from prism_megatron.convert.transfer import named_parameters
    from prism_megatron.rollout.engine import RolloutEngine
    from prism_megatron.stages.rollouts import push_weights, start_engine

    engine = start_engine(config, policy.source)
    assert isinstance(engine, RolloutEngine)
    parameters = list(named_parameters(policy.chunks).values())
    copies = [parameter.detach().clone() for parameter in parameters]

    def push(number: int) -> None:
        push_weights(engine, policy, number, config.rollout)

    def disk(number: int) -> None:
        policy.export(directory)
        engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(directory)})

    def copy(number: int) -> None:
        for parameter, target in zip(parameters, copies, strict=True):
            target.copy_(parameter.detach())

    return {"push": push, "disk": disk, "copy": copy}


if __name__ == "__main__":
    sys.exit(main())
