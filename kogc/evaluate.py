"""How well a build predicts a text (perplexity), and how far its predictions are from Transformers' in FP32 (KL).

The text is cut into windows of `window` tokens, each `stride` (half of that) after the last. A window starts with the
begin token, where the tokenizer sets one before a text, and scores only the tokens that no earlier window has scored.
So every token is scored once, and all but the first window's with at least half a window of text before them. Without
a begin token the very first token of the text has nothing to be predicted from, and is not scored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .errors import KogcError

if TYPE_CHECKING:
    from .session import Session
    from .tokenizer import Tokenizer

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DEFAULT_WINDOW = 2048
BLOCK_ROWS = 16  # rows of logits that are widened to FP64 at a time
MOST_NATS = 700.0  # whose exponential is still a number


@dataclass(frozen=True)
class Divergence:
    """KL(reference || build) over the scored tokens, in nats, and the share of them whose best tokens agree."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    top1_agreement: float
    reference_nats_per_token: float


@dataclass(frozen=True)
class Evaluation:
    """tokens: scored; bytes: of the text they stand for, in UTF-8; window, stride: in tokens."""

    tokens: int
    bytes: int
    window: int
    stride: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    divergence: Divergence | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Reference(Protocol):
    """Another implementation of the model, fed the same sequences in the same parts."""

    def begin(self) -> None:
        """The next part is the start of another sequence."""

    def logits(self, tokens: Sequence[int]) -> F32:
        """Logits after each of the sequence's next tokens: float32 [len(tokens), vocab]."""


@dataclass(frozen=True)
class Window:
    """Tokens begin to end (exclusive) of a text are seen, those from `scored` on are scored."""

    begin: int
    end: int
    scored: int


def evaluate(
    session: Session,
    text: str,
    limit: int | None = None,
    window: int | None = None,
    reference: Reference | None = None,
) -> Evaluation:
    """Score a text, or its first `limit` tokens, with the build and, if there is one, against a reference.

    window: tokens seen at once, 2 to the artifact's context; None: DEFAULT_WINDOW, or the context where that is less.
    KogcError for another window, a text without a token to predict, and logits that are not finite. The kernel runs
    about two tokens for each of the text. The KV cache is overwritten.
    """
    if session.tokenizer is None:
        raise KogcError("this artifact has no tokenizer: a text cannot be evaluated")
    window = min(DEFAULT_WINDOW, session.max_context) if window is None else window
    if not 2 <= window <= session.max_context:
        raise KogcError(f"a window of {window} tokens: must be 2 to the artifact's context of {session.max_context}")
    begin, tokens = _tokenize(session.tokenizer, text)
    tokens, first = tokens[:limit], 1 - len(begin)
    if first >= len(tokens):
        raise KogcError("the text is too short: it has no token to predict")
    scores = _Scores()
    for place in windows(len(tokens), window - len(begin), window // 2, first):
        seen = begin + tokens[place.begin : place.end]
        _score(session, reference, seen, len(begin) + place.scored - place.begin, scores)
    text_bytes = len(session.tokenizer.decode(tokens[first:], skip_special=False).encode())
    return scores.summary(text_bytes, window)


def windows(count: int, size: int, stride: int, first: int) -> Iterator[Window]:
    """The windows over `count` tokens: together they score each token from `first` on once."""
    for begin in range(0, count, stride):
        end = min(begin + size, count)
        yield Window(begin, end, first)
        if end == count:
            return
        first = end


def _tokenize(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """([begin token] or [], tokens of the text alone, without one that is written at its start)."""
    tokens, whole = tokenizer.encode(text, special=False), tokenizer.encode(text)
    begin = whole[:1] if len(whole) > len(tokens) and whole[1 : len(tokens) + 1] == tokens else []
    return begin, tokens[1:] if begin and tokens[:1] == begin else tokens


def _score(session: Session, reference: Reference | None, seen: list[int], first: int, scores: _Scores) -> None:
    """Score the tokens of a window from seen[first] on. Row i of the logits predicts seen[i + 1]."""
    if reference is not None:
        reference.begin()
    row = 0
    for ours in session.logits_in_parts(seen[:-1]):
        end = row + len(ours)
        theirs = None if reference is None else reference.logits(seen[row:end])
        skip = max(0, first - 1 - row)
        scores.add(seen[row + 1 : end + 1][skip:], ours[skip:], None if theirs is None else theirs[skip:])
        row = end


class _Scores:
    """What is known of each scored token."""

    def __init__(self) -> None:
        self._nats: list[F64] = []
        self._reference_nats: list[F64] = []
        self._kl: list[F64] = []
        self._agree: list[NDArray[np.bool_]] = []

    def add(self, targets: Sequence[int], ours: F32, theirs: F32 | None) -> None:
        """Rows of logits and the tokens that they should predict."""
        for i in range(0, len(targets), BLOCK_ROWS):
            rows = slice(i, i + BLOCK_ROWS)
            chosen = np.array(targets[rows])[:, None]
            build = _log_softmax(ours[rows])
            self._nats.append(-np.take_along_axis(build, chosen, 1)[:, 0])
            if theirs is None:
                continue
            exact = _log_softmax(theirs[rows])
            self._reference_nats.append(-np.take_along_axis(exact, chosen, 1)[:, 0])
            self._kl.append((np.exp(exact) * (exact - build)).sum(axis=1))
            self._agree.append(build.argmax(axis=1) == exact.argmax(axis=1))

    def summary(self, text_bytes: int, window: int) -> Evaluation:
        nats = np.concatenate(self._nats)
        if not np.isfinite(nats).all():
            raise KogcError("the build's logits are not all finite numbers: the weights, or the kernel, are broken")
        mean, total = float(nats.mean()), float(nats.sum())
        return Evaluation(
            tokens=len(nats),
            bytes=text_bytes,
            window=window,
            stride=window // 2,
            nats_per_token=mean,
            perplexity=math.exp(min(mean, MOST_NATS)),
            bits_per_byte=total / math.log(2) / max(text_bytes, 1),
            divergence=self._divergence() if self._kl else None,
        )

    def _divergence(self) -> Divergence:
        kl = np.concatenate(self._kl)
        p50, p90, p99 = (float(q) for q in np.quantile(kl, (0.5, 0.9, 0.99)))
        return Divergence(
            mean=float(kl.mean()),
            p50=p50,
            p90=p90,
            p99=p99,
            max=float(kl.max()),
            top1_agreement=float(np.concatenate(self._agree).mean()),
            reference_nats_per_token=float(np.concatenate(self._reference_nats).mean()),
        )


def _log_softmax(logits: F32) -> F64:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    out: F64 = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return out
