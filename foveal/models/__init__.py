"""Small shared backbones, each taking its attention from a factory, so that a paper's experiment is a configuration."""

from .affordance import EEGtGAT
from .basenet import BaseNet
from .blocks import AttentionFactory, Hosted, Memory, Pass, Recurrent, SelfAttention
from .decoder_lm import DecoderLM
from .diffusion_lm import DiffusionLM
from .dit import DiT
from .resnet import MobileNetV2, ResNet
from .shift import Shifted, shifted_factory
from .vit import ViT

__all__ = [
    "AttentionFactory",
    "BaseNet",
    "DecoderLM",
    "DiT",
    "DiffusionLM",
    "EEGtGAT",
    "Hosted",
    "Memory",
    "MobileNetV2",
    "Pass",
    "Recurrent",
    "ResNet",
    "SelfAttention",
    "Shifted",
    "ViT",
    "shifted_factory",
]
