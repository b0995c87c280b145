"""Several continuations of a prompt in one launch, on a GPU whose plan has a kernel for them."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ..plan.samples import COLUMNS, own_pages, page_bytes
from . import LINE, Request, Runtime, tokens_of, written
from .args import SampleArgs, bias_words, sample_args
from .gpu import SAMPLES, GpuRuntime


class SampleWords:
    """The words of a launch of samples: a stop word each, and a ring of tokens each (-1: not yet written)."""

    def __init__(self, buffer: Any, n: int, ring: int) -> None:
        words: NDArray[np.int32] = np.frombuffer(buffer, np.int32, self.bytes(n, ring) // 4)
        self.stop_words = words[:n]
        self.rings = words[LINE // 4 :].reshape(n, ring)
        self.stop_words[:] = 0
        self.rings[:] = -1

    @staticmethod
    def bytes(n: int, ring: int) -> int:
        return LINE + 4 * n * ring

    @staticmethod
    def pointers(base: int) -> dict[str, int]:
        return {"stop_words": base, "tokens": base + LINE}


class SamplesRuntime(GpuRuntime):
    """See GpuRuntime. Made also for a plan without such a kernel: ask `making_samples`."""

    _many: SampleWords | None = None  # of the launch under way

    def samples(self, request: Request, n: int) -> Generator[tuple[int, int], None, None]:
        """Launch n continuations of a prompt together, and yield (sample, token) as tokens are made.

        1 to 16, or ValueError. Sample i draws with the request's seed + i. `end_sample` ends one
        of them, closing the iterator all. Logits that are asked for are those of the tokens made: see `sample_logits`.
        """
        if not 1 <= n <= COLUMNS:
            raise ValueError(f"{n} samples: a kernel makes 1 to {COLUMNS} together")
        with self._taken():
            with self._opened():
                self._many, more = self._share_samples(n, request.max_new)
                sampling, pointers = self._prepared(request, n)
                start, history = request.start + len(request.prompt) - 1, len(request.history)
                args = sample_args(
                    pointers | more, n, own_pages(start, request.max_new), request.start, request.max_new, request.stop,
                    sampling, history,
                )  # fmt: skip
                args.n_prompt = len(request.prompt)
                self._launch_samples(args, tokens_of(request), request.logits, bias_words(sampling))
            yield from self._follow_samples(self._many.rings)

    def end_sample(self, sample: int) -> None:
        """End one sample of the launch under way, within a token."""
        with self._opened():
            if self._many is not None:
                self._many.stop_words[sample] = 1

    def _tell_to_stop(self) -> None:
        super()._tell_to_stop()
        if self._many is not None:
            self._many.stop_words[:] = 1

    def sample_logits(self, n: int, max_new: int) -> NDArray[np.float32]:
        """The logits from which the last launch of n samples chose its tokens: float32[max_new][n][vocab]."""
        return self._read_logits(max_new * n).reshape(max_new, n, -1)

    def _follow_samples(self, rings: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
        made = [0] * len(rings)
        while True:
            with self._opened():
                done = self._ended()  # asked before the rings are read: see _follow
                new = [written(ring[made[sample] :]) for sample, ring in enumerate(rings)]
            for sample, tokens in enumerate(new):
                made[sample] += len(tokens)
                yield from ((sample, token) for token in tokens)
            if done:
                return
            time.sleep(self.poll_seconds)

    def _share_samples(self, n: int, max_new: int) -> tuple[SampleWords, dict[str, int]]:
        """The words of a launch of n samples, and the addresses of all that only such a launch needs."""
        self._many = None  # its memory may go
        buffer, there = self._share("samples", SampleWords.bytes(n, max_new))
        return SampleWords(buffer, n, max_new), SampleWords.pointers(there)

    def _launch_samples(
        self, args: SampleArgs, prompt: NDArray[np.int32], logits: bool, bias: NDArray[np.int32]
    ) -> None:
        """Start a launch of samples, the prompt before its last token first. See _launch."""
        driver, plan, cut = self._driver, self.plan, self.plan.samples
        assert cut
        driver.use()
        n = args.n_samples
        args.pages = self._grow("pages", n * args.n_pages * page_bytes(plan), f"{n} samples of {args.max_new} tokens")
        args.choices = self._grow("choices", n * cut.choice.bytes, f"{n} samples") if args.choice else 0
        args.logits_log = self._logits_buffer(args.max_new * n) if logits else 0
        scratch = self._grow("samples", cut.scratch_bytes, "samples")
        self._give(args, prompt, bias)
        driver.clear(scratch, cut.scratch_bytes, self._stream)
        if args.choice:
            driver.clear(args.choices, n * cut.choice.bytes, self._stream)
        with self._timed():
            if args.n_prompt > 1:
                self._start_passes(args)
            args.scratch = scratch
            self._start(SAMPLES, cut.threads, cut.memory_bytes, args)


def making_samples(runtime: Runtime) -> SamplesRuntime:
    """The runtime as one that makes samples together. ValueError where its plan has no kernel for them."""
    if runtime.plan.samples is None:
        raise ValueError(f"{runtime.plan.spec.name} on {runtime.plan.profile.name} makes samples one after the other")
    return cast(SamplesRuntime, runtime)
