"""Tokenizers as one tokenizer.json, from wherever a checkpoint keeps its own.

Byte-level BPE from a vocabulary and merges (GGUF files, Qwen's vocab.json and merges.txt) is rebuilt with the
pre-tokenizer of its family; the library does the rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ("smollm", "qwen2", "gpt-2")


def byte_level_bpe(
    vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], family: str, special: Sequence[AddedToken]
) -> Tokenizer:
    """A byte-level BPE tokenizer with the pre-tokenizer of its family.

    Args:
        family: as GGUF's `tokenizer.ggml.pre` names it, one of FAMILIES.
        special: tokens matched before anything else, such as <|im_end|>.

    Raises:
        ValueError: the family is not one of FAMILIES, or vocabulary and merges contradict each other.
    """
    refusal = "vocabulary and merges do not make a tokenizer"
    # checked here, because the library panics at some of these and takes others
    for token in itertools.chain.from_iterable((left, right, left + right) for left, right in merges):
        if token not in vocabulary:
            raise ValueError(f"{refusal} (token {token!r} of the merges is not in the vocabulary)")
    numbers = set(vocabulary.values())
    if len(numbers) < len(vocabulary) or not all(0 <= number < 2**32 for number in numbers):
        raise ValueError(f"{refusal} (its numbers repeat or are out of range)")
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{refusal} ({str(error).splitlines()[0]})") from None
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family != "qwen2")
    if family == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif family == "gpt-2":
        tokenizer.pre_tokenizer = byte_level
    else:
        raise ValueError(f"tokenizer family {family!r} is not supported, expected one of {', '.join(FAMILIES)}")
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(list(special))
    return tokenizer


def parse_merges(lines: Iterable[str]) -> list[tuple[str, str]]:
    """Merges from `left right` lines. Raises ValueError for a line that is not two tokens."""
    pairs = []
    for line in lines:
        left, _, right = line.partition(" ")
        if not left or not right or " " in right:
            raise ValueError(f"merge {line!r} is not two tokens")
        pairs.append((left, right))
    return pairs
