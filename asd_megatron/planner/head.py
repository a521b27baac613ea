"""Memory of the fused head: a tile of logits, hidden states of all tokens and their gradient (`ops.head_tiles`).

With n rows in a tile, v of the vocabulary's rows on the rank, N rows of the pack whose logits are computed, T tokens
and H hidden: the tile has 4 n v bytes (at most 512 MiB on a GPU); its gradient in bfloat16 has half of that beside it;
hidden states gathered over sequence-parallel ranks, their gradient of the N rows and of all T tokens have 2 T H each.
The weight's gradient is added to the float32 buffer in place; what autograd gets for it has the weight's size and no
contents.
"""

from __future__ import annotations

from dataclasses import dataclass

from asd_megatron.models.parameters import padded_vocabulary
from asd_megatron.ops.head_tiles import tile_rows
from asd_megatron.planner.activations import FLOAT, Activations


@dataclass(frozen=True)
class Head:
    """Of one pack on the last stage. rows: of the pack, whose logits are computed. exact: whether a tile holds the
    teacher's logits too."""

    activations: Activations
    rows: int
    exact: bool = False

    @property
    def vocabulary(self) -> int:
        """Rows of the weight on this rank."""
        layout = self.activations.training.layout
        return padded_vocabulary(self.activations.shape.vocab, layout.tensor) // layout.tensor

    @property
    def weight(self) -> float:
        """Bytes of the weight, and of a tensor like it."""
        return self.vocabulary * self.activations.shape.hidden * self.activations.element

    @property
    def tile(self) -> float:
        """Bytes of the tile's float32 logits: as many equal tiles as needed (`PairTiles` of two distributions)."""
        block = tile_rows(self.vocabulary, on_gpu=not self.activations.on_cpu)
        share = 1.0
        if self.exact:
            divided = self.activations.on_cpu and self.activations.training.layout.tensor == 1
            block, share = (block * 7 // 8, 4 / 3) if divided else (block * 2 // 3, 2.0)
        tiles = -(-self.rows // block)
        return FLOAT * share * -(-self.rows // max(tiles, 1)) * self.vocabulary

    @property
    def gradient(self) -> float:
        """Bytes of the tile's gradient beside it: in the products' dtype, in the tile itself where that is float32."""
        return self.tile / 2 if self.activations.element < FLOAT else 0.0

    @property
    def _rows_hidden(self) -> float:
        return self.rows * self.activations.shape.hidden * self.activations.element

    @property
    def _all_hidden(self) -> float:
        return self.activations.tokens * self.activations.shape.hidden * self.activations.element

    def forward(self) -> float:
        """When its forward pass, which computes the gradients too, needs most: in the tiles, or after them, when the
        gradient of the rows becomes that of all tokens."""
        scattered = self._all_hidden + (self.activations.hidden if self.activations.gathered else 0.0)
        return self.activations.gathered + self.tile + self._rows_hidden + max(self.gradient, scattered)

    def dummy(self) -> float:
        """The empty gradient of the weight; of a tied one it lives until the embedding's gradient is there."""
        return self.weight

    def scoring(self) -> float:
        """Without gradients."""
        return self.activations.gathered + self.tile
