"""What can be recorded of attention, one file a probe; ``foveal.lens.record`` runs them."""

from .atlas import Atlas
from .divergence import HeadDivergence
from .edges import TopEdges
from .entropy import Entropy
from .importance import HeadImportance
from .influence import Influence, SinkScore
from .lookback import LookBack
from .lost import Lost
from .mass import Mass
from .norms import KeyValueNorms
from .received import Received
from .rows import ChosenRows
from .windowed import WindowedDistance

__all__ = [
    "Atlas", "ChosenRows", "Entropy", "HeadDivergence", "HeadImportance", "Influence", "KeyValueNorms", "LookBack", "Lost", "Mass", "Received",
    "SinkScore", "TopEdges", "WindowedDistance",
]  # fmt: skip
