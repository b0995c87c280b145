"""Turn the config.json of a Hugging Face checkpoint into a model spec.

The rule is that nothing is ignored: a key is read, or it is on the list of keys that cannot change the result, or it
must hold the value that switches its feature off; any other key is refused by name. An absent key means what it means
to Transformers: the default of the model's own configuration class.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config_json import Config, plain, read_json, show
from .errors import KogcError
from .spec import MAX_LAYERS, ModelSpec, Rope, RopeScaling, validate

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

ROUNDED = "float32 weights are rounded to bf16"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Bookkeeping, training and sampling settings: no value of these changes the logits. (pretraining_tp, of Llama 2, once
# cut the same sums into parts; max_sequence_length, of Vicuna, no model has ever read.)
HARMLESS = _words(
    """
    _name_or_path _commit_hash transformers_version transformers.js_config unsloth_version unsloth_fixed
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation
    _flash_attn_2_enabled _experts_implementation use_flash_attention use_flash_attn is_llama_config
    use_cache return_dict output_hidden_states output_attentions output_scores return_dict_in_generate torchscript
    initializer_range attention_dropout hidden_dropout resid_pdrop embd_pdrop gradient_checkpointing use_bfloat16
    pad_token_id sep_token_id unk_token_id decoder_start_token_id tokenizer_class prefix task_specific_params
    finetuning_task problem_type id2label label2id num_labels tf_legacy_loss remove_invalid_values
    chunk_size_feed_forward do_sample temperature top_k top_p min_p max_length max_new_tokens
    num_return_sequences length_penalty early_stopping diversity_penalty pretraining_tp max_sequence_length
    """
)

# Settings of generate() that change a continuation and are not applied here, with the values that leave it alone.
NOT_APPLIED: dict[str, tuple[object, ...]] = {
    "encoder_no_repeat_ngram_size": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "typical_p": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "top_h": (None,),
    "penalty_alpha": (None, 0),
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "renormalize_logits": (None, False),
    "min_new_tokens": (None, 0),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "force_words_ids": (None,),
    "constraints": (None,),
    "watermarking_config": (None,),
    "dola_layers": (None,),
}
# The same in a config.json, whose settings generate() takes where there is no generation_config.json.
NOT_TAKEN: dict[str, tuple[object, ...]] = {
    "do_sample": (None, False),
    "repetition_penalty": (None, 1),
    **NOT_APPLIED,
}

# Features that are not supported, with every value that means "off". None stands for null.
OFF: dict[str, tuple[object, ...]] = {
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_softcapping": (None,),
    "partial_rotary_factor": (None, 1),
    "rotary_pct": (None, 1),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    "mlp_bias": (None, False),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None, {}),
    "residual_multiplier": (None, 1),
    "embedding_multiplier": (None, 1),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1),
    "logit_scale": (None, 1),
    "lm_head_multiplier": (None, 1),
    "query_pre_attn_scalar": (None,),
    "scale_emb": (None, 1),
    "scale_depth": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "attention_chunk_size": (None,),
    "is_encoder_decoder": (None, False),
    "is_decoder": (None, False, True),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
}

# Keys that the functions below read.
READ = _words(
    """
    architectures model_type num_hidden_layers hidden_size intermediate_size num_attention_heads num_key_value_heads
    head_dim vocab_size tie_word_embeddings rms_norm_eps max_position_embeddings hidden_act attention_bias
    sliding_window use_sliding_window max_window_layers layer_types rope_theta rope_scaling rope_parameters
    original_max_position_embeddings dtype torch_dtype bos_token_id eos_token_id
    """
)

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": _words(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim truncate"
    ),
}

Notes = list[str]


def spec_from_dir(path: str | Path) -> tuple[ModelSpec, Notes]:
    """The spec of a checkpoint directory, and remarks for the user (one line each).

    Stop tokens come from generation_config.json where it names any, as in Transformers' generate.
    KogcError names file and key of whatever is missing, malformed or unsupported.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise KogcError(f"{directory}: not a directory")
    source = directory / "config.json"
    config = read_json(source)
    spec, notes = spec_from_config(config, str(source))
    spec = replace(spec, name=_name(os.path.abspath(directory)))  # the same from within it
    generation = directory / "generation_config.json"
    if generation.exists():
        settings = Config(read_json(generation), str(generation))
        spec = _with_generation(spec, settings)
        notes += _generation_notes(settings, NOT_APPLIED)
    else:
        notes += _generation_notes(Config(config, str(source)), NOT_TAKEN)
    return spec, notes


