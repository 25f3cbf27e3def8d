"""Does our Qwen3-VL compute what HF's does, at any parallel layout?

    python tools/parity.py --hf runs/tiny/base --tp 2 --pp 2 --gradients

Starts its own ranks, runs HF and ours on the same chats in float32 and prints one JSON line with the largest
differences, absolute and relative to the largest value compared. Exit status 1 past the tolerance, 2 for what cannot be
run.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_megatron.config import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig, WarmupConfig
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.pack import Padding, TrainingSequence, pack
from prism_megatron.types import PERCEPTION, REASONING, EncodedPrompt, InputSpec, PackedBatch
from tools.parity_inputs import default_chats, encode_rows, load_rows, read_chats, save_rows

LOGITS_TOLERANCE = 2e-5  # relative to the largest logit
GRADIENT_TOLERANCE = 1e-4  # relative to the largest entry of each tensor
# With an epsilon far above any gradient, AdamW's first step is the gradient times learning rate over epsilon.
_EPSILON, _STEP = 1e8, 1e5
SIDES = ("teacher", "student")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """How our side is run. ``batching``: single (one row a micro-batch), packed or padded (all rows of a rank)."""

    ranks: int = 1
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    batching: str = "single"
    recompute: bool = False
    gradients: bool = True
    distributed_optimizer: bool = False
    moe_aux_loss_coeff: float = 0.0
    experts: str = ""  # dedicated or shared: the checkpoint upcycled to a discriminator, and not the policy
    precision: str = "fp32"

    @property
    def name(self) -> str:
        short = {"tensor_model": "tp", "pipeline_model": "pp", "virtual_pipeline_model": "vpp", "context": "cp"}
        short |= {"expert_model": "ep", "expert_tensor": "etp"}
        degrees = [f"{s}{n}" for k, s in short.items() if (n := getattr(self.parallel, f"{k}_parallel_size")) > 1]
        parallel = self.parallel
        split = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
        flags = {"sp": parallel.sequence_parallel, f"split{split}": any(split), "recompute": self.recompute}
        flags |= {"distopt": self.distributed_optimizer, self.batching: self.batching != "single"}
        flags |= {self.experts: bool(self.experts), "balanced": bool(self.experts and self.moe_aux_loss_coeff)}
        return "-".join([f"{self.ranks}x", *degrees, *(name for name, on in flags.items() if on)])


def _sequence(row: EncodedPrompt, spec: InputSpec) -> TrainingSequence:
    """Trained on everything after its last image (or its first token)."""
    visual = (spec.image_token_id, spec.video_token_id)
    start = 1 + max((i for i, token in enumerate(row.token_ids) if token in visual), default=0)
    return TrainingSequence(EncodedPrompt(row.token_ids[:start], row.visuals), row.token_ids[start:])


# HF -------------------------------------------------------------------------------------------------------------------


def hf_results(
    checkpoint: Path,
    rows: Sequence[EncodedPrompt],
    gradients: bool,
    aux_coeff: float,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """Logits of every row and gradients of the mean trained token's loss, from HF's model, one row at a time.

    Everything comes back in float32 on the CPU. ``aux_coeff`` adds the load-balancing loss, written down here once more
    from HF's own router logits.
    """
    from transformers import AutoModelForImageTextToText

    spec = ChatProcessor(checkpoint).input_spec
    hf = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").to(device)
    routers: list[Tensor] = []
    for name, module in hf.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _m, _i, output: routers.append(output[0]))
    sequences = [_sequence(row, spec) for row in rows]
    trained = sum(len(s.response_ids) for s in sequences)
    tokens = sum(map(len, sequences))
    results: dict[str, Tensor] = {}
    for number, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        routers.clear()
        with torch.set_grad_enabled(gradients):
            inputs = {name: value.to(device) for name, value in _hf_inputs(row, spec).items()}
            logits = hf(**inputs).logits[0].float()
            results[f"row_{number}"] = logits.detach().cpu()
            if gradients:
                start = len(sequence.prompt.token_ids) - 1
                logprobs = logits[start:-1].log_softmax(-1)
                chosen = logprobs.gather(1, torch.tensor(sequence.response_ids, device=device)[:, None])
                results[f"logprobs_{number}"] = chosen[:, 0].detach().cpu()
                results[f"entropy_{number}"] = -(logprobs.exp() * logprobs).sum(-1).detach().cpu()
                loss = -chosen.sum() / trained
                for router_logits in routers if aux_coeff else ():
                    balance = _switch_loss(router_logits, hf.config.text_config.num_experts_per_tok)
                    loss = loss + aux_coeff * balance / len(routers) * len(sequence) / tokens
                loss.backward()
    if gradients:
        for name, parameter in hf.named_parameters():
            assert parameter.grad is not None, name
            gradient = parameter.grad.float().cpu()
            # Stacked experts are held transposed to how they are stored.
            results[f"grad:{name}"] = gradient.mT if ".mlp.experts." in name else gradient
    return results


def _switch_loss(router_logits: Tensor, topk: int) -> Tensor:
    """E * sum_e f_e P_e over the tokens of a row, f counting every chosen expert."""
    probs = router_logits.float().softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(topk, dim=-1).indices, 1.0)
    return probs.shape[1] * (chosen.mean(0) * probs.mean(0)).sum()


def _hf_inputs(row: EncodedPrompt, spec: InputSpec) -> dict[str, Tensor]:
    ids = torch.tensor([row.token_ids])
    kinds = (ids == spec.image_token_id).int() + 2 * (ids == spec.video_token_id).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds}
    for is_video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        shown = [v for v in row.visuals if v.is_video == is_video]
        if shown:
            inputs[pixels] = torch.cat([v.patches for v in shown])
            inputs[grid] = torch.tensor([v.grid for v in shown])
    return inputs


# Ours, on every rank --------------------------------------------------------------------------------------------------


def our_results(checkpoint: Path, rows: Sequence[EncodedPrompt], spec: InputSpec, case: Case) -> dict[str, Tensor]:
    """The same from ours, on every rank; collective. Gradients under HF's names."""
    from prism_megatron.convert.hf_io import HFWeights
    from prism_megatron.convert.qwen3_vl import policy_table
    from prism_megatron.convert.transfer import export_weights, load_weights
    from prism_megatron.model.build import build_policy, wrap_for_training
    from prism_megatron.model.sizes import read_sizes
    from prism_megatron.optim.optimizer import build_optimizer
    from prism_megatron.optim.step import Stats, evaluate_step, train_step
    from prism_megatron.parallel.collectives import (
        from_last_stage,
        gather_over_data_parallel,
        sum_over_data_parallel,
    )

    sizes = read_sizes(checkpoint)
    table = policy_table(sizes)
    model = ModelConfig(
        str(checkpoint), case.precision, recompute=case.recompute, moe_aux_loss_coeff=case.moe_aux_loss_coeff
    )
    chunks = build_policy(model, case.parallel, sizes)
    with HFWeights(checkpoint) as weights:
        load_weights(chunks, table, weights)
    wrapped = wrap_for_training(chunks, case.distributed_optimizer)
    sequences = [_sequence(row, spec) for row in rows]
    groups_of_rows, batches = _batches(sequences, spec, case)

    logits = evaluate_step(wrapped, batches, lambda chunk, batch: chunk(batch, whole_logits=True))
    mine = {}
    for members, batch, values in zip(groups_of_rows, batches, logits, strict=True):
        for row, start in zip(members, batch.cu_seqlens.tolist(), strict=False):
            mine[f"row_{row}"] = values[start : start + len(sequences[row])].cpu()
    results = dict(gather_over_data_parallel(list(mine.items())))
    if not case.gradients:
        return results

    trained, tokens = sum_over_data_parallel(
        *(sum(f(sequences[r]) for g in groups_of_rows for r in g) for f in (lambda s: len(s.response_ids), len))
    )
    shares = {id(b): sum(len(sequences[r]) for r in g) / tokens for g, b in zip(groups_of_rows, batches, strict=True)}
    scored: list[tuple[str, Tensor]] = []

    def loss(batch: PackedBatch, scores: Any) -> tuple[Tensor, Stats]:
        members = groups_of_rows[next(i for i, b in enumerate(batches) if b is batch)]
        for row, end in zip(members, batch.last_tokens.tolist(), strict=True):
            response = slice(end - len(sequences[row].response_ids), end)
            scored.append((f"logprobs_{row}", scores.logprobs[response].detach().cpu()))
            scored.append((f"entropy_{row}", scores.entropy[response].cpu()))
        return -(scores.logprobs * batch.loss_mask).sum() / trained, Stats({})

    lr = _STEP * _EPSILON if case.distributed_optimizer else 0.0
    optimizer = build_optimizer(OptimizerConfig(lr=lr, adam_eps=_EPSILON, clip_grad=0.0), wrapped)
    before = {n: t.clone() for n, t in export_weights(wrapped, table)} if case.distributed_optimizer else {}
    train_step(wrapped, optimizer, batches, lambda chunk, batch: chunk(batch, shares[id(batch)]), loss, lr)
    results |= dict(gather_over_data_parallel(from_last_stage(scored)))
    if case.distributed_optimizer:  # gradients are scattered over the ranks: look at what the step made of them
        after = export_weights(wrapped, table)
        return results | {f"grad:{name}": (before[name] - tensor) / _STEP for name, tensor in after}
    return results | {f"grad:{name}": g.cpu() for name, g in export_weights(wrapped, table, read=_gradient)}


