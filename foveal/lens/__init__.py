"""Measure attention without materialising it: what every layer and head looks at, in O(N) memory."""

from .exact import RowMasses, received_mass, row_masses
from .labels import LABELS, head_labels
from .model import ModelProfile, profile_model
from .overlap import chance_overlap, overlap
from .profile import LayerProfile, profile_attention
from .show import plot, render_profile
from .stats import Estimate, Rows, stratified_mean, stratified_rows, weighted_quantile

__all__ = [
    "LABELS", "Estimate", "LayerProfile", "ModelProfile", "RowMasses", "Rows", "chance_overlap", "head_labels", "overlap", "plot",
    "profile_attention", "profile_model", "received_mass", "render_profile", "row_masses", "stratified_mean", "stratified_rows",
    "weighted_quantile",
]  # fmt: skip
