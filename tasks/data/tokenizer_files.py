"""The tokenizer of a run as files that land in its snapshots, so that a snapshot can be used as it stands."""

from __future__ import annotations

import json

from cluster.data_files import open_data_store
from cluster.errors import ObjectMissing
from configs.data import DataConfig
from configs.errors import UserError
from tasks.data.beside import CONFIG_KEY, TEMPLATE_KEY, files_beside
from tasks.data.chat.rows import spelled_end
from tasks.data.chat.template import find_template
from tasks.data.sources import find_sources
from tasks.data.token_files import find_token_files, is_token_folder
from tasks.data.token_manifest import TOKENIZER_KEY, TokenPlan
from tasks.data.vocabulary import (
    BYTE_LEVEL,
    TokenizerFile,
    Vocabulary,
    build_vocabulary,
    load_vocabulary,
    tokenizer_url,
)


def tokenizer_files(data: DataConfig) -> dict[str, bytes]:
    """File name to content of what transformers' ``AutoTokenizer`` loads; nothing for byte-level data and where nobody knows.

    Chat data brings its template along, whatever the tokenizer. The tokenizer is that of :func:`run_vocabulary`. A ``tokenizer_config.json`` that lies beside ``data.tokenizer`` is
    taken along; without one a small one is made, with the end of document as end of sequence.
    """
    vocabulary = run_vocabulary(data)
    template = {}
    if data.format == "chat" and vocabulary is not None:
        template = {TEMPLATE_KEY: find_template(data, spelled_end(vocabulary)).source.encode()}
    if not isinstance(vocabulary, TokenizerFile):
        return template
    made = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": vocabulary.name_of(vocabulary.end_of_document),
        "clean_up_tokenization_spaces": False,
    }
    beside = {} if data.tokenizer == BYTE_LEVEL else files_beside(tokenizer_url(data.tokenizer))
    return {CONFIG_KEY: json.dumps(made, indent=1).encode(), **beside, **template, TOKENIZER_KEY: vocabulary.source}


def run_vocabulary(data: DataConfig) -> Vocabulary | None:
    """The vocabulary of a run's tokens: ``data.tokenizer``, or what ``pma tokenize`` kept beside the token files.

    None for token files of which nobody said it. The sources are those of a run, which agree with one another.
    """
    if data.tokenizer != BYTE_LEVEL or data.format == "chat":
        return load_vocabulary(data.tokenizer, data.end_of_document)
    for source in [source for domain in data.mixture for source in domain.sources] or data.sources:
        found = find_sources([source], data, "data.sources")
        if found.texts:
            return load_vocabulary(BYTE_LEVEL)
        for url in found.tokens:
            if is_token_folder(url):
                folder = find_token_files(url)
                assert folder.manifest is not None, "a folder without one is refused"
                return _kept_vocabulary(folder.url, folder.manifest.plan)
    return None


def _kept_vocabulary(folder: str, plan: TokenPlan) -> Vocabulary:
    if plan.tokenizer == BYTE_LEVEL:
        return load_vocabulary(BYTE_LEVEL)
    store, key = open_data_store(f"{folder}/{TOKENIZER_KEY}")
    try:
        source = store.read(key)
    except ObjectMissing:
        raise UserError(f"{folder}/{TOKENIZER_KEY} is missing; give the tokenizer as data.tokenizer") from None
    return build_vocabulary(source, plan.end_of_document, f"{folder}/{TOKENIZER_KEY}")
