"""Where the settings of a draw come from."""

import pytest

from kvrun.backends.batch import Sampler
from kvrun.cli.options import SamplingOptions, build_sampler
from kvrun.errors import UsageError

ALIAS = {"temperature": 0.2, "top_p": 0.9, "repetition_penalty": 1.1}
CONFIG = {"do_sample": True, "temperature": 0.6, "top_k": 20}


def test_flags_win_over_the_model_s_file_and_that_over_the_alias():
    options = SamplingOptions(seed=1, temperature=0.8)
    assert build_sampler(options, CONFIG, ALIAS) == Sampler(1, temperature=0.8, top_k=20, top_p=0.9, repeat_penalty=1.1)
    assert build_sampler(SamplingOptions(seed=1), CONFIG, ALIAS).temperature == 0.6
    assert build_sampler(SamplingOptions(seed=1), {}, ALIAS).temperature == 0.2


def test_nobody_says_anything():
    assert build_sampler(SamplingOptions(), {}, {}) == Sampler()


def test_do_sample_of_the_model_s_file():
    assert build_sampler(SamplingOptions(), CONFIG | {"do_sample": False}, ALIAS).temperature == 0
    assert build_sampler(SamplingOptions(seed=1), {"do_sample": True}, {}).temperature == 1
    assert build_sampler(SamplingOptions(temperature=0.0), CONFIG, ALIAS).temperature == 0


def test_a_seed_is_drawn_only_where_it_matters():
    warm = SamplingOptions(temperature=1.0)
    assert len({build_sampler(warm, {}, {}).seed for _ in range(4)}) > 1
    assert build_sampler(SamplingOptions(), {}, {}).seed == 0
    assert build_sampler(SamplingOptions(temperature=1.0, seed=0), {}, {}).seed == 0


def test_a_model_s_file_that_holds_nonsense():
    with pytest.raises(UsageError, match="generation_config.json: temperature"):
        build_sampler(SamplingOptions(), {"temperature": "warm"}, {})
