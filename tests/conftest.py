"""Settings of the whole suite."""

import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

# The models here are so small that threads only wait for each other, on busy machines for long.
# tests/ops asks for two of them where threads are what is tested.
torch.set_num_threads(1)

# A shell that starts the suite in the background makes it ignore Ctrl-C, which the processes that
# tests start and interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run: what fails in continuous integration, anybody can repeat.
settings.register_profile(
    "receptance",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("receptance")

# Hypothesis draws constants of the modules that are loaded as well, which other tests decide.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-randomly, where it is loaded, decide the order alone and not what a test draws."""
    config.option.randomly_reset_seed = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Seed the global generators before each test and its fixtures, and restore them afterwards.

    What a test draws then depends neither on the tests that ran before it nor on their order.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    found = yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])
    return found
