"""Importing config.json: the same facts as Transformers reads, and every unsupported key refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kogc import rope
from kogc.errors import KogcError
from kogc.importer import spec_from_config, spec_from_dir
from kogc.spec import ModelSpec, Rope, RopeScaling, dump_spec, load_spec, parse_spec

OLD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 321,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """A small configuration of a family; a change to ... removes the key."""
    out = {**OLD, "architectures": [f"{NAMES[family]}ForCausalLM"], "model_type": family, **changes}
    return {key: value for key, value in out.items() if value is not ...}


def spec_of(family: str = "llama", **changes: Any) -> ModelSpec:
    return spec_from_config(config(family, **changes), "hub/test")[0]


def refusal(family: str = "llama", **changes: Any) -> str:
    with pytest.raises(KogcError) as caught:
        spec_from_config(config(family, **changes), "dir/config.json")
    message = str(caught.value)
    assert message.startswith("dir/config.json: ")
    assert "\n" not in message
    return message.removeprefix("dir/config.json: ")


# What Transformers itself writes.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", list(NAMES))
def test_what_save_pretrained_writes_imports(tmp_path: Path, family: str, dtype: str) -> None:
    cls = getattr(transformers, f"{NAMES[family]}Config")
    saved = cls(
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=64,
        vocab_size=777,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0},
        architectures=[f"{NAMES[family]}ForCausalLM"],
        dtype=dtype,
        bos_token_id=5,
        eos_token_id=[7, 8],
    )
    saved.save_pretrained(tmp_path)
    spec, notes = spec_from_dir(tmp_path)
    assert spec == ModelSpec(
        name=spec.name,
        family=family,
        layers=3,
        hidden=192,
        ffn=320,
        heads=6,
        kv_heads=3,
        head_dim=64,
        vocab=777,
        tied_embeddings=True,
        norm_eps=1e-6,
        max_context=saved.max_position_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=4096 if family == "mistral" else None,
        sliding_layers=None,
        rope=Rope(50000.0, RopeScaling("linear", 2.0)),
        dtype="fp16" if dtype == "float16" else "bf16",
        bos_token=5,
        eos_tokens=(7, 8),
    )
    assert any("rounded to bf16" in note for note in notes) == (dtype == "float32")
    assert parse_spec(dump_spec(spec)) == spec


@pytest.mark.parametrize("family", list(NAMES))
def test_a_full_dump_of_the_class_defaults_imports(family: str) -> None:
    cls = getattr(transformers, f"{NAMES[family]}Config")
    values = json.loads(json.dumps(cls().to_dict()))
    spec, notes = spec_from_config(values, "x")
    assert spec.family == family
    assert spec.head_dim == 128
    assert notes == ["x: dtype is not stated: weights are taken as bf16"]


@pytest.mark.parametrize("family", list(NAMES))
def test_a_saved_model_has_the_tensors_that_the_spec_implies(tmp_path: Path, family: str) -> None:
    cls = getattr(transformers, f"{NAMES[family]}Config")
    made = cls(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=50,
    )
    model = getattr(transformers, f"{NAMES[family]}ForCausalLM")(made)
    model.save_pretrained(tmp_path)
    spec, _ = spec_from_dir(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    attention = "model.layers.0.self_attn."
    assert shapes[attention + "q_proj.weight"] == (spec.q_rows, spec.hidden)
    assert shapes[attention + "v_proj.weight"] == (spec.kv_rows, spec.hidden)
    assert (attention + "k_proj.bias" in shapes) == spec.qkv_bias
    assert (attention + "q_norm.weight" in shapes) == spec.qk_norm
    assert attention + "o_proj.bias" not in shapes
    # A model's own generation_config.json is beside it, and its stop tokens agree.
    assert (tmp_path / "generation_config.json").exists()
    assert spec.eos_tokens == ((2,) if family in ("llama", "mistral") else ())


def windows_of(family: str, **changes: Any) -> list[int | None]:
    """The window of each layer according to Transformers' own configuration class."""
    values = {key: value for key, value in config(family, **changes).items() if key != "architectures"}
    made = getattr(transformers, f"{NAMES[family]}Config")(**values)
    if family == "mistral":
        return [made.sliding_window] * made.num_hidden_layers
    return [made.sliding_window if kind == "sliding_attention" else None for kind in made.layer_types]


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 9},
        {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 9},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3},
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": [FULL] * 4, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 9, "layer_types": None, "max_window_layers": 2},
    ],
)
def test_qwen_windows_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    spec = spec_of(family, **changes)
    assert [spec.window(layer) for layer in range(4)] == windows_of(family, **changes)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": None}, {"sliding_window": 9}])
