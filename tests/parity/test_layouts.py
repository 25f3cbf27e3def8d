"""HF = ours in one process = ours at every parallel layout, on one to eight real ranks: logits, gradients.

The chain: ``hf_results`` is HF's model, row by row (the load-balancing loss written down once more from HF's own router
logits). ``test_one_process`` proves ours in one process equal to it. ``test_layout`` proves each layout equal to one
process, to a tighter tolerance, and with it that packed is padded is one sequence at a time, that recomputation changes
nothing, that DeepStack crosses any stage boundary and that an image shown by two rows, or by none, is no special case.
Ranks beyond a layout's own are data parallel. The rows: text, one image, two sizes of image, videos, one image
twice. The models are those of ``tests/models.py``, which differ as published ones do.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from prism_megatron.config import ParallelConfig
from tests.models import make_variant
from tools.parity.cases import GRADIENT_TOLERANCE, LOGITS_TOLERANCE, Case, compare
from tools.parity.hf import hf_results
from tools.parity.inputs import default_chats, encode_rows
from tools.parity.ranks import run_cases

AUX = 0.05


def layout(
    ranks: int, batching: str = "single", recompute: bool = False, distopt: bool = False, **degrees: Any
) -> Case:
    names = {"tp": "tensor_model", "pp": "pipeline_model", "vpp": "virtual_pipeline_model", "cp": "context"}
    names |= {"ep": "expert_model", "etp": "expert_tensor"}
    split = {"first": "num_layers_in_first_pipeline_stage", "last": "num_layers_in_last_pipeline_stage"}
    fields = {f"{names[k]}_parallel_size": n for k, n in degrees.items() if k in names}
    fields |= {split[k]: n for k, n in degrees.items() if k in split}
    parallel = ParallelConfig(**fields, sequence_parallel=degrees.get("sp", False))
    return Case(ranks, parallel, batching, recompute, distributed_optimizer=distopt)


ONE = layout(1)
UNTIED = [
    layout(2, distopt=True),
    layout(8),
    layout(1, "packed"),
    layout(2, "padded"),
    layout(2, tp=2),
    layout(4, tp=2, sp=True, distopt=True),
    layout(2, pp=2, first=2),
    layout(4, pp=4, first=1, last=2),
    layout(4, "packed", pp=2, first=1),
    layout(2, cp=2),
    layout(4, "packed", cp=4, recompute=True),
    layout(4, tp=2, pp=2, last=2, recompute=True),
    layout(8, tp=2, sp=True, pp=2, cp=2, first=2),
    layout(6, pp=3, cp=2, first=1, last=1, distopt=True),
]
TIED = [
    layout(2, pp=2, vpp=2),
    layout(4, tp=2, sp=True, pp=2, vpp=2, distopt=True),
]
EXPERTS = [
    layout(2),
    layout(2, ep=2),
    layout(4, ep=4, distopt=True),
    layout(2, tp=2, sp=True, ep=2),
    layout(2, tp=2, sp=True, etp=2),
    layout(4, tp=2, sp=True, etp=2, ep=2),
    layout(4, pp=2, ep=2),
    layout(4, pp=2, vpp=2, ep=2, recompute=True),
    layout(8, pp=4, ep=2),
    layout(2, cp=2, ep=2),
    layout(4, cp=2, ep=4, recompute=True),
    layout(4, tp=2, sp=True, pp=2, ep=2),
    layout(8, tp=2, sp=True, pp=2, vpp=2, ep=2, distopt=True),
    layout(4, tp=2, sp=True, cp=2, ep=4),
    layout(8, tp=2, sp=True, pp=2, cp=2, etp=2, ep=2),
]
# A discriminator over every layout with all pairs in one micro-batch, load balancing included; without it over any cut.
BALANCED = [
    layout(1, "packed"),
    layout(2, "packed", tp=2, sp=True, ep=2),
    layout(2, "packed", recompute=True, cp=2, ep=2),
    layout(4, "packed", tp=2, sp=True, pp=2, ep=2, first=2),
]
CUT = [layout(1, "packed"), layout(1), layout(2, ep=2)]
JUDGES = [
    [dataclasses.replace(case, experts="dedicated", moe_aux_loss_coeff=AUX) for case in BALANCED],
    [dataclasses.replace(case, experts="dedicated") for case in CUT],
    [dataclasses.replace(case, experts="shared", moe_aux_loss_coeff=AUX) for case in BALANCED[:2]],
]
JUDGED = [(cases[0].name, case.name) for cases in JUDGES for case in cases[1:]]
CASES = {
    "untied": [ONE, *UNTIED],
    "tied": [ONE, *TIED],
    "experts": [dataclasses.replace(case, moe_aux_loss_coeff=AUX) for case in (ONE, *EXPERTS)],
}


Results = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def results_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Results]:
    """HF's results and ours at every layout, of one kind of model, run when first asked for."""

    @functools.cache
    def run(kind: str) -> Results:
        checkpoint = make_variant(kind, tmp_path_factory.mktemp(kind) / "base", seed=3)
        rows = encode_rows(checkpoint, default_chats())
        found = {"hf": hf_results(checkpoint, rows, True, AUX if kind == "experts" else 0.0)}
        judges = [case for cases in JUDGES for case in cases]
        cases = [*CASES[kind], *(judges if kind == "untied" else ())]
        ran = run_cases(checkpoint, rows, cases)
        return found | dict(zip((case.name for case in cases), ran, strict=True))

    return run


@pytest.mark.parametrize("kind", CASES)
def test_one_process(kind: str, results_of: Callable[[str], Results]) -> None:
    results = results_of(kind)
    measured = compare(results[ONE.name], results["hf"])
    assert measured["logits_relative"] < LOGITS_TOLERANCE
    assert measured["gradients_relative"] < GRADIENT_TOLERANCE, measured["gradients_worst_tensor"]


@pytest.mark.parametrize(("kind", "name"), [(kind, case.name) for kind, cases in CASES.items() for case in cases[1:]])
def test_layout(kind: str, name: str, results_of: Callable[[str], Results]) -> None:
    results = results_of(kind)
    measured = compare(results[name], results[ONE.name])
    assert measured["logits_relative"] < 1e-5
    assert measured["logprobs_relative"] < 1e-5
    assert measured["entropy_relative"] < 1e-5
    assert measured["gradients_relative"] < 1e-5, measured["gradients_worst_tensor"]


@pytest.mark.parametrize(("alone", "name"), JUDGED)
def test_discriminator(alone: str, name: str, results_of: Callable[[str], Results]) -> None:
    results = results_of("untied")
    measured = compare(results[name], results[alone])
    assert measured["logits_relative"] < 1e-5, "these are its scores"
    assert measured["gradients_relative"] < 1e-4, measured["gradients_worst_tensor"]
