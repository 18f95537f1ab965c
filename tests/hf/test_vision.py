"""Image tokens and their wrappers, found in config, processor, ids and embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from foveal.core.errors import UnsupportedError
from foveal.hf.vision import forward_inputs, image_tokens, visual_mask
from foveal.steer.carve import ProcessorDoor
from tests.steer.models import FAMILIES, IMAGE, build, prompt


class Tokenizer:
    def get_added_vocab(self) -> dict[str, int]:
        return {
            "<fake_token_around_image>": 40,
            "<row_1_col_2>": 41,
            "<global-img>": 42,
            "<end_of_utterance>": 43,
            "<image>": IMAGE,
        }


class Processor:
    """Behaves as SmolVLM's: a chat template, a picture processor that may split, a tokenizer with wrappers."""

    tokenizer = Tokenizer()

    class image_processor:
        do_image_splitting = True

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        return " ".join(part.get("text", "<image>") for part in messages[0]["content"])

    def __call__(self, images: Any, text: Any, return_tensors: str, do_image_splitting: bool) -> dict[str, Any]:
        return {"text": text, "count": len(images), "split": do_image_splitting}

    def batch_decode(self, ids: Any, skip_special_tokens: bool) -> list[str]:
        return [" seven "]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ids_come_from_the_config(family: str) -> None:
    tokens = image_tokens(build(family))
    assert tokens.ids[0] == IMAGE
    assert tokens.wrappers == ((58, 57) if family.startswith("qwen") else ())
    ids = prompt(family)["input_ids"]
    assert torch.equal(tokens.mask(ids), ids == IMAGE) and torch.equal(tokens.text(ids), ids < 57)


def test_wrappers_come_from_the_processor() -> None:
    model = build("smolvlm")
    assert image_tokens(model, Processor()).wrappers == (40, 41, 42)
    assert image_tokens(model, Tokenizer(), wrappers=[7]).wrappers == (7, 40, 41, 42)


def test_image_tokens_are_found_in_placeholder_embeddings() -> None:
    model, request = build("llava"), prompt("llava")
    tokens = image_tokens(model)
    embeds = model.get_input_embeddings()(request["input_ids"])
    assert torch.equal(visual_mask(tokens, {"inputs_embeds": embeds}, model), request["input_ids"] == IMAGE)
    with pytest.raises(UnsupportedError, match="was called without input_ids"):
        visual_mask(tokens, {}, model)
    assert forward_inputs(model, (request["input_ids"],), {"use_cache": False}).keys() == {"input_ids", "use_cache"}


def test_text_models_and_encoders_have_none() -> None:
    for cls, config in ((hf.LlamaForCausalLM, hf.LlamaConfig), (hf.BertModel, hf.BertConfig)):
        model = cls(
            config(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )
        with pytest.raises(UnsupportedError, match=f"{cls.__name__} has no image tokens.*LLaVA"):
            image_tokens(model)


def test_questions_through_a_processor() -> None:
    way = ProcessorDoor(Processor())
    assert way.prepare(["a", "b"], "how many?") == {"text": ["<image> <image> how many?"], "count": 2, "split": False}
    assert way.decode(torch.tensor([3])) == "seven"
