"""RoPE tables from a config: the inverse frequencies of every scaling kind, in the spelling of old and new configs.

Formulas are those of transformers' ROPE_INIT_FUNCTIONS (modeling_rope_utils.py), taken in double precision.
Sources: RoPE (Su et al., 2021); linear (kaiokendev, 2023); YaRN (Peng et al., 2023); LongRoPE (Ding et al., 2024);
llama3 (Llama 3.1 reference code).
"""

from __future__ import annotations

import math

from kvrun.errors import show
from kvrun.models.config import Config
from kvrun.models.family import Family
from kvrun.models.spec import RopeSpec

FULL, SLIDING = "full_attention", "sliding_attention"
MAX_CONTEXT = 2**31 - 1
BIG = 1e12


def _base(theta: float, dim: int) -> list[float]:
    return [theta ** (-i / dim) for i in range(0, dim, 2)]


def _default(p: Config, theta: float, dim: int, context: tuple) -> tuple[list[float], float]:
    return _base(theta, dim), 1.0


def _linear(p: Config, theta: float, dim: int, context: tuple) -> tuple[list[float], float]:
    factor = p.number("factor", 1e-3, 1e6)
    return [f / factor for f in _base(theta, dim)], 1.0


def _llama3(p: Config, theta: float, dim: int, context: tuple) -> tuple[list[float], float]:
    original = context[1]
    factor = p.number("factor", 1e-3, 1e6)
    low = p.number("low_freq_factor", 1e-3, 1e6)
    high = p.number("high_freq_factor", 1e-3, 1e6)
    if high <= low:
        raise p.error("high_freq_factor", f"is {high:g}, not above low_freq_factor {low:g}")
    scaled = []
    for f in _base(theta, dim):
        wavelength = 2 * math.pi / f
        if wavelength > original / low:
            f /= factor
        elif wavelength >= original / high:
            smooth = (original / wavelength - low) / (high - low)
            f = (1 - smooth) * f / factor + smooth * f
        scaled.append(f)
    return scaled, 1.0


def _yarn(p: Config, theta: float, dim: int, context: tuple) -> tuple[list[float], float]:
    n_positions, original, _ = context
    factor = p.number("factor", 1e-3, 1e6, None) or n_positions / original

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention = p.number("attention_factor", 0.0, 1e3, None)
    if attention is None:
        m, m_all = p.number("mscale", 0.0, 1e3, None), p.number("mscale_all_dim", 0.0, 1e3, None)
        attention = mscale(m) / mscale(m_all) if m and m_all else mscale(1.0)

    def channel(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = channel(p.number("beta_fast", 1e-6, 1e6, None) or 32.0)
    high = channel(p.number("beta_slow", 1e-6, 1e6, None) or 1.0)
    if p.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    scaled = []
    for i, f in enumerate(_base(theta, dim)):
        ramp = min(max((i - low) / (high - low), 0.0), 1.0)
        scaled.append(f / factor * ramp + f * (1 - ramp))
    return scaled, attention


def _longrope(p: Config, theta: float, dim: int, context: tuple) -> tuple[list[float], float]:
    n_positions, original, n_ctx = context
    factor = p.number("factor", 1e-3, 1e6, None) or n_positions / original
    attention = p.number("attention_factor", 0.0, 1e3, None)
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short, long = (p.numbers(key, dim // 2, 1e-3, 1e6) for key in ("short_factor", "long_factor"))
    # One set for the whole context: keys in the cache cannot change theirs when a sequence grows past `original`.
    chosen = long if n_ctx is not None and n_ctx > original else short
    return [f / s for f, s in zip(_base(theta, dim), chosen)], attention


KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}


def _table(p: Config, family: Family, theta: float, partial: float, head_dim: int, context: tuple) -> RopeSpec:
    kind = p.text("rope_type", None) or p.text("type", "default")
    kind = family.rope_aliases.get(kind, kind)
    if kind not in KINDS:
        raise p.error("rope_type", f"{show(kind)} is not known (known: {', '.join(sorted(KINDS))})")
    theta = p.number("rope_theta", 1.0 + 1e-6, BIG, theta)
    partial = p.number("partial_rotary_factor", 1e-3, 1.0, partial)
    if partial != 1.0 and not family.partial:
        raise p.error("partial_rotary_factor", f"{partial:g} is not known for {family.name} models")
    dim = int(head_dim * partial)
    if dim < 2 or dim % 2:
        raise p.error("partial_rotary_factor", f"leaves {dim} rotated channels of {head_dim}; it must be an even number")
    inv_freq, attention = KINDS[kind](p, theta, dim, context)
    return RopeSpec(tuple(inv_freq), dim, attention, family.interleaved)


def read_ropes(config: Config, family: Family, head_dim: int, n_positions: int,
               n_ctx: int | None) -> dict[str, RopeSpec]:
    """Layer type ("full_attention", "sliding_attention") -> its table. n_ctx chooses LongRoPE's factors.

    Old configs hold rope_theta beside rope_scaling, new ones both in rope_parameters, there nested by layer type
    where types differ. ModelError for an unknown kind and for values out of range.
    """
    theta = config.number("rope_theta", 1.0 + 1e-6, BIG, family.defaults["rope_theta"])
    partial = config.number("partial_rotary_factor", 1e-3, 1.0, family.defaults.get("partial_rotary_factor", 1.0))
    key = "rope_scaling" if config.get("rope_scaling", {}) != {} else "rope_parameters"
    params = config.child(key) if config.has(key) else Config({}, config.where, f"{config.prefix}{key}.")
    nested = any(kind in params.values for kind in (FULL, SLIDING))

    tables = {}
    for kind in (FULL, SLIDING):
        kind_theta = theta
        if nested:
            p = params.child(kind) if params.has(kind) else Config({}, params.where, f"{params.prefix}{kind}.")
        else:
            # Where the two kinds have a theta each, old configs scale the full layers alone.
            p = Config({}, params.where, params.prefix) if kind == SLIDING and family.local_theta else params
        if kind == SLIDING and family.local_theta:
            kind_theta = config.number(family.local_theta, 1.0 + 1e-6, BIG, family.defaults[family.local_theta])
        original = p.integer("original_max_position_embeddings", 2, MAX_CONTEXT, n_positions)
        if not nested:
            # Phi-3 keeps it outside, and there it wins.
            original = config.integer("original_max_position_embeddings", 2, MAX_CONTEXT, original)
        tables[kind] = _table(p, family, kind_theta, partial, head_dim, (n_positions, original, n_ctx))
    return tables
