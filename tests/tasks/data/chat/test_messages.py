"""What a chat row may hold, and what is said of one that holds something else."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.data.chat.messages import BadRow, Message, parse_row, row_key
from tests.chat_data import turns


def said(role: str, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


def test_pair_is_a_question_and_its_answer() -> None:
    assert parse_row({"prompt": "q", "completion": "a", "more": [1]}) == (
        Message(role="user", content="q"), Message(role="assistant", content="a"),
    )  # fmt: skip


def test_messages_are_kept_up_to_the_last_answer() -> None:
    row = {"messages": [said("system"), said("user", "q"), said("assistant", "a"), said("user", "and?")], "id": 3}
    assert [(message.role, message.content) for message in parse_row(row)] == [
        ("system", "x"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip


def test_prompt_beside_messages_is_ignored_as_data_sets_repeat_it() -> None:
    assert parse_row({**turns("q", "a"), "prompt": "q"}) == parse_row(turns("q", "a"))


def test_null_columns_of_a_mixed_parquet_file_are_not_there() -> None:
    assert parse_row({"messages": None, "prompt": "q", "completion": "a"})[1].content == "a"
    assert parse_row({**turns("q", "a"), "prompt": None, "completion": None})[1].content == "a"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q"}, "has no answer: prompt is there, completion is missing"),
        ({"completion": "a"}, "holds neither messages nor prompt and completion (fields: 'completion')"),
        ({"text": "q", "n": 1}, "fields: 'text', 'n'"),
        ({}, "fields: none"),
        ({**turns("q", "a"), "completion": "a"}, "both messages and completion"),
        ({"prompt": "q", "completion": ""}, "message 2 is an empty answer"),
        ({"prompt": "q", "completion": " \n"}, "message 2 is an empty answer"),
        ({"prompt": "q", "completion": 3}, "completion is int, not text"),
        ({"prompt": [said("user")], "completion": "a"}, "prompt is list, not text"),
        ({"prompt": "q", "completion": "\ud800"}, "completion holds half of a surrogate pair"),
        ({"messages": "q"}, "messages is str, not a list"),
        ({"messages": []}, "has no answer"),
        ({"messages": [said("user")]}, "has no answer: no message of the role assistant"),
        ({"messages": ["q"]}, "message 1 is no object with role and content"),
        ({"messages": [{"role": "user"}]}, "message 1 is no object with role and content"),
        ({"messages": [said("human"), said("gpt")]}, "message 1 has the role 'human'; known: system, user, assistant"),
        ({"messages": [said("user"), said("tool"), said("assistant")]}, "message 2 has the role 'tool'"),
        ({"messages": [said(["user"])]}, "message 1 has the role ['user']"),
        ({"messages": [said("assistant"), said("user")]}, "message 1 is an answer, and no message of the role user"),
        ({"messages": [said("system"), said("assistant")]}, "message 2 is an answer, and no message of the role user"),
        ({"messages": [said("user"), said("assistant"), said("assistant")]}, "messages 2 and 3 are two answers in a row"),
        ({"messages": [said("user"), said("assistant", None)]}, "the content of message 2 is null, not text"),
        ({"messages": [said("user", [{"type": "text", "text": "q"}]), said("assistant")]}, "message 1 is list, not text"),
    ],
)  # fmt: skip
def test_bad_row_is_said_what_is_wrong_with(row: dict[str, Any], expected: str) -> None:
    with pytest.raises(BadRow) as caught:
        parse_row(row)
    assert expected in str(caught.value)


def test_key_is_of_what_is_said_alone() -> None:
    one = row_key(parse_row({"prompt": "q", "completion": "a", "id": 1}))
    assert one == row_key(parse_row({**turns("q", "a"), "id": 2}))
    others = [
        turns("q", "b"),
        turns("qa", ""),
        {"messages": [said("system", "q"), said("user"), said("assistant", "a")]},
    ]
    keys = {row_key([Message(role=m["role"], content=m["content"]) for m in row["messages"]]) for row in others}
    assert len(keys | {one}) == 4