def test_mistral_windows_are_those_of_transformers(changes: dict[str, Any]) -> None:
    spec = spec_of("mistral", **changes)
    assert [spec.window(layer) for layer in range(4)] == windows_of("mistral", **changes)
    assert spec.sliding_layers is None


def test_contradicting_windows() -> None:
    assert "layer_types: sliding_attention without" in refusal("qwen2", layer_types=[SLIDING] * 4)
    assert "layer_types: 3 entries for num_hidden_layers = 4" in refusal("qwen3", layer_types=[FULL] * 3)
    assert 'layer_types: "chunked_attention" is not' in refusal("qwen3", layer_types=["chunked_attention"] * 4)
    assert "layer_types: 'full_attention' in layer 1" in refusal(
        "mistral", sliding_window=9, layer_types=[SLIDING, FULL, SLIDING, FULL]
    )
    assert "layer_types: 'sliding_attention' in layer 0" in refusal("llama", layer_types=[SLIDING] * 4)
    assert "sliding_window = 9" in refusal("llama", sliding_window=9)
    assert "sliding_window = 0" in refusal("mistral", sliding_window=0)
    assert "use_sliding_window = false" in refusal("mistral", sliding_window=9, use_sliding_window=False)
    assert "max_window_layers = 2" in refusal("mistral", max_window_layers=2)
    assert spec_of("llama", layer_types=[FULL] * 4).sliding_window is None


# Public configurations, as they stand.


def test_llama_3_2_1b() -> None:
    public = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0.dev0",
        "use_cache": True,
        "vocab_size": 128256,
    }
    assert spec_from_config(public, "meta-llama/Llama-3.2-1B") == (load_spec("llama-3.2-1b"), [])


def test_smollm2_135m() -> None:
    public = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
        "vocab_size": 49152,
    }
    assert spec_from_config(public, "HuggingFaceTB/SmolLM2-135M@main") == (load_spec("smollm2-135m"), [])


# Refusals.

UNSUPPORTED: dict[str, Any] = {
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "partial_rotary_factor": 0.5,
    "rope_interleaved": True,
    "use_mrope": True,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "quantization_config": {"quant_method": "fp8"},
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "residual_multiplier": 0.22,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "query_pre_attn_scalar": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_nextn_predict_layers": 1,
    "attention_chunk_size": 8192,
    "no_rope_layers": [1, 1, 0, 1],
    "is_encoder_decoder": True,
    "pruned_heads": {"0": [1]},
    "clip_qkv": 8.0,
    "some_new_feature": None,
    "Hidden_act": "silu",
}


@pytest.mark.parametrize("key", list(UNSUPPORTED))
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_unsupported_keys_are_refused_by_name_and_value(family: str, key: str) -> None:
    value = UNSUPPORTED[key]
    assert refusal(family, **{key: value}).startswith(f"{key} = {json.dumps(value)}: ")


def test_the_same_keys_switched_off_are_accepted() -> None:
    plain = spec_of()
    for key, value in {
        "final_logit_softcapping": None,
        "partial_rotary_factor": 1.0,
        "mlp_bias": False,
        "attention_bias": False,
        "quantization_config": None,
        "residual_multiplier": 1.0,
        "pretraining_tp": 1,
        "num_experts": 0,
        "repetition_penalty": 1.0,
        "hidden_act": "silu",
        "sliding_window": None,
        "layer_types": None,
        "original_max_position_embeddings": None,
    }.items():
        assert spec_of(**{key: value}) == plain, key


def test_a_hostile_key_stays_on_one_line() -> None:
    assert refusal(**{"a\nb\x1b[2J": 1}).startswith('"a\\nb\\u001b[2J" = 1: unknown key')
    assert len(refusal(**{"k" * 5000: "v" * 5000})) < 300
    assert refusal(rope_scaling={"a\nb": {}}).startswith('rope_scaling."a\\nb": rotary settings')


def test_a_flag_is_not_a_count() -> None:
    assert refusal(residual_multiplier=True).startswith("residual_multiplier = true")
    assert refusal(mlp_bias=0).startswith("mlp_bias = 0")
    assert refusal(num_hidden_layers=True).startswith("num_hidden_layers = true: expected an integer")
    assert refusal(tie_word_embeddings=1).startswith("tie_word_embeddings = 1: expected true or false")


def test_qwen2_always_has_its_bias() -> None:
    assert spec_of("qwen2", attention_bias=True).qkv_bias
    assert spec_of("qwen2").qkv_bias
    assert refusal("qwen2", attention_bias=False).startswith("attention_bias = false: not supported for family qwen2")


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GemmaForCausalLM"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [["LlamaForCausalLM"]]},
    ],
)
def test_other_architectures(changes: dict[str, Any]) -> None:
    message = refusal(**changes)
    assert message.startswith("architectures = ")
    assert "Qwen3ForCausalLM" in message


