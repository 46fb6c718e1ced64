"""Where answers begin and end in a rendered conversation, and templates that are missing, broken or fickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.data import DataConfig
from configs.errors import UserError
from tasks.data.chat.messages import BadRow, parse_row
from tasks.data.chat.template import BUILT_IN, ChatTemplate, TemplateFile, find_template
from tests.chat_data import train_chat_bpe, turns

ENDS = ("<|im_end|>", "</s>")
ROW = turns(" q", "a ", "and?", "b")
CHATML = BUILT_IN["chatml"]
# Strips what is said, as Llama's template does.
TRIMMING = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token if m.role == 'assistant' }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)
# Drops the thoughts of all answers but the last, as Qwen3's does.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ '<think>' if loop.last }}{{ m.content }}<|im_end|>"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}{{ 'A:' if add_generation_prompt }}"
)


def template(source: str, ends: tuple[str, ...] = ENDS, **variables: str) -> ChatTemplate:
    return ChatTemplate(TemplateFile(source=source, name="t", variables={"eos_token": "</s>", **variables}), ends)


def answers(source: str, row: dict[str, Any] = ROW, **variables: str) -> list[str]:
    text, spans = template(source, **variables).render(parse_row(row))
    return [text[start:end] for start, end in spans]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHATML, ["a <|im_end|>", "b<|im_end|>"]),
        (BUILT_IN["plain"], ["a </s>", "b</s>"]),
        (TRIMMING, ["a</s>", "b</s>"]),
        (TAGGED, ["a <|im_end|>", "b<|im_end|>"]),
        (TAGGED.replace("{% endgeneration %}<|im_end|>", "<|im_end|>{%- endgeneration -%}"), ["a <|im_end|>", "b<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_are_what_follows_the_generation_prompt_up_to_the_token_that_ends_the_turn(
    source: str, expected: list[str]
) -> None:
    assert answers(source) == expected


def test_text_is_what_transformers_renders(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_chat_bpe(tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|endoftext|>")
    for source in (CHATML, BUILT_IN["plain"], TRIMMING):
        (tmp_path / "chat_template.jinja").write_text(source)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        expected = loaded.apply_chat_template(ROW["messages"], tokenize=False)
        text, _ = template(source, ("<|im_end|>", "<|endoftext|>"), eos_token="<|endoftext|>").render(parse_row(ROW))
        assert text == expected


def test_thought_that_the_template_opens_itself_belongs_to_the_answer() -> None:
    assert answers(FORGETFUL, turns("q", "a")) == ["<think>a<|im_end|>"]


def test_conversation_rendered_otherwise_than_its_begin_is_refused_with_a_cure() -> None:
    with pytest.raises(BadRow, match=r"answers cannot be told apart.*\{% generation %\}.*or give rows of one answer"):
        answers(FORGETFUL)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "no token of its own in the vocabulary, so the model"),
        ("{{ raise_exception('no such thing') }}", "t refuses it: no such thing"),
        ("{{ messages[9].content }}", "t refuses it: .* no element 9"),
        ("{{ messages[0].content + 1 }}", "t refuses it: can only concatenate str"),
        ("{{ messages[-1].content if messages[-1].role == 'assistant' }}</s>", "writes nothing before|cannot be told apart"),
        ("{% for m in messages %}{% generation %}{% endgeneration %}x</s>{% endfor %}", "marks no answer"),
    ],
)  # fmt: skip
def test_row_that_the_template_cannot_say_is_refused(source: str, expected: str) -> None:
    with pytest.raises(BadRow, match=expected):
        answers(source, turns("q", "a"))


def test_templates_are_kept_in_the_sandbox() -> None:
    with pytest.raises(BadRow, match=r"refuses it: .*unsafe"):
        answers("{{ ''.__class__.__mro__[1].__subclasses__() }}")


def test_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"t is no Jinja template: .*\(line 2\)"):
        template("{{ messages }}\n{% for %}")


def test_date_is_the_same_on_every_day() -> None:
    source = '{{ strftime_now("%d %b %Y") }}' + CHATML
    text, _ = template(source).render(parse_row(ROW))
    assert text.startswith("26 Jul 2024<|im_start|>user")
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    assert template(guarded).render(parse_row(ROW))[0].startswith("2024")


def test_date_of_an_unknown_format_is_refused() -> None:
    with pytest.raises(UserError, match="tokens would change overnight; give a copy with the date written in"):
        template("{% set f = '%Y' %}{{ strftime_now(f) }}" + CHATML)


# Where templates are found


def test_no_template_is_refused_with_what_to_give(tmp_path: Path) -> None:
    train_chat_bpe(tmp_path)
    for tokenizer in ("bytes", str(tmp_path)):
        data = DataConfig(format="chat", sources=("x",), tokenizer=tokenizer)
        with pytest.raises(UserError) as caught:
            find_template(data, "</s>")
        assert f"data.tokenizer={tokenizer!r} brings none; give data.chat_template: plain, chatml, or the path" in str(
            caught.value
        )


@pytest.mark.parametrize("kind", ["string", "named"])
def test_own_template_of_a_tokenizer_is_taken(tmp_path: Path, kind: str) -> None:
    own: Any = {"string": "one", "named": [{"name": "tools", "template": "x"}, {"name": "default", "template": "one"}]}
    train_chat_bpe(tmp_path, chat_template=own[kind], bos_token="<|im_start|>", eos_token={"content": "<|im_end|>"})
    found = find_template(DataConfig(format="chat", sources=("x",), tokenizer=str(tmp_path)), "<|endoftext|>")
    assert found.source == "one"
    assert found.variables == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    # As transformers has it, the file goes before the field.
    (tmp_path / "chat_template.jinja").write_text("two")
    assert find_template(DataConfig(format="chat", sources=("x",), tokenizer=str(tmp_path)), "e").source == "two"
    asked = DataConfig(format="chat", sources=("x",), tokenizer=str(tmp_path), chat_template="chatml")
    assert find_template(asked, "e").source == CHATML


def test_template_of_a_path_is_read_and_its_mistakes_named(tmp_path: Path) -> None:
    def find(value: str) -> TemplateFile:
        return find_template(DataConfig(format="chat", sources=("x",), chat_template=value), "\0")

    (tmp_path / "t.jinja").write_text("über")
    assert find(str(tmp_path / "t.jinja")).source == "über"
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"t.jinja' is no text: byte 0"):
        find(str(tmp_path / "t.jinja"))
    with pytest.raises(UserError, match=r"'.*gone.jinja' does not exist"):
        find(str(tmp_path / "gone.jinja"))
    with pytest.raises(UserError, match=r"data.chat_template='chatlm' is not known; plain, chatml, or the path"):
        find("chatlm")


def test_broken_tokenizer_config_is_named(tmp_path: Path) -> None:
    train_chat_bpe(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json beside data.tokenizer=.* is no JSON"):
        find_template(DataConfig(format="chat", sources=("x",), tokenizer=str(tmp_path)), "e")
