"""A loaded artifact: generate, stream, conversations, and teacher-forced logits.

Needs numpy, tokenizers and (for a GPU) cuda-bindings; nothing of the compiler.
"""

from __future__ import annotations

import operator
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from .artifact import GENERATION_CONFIG, TOKENIZER, read_manifest
from .errors import KogcError
from .plan.plan import Plan
from .plan.samples import COLUMNS as MOST_SAMPLES
from .prefix_cache import PrefixCache
from .runtime import Request, Runtime, open_runtime
from .runtime.args import STOP_TOKENS, Logprobs
from .runtime.program import open_program
from .runtime.samples import making_samples
from .sampling import GREEDY, SEEDS, Sampling, sampling_from_config
from .spec import ModelSpec
from .stop_strings import StopStrings

if TYPE_CHECKING:
    from .chat import ChatTemplate, Message
    from .tokenizer import Tokenizer

DEFAULT_NEW_TOKENS = 256
CONTEXT_TOKENS = 32  # of the prompt that the text of the first new token may depend on
LOGIT_POSITIONS = 512  # of one launch
LOGIT_BYTES = 128 << 20  # of one launch's buffer on the device

FinishReason = Literal["stop", "length", "context", "closed"]


@dataclass(frozen=True)
class Piece:
    """A generated token, and the text that it completes (possibly empty); log-probabilities where asked for."""

    token: int
    text: str
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Generation:
    """A finished continuation. tokens includes what stopped it (a token, the tokens of a string), text does not.

    seconds: on the device, with what was run of the prompt. cached_tokens: how many tokens of the prompt were not run,
    because the KV cache held them. finish_reason: stop (a stop token or string came), length (max_new_tokens are
    made), context (the artifact's limit came), closed (the reader ended the stream, or it has not ended yet).
    """

    tokens: list[int]
    text: str
    prompt_tokens: int
    seconds: float
    finish_reason: FinishReason
    cached_tokens: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)  # one a token, where asked for


def load(
    path: str | os.PathLike[str], device: int = 0, *, oversubscribe: bool = False, sampling: Sampling | None = None
) -> Session:
    """Open an artifact directory on GPU number `device`, or on this machine's CPU if it was built for one.

    The artifact and the machine are checked before anything large is allocated. KogcError says what to rebuild.
    oversubscribe (CPU): allow more blocks than cores, at a fraction of the speed.
    sampling: how tokens are chosen where a call does not say; None: as the model's generation_config.json asks.
    """
    device, directory = _integer(device, "device"), Path(path)
    manifest = read_manifest(directory)
    if sampling is None:
        config = directory / GENERATION_CONFIG
        sampling = sampling_from_config(config) if config.is_file() else GREEDY
    with open_program(directory, manifest) as program:
        runtime = open_runtime(program, device, oversubscribe=oversubscribe)
    try:
        tokenizer = _open_tokenizer(directory)
        if read_manifest(directory) != manifest:  # what was opened may be of either
            raise KogcError(f"{directory}: was replaced while it was loaded: load it again")
    except BaseException:
        runtime.close()
        raise
    return Session(runtime, tokenizer, manifest.stop_tokens, directory, sampling)


def _open_tokenizer(directory: Path) -> Tokenizer | None:
    if not (directory / TOKENIZER).is_file():
        return None
    from .tokenizer import Tokenizer

    return Tokenizer(directory)


