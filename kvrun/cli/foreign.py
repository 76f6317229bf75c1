"""What other tools call their options, so that whoever comes from one is told the name here and not something else."""

from __future__ import annotations

from typing import Any

from kvrun.errors import UsageError

# Option of llama.cpp, ollama or transformers -> the parameter that is meant; "" where there is nothing to say
_PARAMETERS = {
    **dict.fromkeys(("-c", "--ctx-size", "--num-ctx"), "n_ctx"),
    **dict.fromkeys(("--predict", "--n-predict", "--num-predict", "--max-new-tokens", "--max_new_tokens"), "max_tokens"),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), "kv"), **dict.fromkeys(("-m", "--model", "-hf", "-hfr", "--hf-repo"), "model"),
    **dict.fromkeys(("-p", "--prompt"), "prompt"), **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), "device"), "-t": "threads",
    **dict.fromkeys(("-sys", "--system-prompt"), "system"), "--temperature": "temp", "--format": "schema",
    **dict.fromkeys(("--repetition-penalty", "--repetition_penalty"), "repeat_penalty"), **dict.fromkeys(("-no-cnv", "--no-conversation"), "raw"),
    **dict.fromkeys(("-cnv", "-fa", "-fit", "-st", "-ub", "-tb", "-sysf"), "")}


def is_model(word: str) -> bool:
    """Whether the first word of a command line names a model, as with `ollama run` left out or llama.cpp's file alone."""
    if word.startswith("-"):
        return False
    if "/" in word or word.endswith(".gguf"):
        return True
    from kvrun.hub.catalog import load_catalog

    return word in load_catalog().aliases


def check_clusters(args: list[str], command: Any) -> None:
    """UsageError for an option with one dash and several letters, which would be read as several options: -ngl as -n gl, -hf as -h."""
    valued = {name for parameter in command.params if not getattr(parameter, "is_flag", True) for name in parameter.opts}
    for before, arg in zip(["", *args], args):
        if arg == "--":
            return
        if arg in _PARAMETERS and len(arg) > 2 and arg[1] != "-" and before not in valued:
            raise UsageError((_here(arg, command) or f"No such option: {arg}") + f" (see 'kvrun {command.name} --help')")


def meant(error: Exception) -> str:
    """A better word than the parser's own, for options of other tools and for a prompt without quotes; else empty."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    if command is None:
        return ""
    if "extra argument" in str(error) and command.name in _ALONE:
        return f"{str(error).rstrip('.')}: {_ALONE[command.name]}"
    return _here(getattr(error, "option_name", None), command)


_ALONE = {"run": "a prompt of several words stands in quotes", "chat": "MODEL stands alone; the context's size is -n/--n-ctx"}
"""Command -> what to do about one argument too many."""


def _here(option: str | None, command: Any) -> str:
    """What an option of another tool is called here, where the command has it; else empty."""
    for parameter in command.params if option in _PARAMETERS else ():
        if parameter.name == _PARAMETERS[option]:
            here = "/".join(parameter.opts) if parameter.param_type_name == "option" else f"{parameter.metavar}, with no option before it"
            return f"No such option: {option}; here it is {here}"
    return ""