def spec_from_config(config: Mapping[str, Any], source: str) -> tuple[ModelSpec, Notes]:
    """The spec of a parsed config.json, and remarks for the user; `source` names it in errors and gives the name."""
    cfg = Config(config, source)
    family = _family(cfg)
    _refuse_unsupported(cfg, family)
    layers = cfg.size("num_hidden_layers", limit=MAX_LAYERS)
    heads = cfg.size("num_attention_heads")
    hidden = cfg.size("hidden_size")
    window, window_layers = _windows(cfg, family, layers)
    dtype, notes = _dtype(cfg)
    rope = _rope(cfg)
    context, remark = _context(cfg, rope)
    spec = ModelSpec(
        name=_name(source),
        family=family,
        layers=layers,
        hidden=hidden,
        ffn=cfg.size("intermediate_size"),
        heads=heads,
        kv_heads=_kv_heads(cfg, family, heads),
        head_dim=_head_dim(cfg, family, hidden, heads),
        vocab=cfg.size("vocab_size"),
        tied_embeddings=cfg.boolean("tie_word_embeddings", False),
        norm_eps=_norm_eps(cfg),
        max_context=context,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=window,
        sliding_layers=window_layers,
        rope=rope,
        dtype=dtype,
        bos_token=cfg.integer("bos_token_id") if cfg.given("bos_token_id") else _default_token(config, family, "bos"),
        eos_tokens=_eos_tokens(cfg, family),
    )
    validate(spec, source)
    return spec, notes + remark


def _family(cfg: Config) -> str:
    known = ", ".join(ARCHITECTURES)
    names = cfg.values.get("architectures")
    if names is None:
        # A configuration saved without a model has no architectures; the type says which class reads it.
        family = cfg.text("model_type")
        if family not in ARCHITECTURES.values():
            raise cfg.refuse("model_type", f"not supported (known: {', '.join(ARCHITECTURES.values())})")
        return family
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str) or names[0] not in ARCHITECTURES:
        raise cfg.refuse("architectures", f"not supported (known: {known})")
    family = ARCHITECTURES[names[0]]
    if cfg.values.get("model_type", family) != family:
        raise cfg.refuse("model_type", f"contradicts architectures ({names[0]})")
    return family


def _refuse_unsupported(cfg: Config, family: str) -> None:
    for key, value in cfg.values.items():
        if key in READ or key in HARMLESS or key in NOT_TAKEN:
            continue
        if key not in OFF:
            raise cfg.refuse(key, "unknown key: it may change what the model computes, so it is refused")
        if not _is_one_of(value, OFF[key]):
            raise cfg.refuse(key, "not supported")
    if cfg.values.get("hidden_act", "silu") != "silu":
        raise cfg.refuse("hidden_act", "not supported (only silu)")
    # Qwen2 always has biases on query, key and value; elsewhere the flag would also add one to the output projection.
    if cfg.given("attention_bias") and cfg.boolean("attention_bias") != (family == "qwen2"):
        raise cfg.refuse("attention_bias", f"not supported for family {family}")


def _is_one_of(value: object, allowed: Iterable[object]) -> bool:
    # True == 1 in Python, but a flag is not a count.
    return any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed)


def _norm_eps(cfg: Config) -> float:
    eps = cfg.number("rms_norm_eps")
    if not 0.0 < eps < 1.0:
        raise cfg.refuse("rms_norm_eps", "must be above 0 and below 1")
    return eps


def _kv_heads(cfg: Config, family: str, heads: int) -> int:
    if "num_key_value_heads" not in cfg.values and family != "llama":
        # These families' class defaults are fixed numbers that fit one model only.
        raise KogcError(f"{cfg.source}: missing key num_key_value_heads")
    return cfg.size("num_key_value_heads", heads)


def _head_dim(cfg: Config, family: str, hidden: int, heads: int) -> int:
    if cfg.given("head_dim"):
        return cfg.size("head_dim")
    if family == "qwen3" and "head_dim" not in cfg.values:
        return 128
    if hidden % heads:
        raise cfg.refuse("num_attention_heads", f"does not divide hidden_size ({hidden})")
    return hidden // heads


def _windows(cfg: Config, family: str, layers: int) -> tuple[int | None, tuple[int, ...] | None]:
    """(window, layers that use it); the second is None where all do."""
    types = _layer_types(cfg, layers)
    if family in ("qwen2", "qwen3"):
        window, sliding = _qwen_window(cfg, layers, types)
    else:
        window, sliding = _uniform_window(cfg, family, layers, types)
    if window is None or not sliding:
        return None, None
    return window, None if len(sliding) == layers else tuple(sliding)


