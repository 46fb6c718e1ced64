"""The data section: rows of a mixture, and what is refused by key."""

from __future__ import annotations

import json

import pytest

from configs.data import DEFAULT_SOURCES, DataConfig, MixtureDomain
from configs.errors import ConfigError
from configs.load import config_from_dict, config_to_dict, load_config

ROWS = (
    "data.mixture=[{name: web, sources: [s3://b/web, s3://b/more], weight: 3},{name: code, sources: [c], weight: 0.5}]"
)


def test_mixture_rows_become_typed_and_survive_json() -> None:
    config = load_config("tiny", (ROWS,)).config
    assert config.data.mixture == (
        MixtureDomain(name="web", sources=("s3://b/web", "s3://b/more"), weight=3.0),
        MixtureDomain(name="code", sources=("c",), weight=0.5),
    )
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_end_of_document_may_be_given_as_a_number() -> None:
    assert load_config("tiny", ("data.end_of_document=50256",)).config.data.end_of_document == "50256"


def test_defaults_are_what_runs_always_had() -> None:
    data = DataConfig()
    assert (data.sources, data.tokenizer, data.shuffle, data.packing, data.epochs) == (
        DEFAULT_SOURCES, "bytes", True, "none", None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.mixture=[{name: a, sources: [x]}]", "data.mixture[0]={'name': 'a', 'sources': ['x']} is not possible"),
        ("data.mixture=[{name: a, sources: [x], wieght: 1}]", "keys of a row: name, sources, weight"),
        ("data.mixture=[{name: a, sources: x, weight: 1}]", "MixtureDomain.sources: 'x' is not"),
        ("data.mixture=[{name: a, sources: [x], weight: 0}]", "data.mixture[a].weight=0.0"),
        ("data.mixture=[{name: a, sources: [x], weight: -1}]", "data.mixture[a].weight=-1.0"),
        ("data.mixture=[{name: a, sources: [x], weight: .inf}]", "data.mixture[a].weight=inf"),
        ("data.mixture=[{name: a, sources: [x], weight: .nan}]", "data.mixture[a].weight=nan"),
        ("data.mixture=[{name: a, sources: [], weight: 1}]", "data.mixture[a].sources=[]"),
        ("data.mixture=[{name: a/b, sources: [x], weight: 1}]", "data.mixture[].name='a/b'"),
        ("data.mixture=[{name: all, sources: [x], weight: 1}]", "not 'all'"),
        (
            "data.mixture=[{name: a, sources: [x], weight: 1},{name: a, sources: [y], weight: 1}]",
            "data.mixture=['a', 'a'] is not possible; allowed: every name once",
        ),
        ("data.mixture=[{name: a, sources: ['s3://key:secret@b/x'], weight: 1}]", "credentials"),
        ("data.tokenizer=s3://key:secret@b/t.json", "data.tokenizer: a s3:// URL with credentials"),
        ("data.tokenizer=''", "data.tokenizer=''"),
        ("data.text_field=''", "data.text_field=''"),
        ("data.epochs=0", "data.epochs=0 is not possible; allowed: at least 1, or null"),
        ("data.packing=best_fit", "data.packing"),
        ("data.token_dtype=int64", "data.token_dtype"),
        ("data.format=csv", "data.format"),
        ("data.sources=['']", "data.sources"),
    ],
)
def test_impossible_values_refused_by_key_without_secrets(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", (override,))
    assert expected in str(caught.value)
    assert "secret" not in str(caught.value)


def test_sources_beside_a_mixture_refused() -> None:
    with pytest.raises(ConfigError, match=r"data.sources=\['x'\].*leave it out beside data.mixture"):
        load_config("tiny", ("data.sources=[x]", ROWS))
