"""The process that renders chat templates: untrusted programs, in a sandbox, under limits of time and memory.

Lines of JSON on standard input: {"template": text, "variables": object}; on standard output, for each, {"text": text}
or {"error": line}. The first line out is {} and says that it is ready. See chat.py for the other end.
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

CPU_SECONDS = 2  # of one rendering; the system counts whole ones, so it may be one more
MEMORY_BYTES = 512 << 20  # of address space
OUTPUT_CHARACTERS = 1 << 23
ERROR_CHARACTERS = 200
OPEN_FILES = 16


def main() -> None:
    """Answer requests until standard input ends."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _answer({})
    for line in sys.stdin:
        _limit_time()
        _answer(respond(json.loads(line)))


def respond(request: dict[str, Any]) -> dict[str, str]:
    """The answer to one request; whatever goes wrong in a template becomes its `error`."""
    try:
        return {"text": _render(_compile(request["template"]), request["variables"])}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MB of memory"}
    except TemplateSyntaxError as error:
        return {"error": _line(f"line {error.lineno}: {error.message}")}
    except TemplateError as error:
        return {"error": _line(error.message or type(error).__name__)}
    except Exception as error:
        return {"error": _line(f"{type(error).__name__}: {error}")}


def _render(template: Template, variables: dict[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        length += len(piece)
        if length > OUTPUT_CHARACTERS:
            raise TemplateError(f"its text is longer than {OUTPUT_CHARACTERS} characters")
    return "".join(pieces)


@functools.lru_cache(maxsize=4)
def _compile(template: str) -> Template:
    """As Transformers sets Jinja up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=PlainNamespace, dict=PlainDict()
    )
    return environment.from_string(template)


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; here its body is just part of the text."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore, which could reach into Python."""

    def __init__(self, /, *args: Any, **values: Any) -> None:
        values = dict(*args, **values)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


class PlainDict:
    """In place of the class `dict`, whose other attributes a template has no business with."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _line(text: str) -> str:
    return " ".join(text[: 4 * ERROR_CHARACTERS].split())[:ERROR_CHARACTERS]


def _answer(answer: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


def _limit(kind: int, most: int) -> None:
    """Lower a limit for good."""
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _limit_time() -> None:
    """The system ends this process when one rendering takes too long, even where nobody waits for it any more."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time()) + 1 + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
