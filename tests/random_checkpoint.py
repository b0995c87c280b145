"""Small random Hugging Face checkpoints of every supported family, and their references through transformers.

`make` writes one; keyword overrides are config.json's own names (hidden_size, num_key_value_heads, ...), plus
dtype (torch name), seed, shard_bytes (several files with an index) and tokenizer (a byte-level tokenizer.json).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# Odd on purpose: vocabulary not a multiple of anything, ffn not a multiple of 32, GQA of 3.
BASE: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 168,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    # Qwen2 has no head_dim of its own: it is hidden_size / num_attention_heads.
    "qwen2": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen3": {"head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def make(
    tmp_path: Path,
    family: str,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    shard_bytes: int | None = None,
    tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint below `tmp_path` and return its directory (a new one at every call)."""
    config = _config(family, {**BASE, **FAMILY[family], **overrides})
    model = _model_class(family)(config)
    _fill(model, seed)
    model = model.to(getattr(torch, dtype))
    number = len(list(tmp_path.glob(f"{family}-*"))) if tmp_path.exists() else 0
    out = tmp_path / f"{family}-{number}"
    out.mkdir(parents=True)
    model.save_pretrained(out, **({"max_shard_size": shard_bytes} if shard_bytes else {}))
    if tokenizer:
        write_tokenizer(out, config.vocab_size)
    return out


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The transformers model of a checkpoint, eager attention, in evaluation mode."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
    return model.eval()


class Fp8Cache(transformers.DynamicCache):  # type: ignore[misc]
    """A cache that rounds keys and values as kogc's FP8 cache is said to, by PyTorch's own E4M3."""

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(round_fp8(key_states), round_fp8(value_states), layer_idx, *args, **kwargs)


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """Each vector divided by the power of two that brings its largest number to 128 .. 256, rounded, and restored."""
    wide = x.float()
    power = torch.exp2(torch.floor(torch.log2(wide.abs().amax(-1, keepdim=True).clamp(2.0**-119))) - 7)
    return ((wide / power).to(torch.float8_e4m3fn).float() * power).to(x.dtype)


def reference_logits(path: Path, tokens: list[int], dtype: torch.dtype = torch.float32, kv_dtype: str = "bf16") -> Any:
    """Logits of transformers for every position, float32 numpy [tokens, vocab]; `bf16` rounds no keys and values."""
    cache = Fp8Cache() if kv_dtype == "fp8" else None
    with torch.no_grad():
        model = load_reference(path, dtype)
        return model(torch.tensor([tokens]), past_key_values=cache).logits[0].float().numpy()


def write_tokenizer(out: Path, vocab: int) -> None:
    """A byte-level tokenizer: ids 0 to 2 are <unk>, <s>, </s>, then the 256 bytes (vocab of at least 259)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    assert vocab >= len(special) + len(alphabet), "vocab too small for a byte-level tokenizer"
    words = {word: i for i, word in enumerate(special + alphabet)}
    tok = Tokenizer(models.BPE(vocab=words, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(word, special=True) for word in special])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.save(str(out / "tokenizer.json"))


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a checkpoint's config.json; None removes the key."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    file.write_text(json.dumps(config))


def _config(family: str, values: dict[str, Any]) -> Any:
    cls = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[family]
    if family == "qwen2":
        values = {k: v for k, v in values.items() if k != "head_dim"}
    return cls(**values)


def _model_class(family: str) -> Any:
    return {
        "llama": transformers.LlamaForCausalLM,
        "mistral": transformers.MistralForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
    }[family]


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random values that keep activations near 1 through the layers and spread the logits by about 2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("norm.weight"):
                p.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                p.copy_(2.0 * noise / p.shape[1] ** 0.5)
            else:
                p.copy_(noise / p.shape[1] ** 0.5)
