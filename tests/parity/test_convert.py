"""HF to Megatron and back, at every layout, on disk and between ranks: nothing lost, nothing changed, bit for bit."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prism_megatron.config import DiscriminatorConfig, ParallelConfig
from prism_megatron.convert.convert_checkpoint import hf_to_megatron, megatron_to_hf
from prism_megatron.convert.hf_io import HFWeights
from prism_megatron.convert.manifest import first_fault
from prism_megatron.convert.upcycle import UpcycledWeights, upcycled_config
from prism_megatron.model.sizes import read_sizes
from tests.models import make_variant, save_tensors

WORKER = Path(__file__).with_name("convert_worker.py")


@dataclass(frozen=True)
class Checkpoints:
    """HF directories and, under the same names, their conversions at tensor parallelism 1 and 2."""

    root: Path

    def hf(self, name: str) -> Path:
        return self.root / name

    def megatron(self, name: str, tp: int) -> Path:
        return self.root / f"{name}.tp{tp}"


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("convert")
    (root / "tied").symlink_to(tiny_checkpoint)
    make_variant("experts", root / "experts", seed=3)
    whole = make_variant("untied", root / "untied.one-file", seed=4)
    tensors = load_file(whole / "model.safetensors")
    # As merges of adapters leave them: norms in another precision.
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_tensors(root / "untied", mixed, whole, shard_bytes=200_000)
    assert len(list((root / "untied").glob("*.safetensors"))) > 3
    sizes = read_sizes(tiny_checkpoint)
    discriminator = DiscriminatorConfig("", 4, 2, "dedicated", 0.1, 0)
    with HFWeights(tiny_checkpoint) as dense:
        upcycled = UpcycledWeights(dense, sizes, discriminator, seed=5)
        named = {name: upcycled[name] for name in sorted(upcycled.names)}
        changes = dict(upcycled_config(sizes, 4, 2, 0.01))
        save_tensors(root / "discriminator", named, tiny_checkpoint, config_changes=changes)
    made = Checkpoints(root)
    for name in ("tied", "experts", "untied", "discriminator"):
        for tp in (1, 2):
            layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=2)
            hf_to_megatron(made.hf(name), made.megatron(name, tp), layout)
    return made


@pytest.mark.parametrize("name", ["tied", "experts", "untied", "discriminator"])
@pytest.mark.parametrize("tp", [1, 2])
def test_round_trip_on_disk(name: str, tp: int, checkpoints: Checkpoints, tmp_path: Path) -> None:
    hf, megatron = checkpoints.hf(name), checkpoints.megatron(name, tp)
    back = megatron_to_hf(megatron, tmp_path / "back", verify=hf)
    with HFWeights(hf) as before, HFWeights(tmp_path / "back") as after:
        assert before.names == after.names == {entry.name for entry in back.tensors}
        for tensor_name in before.names:
            assert before.lazy(tensor_name).dtype == after.lazy(tensor_name).dtype
            assert torch.equal(before[tensor_name], after[tensor_name]), tensor_name
        assert before.experts_swapped == after.experts_swapped == (name == "experts")
    side = [p.name for p in hf.iterdir() if ".safetensors" not in p.name and p.name != "manifest.json"]
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < set(side)
    assert filecmp.cmpfiles(hf, tmp_path / "back", side, shallow=False) == (side, [], [])
    assert first_fault(tmp_path / "back") is None


DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
}


def degrees_of(line: str) -> dict[str, int]:
    """``tp2 pp2`` in ParallelConfig's words."""
    return {DEGREES[word.rstrip("0123456789")]: int(word[-1]) for word in line.split()}


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (
            2,
            {
                "tied": ["tp2", "pp2", "pp2 vpp2", "tp1"],
                "untied": ["tp2", "pp2 first2"],
                "experts": ["ep2", "pp2", "tp2 etp2", "tp2 etp1"],
                "discriminator": ["ep2", "pp2", "tp2 ep2"],
            },
        ),
        (
            4,
            {
                "tied": ["tp2 pp2", "tp2 pp2 vpp2"],
                "experts": ["ep2 pp2", "tp2 ep2 etp2", "tp2 pp2 ep2"],
                "untied": ["tp2 pp2 first2"],
            },
        ),
    ],
)
def test_every_layout(
    ranks: int, names: dict[str, list[str]], checkpoints: Checkpoints, launch: Callable[..., str], tmp_path: Path
) -> None:
    """Loaded weights are exported unchanged, and Megatron loads the same shards from the conversion."""
    cases = [
        {
            "hf": str(checkpoints.hf(name)),
            "megatron": str(checkpoints.megatron(name, tp=2 if number % 2 else 1)),
            "part": "discriminator" if name == "discriminator" else "policy",
            "degrees": degrees_of(line),
        }
        for number, (name, line) in enumerate((name, line) for name, lines in names.items() for line in lines)
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch(ranks, [str(WORKER), str(tmp_path / "cases.json"), str(tmp_path / "found.json")])
    everybody = json.loads((tmp_path / "found.json").read_text())
    for number, case in enumerate(cases):
        with HFWeights(Path(case["hf"])) as weights:
            tensors = len(weights.names)
        for rank in range(ranks):
            found = everybody[rank][number]
            assert found["wrong"] == [], case
            assert found["differ"] == [], case
            assert found["exported"] == tensors
        degrees = case["degrees"]
        if degrees.get("pipeline_model_parallel_size", 1) > 1:
            first, last = everybody[0][number]["held"], everybody[ranks - 1][number]["held"]
            assert not {name for name in first.keys() & last.keys() if "layers" in name and "vision" not in name}


def test_transformers_and_ours_agree_on_experts(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Stacked experts in either dialect open in transformers with the same logits; ours is the released one."""
    from transformers import AutoModelForImageTextToText

    with HFWeights(checkpoints.hf("experts")) as weights:
        assert weights.experts_swapped, "save_pretrained writes output-first"
        named = {name: weights[name] for name in sorted(weights.names)}
        save_tensors(tmp_path / "released", named, checkpoints.hf("experts"))
    ids = torch.arange(40)[None]
    logits = []
    for directory in (checkpoints.hf("experts"), tmp_path / "released"):
        model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    assert torch.equal(*logits)
    with HFWeights(tmp_path / "released") as released:
        assert not released.experts_swapped
        text = json.loads((tmp_path / "released" / "config.json").read_text())["text_config"]
        shape = (text["num_experts"], text["hidden_size"], 2 * text["moe_intermediate_size"])
        assert released.lazy("model.language_model.layers.0.mlp.experts.gate_up_proj").shape == shape


def test_tied_output_that_is_stored_comes_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    save_tensors(hf, load_file(tiny_checkpoint / "model.safetensors"), tiny_checkpoint)
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, tmp_path / "megatron", ParallelConfig())
    back = megatron_to_hf(tmp_path / "megatron", tmp_path / "back", verify=hf)
    assert len(back.tensors) == len(tensors)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to the embedding but the checkpoint stores another"):
        hf_to_megatron(hf, tmp_path / "again", ParallelConfig())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.visual.pos_embed.weight"), r"lacks 1 tensors of this model: model\.visual\.pos_embed"),
        (lambda t: t.update(more=torch.ones(1)), "checkpoint has 1 tensors that this model does not have: more"),
        (
            lambda t: t.update({"model.language_model.norm.weight": torch.ones(127)}),
            r"model\.language_model\.norm\.weight has shape \(127,\), not \(128,\)",
        ),
        (
            lambda t: t["model.language_model.layers.2.mlp.up_proj.weight"][3].fill_(float("inf")),
            r"layers\.2\.mlp\.up_proj\.weight holds values that are infinite",
        ),
    ],
    ids=["missing", "extra", "reshaped", "not finite"],
)
def test_a_wrong_tensor_is_refused(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    change(tensors)
    save_tensors(tmp_path / "hf", load_file(tiny_checkpoint / "model.safetensors"), tiny_checkpoint)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(tmp_path / "hf", tmp_path / "out", ParallelConfig())
    assert not (tmp_path / "out").exists()