def test_architecture_and_type_must_agree() -> None:
    assert refusal(model_type="mistral").startswith('model_type = "mistral": contradicts architectures')
    assert refusal(architectures=..., model_type="gemma").startswith('model_type = "gemma": not supported')
    assert refusal(architectures=..., model_type=...) == "missing key model_type"


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [..., None, "7", [7], 0, -1, 1 << 40, 10**400], ids=lambda v: repr(v)[:10])
def test_shapes_must_be_there_and_be_sane(key: str, value: Any) -> None:
    message = refusal(**{key: value})
    assert message.startswith((f"{key} = ", f"missing key {key}"))
    assert len(message) < 200


def test_head_dim() -> None:
    assert spec_of().head_dim == 64
    assert spec_of(head_dim=None).head_dim == 64
    assert spec_of(head_dim=96).head_dim == 96
    # The default of the Qwen3 configuration class is a number, not a quotient.
    assert spec_of("qwen3").head_dim == 128
    assert refusal(num_attention_heads=6, num_key_value_heads=3).startswith("num_attention_heads = 6: does not divide")
    assert refusal(num_attention_heads=0).startswith("num_attention_heads = 0")
    assert refusal(head_dim=80).startswith("head_dim: 80 is not supported")


def test_kv_heads() -> None:
    assert spec_of(num_key_value_heads=...).kv_heads == 4
    assert spec_of(num_key_value_heads=None).kv_heads == 4
    assert refusal("qwen2", num_key_value_heads=...) == "missing key num_key_value_heads"
    assert refusal(num_key_value_heads=3).startswith("kv_heads: 3 does not divide heads (4)")


# Rotary settings.

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}


def test_old_and_new_rope_forms_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = spec_of(rope_theta=5e5, rope_scaling=scaling)
    assert old.rope == Rope(5e5, RopeScaling("linear", 2.0))
    assert spec_of(rope_theta=..., rope_parameters={**scaling, "rope_theta": 5e5}) == old
    assert spec_of(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}) == old
    assert spec_of(rope_theta=5e5, rope_scaling={**scaling, "type": "linear"}) == old
    assert spec_of(rope_theta=...).rope == Rope(10000.0)
    assert spec_of(rope_parameters={"rope_type": "default", "rope_theta": 10000.0}).rope == Rope(10000.0)
    assert spec_of(rope_scaling={}).rope == Rope(10000.0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "mrope", "proportional", "ntk"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("word", ["type", "rope_type"])
def test_unknown_rope_types_are_refused_by_name(key: str, word: str, kind: str) -> None:
    message = refusal(**{key: {word: kind, "factor": 2.0}})
    assert message.startswith(f'{key}.{word} = "{kind}": not supported')


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"type": "linear"}}, "missing key rope_scaling.factor"),
        ({"rope_scaling": {"factor": 2.0}}, "missing key rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, 'rope_scaling.factor = "2": expected a number'),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope.scaling.factor: 0.5 must be at least 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "rope_scaling.beta = 1: not supported"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, 'rope_scaling.type = "linear"'),
        ({"rope_scaling": {"type": "default", "mrope_section": [1]}}, "rope_scaling.mrope_section = [1]"),
        ({"rope_scaling": "linear"}, 'rope_scaling = "linear": expected an object'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_theta = 10000.0: contradicts"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention: rotary"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling =",
        ),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": 0}}, "rope_scaling.original_max_position"),
        ({"rope_theta": -1}, "rope.theta: -1.0 must be above 1"),
    ],
)
def test_malformed_rope(changes: dict[str, Any], expected: str) -> None:
    assert refusal(**changes).startswith(expected)


def test_yarn_factor_is_resolved() -> None:
    scaling = spec_of(rope_scaling=YARN).rope.scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(1.1386294361119891)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (32.0, 1.0, True)
    # Without a factor it is the ratio of the two contexts.
    assert spec_of(rope_scaling={**YARN, "factor": None}).rope.scaling == scaling


@pytest.mark.parametrize("truncate", [..., None, False, True])
def test_yarn_truncates_as_transformers_does(truncate: Any) -> None:
    values = {key: value for key, value in {**YARN, "truncate": truncate}.items() if value is not ...}
    theirs = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, rope_parameters={**values, "rope_theta": 1e4}
    )
    expected, _ = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    np.testing.assert_allclose(rope.inv_freq(spec_of(rope_scaling=values)), expected.numpy(), rtol=1e-6)


