"""Perplexity and divergence: what is scored, with what before it, and that the numbers are those of the definitions."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_checkpoint
from builds import kogc_cli, one_line

import kogc
from kogc.build import BuildOptions, build
from kogc.errors import KogcError
from kogc.evaluate import F32, evaluate, windows
from kogc.session import Session
from kogc.targets.detect import detect_cpu_profile

TEXT = "def f(x):\n    return x  # naïve 🙂\n" * 8
BEGIN = 1


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def checkpoint(home: Path) -> Path:
    return random_checkpoint.make(home, "mistral", tokenizer=True, sliding_window=41)


@pytest.fixture(scope="module")
def artifact(home: Path, checkpoint: Path) -> Path:
    build(str(checkpoint), detect_cpu_profile(), home / "artifact", BuildOptions(max_context=256))
    return home / "artifact"


@pytest.fixture(scope="module")
def session(artifact: Path) -> Iterator[Session]:
    with kogc.load(artifact) as opened:
        yield opened


@pytest.fixture
def plain(session: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """The session, with a tokenizer that sets no begin token."""
    encode = session.tokenizer.encode  # type: ignore[union-attr]
    monkeypatch.setattr(session.tokenizer, "encode", lambda text, special=True: encode(text, special=False))
    return session


def log_softmax(row: Any) -> Any:
    row = row.astype(np.float64)
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


class Fed:
    """A reference that answers from a table of whole sequences, and sees that it is fed as it should be."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.sequences: list[list[int]] = []

    def begin(self) -> None:
        self.sequences.append([])

    def logits(self, tokens: Sequence[int]) -> F32:
        self.sequences[-1] += tokens
        rows: F32 = self.answer(self.sequences[-1])[-len(tokens) :]
        return rows


# --- windows ----------------------------------------------------------------------------------------------------------


def test_windows_score_every_token_once_with_half_a_window_before_it() -> None:
    rng = random.Random(0)
    for _ in range(500):
        window, begin = rng.randint(2, 40), rng.randint(0, 1)
        count, size, first = rng.randint(2, 200), window - begin, 1 - begin
        scored = []
        for place in windows(count, size, window // 2, first):
            assert place.end - place.begin <= size
            assert place.scored - place.begin + begin >= 1, "something predicts the first scored token"
            if place.begin:
                assert place.scored - place.begin + begin >= window // 2
            scored += range(place.scored, place.end)
        assert scored == list(range(first, count))


def test_numbers_are_those_of_the_definition(session: Session) -> None:
    """A window is the begin token and the text from there; the last half of it is scored."""
    assert session.tokenizer is not None
    tokens, window = session.tokenizer.encode(TEXT, special=False), 50
    nats = []
    for i, token in enumerate(tokens):
        start = 0 if i < window - 1 else (i - (window - 1)) // (window // 2) * (window // 2) + window // 2
        nats.append(-log_softmax(session.logits([BEGIN, *tokens[start:i]])[-1])[token])
    result = evaluate(session, TEXT, window=window)
    assert (result.tokens, result.bytes) == (len(tokens), len(TEXT.encode()))
    assert (result.window, result.stride, result.divergence) == (50, 25, None)
    assert result.nats_per_token == pytest.approx(np.mean(nats), rel=1e-9)
    assert result.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-9)
    assert result.bits_per_byte == pytest.approx(np.sum(nats) / math.log(2) / len(TEXT.encode()), rel=1e-9)


def test_a_begin_token_that_the_text_has_is_that_of_the_windows(session: Session) -> None:
    """As the text of a chat template has one."""
    assert evaluate(session, "<s>" + TEXT, window=50) == evaluate(session, TEXT, window=50)


def test_without_a_begin_token_the_first_is_not_scored(plain: Session) -> None:
    assert plain.tokenizer is not None
    tokens = plain.tokenizer.encode(TEXT)[:20]
    logits = plain.logits(tokens)
    nats = [-log_softmax(logits[i])[tokens[i + 1]] for i in range(19)]
    result = evaluate(plain, TEXT, limit=20)
    assert (result.tokens, result.bytes) == (19, len(TEXT[1:20].encode()))
    assert result.nats_per_token == pytest.approx(np.mean(nats), rel=1e-9)


