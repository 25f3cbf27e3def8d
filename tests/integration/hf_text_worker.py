"""Greedy answers of an HF directory by stock transformers and by stock vLLM, with nothing of ours but the prompts.

Arguments: checkpoint, prompt file, how many prompts, where to write.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from prism_megatron.data.dataset import read_rlvr
from prism_megatron.model.sizes import read_sizes

RESPONSE_TOKENS = 160


def main() -> None:
    checkpoint, prompts, count, out = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    texts, images = [], []
    for row in read_rlvr(prompts)[:count]:
        chat = []
        for message in row.messages:
            before, *after = message.content.split("<image>")
            parts = [{"type": "text", "text": before}] if before else []
            for text in after:
                parts += [{"type": "image"}, {"type": "text", "text": text}]
            chat.append({"role": message.role, "content": parts})
        texts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        images.append(Image.open(io.BytesIO(row.images[0])).convert("RGB"))
    by_transformers = transformers_answers(checkpoint, processor, texts, images)
    out.write_text(json.dumps({"transformers": by_transformers, "vllm": vllm_answers(checkpoint, texts, images)}))


def transformers_answers(checkpoint: str, processor: Any, texts: list[str], images: list[Image.Image]) -> list[str]:
    import torch
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    answers = []
    for text, image in zip(texts, images, strict=True):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=RESPONSE_TOKENS, do_sample=False)
        answers.append(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def vllm_answers(checkpoint: str, texts: list[str], images: list[Image.Image]) -> list[str]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams

    # Rotary settings left out of config.json have other defaults in vLLM than in transformers.
    rotary = read_sizes(Path(checkpoint)).rotary.rope_parameters()
    overrides = {"text_config": {"rope_parameters": rotary}}
    llm = LLM(model=checkpoint, dtype="float32", max_model_len=512, enforce_eager=True, seed=1, hf_overrides=overrides)
    prompts = [{"prompt": t, "multi_modal_data": {"image": i}} for t, i in zip(texts, images, strict=True)]
    answers = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=RESPONSE_TOKENS), use_tqdm=False)
    return [answer.outputs[0].text for answer in answers]


if __name__ == "__main__":
    main()
