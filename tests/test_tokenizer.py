"""Tokens to text and back, and text that grows without losing or repeating any of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import random_checkpoint as rc
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Library

from kogc.errors import KogcError
from kogc.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    "def f(x):\n    return x",
    "naïve café",
    "日本語 テキスト",
    "🙂🏽 ok",
    "e\u0301",
    " leading",
    "",
]


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    rc.write_tokenizer(tmp_path, 331)
    return Tokenizer(tmp_path)


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Tokenizer:
    """As Llama 2 and Mistral have it: spaces as a mark, unknown characters as bytes, the first space dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghilnoprtuwxy"]
    vocab = {word: i for i, word in enumerate(words)}
    library = Library(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(w, special=True) for w in words[:3]])
    library.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path / "tokenizer.json")


def pieces(tokenizer: Tokenizer, tokens: list[int], context: list[int]) -> list[str]:
    stream = tokenizer.stream(context)
    return [*(stream.push(token) for token in tokens), stream.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_whole_and_piece_by_piece(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.encode(text, special=False)
    assert tokenizer.decode(tokens) == text
    parts = pieces(tokenizer, tokens, [])
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_stream_after_a_prompt_gives_only_what_is_new(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokens = tokenizer.encode("hello wor ld 🙂 a", special=False)
    for cut in range(1, len(tokens)):
        if "\ufffd" not in tokenizer.decode(tokens[:cut]):
            whole = tokenizer.decode(tokens[:cut]) + "".join(pieces(tokenizer, tokens[cut:], tokens[:cut]))
            assert whole == "hello wor ld 🙂 a", cut


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_word_after_a_skipped_special_token_keeps_its_space(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    first, second = tokenizer.encode("on", special=False), tokenizer.encode("hello", special=False)
    tokens = [*first, 2, *second]
    assert "".join(pieces(tokenizer, tokens, [])) == tokenizer.decode(tokens)


def test_an_unfinished_character_waits_and_comes_out_at_the_end(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("a🙂", special=False)
    stream = byte_level.stream()
    assert [stream.push(token) for token in tokens[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_broken_bytes_never_lose_the_text_around_them(byte_level: Tokenizer) -> None:
    generator = random.Random(1)
    for _ in range(200):
        tokens = [generator.randrange(3, 259) for _ in range(12)]
        assert "".join(pieces(byte_level, tokens, [])) == byte_level.decode(tokens)


def test_a_broken_byte_does_not_take_back_a_character(sentencepiece: Tokenizer) -> None:
    tokens = [*sentencepiece.encode("é", special=False)[1:], 3 + 0xFF, *sentencepiece.encode("ab", special=False)[1:]]
    assert "".join(pieces(sentencepiece, tokens, [])) == "é\ufffdab"


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_context_may_begin_within_a_character(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompt = tokenizer.encode("ကခဂငစ" * 4, special=False)  # three bytes each: cut anywhere
    for length in range(4, 40):
        new = tokenizer.encode("ကa", special=False)[-4:]
        assert "".join(pieces(tokenizer, new, prompt[-length:])) == "ကa", length


def test_special_tokens_as_the_post_processor_says(byte_level: Tokenizer) -> None:
    plain = byte_level.encode("hi", special=False)
    assert byte_level.encode("hi") == [1, *plain]
    assert byte_level.decode([1, *plain, 2]) == "hi"
    assert byte_level.decode([1, *plain, 2], skip_special=False) == "<s>hi</s>"
    assert byte_level.size == 259


def test_a_token_without_text_is_nothing(byte_level: Tokenizer) -> None:
    assert byte_level.decode([330]) == ""
    assert pieces(byte_level, [330, *byte_level.encode("a", special=False)], []) == ["", "a", ""]


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path: Path) -> None:
    rc.write_tokenizer(tmp_path, 331)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(4)
    library.enable_padding(length=100)
    library.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer(tmp_path).encode("hello world")) == 12


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 9, 7]}, {"eos_token_id": 2}, (7, 9)),
        ({"eos_token_id": 7}, {"eos_token_id": 2}, (7,)),
        ({}, {"eos_token_id": 2}, (2,)),
        (None, {"eos_token_id": [2, 3]}, (2, 3)),
        (None, {}, ()),
        (None, None, ()),
    ],
)
def test_eos_tokens(tmp_path: Path, generation: dict | None, config: dict | None, expected: tuple[int, ...]) -> None:
    rc.write_tokenizer(tmp_path, 331)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert Tokenizer(tmp_path).eos_tokens == expected


@pytest.mark.parametrize("value", ["2", -1, [2, None], True, 1.5])
def test_a_wrong_eos_token_is_one_line(tmp_path: Path, value: object) -> None:
    rc.write_tokenizer(tmp_path, 331)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(KogcError, match=r"^[^\n]*generation_config.json: eos_token_id: expected [^\n]*$"):
        Tokenizer(tmp_path)


def test_a_missing_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(KogcError, match=r"^[^\n]*tokenizer.json: missing$"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "\x00", '{"model": {\n"type": "BPE"}}', '{"version": "1.0"'])
def test_a_broken_tokenizer_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(KogcError, match=r"^[^\n]*tokenizer.json: not a tokenizer: [^\n]+$"):
        Tokenizer(tmp_path)
