"""Which formats there are, what they take, and which models cannot have them."""

import pytest

from kvrun.backends.plan import CacheGroup
from kvrun.cache.formats import PAGE, check_head_dim, group_layout, kv_name, page_head_bytes, resolve_kv, side_bytes
from kvrun.errors import UsageError

FORMATS = ("f32", "f16", "bf16", "q8", "q4")


def test_names() -> None:
    assert resolve_kv("f16", "float16") == ("f16", "f16")
    assert resolve_kv("f16", "bfloat16") == ("bf16", "bf16")
    assert resolve_kv("q8", "bfloat16") == ("q8", "q8")
    assert resolve_kv("q8/q4", "float16") == ("q8", "q4")
    assert resolve_kv("f16/q4", "bfloat16") == ("bf16", "q4")
    assert resolve_kv("q4/f16", "float16") == ("q4", "f16")
    assert resolve_kv("f32/f32", "bfloat16") == ("f32", "f32")
    for kv in ("f16", "f32", "q8", "q4", "q8/q4", "f16/q4", "q4/f16"):
        for dtype in ("float16", "bfloat16"):
            assert kv_name(resolve_kv(kv, dtype)) == kv


@pytest.mark.parametrize("kv", ["q3", "", "/", "q8/", "/q4", "q8/q4/q4", "Q8", "bf16", "q8 /q4", "f32/q8", "q4/f32", "q4_0"])
def test_what_is_no_format_is_refused_by_name(kv: str) -> None:
    with pytest.raises(UsageError) as refused:
        resolve_kv(kv, "bfloat16")
    assert f"--kv {kv}:" in str(refused.value) and "\n" not in str(refused.value)


def test_heads_that_no_quantized_page_holds() -> None:
    for head_dim in (72, 34, 8, 272):
        check_head_dim(("bf16", "f16"), head_dim)
        for kv in (("q8", "q8"), ("q4", "q4"), ("bf16", "q4"), ("q8", "f16")):
            with pytest.raises(UsageError, match=rf"{head_dim}.*multiple of 16"):
                check_head_dim(kv, head_dim)
    for head_dim in (16, 48, 64, 80, 96, 128, 256):
        check_head_dim(("q4", "q4"), head_dim)


def test_bits_per_value() -> None:
    """8.5 bits in q8, at most 4.5 in q4, for the head sizes that models have."""
    for d in (64, 128, 256):
        k8, v8 = (page_head_bytes("q8", d, is_v=v) * 8 / (PAGE * d) for v in (False, True))
        k4, v4 = (page_head_bytes("q4", d, is_v=v) * 8 / (PAGE * d) for v in (False, True))
        assert k8 == v8 == 8.5
        assert 4 < k4 <= 4.5 and 4 < v4 <= 4.5


def test_layout_of_a_group() -> None:
    group = CacheGroup(0, (0, 1, 2), 2, 64)
    layout = group_layout(group, "q8", "q4", 5)
    assert layout.v_offset == 2 * 128 * 68 and layout.layer_stride == layout.v_offset + 2 * 128 * 36
    assert layout.page_stride == 3 * layout.layer_stride
    assert layout.side_bytes == 3 * 2 * 144 * 64 * 2             # V alone: the open page and 16 first positions
    assert layout.n_bytes == 5 * layout.page_stride + layout.side_bytes
    assert group_layout(group, "q8", "bf16", 5).side_bytes == 0


def test_sizes_are_the_kernels_own() -> None:
    from kvrun.backends.native import DTYPES as dtypes, lib

    for d in (16, 48, 64, 80, 96, 128, 256):
        for k in FORMATS:
            for is_v in (False, True):
                assert lib.kv_page_bytes(dtypes[k], d, is_v) == page_head_bytes(k, d, is_v=is_v), (k, d, is_v)
            for v in FORMATS:
                for heads in (1, 2, 3, 8):
                    assert lib.kv_side_bytes(dtypes[k], dtypes[v], heads, d) == side_bytes(k, v, heads, d), (k, v, heads, d)
