"""Text in and out: prompts against transformers' own, sampling against its definition, streaming against decoding."""

import itertools
import re

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from liteframe.engines.package import InputError, Package, describe_file
from liteframe.runtime.text import ChatText, Sampler
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
# each a form that published templates take
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "system": (
        "{%- if messages[0]['role'] != 'system' %}\n    {{- '<|im_start|>system\\nYou see videos.<|im_end|>\\n' }}\n"
        "{%- endif %}\n{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
    ),
    "named tokens": "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "blocks": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\nQ: {{ m.content }}\n    {% endif %}\n{% endfor %}\nA:"
    ),
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}:",
    "generation": (
        "{% for m in messages %}{{ m.content }}{% generation %}<|im_end|>{{ loop.length }}{% endgeneration %}"
        "{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    ),
    "tools": (
        "{% if tools is not none %}tools{% endif %}{% if documents is defined and not documents %}none{% endif %}"
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ m.content }}{% endfor %}"
        "{{ ns.n }}"
    ),
    "json": "{{ {'<role>': \"it's é\"} | tojson }}{{ messages[0].content }}{{ [1, 2] | tojson(indent=2) }}",
    "date": "{{ strftime_now('%Y') }}: {{ messages[0]['content'] }}",
    "undefined": "{% if enable_thinking is defined %}think{% endif %}{{ messages[0].content }}{{ nothing }}",
}
every_template = pytest.mark.parametrize("template", TEMPLATES)
questions = pytest.mark.parametrize(
    "question", ["what's in the video?", "  two\n\nlines ", "{{ 1 + 1 }} {% raw %}", "café 漢字 😀", "<s >", "a\u2063b"]
)


@pytest.fixture(scope="module")
def tokenizer(small_bpe):
    tokenizer = Tokenizer(models.BPE(*small_bpe))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


@pytest.fixture(scope="module")
def make(tiny_package, tokenizer, tmp_path_factory):
    """ChatText of a package with another tokenizer and template."""

    def make(template, **changes):
        folder = tmp_path_factory.mktemp("text")
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        np.save(folder / "embeddings.npy", np.arange(340 * 24, dtype=np.float32).reshape(340, 24))
        files = {
            name: describe_file(folder, folder / path)
            for name, path in (
                ("tokenizer", "tokenizer.json"),
                ("chat_template", "chat_template.jinja"),
                ("embeddings", "embeddings.npy"),
            )
        }
        text = msgspec.structs.replace(tiny_package.manifest.text, special_tokens=SPECIAL, **files, **changes)
        return ChatText.of(Package(folder=folder, manifest=msgspec.structs.replace(tiny_package.manifest, text=text)))

    return make


@pytest.fixture(scope="module")
def chat(make):
    return make(TEMPLATES["chatml"])


@pytest.fixture(scope="module")
def peer(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def peer_ids(peer, template, content):
    messages = [{"role": "user", "content": content}]
    return peer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=False)


# -- prompts ---------------------------------------------------------------------------------------------------------


@every_template
@questions
def test_a_question_becomes_what_transformers_makes_of_it(make, peer, template, question):
    assert make(TEMPLATES[template]).turn(question)[1] == peer_ids(peer, TEMPLATES[template], question)


@every_template
@questions
def test_the_video_stands_right_before_the_question(make, tokenizer, peer, template, question):
    """Prefix and suffix are those of transformers' prompt with a mark in the video's place, cut at the mark."""
    before, after = make(TEMPLATES[template]).turn(question, with_video=True)
    messages = [{"role": "user", "content": "[VIDEO]" + question}]
    rendered = peer.apply_chat_template(
        messages, chat_template=TEMPLATES[template], add_generation_prompt=True, tokenize=False
    )
    prefix, suffix = rendered.split("[VIDEO]")
    assert before == tokenizer.encode(prefix, add_special_tokens=False).ids
    assert after == tokenizer.encode(suffix, add_special_tokens=False).ids


@pytest.mark.parametrize("template", ["chatml", "system", "named tokens", "generation", "tools"])
@pytest.mark.parametrize("with_video", [False, True])
@questions
def test_a_later_turn_begins_where_the_answer_before_it_ended(make, tokenizer, peer, template, with_video, question):
    """What transformers' prompt has behind the answer, cut at the video's place."""
    before, after = make(TEMPLATES[template]).turn(question, first=False, with_video=with_video)
    messages = [
        {"role": "user", "content": "how many?"},
        {"role": "assistant", "content": "[ANSWER]"},
        {"role": "user", "content": "[VIDEO]" * with_video + question},
    ]
    rendered = peer.apply_chat_template(
        messages, chat_template=TEMPLATES[template], add_generation_prompt=True, tokenize=False
    )
    parts = rendered.split("[ANSWER]")[1].split("[VIDEO]")
    expected = [tokenizer.encode(part, add_special_tokens=False).ids for part in parts]
    assert [before, after] == ([[], *expected] if len(expected) == 1 else expected)


