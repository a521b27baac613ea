import math

from torch import Tensor


def assert_dim_for_fp8_exec(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert math.prod(tensor.shape[:-1]) % 8 == 0 and tensor.shape[-1] % 16 == 0, (
            f"FP8 execution requires rows divisible by 8 and columns divisible by 16, but got {list(tensor.size())}"
        )
