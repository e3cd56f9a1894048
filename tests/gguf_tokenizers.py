"""Small tokenizers trained for a test, as the metadata of a GGUF."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from gguf_files import SPECIAL
from tokenizers import Tokenizer as Library
from tokenizers import pre_tokenizers, trainers
from tokenizers.models import BPE

TEXTS = [
    "It's 12345 o'clock, isn't it?  WE'LL see...\n\n  two lines\r\n\tand a tab",
    "caf\u00e9 cafe\u0301 na\u00efve \u00a1hola! \u4f60\u597d 2024\u5e74 \U0001f600",
    "def f(x):\n    return x**2  # 100%\n",
    "a <|im_start|>b<|im_end|>",
    "   ",
    "",
]


def byte_level_bpe() -> dict[str, Any]:
    """Tokens and merges of a byte-level BPE, some of which span several words."""
    library = Library(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator([*TEXTS[:3] * 3, "1234 12 345 123 2024 cafe\u0301"], trainer)
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {"tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]]}


def byte_level_metadata(trained: dict[str, Any], pre: str, **more: Any) -> dict[str, Any]:
    tokens = trained["tokens"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": trained["merges"],
        "tokenizer.ggml.bos_token_id": 1,
    } | {f"tokenizer.ggml.{name}": value for name, value in more.items()}


def sentencepiece_bpe(
    directory: Path, **options: bool
) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, Any]]:
    """SentencePiece's BPE with byte fallback and the user-defined token <tool>."""
    (directory / "corpus.txt").write_text("\n".join(TEXTS[:3] * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"),
        model_prefix=str(directory / "true"),
        vocab_size=360,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        **options,
    )
    true = sentencepiece.SentencePieceProcessor(str(directory / "true.model"))
    ids = range(true.GetPieceSize())

    def kind(i: int) -> int:
        if true.IsUnknown(i):
            return 2
        if true.IsControl(i):
            return 3
        return 6 if true.IsByte(i) else 4 if true.IdToPiece(i) == "<tool>" else 1

    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [true.IdToPiece(i) for i in ids],
        "tokenizer.ggml.scores": [true.GetScore(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
    }
    if options:
        metadata["tokenizer.ggml.add_space_prefix"] = False
    return true, metadata
