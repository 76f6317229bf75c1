"""The process in which a tokenizer.json is tried before kvrun reads it itself. Runs as a script.

The tokenizers library carries out what the file says: a chain of replacements that doubles a text sixty times, a regular expression without
end, an allocation that fails and so ends the process. Here that is over soon, and harms nobody. tokenizer_guard.py starts this process.

Standard input: the file. Standard output: {} or {"error": why}, as JSON. Argument: JSON of {"path": sys.path, "memory": bytes it may take,
"seconds": of computing for reading the file, "encode_seconds": for a few texts of 4 KB}.
"""

import json
import os
import sys

_MAX_IDS = 1 << 24
_LENGTH = 4096
_TEXTS = ["a B\n 1é日🎉", *(char * _LENGTH for char in "a 1\n!é日"), "aA1 .\n" * (_LENGTH // 6), "don't we'll I'm " * (_LENGTH // 16),
          "<a></s>[INST]" * (_LENGTH // 13), "xyz\t\t  \r\n" * (_LENGTH // 10)]


def _why(data: bytes, max_tokens: int, max_added: int, encode_seconds: float) -> str | None:
    """What speaks against the tokenizer, None where nothing does."""
    from tokenizers import Tokenizer

    from kvrun.text.limits import alarm

    library = Tokenizer.from_buffer(data)
    library.no_truncation()
    library.no_padding()
    vocabulary, added = library.get_vocab(), library.get_added_tokens_decoder()
    if len(vocabulary) > max_tokens or len(added) > max_added:
        return f"it has {len(vocabulary)} tokens, {len(added)} of them added; at most {max_tokens} and {max_added} are taken"
    if max([0, *vocabulary.values(), *added]) >= _MAX_IDS:
        return f"it has ids of {_MAX_IDS} and more"
    alarm(encode_seconds)
    for text in _TEXTS:
        for special in (False, True):
            library.encode_special_tokens = not special
            library.decode(library.encode(text, add_special_tokens=special).ids)
    return None


def main() -> None:
    setup = json.loads(sys.argv[1])
    sys.path[:] = setup["path"]
    from kvrun.text.limits import alarm, limit_memory

    data = sys.stdin.buffer.read()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    limit_memory(setup["memory"])
    alarm(setup["seconds"])
    try:
        why = _why(data, setup["tokens"], setup["added"], setup["encode_seconds"])
    except BaseException as error:  # noqa: BLE001 - a panic of the library is no Exception
        why = " ".join(str(error).split())[:300] or type(error).__name__
    alarm(0)
    print(json.dumps({"error": why} if why else {}))


if __name__ == "__main__":
    main()
