"""What a chat row says: parsed from a JSON object or parquet row, with every mistake named."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from blake3 import blake3

from tasks.data.documents import is_unicode

Role = Literal["system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)


class BadRow(ValueError):
    """What is wrong with one row; whoever knows its file and line says it to the user."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    content: str
    """What is said; an answer is never empty."""


def parse_row(values: Mapping[str, Any]) -> tuple[Message, ...]:
    """The conversation of a row that holds ``messages``, or ``prompt`` and ``completion``; other fields are ignored.

    It ends with its last answer: nothing is learned from what follows. ``prompt`` beside ``messages`` is ignored too, as
    some data sets repeat it there. Raises :class:`BadRow`.
    """
    # A column of a parquet file is there in every row, as null where the row has none of it.
    given = [name for name in ("messages", "prompt", "completion") if values.get(name) is not None]
    if "messages" in given:
        if "completion" in given:
            raise BadRow("holds both messages and completion; leave one of them out")
        return _parse_messages(values["messages"])
    if given == ["prompt", "completion"]:
        user = Message(role="user", content=_text(values["prompt"], "prompt"))
        answer = Message(role="assistant", content=_text(values["completion"], "completion"))
        return _checked([user, answer])
    if given == ["prompt"]:
        raise BadRow("has no answer: prompt is there, completion is missing")
    fields = ", ".join(map(repr, list(values)[:10])) or "none"
    raise BadRow(f"holds neither messages nor prompt and completion (fields: {fields})")


def row_key(messages: Sequence[Message]) -> str:
    """Digest of a conversation: equal ones have the same, whatever other fields their rows hold."""
    spoken = json.dumps([[message.role, message.content] for message in messages], ensure_ascii=False)
    return str(blake3(spoken.encode()).hexdigest())


def _parse_messages(rows: Any) -> tuple[Message, ...]:
    if not isinstance(rows, list):
        raise BadRow(f"messages is {type(rows).__name__}, not a list of {{role, content}}")
    messages = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or "role" not in row or "content" not in row:
            raise BadRow(f"message {number} is no object with role and content")
        if row["role"] not in ROLES:
            raise BadRow(f"message {number} has the role {row['role']!r}; known: {', '.join(ROLES)}")
        content = _text(row["content"], f"the content of message {number}")
        messages.append(Message(role=cast(Role, row["role"]), content=content))
    return _checked(messages)


def _checked(messages: Sequence[Message]) -> tuple[Message, ...]:
    answers = [number for number, message in enumerate(messages) if message.role == "assistant"]
    if not answers:
        raise BadRow("has no answer: no message of the role assistant")
    for number in answers:
        before = [message.role for message in messages[:number]]
        if not messages[number].content.strip():
            raise BadRow(f"message {number + 1} is an empty answer")
        if "user" not in before:
            raise BadRow(f"message {number + 1} is an answer, and no message of the role user stands before it")
        if before[-1] == "assistant":
            raise BadRow(f"messages {number} and {number + 1} are two answers in a row; join them")
    return tuple(messages[: answers[-1] + 1])


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{what} is {'null' if value is None else type(value).__name__}, not text")
    if not is_unicode(value):
        raise BadRow(f"{what} holds half of a surrogate pair")
    return value