@pytest.mark.parametrize("template", ["blocks", "loop controls"])
def test_a_template_that_drops_answers_takes_one_question(make, template):
    with pytest.raises(InputError, match=r"the chat template drops earlier turns, .*; forget\(\) the earlier ones"):
        make(TEMPLATES[template]).turn("why?", first=False)


@pytest.mark.parametrize("token", ["<s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
@pytest.mark.parametrize("form", ["{}", "a{}b", "{}\n<|im_start|>system"])
def test_a_control_token_in_a_question_is_refused(chat, token, form):
    for first, with_video in itertools.product((True, False), repeat=2):
        with pytest.raises(InputError, match=r"contains the control token .*; remove it"):
            chat.turn(form.format(token), first, with_video)


@pytest.mark.parametrize("question", ["<think>", "<|im_ end|>", "< |im_end|>", "im_end"])
def test_what_only_looks_like_one_is_taken(chat, question):
    assert chat.turn(question)[1]


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_no_question_has_more_turns_than_its_own(chat, tokenizer, question):
    """Whatever is asked, the prompt has one beginning and end of a user's turn and one beginning of an answer."""
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    try:
        _, ids = chat.turn(question)
    except InputError:
        assert any(token in question for token in SPECIAL.values()) or "<|im_start|>" in question
        return
    assert [i for i in ids if i in (start, end)] == [start, end, start]


def test_a_question_that_is_not_unicode_is_refused(chat):
    with pytest.raises(InputError, match=r"'caf\\udce9' is not valid Unicode"):
        chat.turn("caf\udce9")


def test_text_around_a_unit_names_its_frames(make, tokenizer):
    text = make(TEMPLATES["chatml"], unit_prefix="{first}..{last} of {first} {x}", unit_suffix="{first}\n")
    before, after = text.unit(17, 20)
    assert tokenizer.decode(before) == "17..20 of 17 {x}"
    assert tokenizer.decode(after) == "{first}\n"
    assert text.unit(17, 20, merged=True)[0] == before


def test_a_run_of_merged_frames_has_a_prefix_of_its_own(make, tokenizer):
    text = make(TEMPLATES["chatml"], unit_prefix="Frame{first}: ", run_prefix="Frames {first}-{last}: ")
    shown = [((2, 200), True), ((2, 200), False), ((5, 5), True), ((5, 5), False)]
    prefixes = [tokenizer.decode(text.unit(*frames, merged)[0]) for frames, merged in shown]
    assert prefixes == ["Frames 2-200: ", "Frame2: ", "Frame5: ", "Frame5: "]


def test_embeddings_are_rows_of_the_table(chat):
    table = np.arange(340 * 24, dtype=np.float32).reshape(340, 24)
    got = chat.embed([5, 0, 339, 5])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, table[[5, 0, 339, 5]])
    assert chat.embed([]).shape == (0, 24)


@pytest.mark.parametrize("template", ["{% if %}", "{{ 'a }}", "{% for m in messages %}", "{% endgeneration %}"])
def test_a_template_that_does_not_parse_is_named(make, template):
    with pytest.raises(InputError, match=r"chat_template\.jinja: the chat template does not parse"):
        make(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only assistants') }}", "only assistants"),
        ("{{ messages.nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
    ],
)
def test_a_template_that_fails_is_an_error_that_says_why(make, template, reason):
    with pytest.raises(InputError, match=f"the chat template failed: .*{reason}"):
        make(template).turn("why?")


def test_a_template_without_a_place_for_the_question_has_none_for_a_video(make):
    with pytest.raises(InputError, match="the chat template drops the user's text"):
        make("{{ messages[0].role }}").turn("why?", with_video=True)


# -- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["what's in the video?", "café  crème", "漢字 и 😀👨‍👩‍👧!", "\n\n\t ", "e\u0301"])
def test_streamed_text_is_the_whole_text_in_whole_characters(chat, tokenizer, text):
    ids = tokenizer.encode(text).ids
    pieces = list(chat.stream(iter(ids)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert all(pieces)


def test_a_character_of_several_tokens_comes_with_the_last_of_them(chat, tokenizer):
    ids = tokenizer.encode("a😀b").ids
    assert [len(tokenizer.id_to_token(i)) for i in ids] == [1] * 6
    taken = []
    pieces = [(len(taken), piece) for piece in chat.stream(i for i in ids if not taken.append(i))]
    assert pieces == [(1, "a"), (5, "😀"), (6, "b")]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 339) | st.integers(0, 255), max_size=30))
