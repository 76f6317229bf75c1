"""How fast a model runs behind caches of several depths and formats, and how near that is to what memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence as Items
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from kvrun.cache.planner import attended_bytes, token_bytes
from kvrun.measure.divergence import decode_ms
from kvrun.measure.tracks import Model, Track

DECODE_STEPS = 4
"""Decode steps of a round."""


@dataclass(frozen=True)
class Speed:
    """One format at one depth (tokens in the cache). bytes_moved: weights and cache that a decode step reads and
    writes. bandwidth_share: bytes_moved in that time over the measured read bandwidth. no_cache_ms_per_token: of
    computing the whole prefix for each token; None where it was not asked for."""

    kv: str
    depth: int
    prefill_tokens_per_second: float
    ms_per_token: float
    tokens_per_second: float
    bytes_moved: int
    bandwidth_share: float | None
    no_cache_ms_per_token: float | None = None


def measure(model: Model, depths: Items[int], *, bandwidth: float | None, repeat: int, no_cache: bool, seed: int = 0,
            progress: Callable[[str, int, int | None], None] = lambda what, done, total: None) -> Iterator[list[Speed]]:
    """For each depth, ascending, a Speed of each track. model.n_ctx must reach a chunk beyond the deepest.

    Times are medians of `repeat` rounds in which the tracks take turns. Token ids are random: time does not depend on
    them. A depth is reached by prefill from the one before. bandwidth: bytes per second, None where unknown.
    """
    rng = np.random.default_rng(seed)
    chunk = model.plan.max_rows
    ids = rng.integers(0, model.plan.vocab_size, max(depths) + chunk).tolist()
    for depth in sorted(set(depths)):
        for track in model.tracks:
            while track.length < depth:
                track.prefill(ids[track.length : min(track.length + chunk, depth)])
                progress(f"{track.kv} to depth {depth}", track.length, depth)
        progress("decoding at depth", depth, None)
        decoding = decode_ms(model.tracks, ids[depth], rounds=repeat, steps=DECODE_STEPS)
        progress("reading at depth", depth, None)
        reading = _prefill_seconds(model.tracks, ids[depth : depth + chunk], repeat)
        whole = [None] * len(model.tracks)
        if no_cache:
            progress("without a cache at depth", depth, None)
            whole = _no_cache_ms(model.tracks, ids[: depth + 1], repeat)
        yield [_speed(model, track, depth, ms, chunk / seconds, without, bandwidth)
               for track, ms, seconds, without in zip(model.tracks, decoding, reading, whole, strict=True)]


def _speed(model: Model, track: Track, depth: int, ms: float, prefill: float, without: float | None, bandwidth: float | None) -> Speed:
    layouts = model.blueprint.layouts(track.kv, model.n_ctx)
    mean_depth = depth + 1 + (DECODE_STEPS + 1) // 2  # behind the step that warms up, with the row's own token
    moved = round(model.blueprint.read_bytes + attended_bytes(model.plan.groups, layouts, mean_depth) + token_bytes(layouts))
    share = None if bandwidth is None else moved / (ms / 1000) / bandwidth
    return Speed(track.kv, depth, prefill, ms, 1000 / ms, moved, share, without)


def _prefill_seconds(tracks: Items[Track], ids: list[int], repeat: int) -> list[float]:
    """Seconds to read one chunk behind what each cache holds. The caches are left as they were."""
    seconds: list[list[float]] = [[] for _ in tracks]
    for _ in range(repeat):
        for track, taken in zip(tracks, seconds, strict=True):
            length = track.length
            started = perf_counter()
            track.prefill(ids)
            taken.append(perf_counter() - started)
            track.rewind(length)
    return [float(np.median(taken)) for taken in seconds]


def _no_cache_ms(tracks: Items[Track], ids: list[int], repeat: int) -> list[float]:
    """Milliseconds to compute the whole prefix for one token. Each cache ends with all of `ids` but the last."""
    milliseconds = []
    for track in tracks:
        taken = []
        for _ in range(repeat):
            started = perf_counter()
            track.predict(ids)
            taken.append(1000 * (perf_counter() - started))
        track.rewind(len(ids) - 1)
        milliseconds.append(float(np.median(taken)))
    return milliseconds
