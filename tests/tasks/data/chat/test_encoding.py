"""Tokens of conversations: the ones that count spell the answers and their ends, exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tasks.data.chat.encoding import ChatEncoder, EncodedRow
from tasks.data.chat.messages import BadRow, Message, parse_row
from tasks.data.chat.template import BUILT_IN, TemplateFile
from tasks.data.vocabulary import load_vocabulary
from tests.chat_data import train_chat_bpe, train_prefixing_unigram, turns

TRIMMING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content | trim }}{{ '<|im_end|>' if m.role == 'assistant' }}\n\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
# Letters that the BPE merges with what stands beside them, spaces, and what spells control tokens.
WORDS = st.lists(
    st.sampled_from(["the cat", " ", "\n", "  ", "ö", "東", "<|im_end|>", "<|im_", "end|>", "<|endoftext|>", ":", "a"]),
    min_size=1, max_size=6,
).map("".join)  # fmt: skip
ANSWERS = WORDS.filter(lambda text: text.strip() != "")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bpe, prefixing = tmp_path_factory.mktemp("bpe"), tmp_path_factory.mktemp("prefixing")
    train_chat_bpe(bpe)
    train_prefixing_unigram(prefixing)
    return {"bpe": bpe, "prefixing": prefixing}


def encoder(tokenizer: Path | str, source: str, eos_token: str = "\0") -> ChatEncoder:
    end = None if tokenizer == "bytes" else "<|endoftext|>"
    file = TemplateFile(source=source, name="t", variables={"eos_token": eos_token})
    return ChatEncoder(file, load_vocabulary(str(tokenizer), end))


def runs(row: EncodedRow) -> list[list[int]]:
    """Stretches of tokens that count."""
    borders = np.flatnonzero(np.diff(row.is_answer.astype(int), prepend=0, append=0))
    return [row.tokens[start:end].tolist() for start, end in zip(borders[::2], borders[1::2], strict=True)]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(said=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3))
def test_bytes_that_count_are_the_answers_and_a_zero_each(said: list[tuple[str, str]]) -> None:
    row = encoder("bytes", BUILT_IN["plain"]).encode(parse_row(turns(*[text for pair in said for text in pair])))
    assert [bytes(run).decode() for run in runs(row)] == [f"{answer}\0" for _, answer in said]
    whole = "".join(f"User:\n{question}\nAssistant:\n{answer}\0\n" for question, answer in said)
    # What follows the last answer is not kept.
    assert bytes(row.tokens.tolist()).decode() == whole[:-1]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(said=st.lists(st.tuples(WORDS, ANSWERS), min_size=1, max_size=3), trims=st.booleans())
def test_tokens_that_count_decode_to_the_answers_and_end_with_the_end_of_turn(
    folders: dict[str, Path], said: list[tuple[str, str]], trims: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    source = TRIMMING if trims else BUILT_IN["chatml"]
    row = encoder(folders["bpe"], source).encode(parse_row(turns(*[text for pair in said for text in pair])))
    found = runs(row)
    assert [tokenizer.decode(run[:-1], skip_special_tokens=False) for run in found] == [
        answer.strip() if trims else answer for _, answer in said
    ]
    assert [run[-1] for run in found] == [end] * len(said)
    # Only the template's own are control tokens, whatever people wrote.
    assert [run.count(end) for run in found] == [1] * len(said)
    starts, ends = (int((row.tokens == tokenizer.token_to_id(name)).sum()) for name in ("<|im_start|>", "<|im_end|>"))
    assert starts == 2 * len(said)
    assert ends == len(said) * (1 if trims else 2)
    assert tokenizer.token_to_id("<|endoftext|>") not in row.tokens


def test_prompt_is_encoded_as_it_is_at_inference(folders: dict[str, Path]) -> None:
    """Encoded as a whole, " the" would be one token across the border, which no prompt ends with."""
    tokenizer = Tokenizer.from_file(str(folders["bpe"] / "tokenizer.json"))
    source = "U {{ messages[0].content }} A {{ messages[1].content + '<|im_end|>' if messages[1] }}"
    row = encoder(folders["bpe"], source).encode(parse_row(turns("on", "the cat")))
    prompt = tokenizer.encode("U on A ").ids
    assert row.tokens[: len(prompt)].tolist() == prompt
    assert row.is_answer.tolist() == [False] * len(prompt) + [True] * (len(row.tokens) - len(prompt))
    assert row.tokens.tolist() != tokenizer.encode("U on A the cat<|im_end|>").ids


def test_tokenizer_with_a_space_before_every_text_puts_one_before_the_first_piece_alone(
    folders: dict[str, Path],
) -> None:
    tokenizer = Tokenizer.from_file(str(folders["prefixing"] / "tokenizer.json"))
    source = "U:{{ messages[0].content }}\nA:{{ messages[1].content + '<|im_end|>' if messages[1] }}"
    row = encoder(folders["prefixing"], source).encode(parse_row(turns("the dog", "the cat")))
    (answer,) = runs(row)
    assert answer[-1] == tokenizer.token_to_id("<|im_end|>")
    spelled = [tokenizer.id_to_token(token) for token in answer[:-1]]
    assert "".join(spelled) == "the▁cat"
    assert tokenizer.id_to_token(int(row.tokens[0])).startswith("▁")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(answer=st.text(alphabet="the cat\nö", min_size=1).filter(lambda text: text.strip() != ""))
def test_prefixing_tokenizer_decodes_to_the_answer_too(folders: dict[str, Path], answer: str) -> None:
    tokenizer = Tokenizer.from_file(str(folders["prefixing"] / "tokenizer.json"))
    row = encoder(folders["prefixing"], BUILT_IN["chatml"]).encode(parse_row(turns("q", answer)))
    (run,) = runs(row)
    spelled = [tokenizer.id_to_token(token) for token in run[:-1]]
    raw = b"".join(
        bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()
        for token in spelled
    )
    assert raw.decode() == answer


def test_what_the_template_writes_itself_is_a_control_token_even_if_not_called_special(tmp_path: Path) -> None:
    from tests.chat_data import added

    tokenizer = train_chat_bpe(tmp_path)
    tokenizer.add_tokens([added("<turn>", special=False), added("<other>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    source = "U{{ messages[0].content }}A{{ messages[1].content + '<turn>' if messages[1] }}"
    row = encoder(tmp_path, source).encode(parse_row(turns("q", "a<turn>b<other>")))
    (run,) = runs(row)
    assert run.count(tokenizer.token_to_id("<turn>")) == 1
    # One that is no control token is what the tokenizer makes of it anywhere.
    assert run.count(tokenizer.token_to_id("<other>")) == 1
    assert tokenizer.decode(run, skip_special_tokens=False) == "a<turn>b<other><turn>"


def test_zero_byte_is_refused_where_it_ends_a_turn() -> None:
    with pytest.raises(BadRow, match="it holds a zero byte"):
        encoder("bytes", BUILT_IN["plain"]).encode(parse_row(turns("q", "a\0b")))


def test_template_whose_end_is_no_token_is_refused() -> None:
    with pytest.raises(BadRow, match=r"ends the answer with 'a<\|im_end\|>', which is no token of its own"):
        encoder("bytes", BUILT_IN["chatml"]).encode(parse_row(turns("q", "a")))


def test_first_token_never_counts(folders: dict[str, Path]) -> None:
    for tokenizer, source in (("bytes", BUILT_IN["plain"]), (folders["bpe"], BUILT_IN["chatml"])):
        row = encoder(tokenizer, source).encode(
            [Message(role="user", content=""), Message(role="assistant", content="a")]
        )
        assert not row.is_answer[0]
        assert row.is_answer[-1]