def discriminator_results(
    checkpoint: Path, rows: Sequence[EncodedPrompt], spec: InputSpec, case: Case
) -> dict[str, Tensor]:
    """Scores and gradients of a discriminator's step, as the stages take it: each row's answer beside its reverse.

    The two are scored together, so that they share their prompt at the layouts which let them.
    Load balancing is over a micro-batch, so that it is the same at layouts with the same micro-batches only.
    """
    from prism_megatron.convert.transfer import export_weights
    from prism_megatron.data.loader import rank_share
    from prism_megatron.parallel import groups
    from prism_megatron.parallel.collectives import gather_over_data_parallel
    from prism_megatron.stages.discriminator import DiscriminatorObjective, Pair, discriminator_step, score
    from prism_megatron.stages.setup import load_discriminator

    mine = rank_share(list(range(len(rows))), groups.data_parallel_rank(), groups.data_parallel_size())
    pairs = {}
    for row in mine:
        told = _sequence(rows[row], spec)
        for branch in (PERCEPTION, REASONING):
            teacher, student = (
                TrainingSequence(told.prompt, ids, branch) for ids in (told.response_ids, told.response_ids[::-1])
            )
            pairs[2 * row + branch] = Pair(teacher, student, f"row {row}")
    widest = max(3 * len(row.token_ids) for row in rows)  # the gradient penalty lays the teacher down twice
    config = WarmupConfig(
        stage="warmup",
        parallel=case.parallel,
        model=ModelConfig(hf_checkpoint=str(checkpoint), recompute=case.recompute),
        discriminator=DiscriminatorConfig(
            str(checkpoint), 8, 2, case.experts, upcycle_noise=0.5, load_balance_coeff=case.moe_aux_loss_coeff
        ),
        max_tokens_per_microbatch=widest if case.batching == "single" else 1 << 20,
    )
    trained = load_discriminator(config, OptimizerConfig(lr=0.0, clip_grad=0.0))
    if hasattr(trained.chunks[-1].module, "score_heads"):
        with torch.no_grad():  # at zero, as they start, nothing else has a gradient
            head = trained.chunks[-1].module.score_heads.weight
            head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)))
    processor = _processor(checkpoint)
    sides = {f"row_{number}_{side}": getattr(pair, side) for number, pair in pairs.items() for side in SIDES}
    owners = [f"row {row}" for row in mine for _ in range(2 * len(SIDES))]
    values = score(trained, list(sides.values()), owners, processor, config)
    results: dict[str, Tensor] = dict(gather_over_data_parallel(list(zip(sides, values, strict=True))))
    objective = DiscriminatorObjective((0.6, 1.4), 0.1, label_smoothing=0.1, penalty=0.1, penalty_std=0.02)
    discriminator_step(trained, list(pairs.values()), processor, config, objective, lr=0.0)
    gradients = export_weights(trained.chunks, trained.table, read=_gradient)
    return results | {f"grad:{name}": gradient for name, gradient in gradients}


