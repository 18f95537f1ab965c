"""Small shared backbones, each taking its attention from a factory, so that a paper's experiment is a configuration."""

from .blocks import AttentionFactory, Hosted, Memory, Pass, Recurrent, SelfAttention
from .decoder_lm import DecoderLM
from .diffusion_lm import DiffusionLM
from .dit import DiT
from .vit import ViT

__all__ = [
    "AttentionFactory",
    "DecoderLM",
    "DiT",
    "DiffusionLM",
    "Hosted",
    "Memory",
    "Pass",
    "Recurrent",
    "SelfAttention",
    "ViT",
]
