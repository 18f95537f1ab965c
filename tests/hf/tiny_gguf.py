"""A GGUF file small enough for a test: a Llama of two layers with random weights and a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

WIDTH, HEADS, KV_HEADS, INNER, LAYERS, CONTEXT = 32, 4, 2, 64, 2, 128


def write_tiny_gguf(path: Path, seed: int = 0, architecture: str = "llama") -> Path:
    """Write the file and return its path; other seeds give other weights."""
    rng = np.random.default_rng(seed)
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "Ġt", "he"]
    w = gguf.GGUFWriter(path, architecture)
    w.add_name("tiny")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list(tokens)
    w.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    w.add_token_merges(["Ġ t", "h e"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)

    def add(name: str, *shape: int) -> None:
        w.add_tensor(name, (rng.standard_normal(shape) * 0.1).astype(np.float32))

    kv = WIDTH // HEADS * KV_HEADS
    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name, shape in {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }.items():
            add(f"blk.{i}.{name}.weight", *shape)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def write_tiny_folder(parent: Path) -> Path:
    """The same model as a folder of transformers in ``parent``, which loads faster than the GGUF file."""
    from foveal.hf.load import load_model

    loaded = load_model(write_tiny_gguf(parent / "tiny.gguf"), cache_dir=parent / "cache", device="cpu")
    folder = parent / "tiny"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder
