"""Which Python packages kvrun needs on the machine and which are missing there; the latter end it with 1."""

import importlib.metadata
import importlib.util
import shutil
import sys

NEEDED = {"torch": "torch", "cffi": "cffi", "numpy": "numpy", "safetensors": "safetensors", "tokenizers": "tokenizers", "typer": "typer", "rich": "rich",
          "platformdirs": "platformdirs", "jinja2": "jinja2", "prompt_toolkit": "prompt_toolkit", "gguf": "gguf", "huggingface_hub": "huggingface-hub"}
FOR_TESTS = {"pytest": "pytest", "hypothesis": "hypothesis", "transformers": "transformers"}


def main() -> None:
    """One line a package."""
    missing = []
    for module, name in (NEEDED | FOR_TESTS).items():
        there = importlib.util.find_spec(module) is not None
        print(f"{name:<18}{importlib.metadata.version(name) if there else 'missing' + ('' if module in NEEDED else ', and its step will fail')}")
        if not there and module in NEEDED:
            missing.append(name)
    if not shutil.which("cmake"):
        missing.append("cmake")
    if missing:
        sys.exit(f"missing: {', '.join(missing)}; bring wheels (cffi also needs pycparser, prompt_toolkit wcwidth) and name their folder in WHEELS")


if __name__ == "__main__":
    main()
