import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes.tiny_model import IMAGE_MEAN, IMAGE_STD, make_tiny_model

SMALL = {"text_config": {"num_hidden_layers": 2}, "vision_config": {"depth": 2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "dense", seed=1)


def test_it_loads_as_a_stock_checkpoint_and_answers_about_a_picture(checkpoint: Path):
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 5e6
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    tokenizer = processor.tokenizer
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "image"}, {"text": "Why?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    image = Image.new("RGB", (96, 96), (255, 0, 0))
    inputs = processor(text=[prompt], images=[image], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 6, 6]]  # 96 x 96 stays as it is
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    assert inputs["pixel_values"][:, :512].unique().tolist() == pytest.approx([(1 - IMAGE_MEAN) / IMAGE_STD])  # red
    with torch.no_grad():
        assert model(**inputs).logits.shape == (1, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token == "<|endoftext|>"


def test_the_geometry_is_qwen3_vls_and_splits_in_two(checkpoint: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert config["tie_word_embeddings"]
    assert text["vocab_size"] % 16 == 0
    assert text["rope_parameters"]["mrope_section"] == [6, 5, 5]
    assert sum(text["rope_parameters"]["mrope_section"]) == text["head_dim"] // 2
    for heads in (text["num_attention_heads"], text["num_key_value_heads"], vision["num_heads"]):
        assert heads % 2 == 0
    assert (vision["patch_size"], vision["spatial_merge_size"], vision["out_hidden_size"]) == (16, 2, 128)
    assert vision["deepstack_visual_indexes"] == [0, 1]


def test_the_tokenizer_splits_as_qwens_does_and_loses_nothing(checkpoint: Path):
    tokenizer = AutoProcessor.from_pretrained(checkpoint).tokenizer
    text = "</caption>\n<think>\n- red: 12\n"
    pieces = [tokenizer.decode([i]) for i in tokenizer(text)["input_ids"]]
    assert "".join(pieces) == text
    assert pieces[:4] == ["</", "caption", ">\n", "<think"]  # Qwen, too, joins ">" with the line break
    assert pieces[-3:] == ["1", "2", "\n"]  # and takes numbers digit by digit
    assert tokenizer.decode(tokenizer("naïve 图 🙂")["input_ids"]) == "naïve 图 🙂"


def test_the_tower_separates_pictures(checkpoint: Path):
    """Features of two images differ; with HF's default initialization they are nearly equal, and nothing learns."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    images = [Image.new("RGB", (96, 96), color) for color in ((220, 40, 40), (40, 180, 60))]
    inputs = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        features = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
    red, green = features.unflatten(0, (2, 9))
    assert (red - green).norm() > 0.5 * red.norm()


def test_the_seed_decides_the_weights(checkpoint: Path, tmp_path: Path):
    def weights(path: Path) -> bytes:
        return (path / "model.safetensors").read_bytes()

    assert weights(make_tiny_model(tmp_path / "same", seed=1)) == weights(checkpoint)
    assert weights(make_tiny_model(tmp_path / "other", seed=2)) != weights(checkpoint)


def test_overrides_change_sizes_and_unknown_ones_are_refused(tmp_path: Path):
    path = make_tiny_model(tmp_path / "moe", moe=True, overrides=SMALL)
    model = AutoModelForImageTextToText.from_pretrained(path)
    assert type(model).__name__ == "Qwen3VLMoeForConditionalGeneration"
    assert len(model.model.language_model.layers) == 2
    assert model.config.text_config.num_experts == 4
    with pytest.raises(ValueError, match=r"unknown key\(s\) \['width'\] in the overrides' text_config"):
        make_tiny_model(tmp_path / "x", overrides={"text_config": {"width": 3}})
    with pytest.raises(ValueError, match="unknown section 'vision' in the overrides"):
        make_tiny_model(tmp_path / "x", overrides={"vision": {}})
    assert not (tmp_path / "x").exists()