def test_yarn_added_to_a_config_stretches_its_context() -> None:
    """As model cards of Qwen say to; a context that is stated as stretched, or with nothing to stretch, stands."""
    original = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    spec, notes = spec_from_config(config(rope_scaling=original), "x")
    said = "YaRN's factor times original_max_position_embeddings, not max_position_embeddings = 4096"
    assert (spec.max_context, notes) == (16384, [f"x: the context is 16384 tokens, {said}"])
    for changes in (
        {"rope_scaling": original, "max_position_embeddings": 16384},
        {"rope_scaling": original, "max_position_embeddings": 20000},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ):
        spec, notes = spec_from_config(config(**changes), "x")
        assert (spec.max_context, notes) == (changes.get("max_position_embeddings", 4096), [])


def test_llama3_starts_from_the_stated_context() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for changes, expected in (
        ({}, 4096),
        ({"original_max_position_embeddings": 512}, 512),
    ):
        scaling = spec_of(rope_scaling=llama3, **changes).rope.scaling
        assert scaling is not None
        assert scaling.original_max_position == expected


# Data types, tokens, files.


def test_dtypes() -> None:
    assert spec_from_config(config(torch_dtype="float16"), "x")[0].dtype == "fp16"
    assert spec_from_config(config(torch_dtype="torch.bfloat16"), "x")[1] == []
    spec, notes = spec_from_config(config(torch_dtype=..., dtype="float32"), "x")
    assert (spec.dtype, notes) == ("bf16", ["x: float32 weights are rounded to bf16"])
    assert refusal(torch_dtype="float8_e4m3fn").startswith('torch_dtype = "float8_e4m3fn": not supported')
    assert refusal(dtype="float16").startswith('torch_dtype = "bfloat16": contradicts dtype')


def test_tokens() -> None:
    assert spec_of(eos_token_id=[5, 6, 5]).eos_tokens == (5, 6)
    assert spec_of(eos_token_id=None, bos_token_id=None).eos_tokens == ()
    assert spec_of(eos_token_id=..., bos_token_id=...).eos_tokens == (2,)
    assert spec_of("qwen2", eos_token_id=..., bos_token_id=...).bos_token is None
    assert refusal(eos_token_id="2").startswith('eos_token_id = "2"')
    assert refusal(eos_token_id=[True]).startswith("eos_token_id = [true]")
    assert refusal(eos_token_id=321).startswith("eos_tokens: 321 is outside the vocabulary")


def write(directory: Path, text: str | bytes, name: str = "config.json") -> Path:
    data = text.encode() if isinstance(text, str) else text
    (directory / name).write_bytes(data)
    return directory


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    write(tmp_path, json.dumps(config()))
    write(tmp_path, '{"eos_token_id": [9, 2], "temperature": 0.6, "num_beams": 4}', "generation_config.json")
    spec, notes = spec_from_dir(tmp_path)
    assert spec.eos_tokens == (9, 2)
    assert len(notes) == 1
    assert "num_beams = 4 is not applied" in notes[0]
    write(tmp_path, '{"eos_token_id": 999}', "generation_config.json")
    with pytest.raises(KogcError, match=r"generation_config\.json: eos_tokens: 999"):
        spec_from_dir(tmp_path)


def test_settings_of_generate_in_config_json_are_no_mathematics(tmp_path: Path) -> None:
    """Transformers takes them from there only where there is no generation_config.json."""
    settings = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "num_beams": 4, "typical_p": 1.0}
    write(tmp_path, json.dumps(config(**settings)))
    spec, notes = spec_from_dir(tmp_path)
    named = [note.split(": ", 1)[1] for note in notes]
    assert named == [
        f"{what} is not applied" for what in ("do_sample = true", "repetition_penalty = 1.1", "num_beams = 4")
    ]
    write(tmp_path, "{}", "generation_config.json")
    assert spec_from_dir(tmp_path) == (spec, [])


def test_keys_of_old_checkpoints_that_say_nothing() -> None:
    assert spec_of(pretraining_tp=2, max_sequence_length=2048) == spec_of()


def test_the_name_comes_from_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "My Model (v2)"
    directory.mkdir()
    assert spec_from_dir(write(directory, json.dumps(config())))[0].name == "my-model-v2-"
    assert spec_from_config(config(), "org/Name-1B@abc123")[0].name == "name-1b"
    assert spec_from_config(config(), "...")[0].name == "model"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"config\.json:1: not JSON"),
        ('{\n"a": 1,\n}', r"config\.json:[23]: not JSON"),
        ('{"hidden_size": 1, "hidden_size": 2}', "duplicate key 'hidden_size'"),
        ('{"rms_norm_eps": NaN}', "NaN"),
        ("[]", "expected a JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        ("[" * 100000, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 5000 + "}", r"config\.json"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(KogcError, match=expected) as caught:
        spec_from_dir(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(KogcError, match=r"config\.json: missing"):
        spec_from_dir(tmp_path)
    with pytest.raises(KogcError, match="not a directory"):
        spec_from_dir(tmp_path / "nothing")
