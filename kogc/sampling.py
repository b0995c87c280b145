"""How a token is chosen: what a caller may ask for, checked in one place, and what a model asks for by itself.

The order is that of Transformers' generate: logit bias and penalties on the raw logits, then temperature, top-k, top-p,
min-p, and a draw. Penalties are vLLM's: repetition counts the prompt and what was generated, presence and frequency
count what was generated. Ties: top-k keeps every token that ties with the k-th; top-p keeps the fewest of the most
likely tokens that reach p, and every token that ties with the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .config_json import read_json
from .errors import KogcError

MAX_BIAS = 300  # tokens with a bias in one request
MAX_LOGPROBS = 20
SEEDS = 1 << 64

# The numbers that each parameter may be: least, most, and whether the least itself is allowed.
RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 1000.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 1000.0, False),
    "presence_penalty": (-1000.0, 1000.0, True),
    "frequency_penalty": (-1000.0, 1000.0, True),
}
INTEGERS = {"top_k": (1 << 31) - 1, "seed": SEEDS - 1, "logprobs": MAX_LOGPROBS}  # each from 0
LEAST_TEMPERATURE = 1e-3  # other than 0: below, differences of logits overflow
LEAST_PENALTY = 1e-3
MOST_BIAS = 1000.0
FROM_CONFIG = ("temperature", "top_k", "top_p", "min_p")  # keys of generation_config.json that need do_sample


@dataclass(frozen=True)
class Sampling:
    """Parameters of the choice; the defaults draw from the model's own distribution.

    temperature: divides the logits; 0: the largest logit is taken, and top_k, top_p, min_p mean nothing. top_k: so many
    tokens are admitted, 0: all. top_p: share of the probability that is admitted. min_p: least probability relative to
    the likeliest token's. Penalties: repetition divides (1: off), presence and frequency are subtracted (0: off).
    logit_bias: (token, number added to its logit), at most 300 tokens. seed: the same seed gives the same tokens on any
    number of blocks; None: another at every call. logprobs: give the log-probability of each token, and of that many of
    the likeliest (0 to 20), under the model's distribution before any of this; None: do not.

    KogcError, one line that names the parameter, for a value outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (least, most, included) in RANGES.items():
            _check_number(name, getattr(self, name), least, most, included)
        for name, limit in INTEGERS.items():
            _check_integer(name, getattr(self, name), limit)
        if 0 < self.temperature < LEAST_TEMPERATURE:
            raise KogcError(f"temperature: {self.temperature!r} is neither 0 (greedy) nor at least {LEAST_TEMPERATURE}")
        if self.repetition_penalty < LEAST_PENALTY:
            raise KogcError(f"repetition_penalty: {self.repetition_penalty!r} is less than {LEAST_PENALTY}")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    def check_tokens(self, vocab: int) -> None:
        """KogcError for a bias of a token outside the vocabulary."""
        for token, _ in self.logit_bias:
            if token >= vocab:
                raise KogcError(f"logit_bias: token {token} is outside the vocabulary (0 to {vocab - 1})")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def filters(self) -> bool:
        """Whether some tokens are never drawn."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


def _check_number(name: str, value: Any, least: float, most: float, included: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise KogcError(f"{name}: {value!r} is not a number")
    if not least <= value <= most or (value == least and not included):  # written so that NaN fails
        start = f"from {least:g}" if included else f"above {least:g} and up"
        raise KogcError(f"{name}: {value!r} is not {start} to {most:g}")


def _check_integer(name: str, value: Any, limit: int) -> None:
    if value is None and name != "top_k":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise KogcError(f"{name}: {value!r} is not an integer")
    if not 0 <= value <= limit:
        raise KogcError(f"{name}: {value!r} is not from 0 to {limit}")


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    """Pairs from pairs or from a mapping, every token once."""
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    out: dict[int, float] = {}
    try:
        for token, value in pairs:
            _check_integer("logit_bias", token, (1 << 31) - 1)
            _check_number("logit_bias", value, -MOST_BIAS, MOST_BIAS, True)
            if token in out:
                raise KogcError(f"logit_bias: token {token} is named twice")
            out[token] = float(value)
    except (TypeError, ValueError):
        raise KogcError("logit_bias: not pairs of a token id and a number") from None
    if len(out) > MAX_BIAS:
        raise KogcError(f"logit_bias: {len(out)} tokens, at most {MAX_BIAS} can have one")
    return tuple(out.items())


GREEDY = Sampling(temperature=0.0)
GENERATE_TOP_K = 50  # of Transformers' generate, where nothing names another


def sampling_from_config(path: Path) -> Sampling:
    """What a generation_config.json asks for: greedy unless do_sample is true, and what it does not name is off.

    But for top_k, of which Transformers' generate then takes 50.

    KogcError names the file and the key at fault.
    """
    config = read_json(path)
    values = {key: value for key, value in config.items() if value is not None}
    draws = values.get("do_sample", False)
    if not isinstance(draws, bool):
        raise KogcError(f"{path}: do_sample: {draws!r} is neither true nor false")
    if draws:
        values.setdefault("top_k", GENERATE_TOP_K)
    keys: Sequence[str] = ("repetition_penalty", *(FROM_CONFIG if draws else ()))
    try:
        return replace(Sampling() if draws else GREEDY, **{key: values[key] for key in keys if key in values})
    except KogcError as error:
        raise KogcError(f"{path}: {error}") from None
