"""One thread an operation: the tests run in as many processes as there are cores."""

import torch

torch.set_num_threads(1)
