"""A chat that goes on and on, for a short while: see soak.py, which runs for half an hour by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_short_soak():
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "0.3", "--restart", "0.05"], capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["answers"] > 0 and result["wrong"] is None
