"""Every reader of foreign bytes, over what once broke it and what chance makes of valid files: it takes them or refuses them in one line."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from .mutate import mutate
from .targets import TARGETS

EXAMPLES = {"tokenizer": 60, "tokenizer_config": 300, "template": 300, "session": 500, "prompt_cache": 300, "slash": 200}
"""Inputs for each target: 1,000 where nothing is said."""


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_kept(name):
    """The corpus: valid files, and those that once broke the target. The valid ones are taken."""
    target = TARGETS[name]
    taken = {kept: target(data) for kept, data in target.corpus().items()}
    assert taken and any(taken.values()) and all(took for kept, took in taken.items() if kept.startswith("made"))


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files(name):
    target = TARGETS[name]
    corpus = sorted(target.corpus().values())

    @settings(max_examples=EXAMPLES.get(name, 1000), database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(corpus), st.integers(0, 2**32))
    def check(data, seed):
        target(mutate(data, Random(seed), target.kind))

    check()


def test_the_coverage_guided_fuzzer_runs(tmp_path):
    """The script that is run by hand, on a target that costs nothing."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris has no wheel for this Python (see the test extra)")
    script = Path(__file__).with_name("run.py")
    done = subprocess.run([sys.executable, str(script), "sanitizer", "--runs", "2000", "--findings", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "stat::number_of_executed_units" in done.stderr, done.stderr[-2000:]
    assert list((tmp_path / "sanitizer").iterdir()) == []
