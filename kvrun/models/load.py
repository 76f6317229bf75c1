"""config.json -> ModelSpec. What a config does not say is an error, unless its family lists the key as left out."""

from __future__ import annotations

import math

from kvrun.errors import show
from kvrun.models.config import REQUIRED, Config
from kvrun.models.family import Family, families
from kvrun.models.rope import FULL, MAX_CONTEXT, SLIDING, read_ropes
from kvrun.models.spec import LayerSpec, ModelSpec, RopeSpec

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
DTYPES = ("bfloat16", "float16", "float32")
MAX_SIZE = 2**20
MAX_LAYERS = 1024
MAX_VOCAB = 2**24


def find_family(config: dict, where: str) -> tuple[str, Family]:
    """The architecture that a config names, and its family. ModelError: unknown, quantized, or bringing its own code."""
    top = Config(config, where)
    names = top.items("architectures")
    if not names or type(names[0]) is not str:
        raise top.error("architectures", "is not a list of names")
    known = families()
    if top.has("auto_map") and not (names[0] in known and known[names[0]].own_code):
        raise top.error("auto_map", "asks for code from the model's repository, which kvrun never runs; "
                        "use a version of the model without it")
    if names[0] not in known:
        raise top.error("architectures", f"{show(names[0])} is not known (known: {', '.join(sorted(known))})")
    family = known[names[0]]
    for part in (config, config.get(family.nested)) if family.nested else (config,):
        method = part.get("quantization_config") if isinstance(part, dict) else None
        if method is not None:
            name = method.get("quant_method") if isinstance(method, dict) else None
            raise top.error("quantization_config", f"{show(name)} is not known; take the unquantized model or a GGUF file")
    return names[0], family


class _Reader:
    """A config together with its family's defaults."""

    def __init__(self, config: Config, family: Family):
        self.config, self.family = config, family

    def _default(self, key: str) -> object:
        return self.family.defaults.get(key, REQUIRED)

    def size(self, key: str, high: int = MAX_SIZE) -> int:
        return self.config.integer(key, 1, high, self._default(key))

    def multiplier(self, name: str) -> float:
        """A scale as the family writes it; "" is 1."""
        if not name:
            return 1.0
        if name == "sqrt_hidden":
            return math.sqrt(self.size("hidden_size"))
        key = name.removeprefix("/").removesuffix("**-0.5")
        value = self.config.number(key, 1e-6, 1e6, self._default(key))
        if name.startswith("/"):
            return 1.0 / value
        return value**-0.5 if name.endswith("**-0.5") else value

    def softcap(self, key: str) -> float:
        """0 where the family has none or the config says null or nothing: the config class' own "off"."""
        return self.config.number(key, 1e-3, 1e6, 0.0) if key else 0.0

    def flag(self, value: bool | str) -> bool:
        return self.config.flag(value, self._default(value)) if isinstance(value, str) else value

    def rotates(self, n_layers: int) -> list[bool]:
        """Which layers have RoPE."""
        if not self.family.nope:
            return [True] * n_layers
        flags = self.config.items("no_rope_layers", None)
        if flags is None:
            interval = self.size("no_rope_layer_interval")
            return [(i + 1) % interval != 0 for i in range(n_layers)]
        if len(flags) < n_layers or any(type(f) is not int or f not in (0, 1) for f in flags):
            raise self.config.error("no_rope_layers", f"is not a list of {n_layers} times 0 or 1")
        return [f == 1 for f in flags[:n_layers]]

    def layer_types(self, n_layers: int, rotates: list[bool]) -> list[str]:
        """Which layers slide: `layer_types` of newer configs, else the family's rule."""
        config, rule = self.config, self.family.windows
        types = config.items("layer_types", None)
        if types is not None:
            if len(types) != n_layers or any(t not in (FULL, SLIDING) for t in types):
                raise config.error("layer_types", f"is not a list of {n_layers} times {FULL!r} or {SLIDING!r}")
            if rule in ("full", "all") and len(set(types)) > 1:
                raise config.error("layer_types", f"mixes kinds, which {self.family.name} models do not")
            if rule in ("upper", "nope") and SLIDING in types and not self.flag("use_sliding_window"):
                raise config.error("layer_types", "has sliding layers, but use_sliding_window is false")
            if rule != "all":
                return list(types)
        if rule == "pattern":
            key = "sliding_window_pattern" if config.has("sliding_window_pattern") else "_sliding_window_pattern"
            every = config.integer(key, 1, MAX_LAYERS, self._default("sliding_window_pattern"))
            slides = [(i + 1) % every != 0 for i in range(n_layers)]
        elif rule == "all":
            if "sliding_window" not in config.values:
                config.get("sliding_window")
            slides = [config.has("sliding_window")] * n_layers
        elif rule in ("upper", "nope") and self.flag("use_sliding_window") and config.has("sliding_window"):
            first = config.integer("max_window_layers", 0, MAX_LAYERS) if rule == "upper" else 0
            slides = [i >= first if rule == "upper" else not rotates[i] for i in range(n_layers)]
        else:
            slides = [False] * n_layers
        return [SLIDING if s else FULL for s in slides]

    def layers(self, n_layers: int, ropes: dict[str, RopeSpec]) -> tuple[tuple[LayerSpec, ...], tuple[RopeSpec, ...]]:
        rotates = self.rotates(n_layers)
        types = self.layer_types(n_layers, rotates)
        window = self.size("sliding_window", MAX_CONTEXT) if SLIDING in types else 0
        used = [ropes[t] for t, rotated in zip(types, rotates) if rotated]
        tables = tuple(dict.fromkeys(used))
        layers = (LayerSpec(window if t == SLIDING else 0, tables.index(ropes[t]) if rotated else None)
                  for t, rotated in zip(types, rotates))
        return tuple(layers), tables


