"""The CUDA architecture of this machine's GPU, as CMake names it: 90-real. Nothing where torch sees none."""

import torch

if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}-real")
