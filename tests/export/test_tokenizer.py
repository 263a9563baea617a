"""Byte-level BPE by family: the same token numbers as transformers' own tokenizers from the same vocabulary, any text.

transformers has no class for SmolLM, whose pre-tokenizer llama.cpp defines as: digits one by one, then GPT-2's.
"""

import functools
import itertools
import json

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from liteframe.export.tokenizer import FAMILIES, byte_level_bpe, parse_merges
from tokenizers import AddedToken, Tokenizer
from transformers import GPT2Tokenizer, Qwen2Tokenizer

every_family = pytest.mark.parametrize("family", FAMILIES)
SPECIAL = [
    AddedToken("<|im_end|>", special=True, normalized=False),
    AddedToken("<think>", special=False, normalized=False),
]
# what the families treat differently comes more often than chance would have it
texts = st.lists(
    st.one_of(
        st.sampled_from(["the cat", "2024", "I'LL", "we're", "café", "cafe\u0301", "½", "٣", "Ⅷ", "video?", "<think"]),
        st.text(" \t\r\n\u00a0\u3000", max_size=4),
        st.text(max_size=6),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def encoders(small_bpe):
    """By family: our tokenizer, and transformers' way from text to (pieces, token numbers)."""
    vocabulary, merges = small_bpe
    gpt2 = GPT2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, bos_token=None, eos_token=None)
    qwen2 = Qwen2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, eos_token=None, pad_token=None)

    def read(tokenizer, text):
        return cut(tokenizer.backend_tokenizer, text), tokenizer.encode(text)

    def smollm(text):
        parts = [read(gpt2, part) for part in regex.split(r"(\p{N})", text) if part]
        return tuple(list(itertools.chain.from_iterable(kind)) for kind in zip(*parts, strict=True)) or ([], [])

    theirs = {"gpt-2": functools.partial(read, gpt2), "qwen2": functools.partial(read, qwen2), "smollm": smollm}
    return {family: (byte_level_bpe(vocabulary, merges, family, []), theirs[family]) for family in FAMILIES}


def cut(tokenizer, text):
    """The pieces within which tokens are merged: more than a small vocabulary's tokens show."""
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@every_family
@settings(max_examples=100, deadline=None)
@given(text=texts)
@example(text="what's in the video?  1000 100 10\n\n\nwe're I'LL 20244 café\r\n \t ½ x")
def test_pieces_and_token_numbers_equal_those_of_transformers(encoders, family, text):
    ours, theirs = encoders[family]
    assert (cut(ours, text), ours.encode(text).ids) == theirs(text)


@every_family
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_decoding_gives_the_text_back(encoders, family, text):
    ours, _ = encoders[family]
    expected = text if family != "qwen2" else ours.normalizer.normalize_str(text)
    assert ours.decode(ours.encode(text).ids) == expected


def test_the_families_differ_where_they_should(encoders):
    """Otherwise agreement with three peers would say nothing about choosing among them."""
    pieces = {tuple(cut(ours, " 2024\n\nI'LL")) for ours, _ in encoders.values()}
    assert len(pieces) == len(FAMILIES)


def test_only_qwen2_composes_characters(encoders):
    apart, composed = "cafe\u0301", "café"
    for family, (ours, _) in encoders.items():
        assert (ours.encode(apart).ids == ours.encode(composed).ids) == (family == "qwen2")


@every_family
def test_a_special_token_is_matched_whole_and_numbered_after_the_vocabulary(small_bpe, family):
    vocabulary, merges = small_bpe
    tokenizer = byte_level_bpe(vocabulary, merges, family, SPECIAL)
    numbers = [tokenizer.token_to_id(str(token.content)) for token in SPECIAL]
    assert numbers == [len(vocabulary), len(vocabulary) + 1]
    ids = tokenizer.encode("the<|im_end|><think>cat").ids
    assert [i for i in ids if i >= len(vocabulary)] == numbers
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<think>cat"
    without = byte_level_bpe(vocabulary, merges, family, [])
    assert [i for i in ids if i < len(vocabulary)] == without.encode("the").ids + without.encode("cat").ids


def test_a_special_token_of_the_vocabulary_keeps_its_number(small_bpe):
    vocabulary, merges = small_bpe
    vocabulary = {**vocabulary, "<|im_end|>": len(vocabulary), "last": len(vocabulary) + 1}
    tokenizer = byte_level_bpe(vocabulary, merges, "qwen2", SPECIAL[:1])
    assert tokenizer.encode("<|im_end|>").ids == [vocabulary["<|im_end|>"]]
    assert tokenizer.get_vocab_size() == len(vocabulary)


@every_family
def test_a_saved_tokenizer_is_the_same_and_saving_is_deterministic(small_bpe, family):
    vocabulary, merges = small_bpe
    tokenizer = byte_level_bpe(vocabulary, merges, family, SPECIAL)
    shuffled = byte_level_bpe(dict(reversed(vocabulary.items())), merges, family, SPECIAL)
    assert tokenizer.to_str() == shuffled.to_str()
    text = " 2024 café<think>\n\n"
    assert Tokenizer.from_str(tokenizer.to_str()).encode(text).ids == tokenizer.encode(text).ids
    assert json.loads(tokenizer.to_str())["model"]["vocab"] == vocabulary


@pytest.mark.parametrize("family", ["chatglm-bpe", "", "gpt2", "Qwen2"])
def test_an_unknown_family_is_refused(small_bpe, family):
    with pytest.raises(ValueError, match=f"family '{family}' is not supported, expected one of smollm, qwen2, gpt-2"):
        byte_level_bpe(*small_bpe, family, [])


@pytest.mark.parametrize(
    ("vocabulary", "merges", "reason"),
    [
        ({"a": 0, "b": 1}, [("a", "c")], "token 'c' of the merges is not in the vocabulary"),
        ({"a": 0, "b": 1}, [("a", "b")], "token 'ab' of the merges is not in the vocabulary"),
        ({"a": -1, "b": 1}, [], "out of range"),
        ({"a": 2**32}, [], "out of range"),
        ({"a": 0, "b": 0}, [], "repeat"),
        ({"\ud800": 0}, [], ""),
    ],
)
def test_vocabulary_and_merges_that_make_no_tokenizer_are_refused(vocabulary, merges, reason):
    with pytest.raises(ValueError) as caught:
        byte_level_bpe(vocabulary, merges, "gpt-2", [])
    message = str(caught.value)
    assert "vocabulary and merges do not make a tokenizer" in message
    assert reason in message
    assert "\n" not in message


tokens = st.text(st.characters(exclude_characters=" "), min_size=1)


@given(pairs=st.lists(st.tuples(tokens, tokens)))
def test_merges_are_read_back_as_written(pairs):
    assert parse_merges(f"{left} {right}" for left, right in pairs) == pairs


@pytest.mark.parametrize("line", ["", " ", "one", "one ", " one", "a b c", "a  b"])
def test_a_merge_that_is_not_two_tokens_is_refused_by_its_text(line):
    with pytest.raises(ValueError) as caught:
        parse_merges(["a b", line])
    assert str(caught.value) == f"merge {line!r} is not two tokens"
