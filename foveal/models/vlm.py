"""A vision-language model in one piece: vision encoder → projector → decoder, on transformers' own modules.

Because it is a transformers model, policies, probes and interventions attach to it as to any other. The tiny one for tests and
planted effects is trained from scratch; the small real one joins DINOv2-S and SmolLM2 (``foveal.recipes.vlm``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Dinov2Config,
    Dinov2Model,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..core.errors import ConfigError, ShapeError


class VLMConfig(PreTrainedConfig):
    """Configuration of :class:`VLM`.

    Args:
        text_config: a LlamaConfig. vision_config: a Dinov2Config. image_token_id: placeholder of an image token.
        shuffle: image tokens are joined in squares of this side, their features side by side.
        hidden: width inside the projector.
    """

    model_type = "foveal_vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 - transformers' own form

    def __init__(
        self, text_config: Any = None, vision_config: Any = None, image_token_id: int = 3, shuffle: int = 1, hidden: int = 128, **kwargs: Any
    ) -> None:  # fmt: skip
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.vision_config = (
            Dinov2Config(**vision_config) if isinstance(vision_config, dict) else vision_config or Dinov2Config()
        )
        self.image_token_id, self.shuffle, self.hidden = image_token_id, shuffle, hidden
        super().__init__(**kwargs)


class VLM(PreTrainedModel, GenerationMixin):
    """``model(input_ids, pixel_values=…)``: features of the pictures take the places of the image tokens, in order."""

    config_class = VLMConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VLMConfig) -> None:
        super().__init__(config)
        self.vision = Dinov2Model(config.vision_config)
        wide = config.vision_config.hidden_size * config.shuffle**2
        self.projector = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.text_config.hidden_size)
        )  # fmt: skip
        self.decoder = LlamaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The decoder's token embeddings."""
        return self.decoder.get_input_embeddings()

    def features(self, pixel_values: Tensor) -> Tensor:
        """Pictures ``(n, 3, S, S)`` → what the projector reads, ``(n, tokens, width)``; the part that does not depend on it."""
        patches = self.vision(pixel_values).last_hidden_state[:, 1:]
        return shuffled(patches, self.config.shuffle)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, as transformers' causal models give them.

        Args:
            input_ids: ``(B, N)``. pixel_values: ``(n, 3, S, S)`` pictures in the order of their tokens; or
            image_features: ``(n, tokens, width)`` from :meth:`features`.

        Raises:
            ShapeError: another number of image tokens than features.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if image_features is None and pixel_values is not None:
                image_features = self.features(pixel_values)
            if image_features is not None:
                assert input_ids is not None
                inputs_embeds = self._placed(input_ids, inputs_embeds, self.projector(image_features))
        return self.decoder(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def _placed(self, ids: Tensor, embeds: Tensor, tokens: Tensor) -> Tensor:
        at = (ids == self.config.image_token_id)[..., None].expand_as(embeds)
        if int(at[..., 0].sum()) != tokens.shape[0] * tokens.shape[1]:
            raise ShapeError(
                f"input_ids holds {int(at[..., 0].sum())} image tokens and the pictures have {tokens.shape[0]} × {tokens.shape[1]}."
            )
        return embeds.masked_scatter(at, tokens.to(embeds.dtype))

    def prepare_inputs_for_generation(self, input_ids: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers does it; pictures belong to the prompt alone."""
        mixin: Any = GenerationMixin
        out: dict[str, Any] = mixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        cache = out.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            out |= {"pixel_values": None, "image_features": None}
        return out


def shuffled(patches: Tensor, side: int) -> Tensor:
    """``(n, h·w, C)`` of a square grid → ``(n, h·w / side², C·side²)``: squares of patches joined, raster order kept.

    Raises:
        ShapeError: no square grid, or one that ``side`` does not divide.
    """
    n, count, width = patches.shape
    edge = round(count**0.5)
    if edge * edge != count or edge % side:
        raise ShapeError(f"{count} patches are no square grid whose side is a multiple of {side}.")
    new = edge // side
    grid = patches.view(n, new, side, new, side, width).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(n, new * new, width * side * side)


@dataclass
class Reader:
    """Questions in and answers out of a :class:`VLM`: the object that ``foveal.steer.carve`` takes as a processor.

    Attributes:
        encode, decode_ids: text to token ids and back. image_token_id, tokens: placeholder and its number per picture.
        side: pictures become squares of this many pixels, padded with ``fill`` and resized.
        before, after: text before the pictures, and after them with ``{question}``. mean, std: of pixel values from 0 to 1.
    """

    encode: Callable[[str], Sequence[int]]
    decode_ids: Callable[[Sequence[int]], str]
    image_token_id: int
    tokens: int
    side: int
    before: str = ""
    after: str = "{question}"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: tuple[int, int, int] = (235, 235, 235)
    pads_to_square: bool = field(default=True, init=False)

    def pixels(self, images: Sequence[Any]) -> Tensor:
        """Pictures → ``(n, 3, side, side)`` float32."""
        from ..steer.picture import pixels_of, resized

        out = []
        for image in images:
            x = pixels_of(image)
            edge = max(x.shape[:2])
            if x.shape[0] != x.shape[1]:
                square = np.broadcast_to(np.array(self.fill, np.uint8), (edge, edge, 3)).copy()
                top, left = (edge - x.shape[0]) // 2, (edge - x.shape[1]) // 2
                square[top : top + x.shape[0], left : left + x.shape[1]] = x
                x = square
            out.append(torch.from_numpy(resized(x, self.side, self.side).astype(np.float32)) / 255)
        stacked = torch.stack(out).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return ((stacked - mean) / std).contiguous()

    def prompt(self, question: str, pictures: int = 1) -> list[int]:
        """Token ids of a question about pictures."""
        text = self.after.replace("{question}", question)
        return [*self.encode(self.before), *[self.image_token_id] * (self.tokens * pictures), *self.encode(text)]

    def prepare(self, images: Sequence[Any], question: str) -> dict[str, Any]:
        """Inputs of one request."""
        ids = torch.tensor([self.prompt(question, len(images))])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels(images)}

    def decode(self, ids: Tensor) -> str:
        """Text of generated ids."""
        return self.decode_ids(ids.tolist()).strip()


class Words:
    """A tokenizer of whole words for small vocabularies; ids 0 to 3 are padding, start, end and the image token."""

    PAD, BOS, EOS, IMAGE = range(4)

    def __init__(self, words: Sequence[str]) -> None:
        self.words = ("<pad>", "<bos>", "<eos>", "<image>", *dict.fromkeys(words))
        self.ids = {word: i for i, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Ids of words separated by spaces.

        Raises:
            ConfigError: a word that is not known.
        """
        unknown = [w for w in text.split() if w not in self.ids]
        if unknown:
            raise ConfigError(f"the word {unknown[0]!r} is not in this vocabulary of {len(self.words)} words.")
        return [self.ids[w] for w in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """Words up to the end token, without special ones."""
        out = []
        for i in ids:
            if i == self.EOS:
                break
            out += [self.words[i]] if i > self.IMAGE else []
        return " ".join(out)


def tiny_vlm(words: Words, *, side: int = 48, patch: int = 8, dim: int = 96, layers: int = 4, heads: int = 6, seed: int = 0) -> tuple[VLM, Reader]:  # fmt: skip
    """A model from scratch of about half a million weights, and its reader: one vision layer, 36 image tokens.

    Args:
        side, patch: of pictures, in pixels. dim, layers, heads: of the decoder. seed: of the weights.
    """
    count = (side // patch) ** 2
    text = LlamaConfig(
        vocab_size=len(words.words), hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=2 * dim, max_position_embeddings=512, pad_token_id=words.PAD, bos_token_id=words.BOS, eos_token_id=words.EOS,
        tie_word_embeddings=False,
    )  # fmt: skip
    vision = Dinov2Config(
        hidden_size=dim,
        num_hidden_layers=1,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=side,
        patch_size=patch,
        drop_path_rate=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VLM(VLMConfig(text_config=text, vision_config=vision, image_token_id=words.IMAGE, hidden=2 * dim))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = words.PAD, words.EOS
    reader = Reader(words.encode, words.decode, words.IMAGE, count, side, before="<bos>")
    return model, reader
