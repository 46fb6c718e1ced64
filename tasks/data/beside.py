"""What users keep beside a tokenizer.json."""

from __future__ import annotations

from cluster.data_files import open_data_store

CONFIG_KEY = "tokenizer_config.json"
SPECIAL_TOKENS_KEY = "special_tokens_map.json"
TEMPLATE_KEY = "chat_template.jinja"


def files_beside(url: str) -> dict[str, bytes]:
    """Name to content of what lies in the folder of the tokenizer file ``url``, of the names above."""
    found = {}
    for name in (CONFIG_KEY, SPECIAL_TOKENS_KEY, TEMPLATE_KEY):
        store, key = open_data_store(f"{url.rpartition('/')[0] or '.'}/{name}")
        content = store.read_if_present(key)
        if content is not None:
            found[name] = content
    return found
