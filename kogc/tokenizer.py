"""Text to tokens and back, as the checkpoint's tokenizer.json says; and text as it grows, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .config_json import read_json
from .errors import KogcError

FILE = "tokenizer.json"
MOST_WAITING = 64  # tokens without a character at their end: bytes that are none
MOST_BYTES = 4  # of a character in UTF-8
UNKNOWN = "\ufffd"  # what incomplete UTF-8 decodes to


class Tokenizer:
    """The tokenizer of a checkpoint or artifact directory (or the path of its tokenizer.json).

    eos_tokens: the ids that end a generation, from generation_config.json or else config.json; empty if neither says.
    """

    def __init__(self, directory: str | Path) -> None:
        path = Path(directory)
        if path.name != FILE:
            path = path / FILE
        if not path.is_file():
            raise KogcError(f"{path}: missing")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as err:  # the library raises plain Exception
            raise KogcError(f"{path}: not a tokenizer: {' '.join(str(err).split())[:200]}") from err
        # Some files carry settings of a training run, which would cut or pad a prompt.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_tokens = _eos_tokens(path.parent)

    @property
    def size(self) -> int:
        """Number of tokens, added ones included; a model's vocabulary may be larger."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text, with the tokens that the checkpoint puts around one (unless `special` is off).

        KogcError for text that cannot be written as UTF-8, as undecodable bytes of a command line become.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise KogcError("the text is not UTF-8") from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special))

    def is_silent(self, token: int, skip_special: bool = True) -> bool:
        """Whether an id never has a text: it has no token, or a special one that is skipped."""
        if self._tokenizer.id_to_token(token) is None:
            return True
        return skip_special and not self.decode([token]) and bool(self.decode([token], False))

    def stream(self, context: Sequence[int] = (), skip_special: bool = True) -> TextStream:
        """A decoder for tokens that follow `context` (the prompt), whose own text is not given again."""
        return TextStream(self, context, skip_special)


class TextStream:
    """Decodes tokens as they arrive: `push` each, then `finish`. The pieces together are the whole text, once.

    A piece never ends inside a character: what may still change waits for the next token or for `finish`.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = (), skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        # A token's text can depend on its neighbours (a word's space is dropped at the start of a text, bytes join to
        # characters), so new tokens are decoded after those whose text was given last.
        self._known = self._from_a_character(list(context))
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if self._tokenizer.is_silent(token, self._skip_special):
            return ""
        self._new.append(token)
        text = self._text()
        if not text or (text.endswith(UNKNOWN) and len(self._new) < MOST_WAITING):
            return ""
        self._known, self._new = self._new, []
        return text

    def finish(self) -> str:
        """The text of the tokens that still wait, at the end of the generation."""
        text = self._text() if self._new else ""
        self._known, self._new = self._known + self._new, []
        return text

    def _from_a_character(self, tokens: list[int]) -> list[int]:
        """A context without the rest of a character that it was cut off from.

        Where bytes are tokens, a run of them that begins within a character decodes to no character at all.
        """
        for start in range(min(MOST_BYTES, len(tokens))):
            if not self._decode(tokens[start:]).startswith(UNKNOWN):
                return tokens[start:]
        return tokens

    def _text(self) -> str:
        known = self._decode(self._known)
        both = self._decode(self._known + self._new)
        if both.startswith(known):
            return both[len(known) :]
        # A broken byte can spoil the bytes before it, which were given already: take the new tokens alone.
        return self._decode(self._new)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip_special)


def _eos_tokens(directory: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        value: Any = read_json(path).get("eos_token_id")
        if value is None:
            continue
        items = value if isinstance(value, list) else [value]
        if any(type(item) is not int or item < 0 for item in items):
            raise KogcError(f"{path}: eos_token_id: expected a token id or a list of them")
        return tuple(dict.fromkeys(items))
    return ()
