"""Measure attention without materialising it: what every layer and head looks at, in O(N) memory."""

from . import probes
from .exact import RowMasses, received_mass, row_masses
from .labelled import Labelled, load
from .labels import LABELS, head_labels
from .model import ModelProfile, profile_model
from .overlap import chance_overlap, overlap
from .probe import KeyProbe, Probe, RowProbe
from .profile import LayerProfile, profile_attention
from .record import Recording, record
from .show import plot, render_profile
from .stats import Estimate, Rows, stratified_mean, stratified_rows, weighted_quantile

__all__ = [
    "LABELS", "Estimate", "KeyProbe", "Labelled", "LayerProfile", "ModelProfile", "Probe", "Recording", "RowMasses", "RowProbe", "Rows",
    "chance_overlap", "head_labels", "load", "overlap", "plot", "probes", "profile_attention", "profile_model", "received_mass", "record",
    "render_profile", "row_masses", "stratified_mean", "stratified_rows", "weighted_quantile",
]  # fmt: skip
