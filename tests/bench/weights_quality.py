"""What --weights q8 and q4 cost: perplexity on prose, and KL divergence from the same model in bfloat16.

MODEL is a folder with 16- or 32-bit weights; a .gguf file (or an alias of one) is first written out as such a folder, by
transformers, into a temporary place. Weights that were quantized before lose less than fresh ones would.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from quality import PROSE, log_likelihood

import kvrun.hub
import kvrun.runtime
from kvrun.weights.load import WEIGHTS

sys.path.append(str(Path(__file__).parents[1]))
from backends.running import kl_divergence, logits_of  # noqa: E402 - shared with the tests of the executors


def as_folder(gguf: Path, to: Path) -> Path:
    """Writes the model of a GGUF file as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(to)
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype="float32").eval()
    model.load_state_dict(load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"], strict=False)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(to)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("-f", "--text", type=Path, default=PROSE, help="UTF-8 prose (default: %(default)s)")
    parser.add_argument("-n", "--tokens", type=int, default=2048, help="tokens of it, at most (default: %(default)s)")
    parser.add_argument("--weights", default=",".join(w for w in WEIGHTS if w != "auto"), help="(default: %(default)s)")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write everything here")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        files = kvrun.hub.resolve(options.model)
        if files.kind == "gguf":
            files = kvrun.hub.resolve(str(as_folder(files.path, Path(place))))
        results: dict[str, dict[str, float]] = {}
        base = ids = None
        for weights in options.weights.split(","):
            engine = kvrun.runtime.open_engine(files, device="cpu", n_ctx=options.tokens, threads=options.threads, max_out=128,
                                               prefill_chunk=128, weights=weights)
            ids = ids or engine.text.encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
            logits = logits_of(engine, ids, chunk=128)
            engine.close()
            base = logits if base is None else base
            divergence = kl_divergence(base, logits)
            results[weights] = {"perplexity": float(np.exp(-log_likelihood(logits, ids))), "mean_kld": float(divergence.mean()),
                                "p99_kld": float(np.quantile(divergence, 0.99)),
                                "same_top1": float((base.argmax(axis=1) == logits.argmax(axis=1)).mean())}
    first = next(iter(results.values()))["perplexity"]
    print(f"{options.model}, {len(ids)} tokens of {options.text.name}")
    for weights, r in results.items():
        print(f"{weights:6} perplexity {r['perplexity']:.4f} ({r['perplexity'] / first - 1:+.3%})   mean KLD {r['mean_kld']:.2e}   "
              f"99 % {r['p99_kld']:.2e}   same top-1 {r['same_top1']:.2%}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
