"""Which tokens the KV cache on the device holds, so that a prompt that begins with them is not run a second time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from .errors import KogcError


class PrefixCache:
    """The tokens whose keys and values surely stand at positions 0, 1, ... of the device's KV cache.

    Launches take it in turn: a second one is refused (KogcError) while one is under way. It is empty from the start
    of a launch, and is written when that ends in order; so whatever else happens, nothing false is remembered.

    in_passes: prompts go through the model in passes of many tokens, which add up in another order than a token by
    itself. A later prompt may then only build on what passes have left, so that it gets the bits of a cold start.
    """

    def __init__(self, in_passes: bool = False) -> None:
        self._in_passes = in_passes
        self._tokens: tuple[int, ...] = ()
        self._lock = threading.Lock()
        self._forgotten = 0

    def forget(self) -> None:
        """Know nothing, not even what a launch that is under way will have left behind."""
        self._tokens = ()
        self._forgotten += 1

    @contextlib.contextmanager
    def continuing(self, prompt: tuple[int, ...], made: Sequence[int]) -> Iterator[int]:
        """Around a launch that continues `prompt`; `made` are, at its end, the tokens that the reader has seen.

        Yields where the launch may start. The last token of the prompt is always run, for its logits.
        """
        with self._taken() as known:
            epoch = self._forgotten
            start = min(shared_length(known, prompt), len(prompt) - 1)
            try:
                yield start
            except GeneratorExit:  # the reader closed the stream: as orderly an end as any
                self._remember(self._run(prompt, made), epoch)
                raise
            self._remember(self._run(prompt, made), epoch)

    @contextlib.contextmanager
    def rewriting(self, tokens: tuple[int, ...]) -> Iterator[None]:
        """Around launches that run all of `tokens` from position 0, one by one."""
        with self._taken():
            epoch = self._forgotten
            yield
            if not self._in_passes:
                self._remember(tokens, epoch)

    @contextlib.contextmanager
    def _taken(self) -> Iterator[tuple[int, ...]]:
        if not self._lock.acquire(blocking=False):
            raise KogcError("this session is already generating: finish or close that stream first")
        try:
            known, self._tokens = self._tokens, ()
            yield known
        finally:
            self._lock.release()

    def _run(self, prompt: tuple[int, ...], made: Sequence[int]) -> tuple[int, ...]:
        """The tokens that surely went through the model, as a prompt of them would.

        A token is chosen from the pass over the one before it, so all but the last one seen were run; where none was
        seen, the prompt need not have been. The kernel may have gone further than the reader saw: that is left out.
        """
        if not made:
            return ()
        return prompt[:-1] if self._in_passes else (*prompt, *made[:-1])

    def _remember(self, tokens: tuple[int, ...], epoch: int) -> None:
        if epoch == self._forgotten:
            self._tokens = tokens


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common from the first on."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
