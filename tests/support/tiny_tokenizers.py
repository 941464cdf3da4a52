"""Tiny tokenizers built in code: byte-level BPE and SentencePiece-like BPE with byte fallback."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. How are you today?",
    "你好,世界!今天天气很好。 我们去公园散步吧。",
    "naïve café résumé — 42 €, emoji 😀🎉👩‍👩‍👧 and more text",
    "def main():\n    print('hello')\n\n\treturn 0",
] * 4


def byte_level() -> Tokenizer:
    """Like Qwen's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|im_start|>", "<|im_end|>"])
    # Not special; one with characters outside of the byte alphabet, one within it.
    tokenizer.add_tokens([AddedToken("<|用户|>", normalized=False), AddedToken("<tool>", normalized=False), "é"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer


def pieces(*, strip: bool = True, metaspace: bool = False) -> Tokenizer:
    """Like Llama 2's (strip), Gemma's (no strip) or one that decodes with Metaspace."""
    words = ["▁", "▁the", "▁quick", "the", "a", "b", "▁▁", "fo", "x", "你", "好", "é", "<0x41", "▁<0x42>", "\ue000"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    for word in words:
        vocabulary[word] = len(vocabulary)
    for letter in "cdefghijklmnopqrstuvwyz.,!?":
        vocabulary.setdefault(letter, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = decoders.Metaspace() if metaspace else decoders.Replace("▁", " ")
    stages = [first, decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        stages.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(stages)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<start▁of>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece() -> Tokenizer:
    """A decoder that the detokenizer does not know."""
    words = ["[UNK]", "[CLS]", "the", "quick", "##ly", "fox", "##es", ".", ",", "don", "'", "t", "n't", "好", "##好"]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]"])
    return tokenizer


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **files: Any) -> Path:
    """Write `tokenizer.json` and `files` (name without suffix -> JSON value)."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory
