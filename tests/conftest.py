"""What holds for every test: one thread, so that test processes side by side don't fight for cores."""

import torch

torch.set_num_threads(1)