def _layer_types(cfg: Config, layers: int) -> list[str] | None:
    types = cfg.values.get("layer_types")
    if types is None:
        return None
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list):
        raise cfg.refuse("layer_types", "expected a list")
    for item in types:
        if item not in known:
            raise KogcError(f"{cfg.source}: layer_types: {show(item)} is not supported (known: {', '.join(known)})")
    if len(types) != layers:
        raise KogcError(f"{cfg.source}: layer_types: {len(types)} entries for num_hidden_layers = {layers}")
    return types


def _qwen_window(cfg: Config, layers: int, types: list[str] | None) -> tuple[int | None, list[int]]:
    """Layers from max_window_layers on use the window, unless layer_types says which do."""
    window = _optional_window(cfg, 4096) if cfg.boolean("use_sliding_window", False) else None
    if types is None:
        first = cfg.integer("max_window_layers", 28)
        return window, list(range(max(first, 0), layers))
    sliding = [i for i, kind in enumerate(types) if kind == "sliding_attention"]
    if sliding and window is None:
        raise KogcError(f"{cfg.source}: layer_types: sliding_attention without use_sliding_window and sliding_window")
    return window, sliding


def _uniform_window(cfg: Config, family: str, layers: int, types: list[str] | None) -> tuple[int | None, list[int]]:
    """Mistral: the window holds for every layer. Llama: there is none."""
    if cfg.given("max_window_layers"):
        raise cfg.refuse("max_window_layers", f"not supported for family {family}")
    window = _optional_window(cfg, 4096) if family == "mistral" else None
    if family == "llama" and cfg.given("sliding_window"):
        raise cfg.refuse("sliding_window", "not supported for family llama")
    if cfg.given("use_sliding_window") and cfg.boolean("use_sliding_window") != (window is not None):
        raise cfg.refuse("use_sliding_window", f"contradicts sliding_window for family {family}")
    expected = "full_attention" if window is None else "sliding_attention"
    for index, kind in enumerate(types or []):
        if kind != expected:
            raise KogcError(
                f"{cfg.source}: layer_types: {kind!r} in layer {index} is not supported for family {family} here"
            )
    return window, list(range(layers))


def _optional_window(cfg: Config, default: int) -> int | None:
    """null means none; an absent key means the class default."""
    if "sliding_window" not in cfg.values:
        return default
    return cfg.size("sliding_window") if cfg.given("sliding_window") else None


def _rope(cfg: Config) -> Rope:
    rope = _rope_section(cfg)
    kind = _rope_type(rope)
    for key, value in rope.values.items():
        if key in ("type", "rope_type", "rope_theta") or key in ROPE_KEYS[kind]:
            continue
        if key == "partial_rotary_factor" and _is_one_of(value, OFF[key]):
            continue
        raise rope.refuse(key, f"not supported for rope type {kind}")
    theta = _rope_theta(cfg, rope)
    if kind == "default":
        return Rope(theta)
    return Rope(theta, _rope_scaling(cfg, rope, kind))


def _context(cfg: Config, rope: Rope) -> tuple[int, Notes]:
    """Positions that the model is for, and a remark where those are not max_position_embeddings.

    Model cards say to add YaRN to a config.json that is otherwise left alone: then it states what was stretched.
    """
    stated, scaling = cfg.size("max_position_embeddings"), rope.scaling
    if scaling is None or scaling.type != "yarn" or scaling.original_max_position is None:
        return stated, []
    stretched = int(scaling.factor * scaling.original_max_position)
    if stretched <= stated or not _states_original(cfg):
        return stated, []
    of = f"YaRN's factor times original_max_position_embeddings, not max_position_embeddings = {stated}"
    return stretched, [f"{cfg.source}: the context is {stretched} tokens, {of}"]


def _states_original(cfg: Config) -> bool:
    key = "original_max_position_embeddings"
    return cfg.given(key) or _rope_section(cfg).given(key)


def _rope_section(cfg: Config) -> Config:
    """The one object that describes the rotary embedding, under its old name or its new one."""
    found: dict[str, Mapping[str, Any]] = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = cfg.values.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise cfg.refuse(key, "expected an object")
        if value:
            found[key] = value
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise cfg.refuse("rope_scaling", "contradicts rope_parameters")
    for key, value in found.items():
        for inner, item in value.items():
            if isinstance(item, dict):
                raise KogcError(f"{cfg.source}: {key}.{plain(inner)}: rotary settings by layer type are not supported")
        return Config(value, cfg.source, f"{key}.")
    return Config({}, cfg.source, "rope_parameters.")


def _rope_type(rope: Config) -> str:
    kinds = {key: rope.text(key) for key in ("rope_type", "type") if rope.given(key)}
    if len(set(kinds.values())) > 1:
        raise rope.refuse("type", f"contradicts rope_type ({kinds['rope_type']!r})")
    for key, kind in kinds.items():
        if kind not in ROPE_KEYS:
            raise rope.refuse(key, f"not supported (known: {', '.join(ROPE_KEYS)})")
        return kind
    if any(key not in ("rope_theta", "partial_rotary_factor") for key in rope.values):
        raise KogcError(f"{rope.source}: missing key {rope.prefix}rope_type")
    return "default"


