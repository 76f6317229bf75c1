"""Templates that mean harm: an error of one line, and the next template renders."""

from __future__ import annotations

import os
import signal

import pytest

from kvrun.errors import ModelError
from kvrun.text import template as module
from kvrun.text.template import ChatTemplate

_DOUBLE = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
_DEEP = "{% set ns = namespace(a=[]) %}{% for i in range(50000) %}{% set ns.a = [ns.a] %}{% endfor %}"
_TIME = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "one long call": "{{ ('a ' * 10**7) | wordcount }}{{ ('x' * 10**6) | wordwrap(1) }}{{ lipsum(n=10**6) }}",
}
_MEMORY = {
    "folded while compiling": "{{ 'x' * 10**9 }}",
    "multiplied": "{% set n = 10**9 %}{{ 'x' * n }}",
    "doubled by ~": _DOUBLE.replace("[1]", "'xx'").replace("+", "~") + "{{ ns.x }}",
    "doubled list": _DOUBLE + "{{ ns.x | length }}",
    "replaced": "{% set ns = namespace(x='xx') %}{% for i in range(8) %}{% set ns.x = ns.x.replace('x', ns.x) %}"
                "{% endfor %}{{ ns.x | length }}",
    "joined": "{{ (['x' * 1000] * 100000) | join('y' * 1000) }}",
    "width of %": "{% set f = '%1000000000d' %}{{ f % 1 }}",
    "width of format": "{{ '{:>1000000000}'.format(1) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "center": "{{ 'x' | center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "indent": "{{ ('x\n' * 30000) | indent(100000) }}",
    "batch": "{{ range(10) | batch(10**9, 'x') | list | length }}",
    "slice": "{{ range(10) | slice(10**8) | list | length }}",
    "sorted": "{{ (range(99999) | list * 5000) | sort | length }}",
    "300 MB of output": "{% for i in range(3000) %}{{ 'x' * 100000 }}{% endfor %}",
    "output under the memory limit": "{% for i in range(700) %}{{ messages[0].content * 100000 }}{% endfor %}",
}
_STACK = {
    "endless macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep json": _DEEP + "{{ ns.a | tojson }}",
    "deep print": _DEEP + "{{ ns.a | pprint }}",
    "range": "{{ range(10**9) | list | length }}",
    "big number": "{{ (10**200000) | string | length }}",
    "json of itself": "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ ns | tojson }}",
}
_ESCAPE = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "change of its input": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "statement": "{% for %}",
}
_ALL = {**_TIME, **_MEMORY, **_STACK, **_ESCAPE}


@pytest.mark.parametrize("name", _ALL)
def test_harm_ends_in_one_line(name):
    with pytest.raises(ModelError) as caught:
        ChatTemplate(_ALL[name], "m.gguf").render([{"role": "user", "content": "x"}])
    message = str(caught.value)
    assert message.startswith("m.gguf: the chat template ") and "\n" not in message and len(message) < 700
    if name in _TIME:
        assert "longer than" in message or "memory" in message
    if name in _MEMORY:
        assert "memory" in message or "MiB" in message or "longer than" in message
    assert ChatTemplate("{{ messages | length }}", "m").render([{}, {}]) == "2"


@pytest.mark.parametrize("source", [
    "{{ ''|attr('__class__') }}", "{{ dict.__class__ }}", "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}", "{{ ['']|map(attribute='__class__')|first }}",
])
def test_inner_attributes_are_undefined(source):
    assert ChatTemplate(source, "m").render([]) == ""


def test_a_template_sees_no_environment_and_writes_no_file(monkeypatch):
    """What stands behind the sandbox, should it leak one day."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    module._worker.kill()
    module.prepare()
    with open(f"/proc/{module._worker._process.pid}/environ", "rb") as f:
        assert b"secret" not in f.read()
    ChatTemplate("", "m").render([])
    with open(f"/proc/{module._worker._process.pid}/limits") as f:
        limits = {line[:26].strip(): line[26:].split() for line in f}
    assert limits["Max file size"][:2] == ["0", "0"]
    assert module._MEMORY < int(limits["Max address space"][0]) < 2 * module._MEMORY


def test_a_process_that_dies_is_replaced():
    ChatTemplate("", "m").render([])
    os.kill(module._worker._process.pid, signal.SIGKILL)
    module._worker._process.wait()
    assert ChatTemplate("a", "m").render([]) == "a"


def test_a_conversation_larger_than_a_pipe():
    big = "é\n" * 500_000
    assert ChatTemplate("{{ messages[0].content }}", "m").render([{"content": big}]) == big
