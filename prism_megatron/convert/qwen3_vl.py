"""The conversion table of Qwen3-VL, used in both directions, with one row per Megatron parameter.

HF names and shapes are those of the released checkpoints; ``hf_io.py`` translates those of other writers. All shapes
are computed from ``config.json``.
"""

from __future__ import annotations

from collections.abc import Iterator

from prism_megatron.convert.rules import (
    COLUMNS,
    EMBEDDING,
    EXPERT_DOWN,
    EXPERT_UP,
    GATED,
    OUTPUT,
    REPLICATED,
    ROWS,
    SCORE_HEAD,
    Layout,
    Rule,
    flattened,
    grouped_qkv,
    headwise_qkv,
    padded_rows,
)
from prism_megatron.errors import UserError
from prism_megatron.model.sizes import HFSizes


def policy_table(sizes: HFSizes) -> list[Rule]:
    """Return the rows of the policy: language model (dense or mixture-of-experts), then vision tower.

    A tied output layer is a separate parameter only on the last of several pipeline stages.
    """
    shape = (sizes.text["vocab_size"], sizes.text["hidden_size"])
    tied = sizes.tie_embeddings
    width = sizes.text["intermediate_size" if sizes.num_experts is None else "moe_intermediate_size"]
    return [
        *_language_model(sizes, sizes.num_experts, width),
        Rule("output_layer.weight", (EMBEDDING if tied else OUTPUT,), (shape,), padded_rows(shape[0]), tied=tied),
        *_vision(sizes),
    ]


def discriminator_table(sizes: HFSizes, num_experts: int, num_heads: int) -> list[Rule]:
    """Return the rows of the discriminator, in the released layout (spec 8.2).

    With a second head, which the released checkpoint does not have, ``v_head.1.weight`` is [2, H].
    """
    assert num_heads in (1, 2)
    head = Rule("score_heads.weight", (SCORE_HEAD,), ((num_heads, sizes.text["hidden_size"]),), REPLICATED)
    return [*_language_model(sizes, num_experts, sizes.text["intermediate_size"]), *_vision(sizes), head]


