"""Checkpoints as people have them: read as they are, or refused in a line that names what is missing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_megatron.config import ModelConfig, ParallelConfig
from prism_megatron.convert.convert_checkpoint import hf_to_megatron
from prism_megatron.convert.hf_io import HFWeights
from prism_megatron.convert.qwen3_vl import policy_table
from prism_megatron.convert.rules import EMBEDDING, OUTPUT
from prism_megatron.convert.transfer import load_weights, named_parameters
from prism_megatron.errors import UserError
from prism_megatron.model.build import build_policy
from prism_megatron.model.sizes import read_sizes
from prism_megatron.parallel import groups
from tests.models import save_tensors

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    groups.initialize(ParallelConfig(), seed=1)
    yield
    groups.shutdown()


@pytest.fixture
def changed(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny checkpoint with other tensors and, if asked for, other entries of config.json."""

    def write(change: Callable[[Tensors], object], **config: object) -> Path:
        tensors = load_file(tiny_checkpoint / "model.safetensors")
        change(tensors)
        directory = tmp_path / "hf"
        shutil.copytree(tiny_checkpoint, directory)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        written = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(written))
        return directory

    return write


def loaded(directory: Path) -> Tensors:
    """Parameters of the policy that the directory fills."""
    sizes = read_sizes(directory)
    model = build_policy(ModelConfig(str(directory)), ParallelConfig(), sizes)
    with HFWeights(directory) as weights:
        load_weights(model, policy_table(sizes), weights)
    return named_parameters(model)


def refused(directory: Path, tmp_path: Path) -> str:
    """Return the error that both readers raise, training and conversion."""
    with pytest.raises(UserError) as training:
        loaded(directory)
    with pytest.raises(UserError) as conversion:
        hf_to_megatron(directory, tmp_path / "megatron", ParallelConfig())
    assert str(training.value) == str(conversion.value)
    assert "\n" not in str(training.value)
    return str(training.value)


def test_mixed_precisions_are_read_as_they_are(changed: Callable[..., Path]) -> None:
    kinds = (torch.bfloat16, torch.float16, torch.float32)

    def mix(tensors: Tensors) -> None:
        for number, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].to(kinds[number % 3])

    directory = changed(mix)
    stored = load_file(directory / "model.safetensors")
    parameters = loaded(directory)
    assert torch.equal(parameters["embedding.word_embeddings.weight"], stored[EMBEDDING].float())
    layer = "model.language_model.layers.1.mlp"
    gate_up = torch.cat([stored[f"{layer}.{part}_proj.weight"].float() for part in ("gate", "up")])
    assert torch.equal(parameters["decoder.layers.1.mlp.linear_fc1.weight"], gate_up)


def test_a_tied_output_layer_that_is_stored_is_read(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING].clone()}))
    assert "output_layer.weight" not in loaded(directory)


def test_a_tied_output_layer_of_other_values_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed(lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING] + 1}))
    assert "config.json ties lm_head.weight to the embedding but the checkpoint stores another matrix" in refused(
        directory, tmp_path
    )


def test_it_is_read_once_the_config_no_longer_ties_it(changed: Callable[..., Path]) -> None:
    directory = changed(lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING] + 1}), tie_word_embeddings=False)
    parameters = loaded(directory)
    assert torch.equal(parameters["output_layer.weight"], parameters["embedding.word_embeddings.weight"] + 1)


def test_an_untied_output_layer_that_is_not_stored_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed(lambda tensors: None, tie_word_embeddings=False)
    assert refused(directory, tmp_path) == "checkpoint lacks 1 tensors of this model: lm_head.weight"


def test_pickled_weights_alone_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed(lambda tensors: None)
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert "holds no model.safetensors (or its index)" in refused(directory, tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(index: str, changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed(lambda tensors: None)
    (directory / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json is damaged" in refused(directory, tmp_path)


def test_a_missing_shard_is_named(changed: Callable[..., Path], tmp_path: Path) -> None:
    whole = changed(lambda tensors: None)
    save_tensors(tmp_path / "shards", load_file(whole / "model.safetensors"), whole, shard_bytes=2_000_000)
    last = max((tmp_path / "shards").glob("model-*.safetensors"))
    last.unlink()
    assert f"lists {last.name}, which is missing" in refused(tmp_path / "shards", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float, changed: Callable[..., Path], tmp_path: Path) -> None:
    directory = changed(lambda tensors: tensors[EMBEDDING][3].fill_(value))
    assert "model.language_model.embed_tokens.weight holds values that are infinite" in refused(directory, tmp_path)
