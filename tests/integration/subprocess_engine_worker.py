"""Runs under torchrun: training on rollouts of a child engine that is killed at work, and later stopped.

Arguments: checkpoint, prompt file, the engine's transport and tensor-parallel size, folder to write to.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from prism_megatron.config import RLVRConfig, apply_overrides
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.parallel import groups
from recipes import STAGE_RECIPES

PROMPTS = 4
DAMAGED = "layers.1.self_attn.v_proj.weight"


def main() -> None:
    checkpoint, data, transport, engine_ranks, folder = sys.argv[1:]
    overrides = [f"model.hf_checkpoint={checkpoint}", f"run.dir={folder}", "parallel.tensor_model_parallel_size=2"]
    overrides += [
        "rollout.engine=child",
        f"rollout.tensor_model_parallel_size={engine_ranks}",
        "rollout.max_num_seqs=16",
    ]
    overrides += [f"rollout.transport={transport}", "rollout.sync_bucket_mib=1", "rollout.sync_checksums=true"]
    overrides += ["rollout.temperature=0.7", "rollout.samples_per_prompt=6"]
    config = apply_overrides(STAGE_RECIPES["tiny_rlvr"](), overrides)
    assert isinstance(config, RLVRConfig)
    groups.initialize(config.parallel, seed=1)
    from prism_megatron.rollout.subprocess_engine import EngineDied, SubprocessEngine
    from prism_megatron.stages.rollouts import Sampler, start_engine
    from prism_megatron.stages.setup import load_policy, load_processor

    rows, processor = read_rlvr(Path(data))[:PROMPTS], load_processor(config)
    engine = start_engine(config, Path(checkpoint))
    assert isinstance(engine, SubprocessEngine)
    measured: dict[str, Any] = train(config, engine, processor, rows)
    policy = load_policy(config)
    measured["corrupted"] = said_of_corruption(config, engine, policy, processor, rows)
    engine._was_restarted = False
    measured["damaged"] = said_of_damage(config, engine, policy, processor, rows)
    measured["no_rows"] = Sampler(engine, processor, config).sample([], 0)

    if engine._processes is not None:  # how long a machine takes for its first batches, nobody can say
        engine._processes._config = replace(engine._processes._config, timeout_seconds=1.0)
        for process in processes():
            process.send_signal(signal.SIGSTOP)
    try:
        Sampler(engine, processor, config).sample(rows, 0)
    except EngineDied as death:
        measured["second_death"] = str(death)
    Path(folder, f"measured_{os.environ['RANK']}.json").write_text(json.dumps(measured))
    groups.shutdown()


def train(config: RLVRConfig, engine: Any, processor: Any, rows: Any) -> dict[str, Any]:
    """Two iterations; in the second the rows are sampled twice, and the engine is killed the second time.

    Each trains on what was sampled last, where the step refuses rollouts of any but the current weights.
    """
    from prism_megatron.observe import metrics as names
    from prism_megatron.stages.batcher import Batcher
    from prism_megatron.stages.policy import policy_gradient_step
    from prism_megatron.stages.rollouts import Sampler, push_weights
    from prism_megatron.stages.setup import load_policy

    policy, batcher = load_policy(config), Batcher.from_config(processor.input_spec, config)
    measured: dict[str, Any] = {"versions": [], "differences": []}
    for iteration in range(2):
        push_weights(engine, policy, iteration, config.rollout)
        samples = Sampler(engine, processor, config).sample(rows, iteration)
        if iteration == 1:
            with engine_killed_at_work():
                again = Sampler(engine, processor, config).sample(rows, iteration)
            measured["same_when_killed"] = [s.rollout for s in again] == [s.rollout for s in samples]
            samples = again
        measured["versions"].append(sorted({sample.rollout.policy_version for sample in samples}))
        advantages = [float((-1) ** number) for number in range(len(samples))]
        batches = batcher.policy(samples, advantages, config, iteration)
        step = policy_gradient_step(policy, None, batches, config, 1e-2)
        measured["differences"].append(step[names.TRAIN_ROLLOUT_LOGPROB_ABS_DIFF])
    return measured


def said_of_corruption(config: RLVRConfig, engine: Any, policy: Any, processor: Any, rows: Any) -> list[str]:
    """Errors of a sync with checksums that transfers a changed bit, and of sampling afterwards."""
    from prism_megatron.rollout.interface import NoWeights
    from prism_megatron.stages.rollouts import Sampler, push_weights

    said = []
    if engine._processes is not None:
        transport = engine._processes._transport
        filled = transport._filled

        def corrupting(named: Any) -> Iterator[Any]:
            for content, pieces in filled(named):
                at = 0
                for piece in pieces:
                    if piece.name.endswith(DAMAGED):
                        content[at] ^= 1
                    at += piece.length
                yield content, pieces

        transport._filled = corrupting
    try:
        push_weights(engine, policy, 2, config.rollout)
    except ValueError as error:
        said.append(str(error))
    finally:
        if engine._processes is not None:
            transport._filled = filled
    try:
        Sampler(engine, processor, config).sample(rows, 0)
    except NoWeights as error:
        said.append(str(error))
    return said


def said_of_damage(config: RLVRConfig, engine: Any, policy: Any, processor: Any, rows: Any) -> str:
    """Error of the sync guard when each update halves a tensor between the two sides.

    While it looks for the parameter the engine is killed, with weights on their way to it.
    """
    from prism_megatron.stages.rollouts import Sampler
    from prism_megatron.stages.sync_guard import SyncGuard

    rollout = replace(config.rollout, guard_interval=1, sync_checksums=False)
    guard = SyncGuard(Sampler(engine, processor, replace(config, rollout=rollout)), policy, rows)
    guard.push(3)
    if engine._processes is not None:
        send, transport = engine._processes.send, engine._processes._transport
        move, moved = transport._move, 0

        def killing(content: Any) -> None:
            nonlocal moved
            moved += 1
            if moved == 3:
                victim = processes()[-1].pid
                os.kill(victim, signal.SIGKILL)
                select.select([os.pidfd_open(victim)], [], [])
            move(content)

        def damaging(command: str, named: Any, *arguments: Any) -> Any:
            if command == "update":
                named = ((name, tensor / 2 if name.endswith(DAMAGED) else tensor) for name, tensor in named)
            else:
                transport._move = killing
            return send(command, named, *arguments)

        engine._processes.send = damaging
    try:
        guard.push(4)
    except RuntimeError as error:
        return str(error)
    finally:
        if engine._processes is not None:
            engine._processes.send, transport._move = send, move
    return ""


@contextmanager
def engine_killed_at_work() -> Iterator[None]:
    """Kill a process of the engine, as the system does that is out of memory, once it has worked for a while."""
    found = processes()
    if not found:
        yield
        return

    def kill(victim: psutil.Process) -> None:
        start = victim.cpu_times().user
        while victim.cpu_times().user < start + 0.3:
            time.sleep(0.01)
        victim.kill()

    killer = threading.Thread(target=kill, args=(found[-1],))
    killer.start()
    yield
    killer.join()


def processes() -> list[psutil.Process]:
    """Return the engine processes that this rank started."""
    return [
        child for child in psutil.Process().children() if "prism_megatron.rollout.subprocess_worker" in child.cmdline()
    ]


if __name__ == "__main__":
    main()
