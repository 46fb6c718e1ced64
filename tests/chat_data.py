"""Chat rows, templates and tokenizers for tests of fine-tuning data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

from configs.load import load_config
from configs.schema import Config
from tests.bpe_tokenizer import train_bpe

CHATML_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SEQUENCE_LENGTH, BATCH_SEQUENCES = 48, 4


def chat_config(source: Path | str, *overrides: str, vocab_size: int = 256, length: int = SEQUENCE_LENGTH) -> Config:
    """``tiny`` on chat rows: 4 sequences a batch, two held-out slices of 2 sequences, the template ``plain``."""
    batch = length * BATCH_SEQUENCES
    return load_config(
        "tiny",
        (
            "data.format=chat", f"data.sources=[{source}]", "data.chat_template=plain", "data.held_out_fraction=0.3",
            f"training.sequence_length={length}", f"training.batch_tokens={batch}",
            f"training.total_tokens={20 * batch}", f"snapshots.interval_tokens={5 * batch}", f"anneal.tokens={batch}",
            "schedule.warmup_tokens=0", "evaluation.num_slices=2", f"evaluation.slice_tokens={2 * length}",
            "model.hidden_size=32", "model.num_experts=4", "model.expert_intermediate_size=32", "model.num_layers=1",
            f"model.vocab_size={vocab_size}", *overrides,
        ),
    ).config  # fmt: skip


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(count: int, *, longest: int = 10) -> list[dict[str, Any]]:
    """Rows of prompt and completion that differ, with answers of 1 to ``longest`` times "no "."""
    return [
        {
            "prompt": f"q{number}",
            "completion": f"{number} " + "no" * (number * 7 % longest),
            "module": f"m{number % 17}",
        }
        for number in range(count)
    ]


def turns(*contents: str) -> dict[str, Any]:
    """A row of messages: user and assistant in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]}


def train_chat_bpe(folder: Path, **config: Any) -> Tokenizer:
    """A byte-level BPE with ChatML's tokens in ``folder``, and a ``tokenizer_config.json`` of ``config``."""
    tokenizer = train_bpe(folder / "tokenizer.json", specials=CHATML_SPECIALS, vocab_size=320)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def train_prefixing_unigram(folder: Path) -> Tokenizer:
    """As Llama's: a space before every text, spaces written as underscores, newlines as bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=list("▁abcdefgh"), show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 3, trainer)
    data = json.loads(tokenizer.to_str())
    # Bytes are entries of the vocabulary, not added tokens.
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def added(name: str, *, special: bool) -> AddedToken:
    """A token that text is searched for whole."""
    return AddedToken(name, special=special, normalized=False)
