"""Rotary tables against Transformers' own rotary modules, element for element."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from kogc import rope
from kogc.importer import spec_from_config
from kogc.spec import ModelSpec, load_spec

LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192},
    "llama3-odd": {**LLAMA3, "factor": 7.3, "low_freq_factor": 1.3, "original_max_position_embeddings": 1000},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-smooth": {
        "rope_type": "yarn",
        "factor": 5.5,
        "original_max_position_embeddings": 4096,
        "beta_fast": 24.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "yarn-factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 0.9,
    },
}
CASES = [
    (name, head_dim, theta)
    for name in SCALINGS
    for head_dim, theta in ((32, 10000.0), (64, 500000.0), (96, 10000.0), (128, 1000000.0))
]


def both(name: str, head_dim: int, theta: float) -> tuple[ModelSpec, Any]:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=131072,
        rope_parameters={**SCALINGS[name], "rope_theta": theta},
    )
    spec, _ = spec_from_config(config.to_diff_dict(), "test")
    return spec, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(("name", "head_dim", "theta"), CASES)
def test_frequencies(name: str, head_dim: int, theta: float) -> None:
    spec, module = both(name, head_dim, theta)
    mine, reference = rope.inv_freq(spec), module.inv_freq.numpy()
    assert mine.dtype == np.float32
    assert mine.shape == (head_dim // 2,)
    # Nearly every element is equal bit for bit; powers differ in their last bit between libraries here and there.
    np.testing.assert_allclose(mine, reference, rtol=2.0**-22, atol=0)
    assert (mine != reference).mean() < 0.1
    assert rope.attention_scaling(spec) == module.attention_scaling


@pytest.mark.parametrize(("name", "head_dim", "theta"), CASES)
def test_table(name: str, head_dim: int, theta: float) -> None:
    spec, module = both(name, head_dim, theta)
    count = 3000
    cos, sin = module(torch.zeros(1), torch.arange(count)[None])
    # With the module's own frequencies, so that only the table is compared.
    mine = rope.table(module.inv_freq.numpy(), count, rope.attention_scaling(spec))
    assert mine.shape == (count, head_dim // 2, 2)
    assert mine.dtype == np.float32
    for index, reference in enumerate((cos, sin)):
        expected = reference[0, :, : head_dim // 2].numpy()
        np.testing.assert_allclose(mine[:, :, index], expected, rtol=0, atol=2.0**-22)


def test_the_angle_is_rounded_to_fp32_at_high_positions() -> None:
    module = both("llama3", 64, 500000.0)[1]
    position = 131071
    frequencies = module.inv_freq.numpy()
    cos, _ = module(torch.zeros(1), torch.tensor([[position]]))
    mine = rope.table(frequencies, position + 1)[position, :, 0]
    np.testing.assert_allclose(mine, cos[0, 0, :32].numpy(), rtol=0, atol=2.0**-22)
    exact = np.cos(position * frequencies.astype(np.float64))
    assert np.abs(mine - exact).max() > 1e-4


def test_scaling_changes_the_frequencies() -> None:
    spec = load_spec("llama-3.2-1b")
    plain = replace(spec, rope=replace(spec.rope, scaling=None))
    scaled, unscaled = rope.inv_freq(spec), rope.inv_freq(plain)
    assert scaled[0] == unscaled[0] == 1.0
    assert scaled[-1] == pytest.approx(unscaled[-1] / 32, rel=1e-6)


def test_position_zero_turns_nothing() -> None:
    first = rope.table(rope.inv_freq(load_spec("qwen3-0.6b")), 1)[0]
    assert (first[:, 0] == 1).all()
    assert (first[:, 1] == 0).all()
