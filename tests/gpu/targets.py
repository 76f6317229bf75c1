"""What is wanted of kvrun on a GPU, against what measure.py found."""

from __future__ import annotations

from collections.abc import Callable


def verdicts(found: dict) -> list[dict]:
    """One entry a target: what, measured, wanted, verdict. Those of what was not measured say so."""
    def ms(shape: str, weights: str, kv: str, depth: int) -> float:
        return next(r["ms_per_token"] for r in found["rows"] if (r["shape"], r["weights"], r["kv"], r["depth"]) == (shape, weights, kv, depth))

    def share(weights: str) -> float:
        return next(r["share_of_copy"] for r in found["rows"] if (r["shape"], r["weights"], r["kv"], r["depth"]) == ("llama-8b", weights, "f16", 0))

    def slope(kv: str) -> float:
        def of(kv: str) -> float:
            return ms("llama-8b", "q4", kv, 32768) - ms("llama-8b", "q4", kv, 2048)

        return of(kv) / of("f16")

    def faster(kv: str) -> float:
        return ms("llama-8b", "q4", "f16", 32768) / ms("llama-8b", "q4", kv, 32768)

    def prefill() -> float:
        ours = next(r["prefill_tokens_per_second"] for r in found["rows"] if r["shape"] == "llama-8b" and r["weights"] == "bf16" and r["prefill_tokens_per_second"])
        return ours / found["peers"]["bare products, prefill tokens/s, llama-8b"]

    targets: list[tuple[str, Callable[[], float], float, bool]] = [
        ("Llama-8B, bf16, empty cache: share of copy bandwidth", lambda: share("bf16"), 0.90, True),
        ("Llama-8B, q4, empty cache: share of copy bandwidth", lambda: share("q4"), 0.70, True),
        ("Llama-1B, bf16, empty cache: ms a token (on an H100)", lambda: ms("llama-1b", "bf16", "f16", 0), 1.0, False),
        ("q8 cache: time a cached token costs, over f16's", lambda: slope("q8"), 0.6, False),
        ("q4 cache: time a cached token costs, over f16's", lambda: slope("q4"), 0.4, False),
        ("Llama-8B, q4, 32k: a q8 cache over f16, tokens/s", lambda: faster("q8"), 1.25, True),
        ("Llama-8B, q4, 32k: a q4 cache over f16, tokens/s", lambda: faster("q4"), 1.45, True),
        ("Llama-8B, bf16: prefill of 2048 over the bare products' rate", prefill, 0.60, True)]
    results = []
    for what, measured, wanted, at_least in targets:
        try:
            value = measured()
            verdict = "met" if (value >= wanted) == at_least else "missed"
            shown = f"{value:.3f}"
        except (StopIteration, KeyError, TypeError, ZeroDivisionError):
            shown, verdict = "-", "not measured"
        results.append({"what": what, "measured": shown, "wanted": f"{'>=' if at_least else '<='} {wanted}", "verdict": verdict})
    return results
