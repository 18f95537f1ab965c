"""The vision-language model in one piece: pictures in their places, caches, saving, and the reader around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import foveal
from foveal.core.errors import ConfigError, ShapeError
from foveal.data import scenes
from foveal.models.vlm import VLM, Reader, Words, shuffled, tiny_vlm
from foveal.patterns import SlidingWindow

WORDS = Words(["a", "b", "c", "red", "circle", "?"])


def tiny() -> tuple[VLM, Reader]:
    model, reader = tiny_vlm(WORDS, side=24, dim=24, layers=3, heads=2)
    return model.eval(), reader


def picture(seed: int = 0, side: int = 24) -> np.ndarray:
    return scenes.render(scenes.scene(torch.Generator().manual_seed(seed), 3), side)


def test_features_take_the_places_of_image_tokens() -> None:
    model, reader = tiny()
    inputs = reader.prepare([picture()], "a red circle ?")
    with torch.no_grad():
        logits = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        at = inputs["input_ids"][0] == WORDS.IMAGE
        embeds[0, at] = model.projector(model.features(inputs["pixel_values"]))[0]
        assert torch.equal(model.decoder(inputs_embeds=embeds).logits, logits)
        assert torch.allclose(
            model(inputs["input_ids"], image_features=model.features(inputs["pixel_values"])).logits, logits, atol=1e-6
        )
        other = model(**reader.prepare([picture(1)], "a red circle ?")).logits
    assert int(at.sum()) == reader.tokens == 9
    assert not torch.allclose(other[:, -1], logits[:, -1])


def test_cached_generation_equals_recomputing_and_policies_attach() -> None:
    model, reader = tiny()
    inputs = reader.prepare([picture()], "a red circle ?")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[2, 3])
        for t in range(4):
            ids = out[:, : inputs["input_ids"].shape[1] + t]
            scores = model(ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
            scores[[2, 3]] = -torch.inf
            assert int(scores.argmax()) == int(out[0, ids.shape[1]])
        plain = model(**inputs).logits
        with foveal.attach(model, SlidingWindow(window=3)) as handle:
            assert handle.num_layers == 3, "the decoder's layers alone"
            assert not torch.allclose(model(**inputs).logits, plain)
        assert torch.equal(model(**inputs).logits, plain)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, reader = tiny()
    inputs = reader.prepare([picture()], "a ?")
    model.save_pretrained(tmp_path)
    again = VLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_shuffle_joins_squares_in_raster_order() -> None:
    patches = torch.arange(16.0).view(1, 16, 1)
    assert shuffled(patches, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(shuffled(patches, 1), patches)
    with pytest.raises(ShapeError, match="multiple of 3"):
        shuffled(patches, 3)


def test_the_reader_pads_to_squares_and_reads_words() -> None:
    _, reader = tiny()
    wide = np.full((10, 30, 3), 255, np.uint8)
    pixels = reader.pixels([wide])
    assert pixels.shape == (1, 3, 24, 24)
    assert float(pixels[0, 0, 12, 12]) == pytest.approx(1.0) and float(pixels[0, 0, 0, 0]) == pytest.approx(
        235 / 255 * 2 - 1
    )
    assert reader.decode(torch.tensor([6, 5, WORDS.EOS, 7])) == "c b"
    with pytest.raises(ConfigError, match="the word 'purple' is not in this vocabulary of 10 words"):
        reader.prompt("a purple circle")


def test_a_wrong_number_of_image_tokens_is_refused() -> None:
    model, reader = tiny()
    inputs = reader.prepare([picture()], "a ?")
    with pytest.raises(ShapeError, match="holds 8 image tokens and the pictures have 1 × 9"):
        model(inputs["input_ids"][:, 2:], pixel_values=inputs["pixel_values"])