@functools.cache
def _processor(checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(checkpoint)


def _gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.main_grad
    return gradient


def _batches(
    sequences: Sequence[TrainingSequence], spec: InputSpec, case: Case
) -> tuple[list[list[int]], list[PackedBatch]]:
    """This data-parallel rank's rows, micro-batch by micro-batch."""
    from prism_megatron.data.loader import rank_share
    from prism_megatron.parallel import groups
    from prism_megatron.stages.microbatch import equal_over_ranks, padding_for

    mine = rank_share(list(range(len(sequences))), groups.data_parallel_rank(), groups.data_parallel_size())
    rows = [[row] for row in mine] if case.batching == "single" else [mine] if mine else []
    rows = equal_over_ranks(rows, case.parallel)
    padding = padding_for(case.parallel, ModelConfig(""))
    if case.batching == "padded":
        longest = max(map(len, sequences))
        longest += -longest % padding.sequence_multiple
        padding = Padding(longest, padding.batch_multiple)
    packed = [pack([sequences[r] for r in members], spec, padding) for members in rows]
    return rows, [batch.to(groups.device()) for batch in packed]


def worker(plan: Path) -> None:
    """Run the cases of ``plan`` one after the other, each on its own ranks; the first failure ends it all.

    Ranks are forked from this process, which has imported everything: starting Python costs more than any case.
    """
    from prism_megatron.parallel import cpu, groups

    cpu.install()
    import prism_megatron.optim.optimizer
    import prism_megatron.optim.step
    import prism_megatron.stages.discriminator  # noqa: F401

    settings = json.loads(plan.read_text())
    _processor(Path(settings["checkpoint"]))
    for number, record in enumerate(settings["cases"]):
        case = Case(**{**record, "parallel": ParallelConfig(**record["parallel"])})
        port = groups.free_port()
        ranks = []
        for rank in range(case.ranks):
            if pid := os.fork():
                ranks.append(pid)
                continue
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            run_rank(case, settings, Path(settings["out"]) / f"{number}.safetensors")
        while ranks:
            pid, status = os.wait()
            ranks.remove(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                sys.exit(f"{case.name}: a rank ended with status {os.waitstatus_to_exitcode(status)}")


def run_rank(case: Case, settings: dict[str, Any], out: Path) -> NoReturn:
    """A rank's whole life. One that hangs prints its stack and ends."""
    from prism_megatron.parallel import groups

    faulthandler.dump_traceback_later(settings["case_timeout"], exit=True)
    try:
        groups.initialize(case.parallel, seed=1)
        rows, spec = load_rows(Path(settings["rows"])), InputSpec(**settings["spec"])
        measure = discriminator_results if case.experts else our_results
        results = measure(Path(settings["checkpoint"]), rows, spec, case)
        if groups.is_main_rank():
            save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
        groups.shutdown()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


# In between -----------------------------------------------------------------------------------------------------------


def run_cases(
    checkpoint: Path, rows: Sequence[EncodedPrompt], cases: Sequence[Case], case_timeout: float = 120
) -> list[dict[str, Tensor]]:
    """Results of each case, from real processes. Raises RuntimeError with their output when one fails or hangs."""
    with tempfile.TemporaryDirectory() as folder:
        save_rows(rows, Path(folder) / "rows.safetensors")
        plan = Path(folder) / "plan.json"
        settings = {
            "checkpoint": str(checkpoint.resolve()),
            "rows": f"{folder}/rows.safetensors",
            "spec": asdict(ChatProcessor(checkpoint).input_spec),
            "out": folder,
            "case_timeout": case_timeout,
            "cases": [asdict(case) for case in cases],
        }
        plan.write_text(json.dumps(settings))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--worker", str(plan)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60 + case_timeout * len(cases),
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"ranks ended with status {done.returncode}:\n{done.stderr[-6000:]}")
        return [load_file(f"{folder}/{number}.safetensors") for number in range(len(cases))]


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, Any]:
    """Largest differences: logits and log-probabilities over all rows, gradients tensor by tensor.

    ``*_relative`` divides by the largest value of the reference (for gradients, of the same tensor).
    """
    assert reference.keys() <= ours.keys(), f"missing: {sorted(reference.keys() - ours.keys())[:3]}"
    measured: dict[str, Any] = {}
    for kind, prefix in {"logits": "row_", "logprobs": "logprobs_", "entropy": "entropy_"}.items():
        names = [name for name in reference if name.startswith(prefix)]
        if not names:
            continue
        worst = max(float((ours[name] - reference[name]).abs().max()) for name in names)
        largest = max(float(reference[name].abs().max()) for name in names)
        measured |= {f"{kind}_max_abs": worst, f"{kind}_relative": worst / largest}
    relative = {}
    for name in (name for name in reference if name.startswith("grad:")):
        worst, largest = float((ours[name] - reference[name]).abs().max()), float(reference[name].abs().max())
        relative[name.removeprefix("grad:")] = worst / largest if largest else worst
        measured["gradients_max_abs"] = max(measured.get("gradients_max_abs", 0.0), worst)
    if relative:
        measured["gradients_worst_tensor"] = max(relative, key=lambda name: relative[name])
        measured["gradients_relative"] = max(relative.values())
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, help="HF Qwen3-VL checkpoint directory")
    for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--packed", action="store_true", help="all rows of a rank in one packed micro-batch")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--inputs", type=Path, help="JSON Lines, one chat in HF's messages format per line")
    parser.add_argument("--dump", type=Path, help="write our logits: row_0 [tokens, vocabulary], input_ids_0, ...")
    parser.add_argument("--gradients", action="store_true", help="compare gradients too")
    arguments = parser.parse_args()
    try:
        return report(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(arguments: argparse.Namespace) -> int:
    """Compare, print, dump; the exit status."""
    from prism_megatron.parallel import cpu
    from prism_megatron.parallel.degrees import check_degrees

    cpu.install()
    from prism_megatron.model.sizes import read_sizes

    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        virtual_pipeline_model_parallel_size=arguments.vpp,
        context_parallel_size=arguments.cp,
        expert_model_parallel_size=arguments.ep,
        expert_tensor_parallel_size=arguments.etp,
        sequence_parallel=arguments.sequence_parallel,
    )
    ranks = arguments.tp * arguments.pp * arguments.cp * arguments.dp
    sizes = read_sizes(arguments.hf)
    check_degrees(parallel, ranks, sizes.degrees())
    rows = encode_rows(arguments.hf, read_chats(arguments.inputs) if arguments.inputs else default_chats())
    case = Case(
        ranks,
        parallel,
        batching="packed" if arguments.packed else "single",
        recompute=arguments.recompute,
        gradients=arguments.gradients,
        distributed_optimizer=arguments.distributed_optimizer,
    )
    reference = hf_results(arguments.hf, rows, arguments.gradients, 0.0)
    (ours,) = run_cases(arguments.hf, rows, [case])
    measured = compare(ours, reference)
    within = measured["logits_relative"] <= LOGITS_TOLERANCE
    within &= measured.get("gradients_relative", 0.0) <= GRADIENT_TOLERANCE
    print(json.dumps({"layout": case.name, "rows": len(rows), **measured, "within_tolerance": within}))
    if arguments.dump:
        dumped = {name: tensor for name, tensor in ours.items() if name.startswith("row_")}
        dumped |= {f"input_ids_{number}": torch.tensor(row.token_ids) for number, row in enumerate(rows)}
        save_file(dumped, arguments.dump)
    return 0 if within else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        sys.exit(main())
