"""Small shared backbones, each taking its attention from a factory, so that a paper's experiment is a configuration."""

from .blocks import AttentionFactory, Hosted, Memory, Pass, Recurrent, SelfAttention
from .affordance import EEGtGAT
from .basenet import BaseNet
from .blocks import AttentionFactory, Memory, Pass, SelfAttention
from .decoder_lm import DecoderLM
from .diffusion_lm import DiffusionLM
from .dit import DiT
from .resnet import MobileNetV2, ResNet
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
    "BaseNet",
    "DecoderLM",
    "DiT",
    "DiffusionLM",
    "EEGtGAT",
    "Memory",
    "MobileNetV2",
    "Pass",
    "ResNet",
    "SelfAttention",
    "ViT",
]
