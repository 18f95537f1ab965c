"""``foveal compress``: SHRP on a sentence encoder, from the original to a pruned copy and what it kept."""

from .options import CompressOptions
from .run import run_compress
from .saved import load_compressed

__all__ = ["CompressOptions", "load_compressed", "run_compress"]
