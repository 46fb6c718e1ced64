"""Where the elements of a tensor lie: one or more boxes in global coordinates, each in some object.

A safetensors file holds a tensor whole: one region. A sharded checkpoint (torch DCP) holds one region
per rank that saved a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tasks.checkpoints.safetensors_header import tensor_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A box of a tensor whose elements lie row-major in one object."""

    key: str
    """Object below the checkpoint's folder."""
    offset: int
    """First byte of the elements in the object, or of the archive that holds them."""
    start: tuple[int, ...]
    """Global coordinates of the first element."""
    shape: tuple[int, ...]
    """Extent."""
    archive_bytes: int = 0
    """0 for bare elements; else the length of the torch.save archive at ``offset``, in which they are found when read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """A stored tensor: what it is, and the regions that tile it."""

    dtype: str
    """safetensors dtype, such as ``F32`` or ``BF16``."""
    shape: tuple[int, ...]
    """Global shape."""
    regions: tuple[Region, ...]
    """Boxes that hold every element exactly once."""
    digest: str = ""
    """BLAKE3 of the tensor's row-major bytes; empty where it is not known."""

    @property
    def num_elements(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all elements."""
        return tensor_bytes(self.dtype, self.shape)