def _rope_theta(cfg: Config, rope: Config) -> float:
    if rope.given("rope_theta") and cfg.given("rope_theta") and rope.number("rope_theta") != cfg.number("rope_theta"):
        raise cfg.refuse("rope_theta", f"contradicts {rope.prefix}rope_theta")
    return rope.number("rope_theta") if rope.given("rope_theta") else cfg.number("rope_theta", 10000.0)


def _rope_scaling(cfg: Config, rope: Config, kind: str) -> RopeScaling:
    if kind == "linear":
        return RopeScaling("linear", rope.number("factor"))
    # A top-level value wins; without any, the scaling starts from the context that the configuration states.
    if cfg.given("original_max_position_embeddings"):
        original = cfg.size("original_max_position_embeddings")
    else:
        original = rope.size("original_max_position_embeddings", cfg.size("max_position_embeddings"))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position=original,
        )
    factor = rope.number("factor", cfg.size("max_position_embeddings") / original)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=rope.number("beta_fast", 32.0) or 32.0,
        beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        attention_factor=_yarn_attention_factor(rope, factor),
        truncate=rope.boolean("truncate", "truncate" not in rope.values),  # null is false, as in Python
    )


def _yarn_attention_factor(rope: Config, factor: float) -> float:
    """The factor on cosine and sine: given, or the paper's 0.1 ln(factor) + 1, or the ratio of two such terms."""
    if rope.given("attention_factor"):
        return rope.number("attention_factor")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    over = rope.number("mscale") if rope.given("mscale") else 0.0
    under = rope.number("mscale_all_dim") if rope.given("mscale_all_dim") else 0.0
    if not (over and under):
        return magnitude(1.0)
    divisor = magnitude(under)
    if divisor <= 0.0:
        raise rope.refuse("mscale_all_dim", "must be above 0")
    return magnitude(over) / divisor


def _dtype(cfg: Config) -> tuple[str, Notes]:
    names = [cfg.text(key).removeprefix("torch.") for key in ("dtype", "torch_dtype") if cfg.given(key)]
    if len(set(names)) > 1:
        raise cfg.refuse("torch_dtype", f"contradicts dtype ({names[0]!r})")
    if not names or names[0] == "auto":
        return "bf16", [f"{cfg.source}: dtype is not stated: weights are taken as bf16"]
    if names[0] == "float32":
        return "bf16", [f"{cfg.source}: {ROUNDED}"]
    known = {"bfloat16": "bf16", "float16": "fp16"}
    if names[0] not in known:
        key = "dtype" if cfg.given("dtype") else "torch_dtype"
        raise cfg.refuse(key, f"not supported (known: {', '.join(known)}, float32)")
    return known[names[0]], []


def _default_token(config: Mapping[str, Any], family: str, which: str) -> int | None:
    """The class default of a token id: only Llama and Mistral have one, and an explicit null removes it."""
    if f"{which}_token_id" in config or family not in ("llama", "mistral"):
        return None
    return 1 if which == "bos" else 2


def _eos_tokens(cfg: Config, family: str) -> tuple[int, ...]:
    value = cfg.values.get("eos_token_id")
    if value is None:
        default = _default_token(cfg.values, family, "eos")
        return () if default is None else (default,)
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
        raise cfg.refuse("eos_token_id", "expected an integer or a list of integers")
    return tuple(dict.fromkeys(items))


def _with_generation(spec: ModelSpec, cfg: Config) -> ModelSpec:
    if cfg.given("eos_token_id"):
        spec = replace(spec, eos_tokens=_eos_tokens(cfg, spec.family))
    if cfg.given("bos_token_id"):
        spec = replace(spec, bos_token=cfg.integer("bos_token_id"))
    validate(spec, cfg.source)
    return spec


def _generation_notes(cfg: Config, settings: Mapping[str, tuple[object, ...]]) -> Notes:
    """A remark for each of the settings that Transformers' generate() would apply and kogc does not."""
    return [
        f"{cfg.source}: {key} = {show(cfg.values[key])} is not applied"
        for key, neutral in settings.items()
        if key in cfg.values and not _is_one_of(cfg.values[key], neutral)
    ]


def _name(source: str) -> str:
    """A spec name from a directory, a config.json inside one, or a hub id."""
    parts = [part for part in re.split(r"[/\\]", source) if part not in ("", ".", "..", "config.json")]
    last = parts[-1].split("@")[0] if parts else ""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-").lower()[:100] or "model"
