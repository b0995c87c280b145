"""Chat templates: rendered as Transformers renders them, and harmless whatever they hold."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import random_checkpoint
from builds import kogc_cli, stub_compiler
from chat_templates import CHATML, HEADERS, INSTRUCT, TEMPLATES, add_chat_template
from transformers import PreTrainedTokenizerFast

from kogc import chat
from kogc.artifact import verify
from kogc.chat import ChatTemplate
from kogc.errors import KogcError
from kogc.tokenizer import Tokenizer

USER = {"role": "user", "content": "  What is 6 < 7?\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "two turns": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nTrue, naïve 🙂"}, USER],
    "answered": [USER, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes"}],
    "system": [{"role": "system", "content": " Be brief. "}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}],
    "thinking": [USER, {"role": "assistant", "content": "Yes", "thinking": "Hm."}],
    "another name": [USER, {"role": "assistant", "content": "Yes", "reasoning": "Hm.", "thinking": None}],
    "calls": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "é", "arguments": {"a": "<b>"}}}]},
    ],
    "two calls": [{"role": "assistant", "content": "", "tool_calls": [1, 2]}],
    "nothing said": [USER, {"role": "assistant", "content": None}],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    random_checkpoint.write_tokenizer(tmp_path, 331)
    return tmp_path


def render(directory: Path, template: str, messages: list[dict[str, Any]] | None = None, prompt: bool = True) -> str:
    """The text of a template, given as a file of its own."""
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    opened = ChatTemplate(directory)
    try:
        return opened.render(messages or [USER], prompt)
    finally:
        opened.close()


def refused(directory: Path, template: str) -> str:
    with pytest.raises(KogcError, match=r"^[^\n]*chat_template.jinja: the chat template failed: [^\n]+$") as caught:
        render(directory, template)
    assert len(str(caught.value)) < 600
    return str(caught.value)


# --- what it renders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers_does(directory: Path, name: str) -> None:
    add_chat_template(directory, TEMPLATES[name])
    ours = ChatTemplate(directory)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATES[name],
    )
    tokenizer, rendered = Tokenizer(directory), 0
    for messages in CONVERSATIONS.values():
        for prompt in (True, False):
            try:
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            except Exception as error:
                with pytest.raises(KogcError, match=re.escape(str(error)[:60])):
                    ours.render(messages, prompt)
                continue
            assert ours.render(messages, prompt) == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
            assert tokenizer.encode(expected, special=False) == ids
            rendered += 1
    assert rendered >= 4
    ours.close()


def test_a_file_of_its_own_comes_first(directory: Path) -> None:
    add_chat_template(directory, "from the configuration")
    assert ChatTemplate(directory).template == "from the configuration"
    assert render(directory, "{{ bos_token }}from the file{{ eos_token }}") == "<s>from the file</s>"


def test_of_named_templates_the_default_is_taken(directory: Path) -> None:
    named: Any = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    add_chat_template(directory, named)
    assert ChatTemplate(directory).template == "plain"


def test_environment(directory: Path) -> None:
    assert render(directory, "{% if true %}\nx\n  {% endif %}\ny") == "x\ny"
    assert render(directory, "{{ {'a': 'é<&'}|tojson }}") == '{"a": "é<&"}'
    assert render(directory, "{{ dict(a=1) }}{{ dict.fromkeys('b', 2) }}") == "{'a': 1}{'b': 2}"
    assert render(directory, "{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert render(directory, "{{ tools is none }}{{ documents is none }}{{ other is defined }}") == "TrueTrueFalse"
    assert render(directory, "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(b=3) }}") == "2{'b': 3}"


def test_a_process_serves_many_renderings_quickly(directory: Path) -> None:
    add_chat_template(directory, CHATML)
    opened = ChatTemplate(directory)
    opened.render([USER])
    assert opened._worker is not None
    process = opened._worker._process
    before = time.perf_counter()
    for _ in range(100):
        opened.render([USER] * 20)
    assert time.perf_counter() - before < 2
    assert opened._worker._process is process
    opened.close()
    assert process.poll() is not None
    assert opened.render([USER]).endswith("<|im_start|>assistant\n")
    opened.close()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__.json }}",
        "{{ dict.__globals__.json }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'_a': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ ('{0.__class__}').format(1) }}{{ ''['__class__'].x }}",
        "{% include 'tokenizer.json' %}",
        "{% import 'os' as os %}",
    ],
)
def test_python_is_out_of_reach(directory: Path, template: str) -> None:
    refused(directory, template)


def test_private_attributes_have_no_value(directory: Path) -> None:
    text = render(directory, "{{ ('a'|attr('__class__')) }}{{ messages|map(attribute='__class__')|join }}")
    assert "class" not in text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 10) }}",
    ],
)
def test_a_template_cannot_hang(directory: Path, template: str) -> None:
    before = time.monotonic()
    assert "too long" in refused(directory, template)
    assert time.monotonic() - before < 30


def test_a_template_that_waits_is_ended_by_the_clock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 0.5)
    add_chat_template(directory, CHATML)
    opened = ChatTemplate(directory)
    opened.render([USER])
    assert opened._worker is not None
    os.kill(opened._worker._process.pid, signal.SIGSTOP)
    with pytest.raises(KogcError, match="the chat template failed: it takes too long$"):
        opened.render([USER])
    assert opened.render([USER])  # by another process
    opened.close()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10 ** 10 }}", "more than 512 MB"),
        ("{{ '%9999999999d' % 3 }}", "more than 512 MB"),
        ("{{ 'a' | center(10 ** 9) }}", "more than 512 MB"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "longer than 8388608 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "failed"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError: Range too big"),
        ("{{ raise_exception('no\n\nway') }}", ": no way"),
        ("{{ raise_exception('x' * 100000) }}", ": xxxx"),
        ("one\n{% for %}", "line 2: Expected an expression"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_a_template_that_breaks_a_limit_is_one_line(directory: Path, template: str, message: str) -> None:
    assert message in refused(directory, template)


def test_a_message_is_an_object(directory: Path) -> None:
    for messages in ("hi", ["hi"], [USER, None]):
        with pytest.raises(KogcError, match="^a message is not an object with role and content$"):
            render(directory, "{{ messages }}", messages)  # type: ignore[arg-type]


def test_refusal_of_a_conversation_keeps_the_process(directory: Path) -> None:
    add_chat_template(directory, INSTRUCT)
    opened = ChatTemplate(directory)
    with pytest.raises(KogcError, match="tokenizer_config.json: the chat template failed: Roles must alternate"):
        opened.render([USER, USER])
    with pytest.raises(KogcError, match="the conversation is empty"):
        opened.render([])
    with pytest.raises(KogcError, match="a message holds what is not plain JSON"):
        opened.render([{"role": "user", "content": object()}])
    assert "[INST]   What is" in opened.render([USER])
    opened.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{}", r"no chat template: neither chat_template.jinja nor chat_template in tokenizer_config.json$"),
        ('{"chat_template": 5}', r"tokenizer_config.json: chat_template: expected text, or a list of named"),
        ('{"chat_template": [{"name": "rag", "template": "x"}]}', r"chat_template: none of 'rag' is 'default'$"),
        ('{"chat_template": [{"name": "default", "template": 5}]}', r"chat_template: none of 'default' is 'default'$"),
        ('{"chat_template": [1]}', r"tokenizer_config.json: chat_template: expected text, or a list of named"),
        ('{"chat_template": "x", "bos_token": 5}', r"tokenizer_config.json: bos_token: expected text"),
        ("{", r"tokenizer_config.json:1: not JSON"),
    ],
)
def test_a_broken_configuration_is_one_line(directory: Path, config: str, message: str) -> None:
    (directory / "tokenizer_config.json").write_text(config)
    with pytest.raises(KogcError, match=message) as caught:
        ChatTemplate(directory)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_one_line(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(KogcError, match="chat_template.jinja: not UTF-8 text"):
        ChatTemplate(directory)


# --- in the artifact --------------------------------------------------------------------------------------------------


def test_an_artifact_carries_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOGC_CACHE", str(tmp_path / "cache"))
    stub_compiler(monkeypatch)
    checkpoint, out = random_checkpoint.make(tmp_path, "llama", tokenizer=True), tmp_path / "out"
    add_chat_template(checkpoint, CHATML)
    (checkpoint / "chat_template.jinja").write_text(HEADERS)
    args = ("build", checkpoint, "--gpu", "h200-sxm", "--blocks", 2, "-o", out)
    assert kogc_cli(*args).exit_code == 0
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()
        assert name in json.loads((out / "manifest.json").read_text())["files"]
    assert ChatTemplate(out).template == HEADERS
    (checkpoint / "chat_template.jinja").unlink()
    assert kogc_cli(*args).exit_code == 0  # a changed checkpoint is built again, without the file
    assert ChatTemplate(out).template == CHATML
    (out / "tokenizer_config.json").write_text((out / "tokenizer_config.json").read_text().replace("kind", "rude"))
    with pytest.raises(KogcError, match="tokenizer_config.json: does not match the manifest's SHA-256"):
        verify(out)
