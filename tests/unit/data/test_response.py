import pytest

from prism_megatron.data.response import SYSTEM_PROMPT, Response, parse_response, render_response

TEXT = "<caption>\n- a red circle\n</caption>\n<think>one</think>\n\n<answer> 1 </answer>"


def test_blocks_are_verbatim():
    response = parse_response(f"  {TEXT}\n")
    assert response == Response("\n- a red circle\n", "one", " 1 ", gap="\n\n")
    assert response.caption_block == "<caption>\n- a red circle\n</caption>"
    assert response.reasoning_block == "<think>one</think>\n\n<answer> 1 </answer>"


def test_render_and_parse_are_inverse():
    text = render_response("\n- x < y\n", "so 1 < 2", "2")
    assert text == "<caption>\n- x < y\n</caption>\n<think>so 1 < 2</think>\n<answer>2</answer>"
    assert parse_response(text) == Response("\n- x < y\n", "so 1 < 2", "2")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The answer is 1",
        TEXT.replace("</answer>", ""),
        TEXT + "<answer>2</answer>",  # two answers: which one counts?
        TEXT.replace("one", "one <answer>2</answer>"),  # nested: the paper's expression reads 2
        TEXT.replace("one", "<caption>x</caption>"),
        TEXT.replace("<think>", "so <think>"),
        "Sure! " + TEXT,
        TEXT + " Done.",
        "<think>one</think><caption>a</caption><answer>1</answer>",
        TEXT.replace("- a red circle", ""),
        TEXT.replace("one", " "),
        TEXT.replace(" 1 ", "\n"),
        TEXT.replace("caption", "CAPTION"),
    ],
)
def test_anything_else_is_refused(text: str):
    assert parse_response(text) is None


@pytest.mark.parametrize(("caption", "think", "answer"), [("", "t", "1"), ("c", "</think>", "1"), ("c", "t", " ")])
def test_render_refuses_what_cannot_be_parsed_back(caption: str, think: str, answer: str):
    with pytest.raises(ValueError, match="non-empty and free of <caption>"):
        render_response(caption, think, answer)


def test_the_system_prompt_shows_each_tag_once_and_in_order():
    positions = [SYSTEM_PROMPT.index(tag) for tag in ("<caption>", "</caption>", "<think>", "</think>", "<answer>")]
    assert positions == sorted(positions)
    assert SYSTEM_PROMPT.startswith("You are a helpful scientific assistant.\n")
    assert SYSTEM_PROMPT.endswith("</answer>")
