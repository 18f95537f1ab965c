"""The main job: which attention should this model use at this context on this machine, and what does it cost?"""

from .options import TuneOptions
from .run import run_tune

__all__ = ["TuneOptions", "run_tune"]
