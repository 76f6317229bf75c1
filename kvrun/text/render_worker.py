"""The process that renders chat templates. Runs as a script, with jinja2 and limits.py alone.

A chat template is a program from the internet. Jinja's sandbox keeps it from reaching Python, but not from running for
ever or from filling memory ('x' * 10**9 is folded while the template is compiled). The system can: this process has a
limit on its memory, an alarm on its time, no files to write, and no environment. template.py starts it and talks to
it.

Frames, both ways: 8 bytes little-endian length, then JSON. Request: {"source", "variables"}. Answer: {"text"} or
{"error": kind, "message"}; kinds: "refused" (the template raised), "failed" (it could not be carried out), "broken"
(it is no template).

Argument: JSON of {"path": sys.path, "memory": bytes it may take, "seconds": of computing a request may take}.
"""

import json
import os
import sys


def _environment():
    """Jinja as transformers' apply_chat_template sets it up (utils/chat_template_utils.py there)."""
    from datetime import datetime

    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what a model was trained to say; for rendering it is no more than its content."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller):
            return caller()

    class PlainDict:
        """The name `dict` in templates: calls only, so that its attributes lead nowhere."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args, **kwargs):
            return dict.fromkeys(*args, **kwargs)

    class PlainNamespace(Namespace):
        """namespace() without names that begin with an underscore."""

        def __init__(*args, **kwargs):
            self, args = args[0], args[1:]
            values = dict(*args, **kwargs)
            for name in values:
                _refuse_private(name)
            Namespace.__init__(self, values)

        def __setitem__(self, name, value):
            _refuse_private(name)
            Namespace.__setitem__(self, name, value)

    def _refuse_private(name):
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(format):
        return datetime.now().strftime(format)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals.update(raise_exception=raise_exception, strftime_now=strftime_now, dict=PlainDict(),
                       namespace=PlainNamespace)
    return env


def _answer(env, compiled: dict, request: dict) -> dict:
    from jinja2 import exceptions
    source = request["source"]
    try:
        if source not in compiled:
            compiled.clear()
            compiled[source] = env.from_string(source)
        return {"text": compiled[source].render(**request["variables"])}
    except exceptions.TemplateSyntaxError as e:
        return {"error": "broken", "message": f"line {e.lineno}: {e.message}"}
    except exceptions.SecurityError as e:
        return {"error": "failed", "message": f"it tried to leave its sandbox ({e})"}
    except exceptions.TemplateError as e:
        return {"error": "refused", "message": str(e)}
    except MemoryError:
        return {"error": "failed", "message": "it wants too much memory"}
    except RecursionError:
        return {"error": "failed", "message": "it nests without end"}
    except Exception as e:
        return {"error": "refused", "message": f"{type(e).__name__}: {e}"}


def _read(n: int) -> bytes:
    parts = []
    while n:
        part = os.read(0, min(n, 1 << 20))
        if not part:
            os._exit(0)         # kvrun has gone
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view):]


def main() -> None:
    setup = json.loads(sys.argv[1])
    sys.path[:] = setup["path"]
    from kvrun.text.limits import alarm, limit_memory

    env = _environment()
    limit_memory(setup["memory"])
    compiled: dict = {}
    while True:
        request = json.loads(_read(int.from_bytes(_read(8), "little")))
        alarm(setup["seconds"])
        try:
            answer = json.dumps(_answer(env, compiled, request)).encode()
        except MemoryError:
            answer = b'{"error": "failed", "message": "it wants too much memory"}'
        alarm(0)
        _write(len(answer).to_bytes(8, "little") + answer)
        del request, answer


if __name__ == "__main__":
    main()
