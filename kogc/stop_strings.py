"""Stop strings: text that ends a generation, found in text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string. What may yet become one is held back until that is decided.

    The first is the one that is complete first; of those complete at the same character, the longest. So the result
    depends on the text alone, not on how it is cut into pieces.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """ValueError for an empty string, which would stop everything."""
        if not all(strings):
            raise ValueError("a stop string is empty")
        self._strings = tuple(strings)
        self._longest = max(map(len, self._strings), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain now: all of it before a stop string, nothing once one has come (`stopped`)."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._strings if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        certain = min(found)[1] if found else len(text) - self._undecided(text)
        self._held = "" if found else text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text held back, at the end of the generation: it became no stop string."""
        text, self._held = self._held, ""
        return text

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._strings):
                return length
        return 0
