"""The byte-level vocabulary as a ``tokenizer.json``: what transformers needs to talk to a model of bytes.

One byte is one token and its value is its id, as :class:`tasks.data.vocabulary.ByteLevel` has it; byte 0, which no text
holds, is the end of a document and of a sequence. The file is a byte-level BPE without a single merge.
"""

from __future__ import annotations

import json
from typing import Any

from tasks.data.beside import CONFIG_KEY
from tasks.data.token_manifest import TOKENIZER_KEY
from tasks.data.vocabulary import BYTE_LEVEL_SIZE, ByteLevel

END = chr(ByteLevel.end_of_document)


def byte_tokenizer_files() -> dict[str, bytes]:
    """File name to content of what transformers' ``AutoTokenizer`` loads."""
    end = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bytes_as_text = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ByteLevel.end_of_document, "content": END, **end}],
        "normalizer": None,
        "pre_tokenizer": bytes_as_text,
        "post_processor": None,
        "decoder": bytes_as_text,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {_spelling(byte): byte for byte in range(BYTE_LEVEL_SIZE)},
            "merges": [],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
    }
    return {TOKENIZER_KEY: json.dumps(tokenizer).encode(), CONFIG_KEY: json.dumps(config, indent=1).encode()}


def _spelling(byte: int) -> str:
    """How byte-level tokenizers spell a byte: printable Latin-1 as itself, the others from U+0100 on, in order."""
    if byte == ByteLevel.end_of_document:
        return END
    return chr(byte) if byte in _PRINTABLE else chr(0x100 + _OTHERS.index(byte))


_PRINTABLE = frozenset((*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)))
_OTHERS = [byte for byte in range(BYTE_LEVEL_SIZE) if byte not in _PRINTABLE]
