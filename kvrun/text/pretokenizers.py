"""How a GGUF file's `tokenizer.ggml.pre` cuts text before byte-level BPE.

A GGUF file names the cut and does not carry it. The regexes are those of the models' own tokenizer.json, for which
the names stand (llama.cpp's src/llama-vocab.cpp keeps the list of names); an unknown name is an error, because a
wrong cut gives a model that answers a little worse and never says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvrun.errors import ModelError, show

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+%s|"
          r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*%s|")
_TEKKEN = _CASED % ("", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = (_CASED % (_CONTRACTIONS + "?", _CONTRACTIONS + "?")
          + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEEPSEEK3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+",
              r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
              r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DIGITS_GPT2 = (r"\p{N}", GPT2)
_BAILING = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
            r"|\s+(?!\S)|\s+")
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """splits: regexes applied one after the other, each cutting what the ones before left; matches and gaps both stay.

    nfc: text is brought to Unicode form C first. whole_words: a word that is a token is taken as it is
    (tokenizers' `ignore_merges`). add_bos: what holds where the file does not say.
    """

    splits: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


def _known() -> dict[str, PreTokenizer]:
    table: dict[str, PreTokenizer] = {}

    def add(names: str, *splits: str, **how) -> None:
        table.update(dict.fromkeys(names.split(), PreTokenizer(splits, **how)))

    add("default", *_DEFAULT)
    add("gpt-2 phi-2 mellum gigachat a.x-4.0 exaone4 jais trillion granite-docling modern-bert", GPT2)
    add("mpt olmo", GPT2, nfc=True)
    # SmolLM's tokenizer.json: Digits(individual_digits) then ByteLevel. Its vocabulary agrees: not one of its 49,152
    # tokens has two digits. (transformers 5.23 does not know the name and leaves the digits together.)
    add("smollm starcoder refact codeshell exaone minerva-7b mellum2", *_DIGITS_GPT2)
    add("command-r", *_DIGITS_GPT2, nfc=True)
    add("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", _LLAMA3, whole_words=True, add_bos=True)
    add("dbrx smaug-bpe chatglm-bpe", _LLAMA3)
    add("glm4 glm5", _LLAMA3, whole_words=True)
    add("qwen2", _QWEN2, nfc=True)
    add("qwen35", _QWEN35, nfc=True)
    add("deepseek-r1-qwen stablelm2 kormo f2llmv2 megrez hunyuan solar-open grok-2", _QWEN2)
    add("tekken", _TEKKEN, whole_words=True, add_bos=True)
    add("gpt-4o llama4 kanana2 minimax-m2", _GPT4O)
    add("deepseek-coder", *_DEEPSEEK_CODER)
    add("deepseek-v3 hunyuan-dense joyai-llm", *_DEEPSEEK3)
    add("falcon", *_FALCON)
    add("bailingmoe bailingmoe2 llada-moe", _BAILING)
    add("seed-coder", _SEED)
    return table


PRE_TOKENIZERS = _known()


def pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """The cut of that name. ModelError if kvrun does not know it."""
    if found := PRE_TOKENIZERS.get(name):
        return found
    raise ModelError(f"{where}: unknown pre-tokenizer {show(name)} (tokenizer.ggml.pre); "
                     "use the model's safetensors folder, which carries its tokenizer.json")
