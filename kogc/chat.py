"""A checkpoint's chat template: how a conversation becomes the text that its model was trained on.

A template is a program that came with a download. It runs in a process of its own (template_worker.py), in Jinja's
sandbox and under limits of time, memory and output, so that a hostile one can neither reach Python nor hang.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artifact import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKENIZER_CONFIG
from .config_json import MAX_CONFIG_BYTES, read_json
from .errors import KogcError

START_SECONDS = 60.0  # of the process, on a machine that is busy with something else
RENDER_SECONDS = 5.0  # of one rendering, on the clock; its own processor time is limited to less
READ_BYTES = 1 << 16
THOUGHT = ("reasoning_content", "thinking", "reasoning")  # what a model thought before its answer; the first counts

Message = Mapping[str, Any]


class ChatTemplate:
    """The template of a checkpoint or artifact directory: chat_template.jinja, or in tokenizer_config.json.

    KogcError where there is none, or its file is not what it should be. Close it to end the process that renders.
    """

    def __init__(self, directory: str | Path) -> None:
        self.source, self.template, self.special_tokens = _find(Path(directory))
        self._worker: _Worker | None = None
        self._lock = threading.Lock()  # one question at a time

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The text of a conversation: objects of plain JSON values with `role` and `content`, oldest first.

        add_generation_prompt: end with what begins an answer. The text has its begin-of-text token already. KogcError
        for an empty conversation, for one that the template refuses, and for a template that breaks a limit.
        """
        if not messages:
            raise KogcError("the conversation is empty: a chat template needs a message")
        if not all(isinstance(message, Mapping) for message in messages):
            raise KogcError("a message is not an object with role and content")
        # Absent is what templates test for, not null.
        plain = [_named_thought({k: v for k, v in message.items() if v is not None}) for message in messages]
        variables = {
            **self.special_tokens,
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            request = json.dumps({"template": self.template, "variables": variables})
        except (TypeError, ValueError) as error:
            raise KogcError(f"a message holds what is not plain JSON: {error}") from None
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            raise KogcError(f"{self.source}: the chat template failed: {answer['error']}")
        return answer["text"]

    def close(self) -> None:
        """End the process; the next rendering starts another."""
        if self._worker is not None and self._worker.owner == os.getpid():
            self._worker.kill()
        self._worker = None

    def _ask(self, request: str) -> dict[str, str]:
        try:
            if self._worker is None or self._worker.owner != os.getpid():  # it answers the process that started it
                self._worker = _Worker()
            return self._worker.ask(request)
        except TimeoutError:
            self.close()
            raise KogcError(f"{self.source}: the chat template failed: it takes too long") from None
        except OSError:
            self.close()
            raise KogcError(f"{self.source}: the chat template failed: it takes too long or too much memory") from None
        except BaseException:  # between question and answer the process is of no further use
            self.close()
            raise


class _Worker:
    """The process at work. TimeoutError when it does not answer in time, another OSError when it has died."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        code = f"import sys; sys.path[:] = {sys.path!r}; from kogc.template_worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not meant for it
        )
        try:
            self._read(START_SECONDS)
        except BaseException:
            self.kill()
            raise

    def ask(self, request: str) -> dict[str, str]:
        assert self._process.stdin is not None
        self._process.stdin.write(request.encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, str] = json.loads(self._read(RENDER_SECONDS))
        return answer

    def _read(self, seconds: float) -> bytes:
        """The next line."""
        assert self._process.stdout is not None
        pipe, line, deadline = self._process.stdout.fileno(), bytearray(), time.monotonic() + seconds
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise TimeoutError
            piece = os.read(pipe, READ_BYTES)
            if not piece:
                raise BrokenPipeError
            line += piece
        return bytes(line)

    def kill(self) -> None:
        self._process.kill()
        try:
            self._process.communicate()  # waits for it, and closes the pipes
        except OSError:  # what was still to be written has no reader any more
            self._process.wait()


def _named_thought(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose thought, under whichever name it came, has both names that templates read."""
    thought = next((message[name] for name in THOUGHT if name in message), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def _find(directory: Path) -> tuple[Path, str, dict[str, str]]:
    """(file, template, special tokens by their names in a template)."""
    config_path, own_path = directory / TOKENIZER_CONFIG, directory / CHAT_TEMPLATE
    config = read_json(config_path) if config_path.is_file() else {}
    special = _special_tokens(config, config_path)
    map_path = directory / SPECIAL_TOKENS
    if map_path.is_file() and "added_tokens_decoder" not in config:  # as Transformers decides which of the two counts
        mapped = read_json(map_path)
        special = {key: text for key, text in special.items() if key not in mapped}  # a null there removes one
        special.update(_special_tokens(mapped, map_path))
    if own_path.is_file():
        return own_path, _read_text(own_path), special
    value = config.get("chat_template")
    if value is None:
        where = f"neither {CHAT_TEMPLATE} nor chat_template in {TOKENIZER_CONFIG}"
        raise KogcError(f"{directory}: no chat template: {where}")
    return config_path, _default(value, config_path), special


def _default(value: object, path: Path) -> str:
    """The template itself, or of several named ones the one called `default`."""
    if isinstance(value, str):
        return value
    try:
        named = {entry["name"]: entry["template"] for entry in value}  # type: ignore[attr-defined]
    except (TypeError, KeyError):
        named = {}
    default = named.get("default")
    if isinstance(default, str):
        return default
    if not named:
        raise KogcError(f"{path}: chat_template: expected text, or a list of named templates")
    names = ", ".join(map(repr, named))[:200]
    raise KogcError(f"{path}: chat_template: none of {names} is 'default'")


def _special_tokens(config: dict[str, Any], path: Path) -> dict[str, str]:
    """bos_token, eos_token and the like: text, or an object whose `content` is the text."""
    found = {}
    for key in (key for key in config if key.endswith("_token")):
        value = config[key]
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[key] = text
        elif key in ("bos_token", "eos_token") and value is not None:  # others of the kind are flags and counts
            raise KogcError(f"{path}: {key}: expected text")
    return found


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise KogcError(f"{path}: larger than {MAX_CONFIG_BYTES} bytes")
        return data.decode("utf-8")
    except OSError as error:
        raise KogcError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise KogcError(f"{path}: not UTF-8 text") from None