def load_spec(config: dict, where: str, n_ctx: int | None = None) -> ModelSpec:
    """Reads and validates a config.json. where: its path, for messages. n_ctx: the context to be run, which chooses
    between LongRoPE's short and long factors (None: short). Raises ModelError, and nothing else."""
    architecture, family = find_family(config, where)
    top = Config(config, where)
    c = top.child(family.nested) if family.nested else top
    r = _Reader(c, family)

    hidden, ffn, heads = r.size("hidden_size"), r.size("intermediate_size"), r.size("num_attention_heads", 4096)
    kv_heads = c.integer("num_key_value_heads", 1, heads, family.defaults.get("num_key_value_heads", heads))
    head_dim = c.integer("head_dim", 2, 4096, family.defaults.get("head_dim", hidden // heads))
    if heads % kv_heads:
        raise c.error("num_attention_heads", f"is {heads}, no multiple of num_key_value_heads {kv_heads}")
    if head_dim < 2 or head_dim % 2:
        raise c.error("head_dim", f"is {head_dim}; kvrun needs an even head size")
    for key, value in (("hidden_size", hidden), ("intermediate_size", ffn),
                       ("num_attention_heads * head_dim", heads * head_dim)):
        if value % 32 or value > MAX_SIZE:
            raise c.error(key, f"is {value}; kvrun needs a multiple of 32 up to {MAX_SIZE}")

    n_positions = r.size("max_position_embeddings", MAX_CONTEXT)
    ropes = read_ropes(c, family, head_dim, n_positions, n_ctx)
    layers, tables = r.layers(r.size("num_hidden_layers", MAX_LAYERS), ropes)

    act = c.text(family.act_key, family.defaults.get(family.act_key, REQUIRED))
    if act not in ACTIVATIONS:
        raise c.error(family.act_key, f"{show(act)} is not known (known: {', '.join(sorted(ACTIVATIONS))})")
    if c.flag("use_bidirectional_attention", False):
        raise c.error("use_bidirectional_attention", "is true: this model does not generate text")

    return ModelSpec(
        architecture=architecture, family=family.name, vocab_size=r.size("vocab_size", MAX_VOCAB), hidden=hidden,
        ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=head_dim, layers=layers, ropes=tables,
        norm_eps=c.number("rms_norm_eps", 0.0, 1.0, family.defaults.get("rms_norm_eps", REQUIRED)),
        act=ACTIVATIONS[act],
        tied=(c if c.has("tie_word_embeddings") else top).flag("tie_word_embeddings",
                                                               family.defaults["tie_word_embeddings"]),
        n_positions=n_positions, dtype=_dtype(c, top),
        attn_scale=r.multiplier(family.attn_scale) if family.attn_scale else head_dim**-0.5,
        pre_norm=family.pre_norm, post_norm=family.post_norm, qk_norm=family.qk_norm, norm_offset=family.norm_offset,
        qkv_bias=r.flag(family.qkv_bias), o_bias=r.flag(family.o_bias), mlp_bias=r.flag(family.mlp_bias),
        embed_scale=r.multiplier(family.embed_scale), residual_scale=r.multiplier(family.residual_scale),
        logit_scale=r.multiplier(family.logit_scale), attn_softcap=r.softcap(family.attn_softcap),
        logit_softcap=r.softcap(family.logit_softcap),
        eos_token_ids=_ids(c if c.has("eos_token_id") else top, "eos_token_id"),
        bos_token_id=next(iter(_ids(c if c.has("bos_token_id") else top, "bos_token_id")), None),
    )


def _dtype(config: Config, top: Config) -> str:
    """What the weights were saved in; configs that do not say mean float32, as in transformers."""
    for c in (config, top):
        for key in ("dtype", "torch_dtype"):
            if c.has(key):
                name = c.text(key)
                if name not in DTYPES:
                    raise c.error(key, f"{show(name)} is not known (known: {', '.join(DTYPES)})")
                return name
    return "float32"


def _ids(config: Config, key: str) -> tuple[int, ...]:
    """Token ids: one, a list or none."""
    value = config.get(key, None)
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for v in values:
        if type(v) is not int or not -1 <= v < MAX_VOCAB:
            raise config.error(key, f"holds {show(v)}, no token id")
    return tuple(v for v in values if v >= 0)
