"""A LLaVA folder small enough for a test: random weights, a tokenizer of whole words, and a processor."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from tests.steer.models import IMAGE, build

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "colour", "is", "the", "red", "cat", "map", "?", ":", "Q", "A"]
TEMPLATE = (
    "{% for m in messages %}Q : {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %} A :{% endfor %}"
)


def write_tiny_vlm(folder: Path) -> Path:
    """Write the folder and return it."""
    vocab = (
        {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), IMAGE)} | {"<image>": IMAGE}
    )
    tokens = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    image = hf.CLIPImageProcessor(size={"height": 16, "width": 16}, do_center_crop=False)
    processor = hf.LlavaProcessor(
        image, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=TEMPLATE, num_additional_image_tokens=1
    )  # fmt: skip
    model = build("llava", torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
