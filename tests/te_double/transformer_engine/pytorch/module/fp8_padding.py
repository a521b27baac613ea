import torch
import torch.nn.functional as F
from torch import Tensor
from transformer_engine.pytorch.quantization import FP8GlobalStateManager


def alignment() -> int:
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    return 32 if recipe is not None and recipe.mxfp8() else 16


class Fp8Padding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        assert len(m_splits) == self.num_gemms
        if self.align_size is None:
            self.align_size = alignment()
        padded = [-(-m // self.align_size) * self.align_size for m in m_splits]
        parts = [F.pad(x, (0, 0, 0, n - len(x))) for x, n in zip(torch.split(inp, m_splits), padded, strict=True)]
        return torch.cat(parts), padded
