"""Settings of the whole suite."""

import torch
from hypothesis import HealthCheck, settings

# The models here are so small that threads only wait for each other, on busy machines for long.
# tests/ops asks for two of them where threads are what is tested.
torch.set_num_threads(1)

# The same examples in every run: what fails in continuous integration, anybody can repeat.
settings.register_profile(
    "receptance",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("receptance")