def test_launches_do_not_show(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = Fed(lambda seen: np.sin(np.outer(np.arange(len(seen)), np.arange(331))).astype(np.float32))
    whole = evaluate(session, TEXT, window=60, reference=reference)
    fed, reference.sequences = reference.sequences, []
    monkeypatch.setattr("kogc.session.LOGIT_POSITIONS", 7)
    assert evaluate(session, TEXT, window=60, reference=reference) == whole
    assert reference.sequences == fed
    assert all(sequence[0] == BEGIN and len(sequence) <= 59 for sequence in fed)


# --- divergence -------------------------------------------------------------------------------------------------------


def test_divergence_from_itself_is_zero(session: Session, artifact: Path) -> None:
    with kogc.load(artifact) as other:
        result = evaluate(session, TEXT, window=60, reference=Fed(other.logits))
    assert result.divergence is not None
    assert (result.divergence.mean, result.divergence.max, result.divergence.top1_agreement) == (0, 0, 1)
    assert result.divergence.reference_nats_per_token == result.nats_per_token


def test_divergence_is_that_of_the_definition(session: Session, artifact: Path) -> None:
    assert session.tokenizer is not None
    tokens = [BEGIN, *session.tokenizer.encode(TEXT, special=False)[:30]]
    ours = [log_softmax(row) for row in session.logits(tokens[:-1])]
    theirs = [log_softmax(1.5 * row[::-1]) for row in session.logits(tokens[:-1])]
    with kogc.load(artifact) as other:
        answer = Fed(lambda seen: 1.5 * other.logits(seen)[:, ::-1])
        result = evaluate(session, TEXT, limit=30, reference=answer).divergence
    assert result is not None
    kl = [float((np.exp(q) * (q - p)).sum()) for p, q in zip(ours, theirs, strict=True)]
    assert result.mean == pytest.approx(np.mean(kl), rel=1e-6)
    assert result.max == pytest.approx(max(kl), rel=1e-6)
    assert [result.p50, result.p90, result.p99] == pytest.approx(list(np.quantile(kl, [0.5, 0.9, 0.99])), rel=1e-6)
    agree = [p.argmax() == q.argmax() for p, q in zip(ours, theirs, strict=True)]
    assert result.top1_agreement == np.mean(agree) < 1
    nats = [-q[token] for q, token in zip(theirs, tokens[1:], strict=True)]
    assert result.reference_nats_per_token == pytest.approx(np.mean(nats), rel=1e-6)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text"


def test_a_build_is_close_to_transformers(artifact: Path, checkpoint: Path, text: Path) -> None:
    done = kogc_cli("eval", artifact, "--text", text, "--reference", checkpoint, "--limit", 200, "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["tokens"], data["window"], data["stride"]) == (200, 256, 128)
    kl = data["divergence"]
    assert 0 < kl["p50"] <= kl["p90"] <= kl["p99"] <= kl["max"] < 5e-3
    assert kl["mean"] < 5e-4
    assert kl["top1_agreement"] > 0.95
    assert kl["reference_nats_per_token"] == pytest.approx(data["nats_per_token"], abs=0.01)


def test_another_model_is_far(artifact: Path, home: Path, text: Path) -> None:
    other = random_checkpoint.make(home, "mistral", seed=1)
    done = kogc_cli("eval", artifact, "--text", text, "--reference", other, "--limit", 50, "--json")
    kl = json.loads(done.stdout)["divergence"]
    assert kl["p50"] > 0.1
    assert kl["top1_agreement"] < 0.5


def test_windows_of_transformers_are_ours(artifact: Path, checkpoint: Path, text: Path) -> None:
    """Several windows, and a sliding window of attention that is shorter than they are."""
    args = ("--reference", checkpoint, "--window", 90)
    done = kogc_cli("eval", artifact, "--text", text, *args)
    assert done.exit_code == 0, done.output
    first, second, third, *_ = done.stdout.splitlines()
    assert first.endswith("windows of 90, stride 45")
    assert "perplexity" in second
    assert float(third.split("mean ")[1].split()[0]) < 5e-4


def test_text_from_stdin_is_predicted(artifact: Path, text: Path) -> None:
    from click.testing import CliRunner

    from kogc.cli import cli

    piped = CliRunner().invoke(cli, ["eval", str(artifact), "--text", "-"], input=text.read_bytes())
    assert piped.stdout == kogc_cli("eval", artifact, "--text", text).stdout
    assert len(piped.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ((), 2, "Missing option '--text'"),
        (("--text", "TEXT", "--window", 257), 1, "a window of 257 tokens: must be 2 to the artifact's context of 256"),
        (("--text", "TEXT", "--window", 1), 2, "'--window'"),
        (("--text", "no/such"), 1, "no/such: No such file or directory"),
        (("--text", "EMPTY"), 1, "the text is too short: it has no token to predict"),
        (("--text", "TEXT", "--reference", "no/such"), 1, "--reference no/such: not a checkpoint directory"),
        (("--text", "TEXT", "--reference", "BROKEN"), 1, "Transformers does not load it: "),
        (("--text", "TEXT", "--reference", "OTHER"), 1, "a vocabulary of 300 tokens, the artifact one of 331"),
    ],
)
def test_bad_input_is_one_line(
    artifact: Path, text: Path, tmp_path: Path, args: tuple[object, ...], status: int, message: str
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    named: dict[object, object] = {"TEXT": text, "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    if "OTHER" in args:
        named["OTHER"] = random_checkpoint.make(tmp_path, "mistral", vocab_size=300)
    result = kogc_cli("eval", artifact, *(named.get(arg, arg) for arg in args))
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert message in one_line(result.stderr)


def test_what_is_missing_is_named(
    artifact: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    line = one_line(kogc_cli("eval", artifact, "--text", text, "--reference", checkpoint).stderr)
    assert "--reference needs torch and transformers (install kogc[eval])" in line
    assert kogc_cli("eval", artifact, "--text", text, "--limit", 5).exit_code == 0


def test_an_artifact_without_tokenizer_is_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "tokenizer", None)
    with pytest.raises(KogcError, match="no tokenizer: a text cannot be evaluated"):
        evaluate(session, TEXT)


def test_logits_that_are_no_numbers_are_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [np.full((3, 331), np.nan, np.float32)]
    monkeypatch.setattr(session, "logits_in_parts", lambda tokens: iter(broken))
    with pytest.raises(KogcError, match="logits are not all finite"):
        evaluate(session, TEXT, limit=3)
