"""One thread an operation: the tests run in as many processes as there are cores. And nothing is timed."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile("cdclean", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cdclean")
