"""Context parallelism: one sequence spread over the ranks of ``torch.distributed``, attention equal to one process."""

from .attention import METHODS, context_parallel_attention, mask_of, mesh_for
from .mesh import RankMesh, rank_mesh
from .partition import PARTITIONS, Partition
from .transport import Meter, RankError
from .volumes import FORMULAS, Volume, volume

__all__ = [
    "FORMULAS",
    "METHODS",
    "PARTITIONS",
    "Meter",
    "Partition",
    "RankError",
    "RankMesh",
    "Volume",
    "context_parallel_attention",
    "mask_of",
    "mesh_for",
    "rank_mesh",
    "volume",
]
