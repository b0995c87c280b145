"""The spec file: what it promises (round trip, exact facts) and what it refuses, with file and line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kogc.errors import KogcError
from kogc.spec import ModelSpec, Rope, RopeScaling, dump_spec, find_spec, list_specs, load_spec, parse_spec, validate

GOOD = """\
name: tiny
family: llama
layers: 2
hidden: 128
ffn: 256
heads: 4
kv_heads: 2
head_dim: 32
vocab: 101
tied_embeddings: false
norm_eps: 1e-5
max_context: 64
qkv_bias: false
qk_norm: false
sliding_window: null
sliding_layers: null
rope:
  theta: 10000
  scaling: null
dtype: bf16
bos_token: 1
eos_tokens: [2]
"""
TINY = parse_spec(GOOD)


def refusal(text: str) -> str:
    with pytest.raises(KogcError) as caught:
        parse_spec(text, "x.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_status == 1
    return message


def test_numbers_are_read_by_the_schema_not_by_yaml() -> None:
    assert TINY.norm_eps == 1e-5
    assert TINY.rope == Rope(10000.0)


def test_derived_rows() -> None:
    assert (TINY.q_rows, TINY.kv_rows, TINY.qkv_rows, TINY.group) == (128, 64, 256, 2)


@pytest.mark.parametrize("name", list_specs())
def test_shipped_specs_round_trip_and_bear_their_name(name: str) -> None:
    spec = load_spec(name)
    assert spec.name == name
    assert parse_spec(dump_spec(spec)) == spec
    assert find_spec(name).read_text(encoding="utf-8").startswith("# ")


# Parameter counts as the model cards state them: they depend on every size in the spec.
PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen2.5-1.5b": 1_543_714_304,
    "mistral-7b-v0.3": 7_248_023_552,
    "smollm2-135m": 134_515_008,
    "laneformer-2b": 2_320_069_632,
}


def parameters(spec: ModelSpec) -> int:
    layer = spec.hidden * (spec.qkv_rows + spec.q_rows + 3 * spec.ffn) + 2 * spec.hidden
    layer += spec.qkv_rows if spec.qkv_bias else 0
    layer += 2 * spec.head_dim if spec.qk_norm else 0
    tables = 1 if spec.tied_embeddings else 2
    return spec.layers * layer + tables * spec.vocab * spec.hidden + spec.hidden


def test_every_shipped_spec_has_a_known_parameter_count() -> None:
    assert {name: parameters(load_spec(name)) for name in list_specs()} == PARAMETERS


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 2.5),
        RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192),
        RopeScaling(
            "yarn",
            4.0,
            original_max_position=32768,
            beta_fast=32.0,
            beta_slow=1.0,
            attention_factor=1.1386294361119891,
            truncate=False,
        ),
    ],
)
def test_round_trip_with_everything_set(scaling: RopeScaling) -> None:
    spec = replace(
        TINY,
        name="0.5",
        family="qwen3",
        qk_norm=True,
        sliding_window=7,
        sliding_layers=(1,),
        rope=Rope(123456.789, scaling),
        norm_eps=1.2345678901234567e-06,
        bos_token=None,
        eos_tokens=(),
    )
    validate(spec, "here")
    assert parse_spec(dump_spec(spec)) == spec


def test_window_of_a_layer() -> None:
    spec = replace(TINY, sliding_window=7, sliding_layers=(1,))
    assert (spec.window(0), spec.window(1)) == (None, 7)
    assert replace(spec, sliding_layers=None).window(0) == 7
    assert TINY.window(0) is None


def test_duplicate_key_names_both_lines() -> None:
    assert refusal(GOOD + "heads: 8\n").startswith("x.yaml:23: duplicate key 'heads' (first on line 6)")


def test_nested_duplicate_key() -> None:
    assert refusal(GOOD.replace("  scaling: null", "  theta: 1")).startswith("x.yaml:19: duplicate key 'rope.theta'")


def test_unknown_key_names_its_line() -> None:
    assert refusal(GOOD.replace("ffn: 256", "ffn: 256\nexperts: 8")).startswith("x.yaml:6: unknown key 'experts'")
    assert refusal(GOOD.replace("  theta", "  base: 1\n  theta")).startswith("x.yaml:18: unknown key 'rope.base'")


def test_missing_keys() -> None:
    assert refusal(GOOD.replace("vocab: 101\n", "")) == "x.yaml:1: missing key 'vocab'"
    assert refusal(GOOD.replace("  scaling: null\n", "")) == "x.yaml:18: missing key 'rope.scaling'"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("heads: 4", "heads: '4'", "x.yaml:6: heads: expected an integer"),
        ("heads: 4", "heads: 4.0", "x.yaml:6: heads: expected an integer"),
        ("heads: 4", "heads: 010", "x.yaml:6: heads: expected an integer"),
        ("heads: 4", "heads: true", "x.yaml:6: heads: expected an integer"),
        ("heads: 4", "heads: [4]", "x.yaml:6: heads: expected an integer, found a list"),
        ("heads: 4", "heads:", "x.yaml:6: heads: expected an integer, found nothing"),
        ("heads: 4", "heads: 99999999999999999999999", "x.yaml:6: heads: the integer is out of range"),
        ("heads: 4", "heads: !!python/name:os.system 4", "x.yaml:6: heads: the tag"),
        ("tied_embeddings: false", "tied_embeddings: no", "x.yaml:10: tied_embeddings: expected true or false"),
        ("norm_eps: 1e-5", "norm_eps: .nan", "x.yaml:11: norm_eps: expected a number"),
        ("norm_eps: 1e-5", "norm_eps: 1e999", "x.yaml:11: norm_eps: expected a finite number"),
        ("norm_eps: 1e-5", "norm_eps: 0", "x.yaml:11: norm_eps:"),
        ("eos_tokens: [2]", "eos_tokens: 2", "x.yaml:22: eos_tokens: expected a list of integers"),
        ("eos_tokens: [2]", "eos_tokens: [2, two]", "x.yaml:22: eos_tokens: expected an integer"),
        ("eos_tokens: [2]", "eos_tokens: [2, 2]", "x.yaml:22: eos_tokens: holds a token twice"),
        ("eos_tokens: [2]", "eos_tokens: [101]", "x.yaml:22: eos_tokens: 101 is outside the vocabulary"),
        ("bos_token: 1", "bos_token: -1", "x.yaml:21: bos_token: -1 is outside"),
        ("kv_heads: 2", "kv_heads: 3", "x.yaml:7: kv_heads: 3 does not divide heads (4)"),
        ("head_dim: 32", "head_dim: 80", "x.yaml:8: head_dim: 80 is not supported"),
        ("head_dim: 32", "head_dim: 256", "x.yaml:8: head_dim: 256 is not supported"),
        ("layers: 2", "layers: 0", "x.yaml:3: layers: 0 is outside"),
        ("layers: 2", "layers: -2", "x.yaml:3: layers: -2 is outside"),
        ("vocab: 101", "vocab: 4000000000", "x.yaml:9: vocab: 4000000000 is outside"),
        ("family: llama", "family: gemma", "x.yaml:2: family: unknown family 'gemma'"),
        ("family: llama", "family: qwen2", "x.yaml:13: qkv_bias: false contradicts family qwen2"),
        ("qk_norm: false", "qk_norm: true", "x.yaml:14: qk_norm: true contradicts family llama"),
        ("dtype: bf16", "dtype: fp8", "x.yaml:20: dtype: unknown dtype 'fp8'"),
        ("sliding_window: null", "sliding_window: 0", "x.yaml:15: sliding_window: 0 is outside"),
        ("sliding_layers: null", "sliding_layers: [0]", "x.yaml:16: sliding_layers: given without sliding_window"),
        ("theta: 10000", "theta: 1", "x.yaml:18: rope.theta: 1.0 must be above 1"),
        ("theta: 10000", "theta: 1e300", "x.yaml:18: rope.theta: 1e+300 must be"),
        ("scaling: null", "scaling: {type: linear, factor: 1e300}", "x.yaml:19: rope.scaling.factor: 1e+300 is"),
        ("scaling: null", "scaling: linear", "x.yaml:19: rope.scaling: expected a mapping"),
        ("scaling: null", "scaling: {type: longrope}", "x.yaml:19: rope.scaling.type: unknown rope scaling 'longrope'"),
        ("scaling: null", "scaling: {type: linear}", "x.yaml:19: missing key 'rope.scaling.factor'"),
        ("scaling: null", "scaling: {type: linear, factor: 0.5}", "x.yaml:19: rope.scaling.factor: 0.5 must be"),
        ("name: tiny", "name: ../../etc", "x.yaml:1: name: '../../etc' must be"),
        ("name: tiny", "name: {a: 1}", "x.yaml:1: name: expected text, found a mapping"),
        ("name: tiny", "<<: {name: tiny}", "x.yaml:1: unknown key '<<'"),
        ("name: tiny", "? [a]\n: 1\nname: tiny", "x.yaml:1: a key must be a plain word"),
    ],
)
def test_wrong_facts_name_their_line(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert refusal(GOOD.replace(old, new, 1)).startswith(expected)


@pytest.mark.parametrize("layers", ["[]", "[1, 0]", "[0, 0]", "[2]", "[-1]"])
def test_bad_sliding_layers(layers: str) -> None:
    text = GOOD.replace("sliding_window: null", "sliding_window: 8")
    assert "x.yaml:16: sliding_layers:" in refusal(text.replace("sliding_layers: null", f"sliding_layers: {layers}"))


@pytest.mark.parametrize("text", ["", "[]", "just words", "a: [1", "a: b: c", "\ta: 1", "--- {}\n--- {}", "a: \x01"])
def test_text_that_is_not_a_spec(text: str) -> None:
    assert refusal(text).startswith("x.yaml:")


def test_deep_nesting_is_one_line() -> None:
    assert refusal("a: " + "[" * 20000).startswith("x.yaml:")


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert load_spec(path) == TINY == load_spec(str(path))
    path.write_bytes(b"name: tiny\nfamily: \xff\n")
    with pytest.raises(KogcError, match=r"mine\.yaml:2: not UTF-8"):
        load_spec(path)
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(KogcError, match="larger than"):
        load_spec(path)
    with pytest.raises(KogcError, match=r"gone\.yaml: no such spec file"):
        load_spec(tmp_path / "gone.yaml")
    with pytest.raises(KogcError, match="no such spec file"):
        load_spec(tmp_path)


@pytest.mark.parametrize("name", ["gpt-5", "", "LLAMA", "llama-3.2-1b\n"])
def test_unknown_name_lists_what_exists(name: str) -> None:
    with pytest.raises(KogcError, match=r"unknown model spec .*llama-3\.2-1b, .*qwen3-8b") as caught:
        load_spec(name)
    assert "\n" not in str(caught.value)


def test_a_name_cannot_leave_the_shipped_directory() -> None:
    with pytest.raises(KogcError, match="no such spec file"):
        load_spec("../model_specs/nothing")
