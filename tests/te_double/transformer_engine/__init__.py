"""A stand-in for Transformer Engine on CPUs: the names, signatures and assertions that Megatron-Core and this project
use, in plain PyTorch. Every file has the path of the file that it stands for (`test_signatures.py` compares them).

It computes in the dtype that it is given, float32 included, and emulates FP8 by rounding to e4m3 and e5m2. It shows
names, sharding, gradients, alignment and state; not kernels, cuDNN's choice of attention, overlap or speed.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
STAND_IN = True
__all__ = ["common", "pytorch"]
