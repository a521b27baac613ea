import torch
from torch import Tensor
from transformer_engine.pytorch.module.fp8_padding import alignment


class Fp8Unpadding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms, self.align_size = num_gemms, align_size

    def forward(self, inp: Tensor, m_splits: list[int]) -> Tensor:
        assert len(m_splits) == self.num_gemms
        if self.align_size is None:
            self.align_size = alignment()
        padded = [-(-m // self.align_size) * self.align_size for m in m_splits]
        return torch.cat([x[:n] for x, n in zip(torch.split(inp, padded), m_splits, strict=True)])