class Session:
    """One model on one device. One generation at a time.

    The KV cache stays from one to the next: a prompt that begins as the last one and its continuation did is run from
    where they differ. The result is that of a cold start, to the bit.
    """

    def __init__(
        self,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        stop_tokens: Sequence[int],
        directory: Path | None = None,
        sampling: Sampling = GREEDY,
    ) -> None:
        """directory: where the chat template is, if there is one. sampling: how tokens are chosen by default."""
        self.sampling = sampling
        self.tokenizer = tokenizer
        self.stop_tokens = tuple(stop_tokens)
        self._runtime = runtime
        self._directory = directory
        self._chat: ChatTemplate | None = None
        self._cached = PrefixCache(in_passes=runtime.plan.passes is not None)

    @property
    def runtime(self) -> Runtime:
        """What a session does not offer. Whoever asks may write the KV cache, so what it holds is forgotten here.

        After launches of your own that follow a generation, call `reset`.
        """
        self._cached.forget()
        return self._runtime

    @property
    def plan(self) -> Plan:
        return self._runtime.plan

    @property
    def spec(self) -> ModelSpec:
        return self.plan.spec

    @property
    def max_context(self) -> int:
        """Tokens of prompt and continuation together."""
        return self.plan.max_context

    @property
    def chat_template(self) -> ChatTemplate:
        """The checkpoint's chat template; KogcError where the artifact has none."""
        if self._chat is None:
            if self._directory is None:
                raise KogcError("this session was not loaded from a directory: it has no chat template")
            from .chat import ChatTemplate

            self._chat = ChatTemplate(self._directory)
        return self._chat

    def chat_tokens(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """The prompt of a conversation, for `generate` and `stream`. See `ChatTemplate.render` for the arguments.

        A control token that is written in a message is that token, as it is for Transformers.
        """
        text = self.chat_template.render(messages, add_generation_prompt)
        return self._text_tokenizer().encode(text, special=False)  # the template wrote the begin token itself

    def reset(self) -> None:
        """Forget what the KV cache holds: the next generation starts from position 0."""
        self._cached.forget()

    def generate(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[int] | None = None,
        *,
        stop_strings: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Generation:
        """Continue a text, or token ids as they are. See `stream` for the arguments."""
        return self.stream(prompt, max_new_tokens, stop, stop_strings=stop_strings, sampling=sampling).finish()

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[int] | None = None,
        *,
        stop_strings: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> Stream:
        """Yield each token with its text as it is made; closing the stream early ends the kernel.

        stop: token ids that end the continuation (at most 16); None: the model's own; (): none. stop_strings: texts
        that end it; the one that comes is not given, and what may become one is given as soon as it is decided.
        sampling: how tokens are chosen; None: the session's own way.
        KogcError for an empty prompt of a model without a begin token, for token ids outside the vocabulary, for
        a prompt that leaves no room in the context, and for stop strings that are empty or without a tokenizer.
        """
        request, at_limit = self._request(prompt, max_new_tokens, stop, sampling)
        return Stream(self, request, self._stop_strings(stop_strings), at_limit)

    def generate_many(
        self,
        prompt: str | Sequence[int],
        n: int,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: Sequence[int] | None = None,
        *,
        stop_strings: Sequence[str] = (),
        sampling: Sampling | None = None,
    ) -> list[Generation]:
        """n continuations of a prompt, 1 to 16 of them; see `stream` for the arguments. Sample i draws with seed + i.

        Where the build has samples (`plan.samples`) they are made together: they share the prompt's keys and values and
        every reading of the weights, and what each of them is does not depend on the others, to the bit. Elsewhere
        (CPU, AMD GPUs, FP16 weights) they are made one after the other, each from the prompt that the first has left in
        the cache. seconds of each Generation: what all took together.
        """
        count = _integer(n, "n")
        if not 1 <= count <= MOST_SAMPLES:
            raise KogcError(f"n: {count} is not from 1 to {MOST_SAMPLES}")
        request, at_limit = self._request(prompt, max_new_tokens, stop, sampling)
        if request.sampling.seed is None and not request.sampling.greedy:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbelow(SEEDS)))
        stops = [self._stop_strings(stop_strings) for _ in range(count)]
        if self.plan.samples is not None:
            return Samples(self, request, stops, at_limit).run()
        streams = [Stream(self, _drawn_with(request, i), own, at_limit) for i, own in enumerate(stops)]
        made = [stream.finish() for stream in streams]
        return [replace(one, seconds=sum(other.seconds for other in made)) for one in made]

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits: row i, float32[vocab], is what follows token_ids[: i + 1]. Shape [n, vocab]."""
        parts = self.logits_in_parts(token_ids)
        out = np.empty((len(token_ids), self.spec.vocab), np.float32)
        row = 0
        for part in parts:
            out[row : row + len(part)] = part
            row += len(part)
        return out

    def logits_in_parts(self, token_ids: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        """The rows of `logits` in order, a launch's worth at a time: all of them may be more than memory holds.

        A part is good until the next is asked for. No other launch is possible before all are read, or given up.
        """
        tokens = self._ids(token_ids, "token_ids")
        if not tokens:
            raise KogcError("token_ids: empty")
        if len(tokens) > self.max_context:
            raise KogcError(f"token_ids: {len(tokens)} tokens, the context holds {self.max_context}")
        return self._launch_logits(tokens)

    def _launch_logits(self, tokens: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
        step = max(1, min(LOGIT_POSITIONS, LOGIT_BYTES // (4 * self.spec.vocab)))
        with self._cached.rewriting(tokens):
            for start in range(0, len(tokens), step):
                result = self._runtime.run(Request(tokens[start : start + step], start, logits=True))
                assert result.logits is not None
                yield result.logits

    def close(self) -> None:
        """Stop what runs and free the device; a second call does nothing."""
        if self._chat is not None:
            self._chat.close()
        self._runtime.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self, prompt: str | Sequence[int], max_new_tokens: int, stop: Sequence[int] | None, sampling: Sampling | None
    ) -> tuple[Request, FinishReason]:
        """What to launch, from the prompt's first token, and how a continuation of full length has ended."""
        tokens = self._prompt(prompt)
        room = self.max_context - len(tokens)
        if room < 1:
            raise KogcError(f"the prompt has {len(tokens)} tokens, the context {self.max_context}: no room to continue")
        wanted = _integer(max_new_tokens, "max_new_tokens")
        if wanted < 1:
            raise KogcError(f"max_new_tokens: {wanted} must be at least 1")
        stops = self.stop_tokens if stop is None else self._ids(stop, "stop")
        if len(stops) > STOP_TOKENS:
            raise KogcError(f"stop: {len(stops)} tokens, the kernel watches for at most {STOP_TOKENS}")
        chosen = self.sampling if sampling is None else sampling
        if not isinstance(chosen, Sampling):
            raise KogcError(f"sampling: {chosen!r} is not a kogc.sampling.Sampling")
        chosen.check_tokens(self.spec.vocab)
        request = Request(tokens, 0, min(wanted, room), stops, sampling=chosen)
        return request, "context" if wanted > room else "length"

    def _prompt(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            prompt = self._text_tokenizer().encode(prompt)
        tokens = self._ids(prompt, "prompt")
        if tokens:
            return tokens
        if self.spec.bos_token is None:
            raise KogcError("the prompt is empty, and the model has no begin-of-text token to start from")
        return (self.spec.bos_token,)

    def _text_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise KogcError("this artifact has no tokenizer: give the prompt as token ids")
        return self.tokenizer

    def _stop_strings(self, values: Sequence[str]) -> StopStrings:
        many = isinstance(values, Sequence) and not isinstance(values, str)
        if not many or not all(isinstance(value, str) for value in values):
            raise KogcError("stop_strings: expected a sequence of strings")
        if not all(values):
            raise KogcError("stop_strings: a string is empty")
        if values and self.tokenizer is None:
            raise KogcError("stop_strings: this artifact has no tokenizer, so a continuation has no text")
        return StopStrings(values)

    def _ids(self, values: Sequence[int], what: str) -> tuple[int, ...]:
        """Checked token ids as plain integers."""
        try:
            tokens = tuple(operator.index(value) for value in values)
        except TypeError:
            raise KogcError(f"{what}: token ids must be integers") from None
        for token in tokens:
            if not 0 <= token < self.spec.vocab:
                raise KogcError(f"{what}: token {token} is outside the vocabulary (0 to {self.spec.vocab - 1})")
        return tokens


class Text:
    """The text of a continuation, token by token, up to a stop string; nothing where there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, prompt: tuple[int, ...], stop: StopStrings) -> None:
        self._decoder = tokenizer.stream(prompt[-CONTEXT_TOKENS:]) if tokenizer else None
        self._stop = stop

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stop.stopped

    def add(self, token: int, stopped: bool, last: bool) -> str:
        """What a token adds to the text: nothing if it `stopped` the generation; with the last, all that waited."""
        if self._decoder is None:
            return ""
        text = "" if stopped else self._decoder.push(token)
        if not last:
            return self._stop.push(text)
        # Bytes of a character that is never finished, and the beginning of a stop string that never came.
        return self._stop.push(text + self._decoder.finish()) + self._stop.finish()


class Stream(Iterator[Piece]):
    """The pieces of one continuation, in order. After the end (or close) `result` tells how it went."""

    def __init__(self, session: Session, request: Request, stop: StopStrings, at_limit: FinishReason) -> None:
        self.prompt_tokens = len(request.prompt)
        self.cached_tokens = 0  # of the prompt, not run again; known after the first piece
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: FinishReason = "closed"
        self.seconds = 0.0  # on the device; known after the end
        self._runtime = session._runtime
        self._cached = session._cached
        self._text = Text(session.tokenizer, request.prompt, stop)
        self._pieces = self._make(request, at_limit)
        self._refused: KogcError | None = None

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        if self._refused is not None:  # a generator that has raised is at its end, which would look like the text's
            raise self._refused
        try:
            return next(self._pieces)
        except KogcError as error:
            self._refused = error
            raise

    def close(self) -> None:
        """End the kernel, if it still runs, and wait for it."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def finish(self) -> Generation:
        """Read what is left, and tell how it went; an interrupt ends the kernel."""
        with self:
            return self.result("".join(piece.text for piece in self))

    def result(self, text: str) -> Generation:
        return Generation(
            self.tokens, text, self.prompt_tokens, self.seconds, self.finish_reason, self.cached_tokens, self.logprobs
        )

    def _make(self, request: Request, at_limit: FinishReason) -> Generator[Piece, None, None]:
        """Launch when the first piece is asked for: only then is it certain what the cache holds."""
        with self._cached.continuing(request.prompt, self.tokens) as start:
            self.cached_tokens = start
            prompt = request.prompt
            made = self._runtime.tokens(replace(request, prompt=prompt[start:], start=start, history=prompt[:start]))
            try:
                for token in made:
                    logprobs = None
                    if request.sampling.logprobs is not None:
                        logprobs = self._runtime.logprobs(len(self.tokens))
                        self.logprobs.append(logprobs)
                    self.tokens.append(token)
                    stopped = token in request.stop
                    last = len(self.tokens) == request.max_new
                    text = self._text.add(token, stopped, stopped or last)
                    if last:
                        self.finish_reason = at_limit
                    if stopped or self._text.stopped:
                        self.finish_reason = "stop"
                        made.close()  # which tells a kernel that does not know of the string
                    yield Piece(token, text, logprobs)
            finally:
                made.close()
                self.seconds = self._runtime.last_timing / 1e3


class Samples:
    """Several continuations of a prompt in one launch."""

    def __init__(self, session: Session, request: Request, stops: list[StopStrings], at_limit: FinishReason) -> None:
        self._runtime, self._cached, self._request = making_samples(session._runtime), session._cached, request
        self._texts = [Text(session.tokenizer, request.prompt, stop) for stop in stops]
        self._made = [Generation([], "", len(request.prompt), 0.0, at_limit) for _ in stops]
        self._parts: list[list[str]] = [[] for _ in stops]
        self._ended = [False for _ in stops]

    def run(self) -> list[Generation]:
        request, prompt = self._request, self._request.prompt
        with self._cached.continuing(prompt, self._made[0].tokens) as start:
            rest = replace(request, prompt=prompt[start:], start=start, history=prompt[:start])
            for sample, token in self._runtime.samples(rest, len(self._made)):
                self._take(sample, token)
        seconds = self._runtime.last_timing / 1e3
        return [
            replace(one, text="".join(parts), seconds=seconds, cached_tokens=start)
            for one, parts in zip(self._made, self._parts, strict=True)
        ]

    def _take(self, sample: int, token: int) -> None:
        """A token of a sample; what the kernel makes before it hears of a stop string is left out."""
        if self._ended[sample]:
            return
        request, made, text = self._request, self._made[sample], self._texts[sample]
        if request.sampling.logprobs is not None:
            made.logprobs.append(self._runtime.logprobs(sample * request.max_new + len(made.tokens)))
        made.tokens.append(token)
        stopped = token in request.stop
        self._parts[sample].append(text.add(token, stopped, stopped or len(made.tokens) == request.max_new))
        if stopped or text.stopped:
            self._ended[sample] = True
            self._made[sample] = replace(made, finish_reason="stop")
            self._runtime.end_sample(sample)


def _integer(value: object, what: str) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise KogcError(f"{what}: {value!r} is not an integer") from None


def _drawn_with(request: Request, sample: int) -> Request:
    """The request of one sample."""
    seed = request.sampling.seed
    if seed is None:
        return request
    return replace(request, sampling=replace(request.sampling, seed=(seed + sample) % SEEDS))
