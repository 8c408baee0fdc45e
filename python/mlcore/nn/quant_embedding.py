"""An embedding table of quantized rows. A row is unpacked when it is looked up; the table itself never is."""

from __future__ import annotations

import torch

from ..quant import PackedWeight, pack
from .quant_linear import PackedModule


class QuantEmbedding(PackedModule):
    """torch.nn.Embedding with rows of 1 to 8 bits, for inference: the table is fixed.

    Args:
        num_embeddings, embedding_dim: as torch.nn.Embedding's; the table is initialized as there, then packed.
        format, group_size, symmetric: as mlcore.quant.pack's.
        dtype: of the result.

    Shape: numbers of rows (...), integers from 0 to num_embeddings - 1; y (..., embedding_dim).

    Raises:
        ValueError: as pack; input isn't of an integer dtype.
        IndexError: a number is out of range.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        format: str = "int8",
        group_size: int | None = None,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        table = torch.nn.Embedding(num_embeddings, embedding_dim).weight
        self.packed, self.dtype = pack(table, format, group_size=group_size, symmetric=symmetric), dtype

    @classmethod
    def from_packed(cls, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> QuantEmbedding:
        """The layer with this table."""
        layer = cls.__new__(cls)
        PackedModule.__init__(layer)
        layer.packed, layer.dtype = packed, dtype
        return layer

    @classmethod
    def from_embedding(cls, embedding: torch.nn.Embedding, format: str = "int8", **how) -> QuantEmbedding:
        """The layer with a torch.nn.Embedding's table packed by mlcore.quant.pack(weight, format, **how)."""
        if embedding.max_norm is not None:
            raise ValueError(f"QuantEmbedding: max_norm changes the table and must be None; got {embedding.max_norm}")
        return cls.from_packed(pack(embedding.weight, format, **how), embedding.weight.dtype).train(embedding.training)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(fn, recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"QuantEmbedding: input must be int32 or int64; got {input.dtype}")
        N, K = self.packed.shape
        rows = input.reshape(-1).long()
        if not torch.compiler.is_compiling() and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < N:
            raise IndexError(f"QuantEmbedding: input must be 0 to {N - 1}; got {int(rows.min())} to {int(rows.max())}")
        return self.packed.rows(rows, self.dtype).reshape(*input.shape, K)

    def extra_repr(self) -> str:
        p = self.packed
        return f"{p.shape[0]}, {p.shape[1]}, {p.format}, bits={p.bits}, group_size={p.group_size}"
