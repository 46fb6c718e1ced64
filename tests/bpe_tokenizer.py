"""A tiny byte-level BPE, trained on the spot by the real ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ("the cat sat on the mat and the dog sat on the log; ", "größer, größte, 東京; ", "def f(x):\n    return x\n")


def train_bpe(path: Path, *, specials: Sequence[str] = ("<|endoftext|>",), vocab_size: int = 300) -> Tokenizer:
    """Train on :data:`TEXT` and write ``path``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(path))
    return tokenizer
