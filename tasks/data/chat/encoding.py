"""Conversations to tokens, and which of them are answers: exact, whatever the template and the tokenizer merge.

A text is cut where answers begin and end, and each piece is encoded by itself, so that no token stands across a border;
at inference, too, the prompt is encoded by itself. What a person wrote never becomes a special token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tasks.data.chat.messages import BadRow, Message
from tasks.data.chat.template import BYTE_LEVEL_END, ChatTemplate, TemplateFile
from tasks.data.vocabulary import TokenizerFile, Vocabulary, dtype_of

_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))
"""Code points that Unicode reserves for use inside a program."""
_NEWLINE = "\n"


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """A conversation up to the end of its last answer."""

    tokens: NDArray[np.unsignedinteger[Any]]
    """Token ids ``[n]``."""
    is_answer: NDArray[np.bool_]
    """Whether each token is of an answer or ends one ``[n]``; never the first."""


class PieceEncoder(Protocol):
    """Encodes pieces of a rendered text; one of :class:`BytePieces` and :class:`TokenizerPieces`."""

    ends: tuple[str, ...]
    """How the tokens are spelled that text is searched for whole, longest first."""
    specials: tuple[str, ...]
    """Those of them that are for templates alone."""

    def encode(self, piece: str, *, is_first: bool) -> Sequence[int]:
        """Token ids of a piece, which begins the text if ``is_first``."""


class BytePieces:
    """A token a byte."""

    ends: tuple[str, ...] = (BYTE_LEVEL_END,)
    specials: tuple[str, ...] = ()

    def encode(self, piece: str, *, is_first: bool) -> Sequence[int]:  # noqa: ARG002  bytes have no beginning
        """The bytes of UTF-8."""
        return piece.encode()


class TokenizerPieces:
    """Pieces by a ``tokenizer.json``, whose own truncation, padding and added ends are switched off."""

    def __init__(self, vocabulary: TokenizerFile) -> None:
        # A tokenizer of its own: that of the vocabulary takes special tokens for text.
        self._tokenizer = Tokenizer.from_str(vocabulary.source.decode())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.ends = tuple(sorted({token.content for token in added}, key=len, reverse=True))
        self.specials = tuple(sorted({token.content for token in added if token.special}, key=len, reverse=True))
        self._newline = self._ids(_NEWLINE)
        # Some put a space before every text, which within a text would be one too many.
        self._has_prefix = self._ids(f"{_NEWLINE}a") != [*self._newline, *self._ids("a")]

    def encode(self, piece: str, *, is_first: bool) -> Sequence[int]:
        """Token ids; a tokenizer that puts a space before every text does so before the first piece alone."""
        if is_first or not self._has_prefix:
            return self._ids(piece)
        ids = self._ids(_NEWLINE + piece)
        width = len(self._newline)
        return ids[width:] if ids[:width] == self._newline else self._ids(piece)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


class ChatEncoder:
    """Encodes conversations by one template and one vocabulary."""

    def __init__(self, file: TemplateFile, vocabulary: Vocabulary) -> None:
        """Raises :class:`configs.errors.UserError` for a template that is none."""
        self._vocabulary = vocabulary
        self._pieces: PieceEncoder = BytePieces()
        if isinstance(vocabulary, TokenizerFile):
            self._pieces = TokenizerPieces(vocabulary)
        self._template = ChatTemplate(file, self._pieces.ends)
        # Besides special tokens, those that the template writes itself.
        control = {name for name in self._pieces.ends if name in file.source} | set(self._pieces.specials)
        names = sorted(control - {BYTE_LEVEL_END}, key=lambda name: (-len(name), name))
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self._dtype = dtype_of(vocabulary.size)

    def encode(self, messages: Sequence[Message]) -> EncodedRow:
        """Tokens of a conversation that ends with an answer. Raises :class:`tasks.data.chat.messages.BadRow`."""
        for message in messages:
            if problem := self._vocabulary.problem_of(message.content):
                raise BadRow(problem)
        shield, shielded = self._shield(messages)
        text, spans = self._template.render(shielded)
        tokens: list[int] = []
        is_answer: list[bool] = []
        position = 0
        for start, end in spans:
            for piece, of_answer in ((text[position:start], False), (text[start:end], True)):
                before = len(tokens)
                for part in piece.split(shield) if shield else [piece]:
                    if part:
                        tokens += self._pieces.encode(part, is_first=not tokens)
                is_answer += [of_answer] * (len(tokens) - before)
            position = end
        return EncodedRow(tokens=np.array(tokens, dtype=self._dtype), is_answer=np.array(is_answer))

    def _shield(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        """``messages`` with a noncharacter between the letters of whatever spells a control token, and that noncharacter."""
        control = self._control
        if control is None or not any(control.search(message.content) for message in messages):
            return "", messages
        said = "".join(message.content for message in messages)
        shield = next((mark for mark in _NONCHARACTERS if mark not in said), None)
        short = next((found[0] for found in control.finditer(said) if len(found[0]) == 1), None)
        if shield is None or short is not None:
            raise BadRow(f"holds {short or 'every noncharacter'!r}, which cannot be written as text here; leave it out")
        return shield, [
            replace(message, content=control.sub(lambda found: shield.join(found[0]), message.content))
            for message in messages
        ]
