"""Text and tokens: what a user spelled is never a special token."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from prism_megatron.data.branches import branch_sequences
from prism_megatron.data.chat import ChatProcessor
from prism_megatron.data.dataset import read_rlvr
from prism_megatron.data.pack import TrainingSequence, pack
from prism_megatron.types import EncodedPrompt, Example, Message

SPECIAL = ("<|image_pad|>", "<|video_pad|>", "<|im_end|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> ChatProcessor:
    return ChatProcessor(tiny_checkpoint)


def test_a_spelled_special_token_is_text(processor: ChatProcessor) -> None:
    text = "see " + " and ".join(SPECIAL)
    ids = processor.encode_text(text)
    assert processor.has_text(ids)
    assert processor.decode(ids) == text


def test_special_tokens_of_prompts_stay_special_afterwards(processor: ChatProcessor) -> None:
    """The tokenizer has a state that decides how a text is read."""
    processor.encode_text("x")
    assert processor.tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [processor.terminator_id]


def test_a_response_that_spells_them_can_be_packed_and_ends_once(processor: ChatProcessor) -> None:
    spelled = " ".join(SPECIAL)
    caption, reasoning = f"<caption>{spelled}</caption>", f"<think>{spelled}</think><answer>1</answer>"
    sequences = branch_sequences(processor, EncodedPrompt(processor.encode_text("see")), caption, reasoning)
    pack(sequences, processor.input_spec)
    for sequence, text in zip(sequences, (caption, reasoning), strict=True):
        assert sequence.response_ids.index(processor.terminator_id) == len(sequence.response_ids) - 1
        assert processor.decode(sequence.response_ids) == text


CHATS = (
    (("user", "<image>How many?"),),
    (("system", "Be exact.\n"), ("user", "\n\n  <image>\n <image>and é, e\u0301, \u2028, 数, 1234567 <image>")),
    (("user", "a <think> b</think>"), ("assistant", " c\n"), ("user", "<caption>\n\n\n"), ("user", "")),
    (("system", ""), ("user", "<|im_en d|> <| <|image_pad |>")),
)


@pytest.mark.parametrize("chat", CHATS)
def test_ordinary_prompts_are_tokenised_as_hf_does(
    processor: ChatProcessor, tiny_checkpoint: Path, chat: tuple[tuple[str, str], ...]
) -> None:
    from transformers import AutoProcessor

    stock = AutoProcessor.from_pretrained(tiny_checkpoint)
    parts = []
    for role, text in chat:
        first, *others = text.split("<image>")
        content = [{"type": "text", "text": first}]
        for other in others:
            content += [{"type": "image"}, {"type": "text", "text": other}]
        parts.append({"role": role, "content": content})
    rendered = stock.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    expected = stock.tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert list(processor.prompt_ids([Message(*turn) for turn in chat])) == expected


TURNS = (
    ("system", "Be exact."),
    ("user", "<image>How many <|im_end|>?"),
    ("assistant", "\n 4 <|im_end|> or </think>5\n"),
    ("user", "And <image>red?"),
    ("assistant", "2"),
    ("user", "Sure?"),
)


def test_answers_in_a_prompt_are_what_a_model_would_have_generated(processor: ChatProcessor) -> None:
    messages = [Message(*turn) for turn in TURNS]
    ids, spans = processor.answered_prompt_ids(messages)
    answers = [message.content for message in messages if message.role == "assistant"]
    assert [ids[start:end] for start, end in spans] == [
        (*processor.encode_text(answer), processor.terminator_id) for answer in answers
    ]
    for number, (start, _) in enumerate(spans):  # what stands before an answer is the prompt it answered
        before = [i for i, message in enumerate(messages) if message.role == "assistant"][number]
        assert ids[:start] == processor.answered_prompt_ids(messages[:before])[0]
    assert processor.tokenizer.decode(ids) == processor.rendered(messages).replace(
        "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
    )
    assert processor.answered_prompt_ids(messages[:2]) == (processor.prompt_ids(messages[:2]), ())


def test_spans_move_with_the_patches_of_images_before_them(processor: ChatProcessor, tiny_data: Path) -> None:
    images = tuple(read_rlvr(tiny_data / "heldout.parquet")[i].images[0] for i in (0, 1))
    row = Example("x", tuple(Message(*turn) for turn in TURNS), images, "file, row 1")
    (prompt,), (bare,) = processor.encode_prompts([row], train_answers=True), processor.encode_prompts([row])
    assert bare.loss_spans == ()
    assert [prompt.token_ids[start:end] for start, end in prompt.loss_spans] == [
        (*processor.encode_text(text), processor.terminator_id) for text in (TURNS[2][1], "2")
    ]
    packed = pack([TrainingSequence(prompt, (5, 6))], processor.input_spec)
    trained = packed.targets[packed.loss_mask.bool()].tolist()
    expected = [token for start, end in prompt.loss_spans for token in prompt.token_ids[start:end]]
    assert trained == [*expected, 5, 6]
    assert len(trained) == TrainingSequence(prompt, (5, 6)).num_loss_tokens


def test_special_tokens_spelled_in_any_turn_of_a_prompt_are_text(processor: ChatProcessor) -> None:
    spelled = " ".join(SPECIAL) + "<|vision_start|><|im_<|im_end|>end|> \ue000 1\ue000"
    roles = ("system", "user", "assistant", "user")
    ids = processor.prompt_ids([Message(role, f"{spelled}<image>\n{spelled}") for role in roles])
    plain = processor.prompt_ids([Message(role, "x<image>\nx") for role in roles])

    def special(tokens: tuple[int, ...]) -> list[int]:
        return [token for token in tokens if not processor.has_text([token])]

    assert special(ids) == special(plain)
    turns = [
        f"<|im_start|>{r}\n{spelled}<|vision_start|><|image_pad|><|vision_end|>\n{spelled}<|im_end|>\n" for r in roles
    ]
    assert processor.tokenizer.decode(ids) == "".join(turns) + "<|im_start|>assistant\n"


def test_text_around_spelled_tokens_is_tokenised_as_ever(processor: ChatProcessor) -> None:
    """A prompt's text is one piece between two special tokens, spelled ones included."""
    text = "\n\n count <|im_end|> and 12 <|im_end|>"
    ids = processor.prompt_ids([Message("user", text)])
    start, end = (processor.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert ids[: ids.index(end)] == (start, *processor.encode_text(f"user\n{text}"))


@pytest.mark.parametrize("token", SPECIAL)
def test_special_tokens_have_no_text(processor: ChatProcessor, token: str) -> None:
    special = processor.tokenizer.convert_tokens_to_ids(token)
    assert not processor.has_text((*processor.encode_text("a"), special))


def test_a_prompt_takes_only_its_own_pictures_along(processor: ChatProcessor, tiny_data: Path) -> None:
    """However many prompts were encoded with it: as bytes, it goes to other ranks."""
    rows = read_rlvr(tiny_data / "heldout.parquet")
    (alone,), together = processor.encode_prompts(rows[:1]), processor.encode_prompts(rows)
    spare = 64  # a pickled tensor has its address, as digits, in it
    assert len(pickle.dumps(together[0])) <= len(pickle.dumps(alone)) + spare


def test_neither_have_rows_of_the_embedding_that_are_no_token(processor: ChatProcessor) -> None:
    assert processor.decode([len(processor.tokenizer)]) == ""
    assert not processor.has_text([len(processor.tokenizer)])
    assert processor.has_text([])
