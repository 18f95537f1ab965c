"""FE-LSD (arXiv 2211.07365): line segments in a blurred frame with the events of its exposure."""

from .backbone import FusionBackbone
from .detector import LineDetector
from .targets import LineMaps

__all__ = ["FusionBackbone", "LineDetector", "LineMaps"]