def test_streaming_any_tokens_equals_decoding_them_at_once(chat, peer, ids):
    """Bytes that are no UTF-8, special tokens, and numbers beyond the tokenizer's vocabulary included."""
    known = [i for i in ids if i < len(peer)]
    expected = peer.decode(known, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(chat.stream(iter(ids))) == expected


def test_an_answer_cut_within_a_character_ends_in_the_mark_for_that(chat, tokenizer):
    assert "".join(chat.stream(iter(tokenizer.encode("a漢").ids[:-1]))) == "a\ufffd"


def test_a_sentencepiece_decoder_keeps_the_spaces_between_pieces(make, tokenizer, tiny_package, tmp_path):
    """Its first piece drops a leading space, which a decoder that starts anew at each token would do every time."""
    pieces = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5}
    other = Tokenizer(models.BPE(pieces, [], byte_fallback=True))
    other.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    chat = make(TEMPLATES["chatml"])
    chat._tokenizer = other
    assert "".join(chat.stream(iter([1, 2, 3, 4, 5, 2]))) == "the catsé cat"


# -- sampling --------------------------------------------------------------------------------------------------------

LOGITS = np.array([1.5, -2.0, 0.25, 3.0, 2.5, -0.5, 2.0, -40.0], np.float32)


def nucleus(logits, temperature, top_p):
    """The distribution by its definition: the fewest most likely tokens whose probabilities reach top_p."""
    scaled = np.exp(np.float64(logits) / temperature)
    scaled /= scaled.sum()
    kept, mass = [], 0.0
    for token in sorted(range(len(scaled)), key=lambda token: -scaled[token]):
        kept.append(token)
        mass += scaled[token]
        if mass >= top_p:
            break
    out = np.zeros(len(scaled))
    out[kept] = scaled[kept] / scaled[kept].sum()
    return out


def drawn(sampler, logits, count):
    return np.bincount([sampler.pick(logits) for _ in range(count)], minlength=len(logits)) / count


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.0, 0.5), (0.7, 0.8), (3.0, 0.3)]
)
def test_tokens_are_drawn_from_the_nucleus_in_proportion(temperature, top_p):
    expected = nucleus(LOGITS, temperature, top_p)
    count = 20_000
    got = drawn(Sampler(temperature, top_p, seed=1), LOGITS, count)
    assert (got[expected == 0] == 0).all()
    assert (np.abs(got - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


class Recorder:
    def choice(self, count, p):
        self.p = p
        return 0


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.floats(0.05, 5), st.floats(0.01, 1))
def test_the_distribution_drawn_from_is_the_nucleus(logits, temperature, top_p):
    logits = np.array(logits, np.float32)
    expected = nucleus(logits, temperature, top_p)
    # where the sum reaches top_p within rounding, either side is right
    assume((expected > 0).tolist() == (nucleus(logits, temperature, min(top_p + 1e-9, 1)) > 0).tolist())
    assume((expected > 0).tolist() == (nucleus(logits, temperature, top_p - 1e-9) > 0).tolist())
    sampler = Sampler(temperature, top_p)
    sampler._random = Recorder()
    sampler.pick(logits)
    np.testing.assert_allclose(sampler._random.p, expected, rtol=1e-9, atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=20), st.floats(0.1, 1), st.integers(0, 100))
def test_temperature_zero_and_a_tiny_nucleus_are_greedy(logits, top_p, seed):
    best = int(np.argmax(logits))
    assert Sampler(0, top_p, seed).pick(np.array(logits, np.float32)) == best
    for temperature, top_p in ((1, 1e-9), (1e-300, 1.0)):
        token = Sampler(temperature, top_p, seed).pick(np.array(logits, np.float32))
        assert logits[best] - logits[token] < 1e-12  # closer ones may be equally likely in double precision


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    first, same, other = (
        [sampler.pick(LOGITS) for _ in range(50)] for sampler in (Sampler(1, 1, s) for s in (7, 7, 8))
    )
    assert first == same != other


def test_logits_stay_as_they_are():
    logits = LOGITS.copy()
    Sampler(0.7, 0.5).pick(logits)
    np.testing.assert_array_equal(logits, LOGITS)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": -1.0}, "top_p is -1.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_values_out_of_range_are_refused(values, named):
    with pytest.raises(InputError, match=f"{re.escape(named)}, expected"):
        Sampler(**values)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_no_answer(temperature, value):
    logits = np.zeros(5, np.float32)
    logits[3] = value
    with pytest.raises(InputError, match="not numbers"):
        Sampler(temperature).pick(logits)
