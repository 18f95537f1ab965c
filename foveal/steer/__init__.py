"""Change a model's attention while it runs: heads, keys, the user's text, image sinks, image-sensitive heads, and the image itself."""

from .apply import apply, report
from .carve import Carved, carve
from .context import ContextSteering
from .heads import HeadScale
from .keys import Knockout
from .var import VAR, find_sink_dims
from .vhd import t_vhd, vhd
from .vhr import VHR

__all__ = [
    "VAR",
    "VHR",
    "Carved",
    "ContextSteering",
    "HeadScale",
    "Knockout",
    "apply",
    "carve",
    "find_sink_dims",
    "report",
    "t_vhd",
    "vhd",
]
