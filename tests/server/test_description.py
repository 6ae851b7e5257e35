"""schemathesis asks every operation of /openapi.json, with right and with wrong requests."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from running_server import make_served, start

# What no schema can say is refused with 400 as well, such as a best_of that is not n.
_LEFT_OUT = "positive_data_acceptance"


@pytest.mark.slow  # 15 requests for each of 27 operations
@pytest.mark.parametrize("phase", ["coverage", "fuzzing", "stateful"])
def test_the_server_keeps_to_its_description(phase, tmp_path):
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    words = ["run", "--phases", phase, "--max-examples", "15", "--seed", "1"]
    words += ["--checks", "all", "--exclude-checks", _LEFT_OUT, "--max-response-time", "600"]
    words += ["--request-timeout", "600"]  # some prompts have 80,000 tokens
    # The interpreter's own paths: the child may not find a package that was put beside it.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for running in start([make_served("tiny", max_tokens=32)]):
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *words, f"{running.url}/openapi.json"],
            cwd=tmp_path,
            env=variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-20_000:]
