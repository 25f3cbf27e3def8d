"""The table of Qwen3-VL's weights, read in both directions. One row per Megatron parameter."""

from __future__ import annotations

from collections.abc import Iterator

from prism_megatron.convert.rules import (
    COLUMNS,
    GATED,
    REPLICATED,
    ROWS,
    Layout,
    Rule,
    expert_down,
    expert_up,
    flattened,
    grouped_qkv,
    headwise_qkv,
)
from prism_megatron.model.build import HFSizes


def policy_table(sizes: HFSizes) -> list[Rule]:
    """Every parameter of the policy: language model (dense or mixture-of-experts), then vision tower."""
    rules = list(_language_model(sizes, sizes.num_experts))
    if not sizes.tie_embeddings:
        rules.append(Rule("output_layer.weight", ("lm_head.weight",), ROWS))
    return [*rules, *_vision(sizes)]


def discriminator_table(sizes: HFSizes, num_experts: int, num_heads: int) -> list[Rule]:
    """Every parameter of the discriminator, in the released layout (spec 8.2).

    A second head, which the released checkpoint does not have, makes ``v_head.1.weight`` [2, H].
    """
    assert num_heads in (1, 2)
    head = Rule("score_heads.weight", ("v_head.1.weight",), REPLICATED)
    return [*_language_model(sizes, num_experts), *_vision(sizes), head]


def _language_model(sizes: HFSizes, num_experts: int | None) -> Iterator[Rule]:
    text = sizes.text
    qkv = grouped_qkv(text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"])
    hf = "model.language_model"
    yield Rule("embedding.word_embeddings.weight", (f"{hf}.embed_tokens.weight",), ROWS)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = f"decoder.layers.{i}", f"{hf}.layers.{i}"
        attention = f"{theirs}.self_attn"
        yield Rule(f"{ours}.input_layernorm.weight", (f"{theirs}.input_layernorm.weight",), REPLICATED)
        yield Rule(
            f"{ours}.self_attention.linear_qkv.weight",
            tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            qkv,
        )
        yield Rule(f"{ours}.self_attention.q_layernorm.weight", (f"{attention}.q_norm.weight",), REPLICATED)
        yield Rule(f"{ours}.self_attention.k_layernorm.weight", (f"{attention}.k_norm.weight",), REPLICATED)
        yield Rule(f"{ours}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), COLUMNS)
        yield Rule(f"{ours}.pre_mlp_layernorm.weight", (f"{theirs}.post_attention_layernorm.weight",), REPLICATED)
        if num_experts is None:
            gate_up = (f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight")
            yield Rule(f"{ours}.mlp.linear_fc1.weight", gate_up, GATED)
            yield Rule(f"{ours}.mlp.linear_fc2.weight", (f"{theirs}.mlp.down_proj.weight",), COLUMNS)
            continue
        yield Rule(f"{ours}.mlp.router.weight", (f"{theirs}.mlp.gate.weight",), REPLICATED)
        for e in range(num_experts):
            expert = f"{ours}.mlp.experts.local_experts.{e}"
            up, down = f"{theirs}.mlp.experts.gate_up_proj", f"{theirs}.mlp.experts.down_proj"
            yield Rule(f"{expert}.linear_fc1.weight", (up,), expert_up(e), expert=e)
            yield Rule(f"{expert}.linear_fc2.weight", (down,), expert_down(e), expert=e)
    yield Rule("decoder.final_layernorm.weight", (f"{hf}.norm.weight",), REPLICATED)


def _vision(sizes: HFSizes) -> Iterator[Rule]:
    vision = sizes.vision
    hf = "model.visual"
    patch = vision["patch_size"]
    kernel = (vision["hidden_size"], vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    yield Rule("vision.patch_embed.weight", (f"{hf}.patch_embed.proj.weight",), flattened(kernel))
    yield Rule("vision.patch_embed.bias", (f"{hf}.patch_embed.proj.bias",), REPLICATED)
    yield Rule("vision.pos_embed.weight", (f"{hf}.pos_embed.weight",), REPLICATED)
    qkv = headwise_qkv(vision["num_heads"])
    for i in range(vision["depth"]):
        ours, theirs = f"vision.layers.{i}", f"{hf}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            yield from _with_bias(f"{ours}.{norm}", f"{theirs}.{norm}", REPLICATED, REPLICATED)
        yield from _with_bias(f"{ours}.attention.linear_qkv", f"{theirs}.attn.qkv", qkv, qkv)
        yield from _with_bias(f"{ours}.attention.linear_proj", f"{theirs}.attn.proj", COLUMNS, REPLICATED)
        yield from _with_bias(f"{ours}.linear_fc1", f"{theirs}.mlp.linear_fc1", ROWS, ROWS)
        yield from _with_bias(f"{ours}.linear_fc2", f"{theirs}.mlp.linear_fc2", COLUMNS, REPLICATED)
    mergers = [("vision.merger", f"{hf}.merger")]
    for i in range(len(vision["deepstack_visual_indexes"])):
        mergers.append((f"vision.deepstack_mergers.{i}", f"{hf}.deepstack_merger_list.{i}"))
    for ours, theirs in mergers:
        yield from _with_bias(f"{ours}.norm", f"{theirs}.norm", REPLICATED, REPLICATED)
        yield from _with_bias(f"{ours}.linear_fc1", f"{theirs}.linear_fc1", ROWS, ROWS)
        yield from _with_bias(f"{ours}.linear_fc2", f"{theirs}.linear_fc2", COLUMNS, REPLICATED)


def _with_bias(ours: str, theirs: str, weight: Layout, bias: Layout) -> Iterator[Rule]:
    yield Rule(f"{ours}.weight", (f"{theirs}.weight",), weight)
    yield Rule(f"{ours}.bias", (f"{theirs}.bias",), bias)
