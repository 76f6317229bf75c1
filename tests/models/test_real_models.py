"""The two real models against transformers' own reading of the same files, over 700 tokens of prose in float32."""

from contextlib import closing
from pathlib import Path

import pytest

from kvrun.text import load_text
from kvrun.weights import open_source

from .oracle import Reference, assert_close, expected_logits

PROSE = (Path(__file__).parents[1] / "data" / "alice.txt").read_text(encoding="utf-8")
LENGTH = 700                # past Gemma's window of 512


def oracle(path: Path, ids: list[int]):
    """Logits by transformers, which reads the GGUF file with its own code."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype="float32", attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    left = model.load_state_dict(tensors, strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys
    model.tie_weights()
    return expected_logits(model, ids)


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def real(request):
    """(ModelFiles, ids, logits by transformers)."""
    files = request.getfixturevalue(request.param)
    ids = load_text(files).encode(PROSE[:8000])[:LENGTH]
    assert len(ids) == LENGTH
    return files, ids, oracle(files.path, ids)


def load(files, chunk: int) -> Reference:
    with closing(open_source(files)) as source:
        return Reference(files.config, source, files.kind, 1024, chunk)


@pytest.mark.parametrize("chunk", [64, 512, LENGTH])
def test_prefill_in_chunks_equals_transformers(real, chunk):
    files, ids, want = real
    with load(files, chunk) as reference:
        assert_close(reference.feed(ids), want, f"chunks of {chunk}")


def test_token_by_token_equals_transformers(real):
    """A prompt row by row, then decode rows past the window after a prefill."""
    files, ids, want = real
    with load(files, 1) as reference:
        assert_close(reference.feed(ids[:24]), want[:24], "rows of one")
    with load(files, 340) as reference:
        reference.feed(ids[:680])
        reference.chunk = 1
        assert_close(reference.feed(ids[680:], prefill=False), want[680:], "decode")
