"""Small shared backbones, each taking its attention from a factory, so that a paper's experiment is a configuration."""

from .blocks import AttentionFactory, Memory, Pass, SelfAttention
from .decoder_lm import DecoderLM
from .diffusion_lm import DiffusionLM
from .dit import DiT
from .shift import Shifted, shifted_factory
from .vit import ViT

__all__ = [
    "AttentionFactory",
    "DecoderLM",
    "DiT",
    "DiffusionLM",
    "Memory",
    "Pass",
    "SelfAttention",
    "Shifted",
    "ViT",
    "shifted_factory",
]