def _language_model(sizes: HFSizes, num_experts: int | None, width: int) -> Iterator[Rule]:
    text = sizes.text
    if num_experts is not None and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        raise UserError(
            "config.json mixes dense and expert layers (mlp_only_layers, decoder_sparse_step); no released Qwen3-VL "
            "does, and this trainer needs experts in every layer"
        )
    hidden, heads, groups, dim = (
        text[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    qkv = grouped_qkv(heads // groups, dim)
    hf = "model.language_model"

    def row(name: str, hf_name: str, shape: tuple[int, ...], layout: Layout) -> Rule:
        return Rule(name, (hf_name,), (shape,), layout)

    vocabulary = text["vocab_size"]
    yield row("embedding.word_embeddings.weight", EMBEDDING, (vocabulary, hidden), padded_rows(vocabulary))
    for i in range(text["num_hidden_layers"]):
        layer, hf_layer = f"decoder.layers.{i}", f"{hf}.layers.{i}"
        attention = f"{hf_layer}.self_attn"
        yield row(f"{layer}.input_layernorm.weight", f"{hf_layer}.input_layernorm.weight", (hidden,), REPLICATED)
        yield Rule(
            f"{layer}.self_attention.linear_qkv.weight",
            tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
            ((heads * dim, hidden), (groups * dim, hidden), (groups * dim, hidden)),
            qkv,
        )
        yield row(f"{layer}.self_attention.q_layernorm.weight", f"{attention}.q_norm.weight", (dim,), REPLICATED)
        yield row(f"{layer}.self_attention.k_layernorm.weight", f"{attention}.k_norm.weight", (dim,), REPLICATED)
        yield row(
            f"{layer}.self_attention.linear_proj.weight", f"{attention}.o_proj.weight", (hidden, heads * dim), COLUMNS
        )
        yield row(
            f"{layer}.pre_mlp_layernorm.weight", f"{hf_layer}.post_attention_layernorm.weight", (hidden,), REPLICATED
        )
        if num_experts is None:
            gate_up = (f"{hf_layer}.mlp.gate_proj.weight", f"{hf_layer}.mlp.up_proj.weight")
            yield Rule(f"{layer}.mlp.linear_fc1.weight", gate_up, ((width, hidden),) * 2, GATED)
            yield row(f"{layer}.mlp.linear_fc2.weight", f"{hf_layer}.mlp.down_proj.weight", (hidden, width), COLUMNS)
            continue
        yield row(f"{layer}.mlp.router.weight", f"{hf_layer}.mlp.gate.weight", (num_experts, hidden), REPLICATED)
        up, down = (num_experts, hidden, 2 * width), (num_experts, width, hidden)
        for linear, part, shape, layout in (
            ("linear_fc1", "gate_up_proj", up, EXPERT_UP),
            ("linear_fc2", "down_proj", down, EXPERT_DOWN),
        ):
            for e in range(num_experts):
                name = f"{layer}.mlp.experts.local_experts.{e}.{linear}.weight"
                yield Rule(name, (f"{hf_layer}.mlp.experts.{part}",), (shape,), layout, expert=e)
    yield row("decoder.final_layernorm.weight", f"{hf}.norm.weight", (hidden,), REPLICATED)


def _vision(sizes: HFSizes) -> Iterator[Rule]:
    vision = sizes.vision
    hidden, width, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    merged = hidden * vision["spatial_merge_size"] ** 2
    hf = "model.visual"
    kernel = (hidden, vision["in_channels"], vision["temporal_patch_size"], patch, patch)
    yield Rule("vision.patch_embed.weight", (f"{hf}.patch_embed.proj.weight",), (kernel,), flattened(kernel))
    yield Rule("vision.patch_embed.bias", (f"{hf}.patch_embed.proj.bias",), ((hidden,),), REPLICATED)
    positions = (vision["num_position_embeddings"], hidden)
    yield Rule("vision.pos_embed.weight", (f"{hf}.pos_embed.weight",), (positions,), REPLICATED)
    qkv = headwise_qkv(hidden // vision["num_heads"])
    for i in range(vision["depth"]):
        layer, hf_layer = f"vision.layers.{i}", f"{hf}.blocks.{i}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{layer}.{norm}", f"{hf_layer}.{norm}", hidden)
        attention = f"{hf_layer}.attn"
        yield from _linear(f"{layer}.attention.linear_qkv", f"{attention}.qkv", (3 * hidden, hidden), qkv)
        yield from _linear(f"{layer}.attention.linear_proj", f"{attention}.proj", (hidden, hidden), COLUMNS)
        yield from _linear(f"{layer}.linear_fc1", f"{hf_layer}.mlp.linear_fc1", (width, hidden), ROWS)
        yield from _linear(f"{layer}.linear_fc2", f"{hf_layer}.mlp.linear_fc2", (hidden, width), COLUMNS)
    # DeepStack's mergers normalise after merging patches, the last merger before.
    mergers = [("vision.merger", f"{hf}.merger", hidden)]
    for i in range(len(vision["deepstack_visual_indexes"])):
        mergers.append((f"vision.deepstack_mergers.{i}", f"{hf}.deepstack_merger_list.{i}", merged))
    for name, hf_name, normalised in mergers:
        yield from _norm(f"{name}.norm", f"{hf_name}.norm", normalised)
        yield from _linear(f"{name}.linear_fc1", f"{hf_name}.linear_fc1", (merged, merged), ROWS)
        yield from _linear(f"{name}.linear_fc2", f"{hf_name}.linear_fc2", (vision["out_hidden_size"], merged), COLUMNS)


def _linear(name: str, hf_name: str, shape: tuple[int, int], layout: Layout) -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (f"{hf_name}.weight",), (shape,), layout)
    yield Rule(f"{name}.bias", (f"{hf_name}.bias",), (shape[:1],), REPLICATED if layout is COLUMNS else layout)


def _norm(name: str, hf_name: str, width: int) -> Iterator[Rule]:
    yield Rule(f"{name}.weight", (f"{hf_name}.weight",), ((width,),), REPLICATED)
    yield Rule(f"{name}.bias", (f"{hf_name}.bias",), ((width,),), REPLICATED)
