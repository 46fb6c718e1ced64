"""A conversation as text, by a chat template, and which characters of it are answers.

Rendered by transformers' own sandboxed Jinja environment, as ``tokenizer.apply_chat_template`` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from cluster.data_files import open_data
from configs.data import DataConfig
from configs.errors import UserError
from tasks.data.beside import CONFIG_KEY, SPECIAL_TOKENS_KEY, TEMPLATE_KEY, files_beside
from tasks.data.chat.messages import BadRow, Message
from tasks.data.vocabulary import BYTE_LEVEL, tokenizer_url

BUILT_IN = {
    "plain": (
        "{% for message in messages %}{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n' }}{% endfor %}"
        "{{ 'Assistant:\\n' if add_generation_prompt }}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    ),
}
"""Templates by name: ``plain`` ends answers with the end of document, ``chatml`` with the token ``<|im_end|>``."""
BYTE_LEVEL_END = "\0"
TODAY = date(2024, 7, 26)
"""What templates that ask for the date are told, so that tokens do not change overnight; Llama's own fallback."""
MAX_TEMPLATE_BYTES = 1 << 20
_TAGGED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASKS_DATE = re.compile(r"strftime_now\(\s*(['\"])([^'\"]*)\1\s*\)")
_VARIABLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_THE_TEMPLATE = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What an expression of a template may raise over a row."""


@dataclass(frozen=True, kw_only=True)
class TemplateFile:
    """A template as it was found."""

    source: str
    """Jinja."""
    name: str
    """Where it is from, for messages."""
    variables: Mapping[str, str]
    """Names of special tokens, such as ``eos_token``, to what they are spelled as."""


def find_template(data: DataConfig, end_of_document: str) -> TemplateFile:
    """The template that ``data`` names, or the tokenizer's own; ``end_of_document`` is how that token is spelled.

    Raises :class:`configs.errors.UserError` if there is none, saying what to give.
    """
    beside = {} if data.tokenizer == BYTE_LEVEL else files_beside(tokenizer_url(data.tokenizer))
    config = _json_of(beside, CONFIG_KEY, data.tokenizer)
    spelled = _spellings({**_json_of(beside, SPECIAL_TOKENS_KEY, data.tokenizer), **config})
    variables = {"eos_token": end_of_document, **spelled}
    if data.chat_template is not None:
        source = BUILT_IN.get(data.chat_template) or _read_template(data.chat_template)
        return TemplateFile(source=source, name=f"data.chat_template={data.chat_template}", variables=variables)
    own = beside[TEMPLATE_KEY].decode() if TEMPLATE_KEY in beside else _default_of(config.get("chat_template"))
    if own is None:
        raise UserError(
            f"data.format=chat needs a chat template, and data.tokenizer={data.tokenizer!r} brings none; give "
            f"data.chat_template: {', '.join(BUILT_IN)}, or the path or URL of a Jinja file"
        )
    return TemplateFile(source=own, name=f"the chat template of {data.tokenizer}", variables=variables)


class ChatTemplate:
    """Renders conversations and finds their answers in the text."""

    def __init__(self, file: TemplateFile, ends: Sequence[str]) -> None:
        """``ends`` is how the vocabulary spells the tokens that may end a turn: those that text is searched for whole."""
        self.source, self.name = file.source, file.name
        self._variables, self._ends = dict(file.variables), tuple(ends)
        self._is_tagged = _TAGGED.search(file.source) is not None
        self._jinja = _ASKS_DATE.sub(lambda asked: repr(TODAY.strftime(asked[2])), file.source)
        if "strftime_now(" in self._jinja:
            raise UserError(
                f"{self.name} asks for today's date in a way that cannot be fixed, so that its tokens would change overnight; "
                "give a copy with the date written in as data.chat_template"
            )
        try:
            self._render([Message(role="user", content="a")])
        except TemplateSyntaxError as error:
            raise UserError(f"{self.name} is no Jinja template: {error.message} (line {error.lineno})") from None
        except _OF_THE_TEMPLATE:
            pass  # What it refuses is said of the row.

    def render(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation that ends with an answer, and begin and end of each answer in it, in characters.

        An answer begins where the model has to go on by itself, after the generation prompt, and ends with the token that
        ends the turn, which belongs to it. Where the template marks answers by ``{% generation %}``, they are what is
        marked there, and the token after it. Raises :class:`tasks.data.chat.messages.BadRow`.
        """
        try:
            text, spans = self._tagged(messages) if self._is_tagged else self._by_prefix(messages)
        except _OF_THE_TEMPLATE as error:
            if isinstance(error, BadRow):
                raise
            raise BadRow(f"{self.name} refuses it: {error}") from None
        if not spans:
            raise BadRow(f"{self.name} marks no answer in it")
        last = text[slice(*spans[-1])]
        if not last.endswith(self._ends):
            raise BadRow(
                f"{self.name} ends the answer with {last[-20:]!r}, which is no token of its own in the "
                "vocabulary, so the model would never learn to stop; give a template that ends answers with one of "
                f"{', '.join(map(repr, self._ends[:10])) or '(there are none)'}"
            )
        if spans[0][0] == 0:
            raise BadRow(f"{self.name} writes nothing before the answer")
        return text, spans

    def _tagged(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        text, marked = self._render(messages, find_marked=True)
        return text, [(start, end + len(self._end_at(text, end))) for start, end in marked if end > start]

    def _end_at(self, text: str, position: int) -> str:
        """The token that ends a turn, if one begins at ``position``; else nothing."""
        if text[:position].endswith(self._ends):
            return ""
        return next((end for end in self._ends if text.startswith(end, position)), "")

    def _by_prefix(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        text, _ = self._render(messages)
        spans = []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before, _ = self._render(messages[:number], add_generation_prompt=True)
            through, _ = self._render(messages[: number + 1])
            end = len(through.rstrip())
            if not through.startswith(before) or text[:end] != through[:end]:
                raise BadRow(
                    f"{self.name} does not render a conversation as what came before and the next answer, so that answers "
                    "cannot be told apart in it; mark them by {% generation %} ... {% endgeneration %} in the template, or "
                    "give rows of one answer"
                )
            spans.append((len(before), end))
        return text, spans

    def _render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, find_marked: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marked = render_jinja_template(
            conversations=[[{"role": message.role, "content": message.content} for message in messages]],
            chat_template=self._jinja,
            return_assistant_tokens_mask=find_marked,
            add_generation_prompt=add_generation_prompt,
            **self._variables,
        )
        return texts[0], marked[0] if find_marked else []


def _read_template(url: str) -> str:
    if "/" not in url and "." not in url:
        raise UserError(
            f"data.chat_template={url!r} is not known; {', '.join(BUILT_IN)}, or the path or URL of a Jinja file"
        )
    with open_data(url) as file:
        source = file.read(MAX_TEMPLATE_BYTES + 1)
    if len(source) > MAX_TEMPLATE_BYTES:
        raise UserError(f"data.chat_template={url!r} is larger than {MAX_TEMPLATE_BYTES >> 20} MiB; is it a template?")
    try:
        return source.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"data.chat_template={url!r} is no text: byte {error.start} is not UTF-8") from None


def _json_of(files: Mapping[str, bytes], name: str, tokenizer: str) -> dict[str, Any]:
    try:
        values = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{name} beside data.tokenizer={tokenizer!r} is no JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def _spellings(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of special tokens, which are text or an object with its content."""
    found = {name: config.get(name) for name in _VARIABLES}
    spelled = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in spelled.items() if isinstance(value, str)}


def _default_of(template: Any) -> str | None:
    """The template of a tokenizer_config.json: one, or one of several under the name ``default``."""
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
