"""The run of ``foveal compress``: convert, train with routing, count usage, prune, train a little, measure, save."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bench.timing import interleaved, speedups
from ..core.errors import ConfigError, UnsupportedError
from ..core.provenance import provenance
from ..data import text
from ..data.sentences import Pairs, sentence_pairs
from ..hf.encoder import LoadedEncoder, load_encoder
from ..recipes import shrp
from ..recipes.fit import fit
from ..recipes.shrp_cost import Shape
from ..recipes.shrp_hosts import Converted, places
from ..recipes.shrp_usage import Usage, count_usage
from ..tune.journal import write_whole
from .options import CompressOptions
from .quality import batches, distance, embed, judge
from .saved import save_compressed

Report = Callable[[str, int, int], None]
CALIBRATION, EVERY = 128, 50
"""Sentences that the expanders are first fitted to; steps between checkpoints."""


@dataclass
class _Work:
    """Everything one run holds on to."""

    options: CompressOptions
    encoder: LoadedEncoder
    pairs: Pairs
    told: dict[str, Any]
    report: Report
    total: int


def run_compress(
    options: CompressOptions, report: Report | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compress an encoder; write the pruned model, checkpoints and ``results.json`` into ``options.out``.

    The training is distillation: one minus the cosine to the original's token outputs, plus the same of the sentence vectors. Only
    converted layers are trained.

    Args:
        options: what to do. report: ``report(what, done, total)``. say: called before a step without units.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        FovealError: with one clear message; training goes on from its checkpoints when the same command is given again.
    """
    content = text.load_text(options.text)
    pairs = sentence_pairs(content, training=options.sentences, pairs=options.pairs, seed=options.seed)
    encoder = load_encoder(options.model, progress=say)
    options = replace(options, tokens=min(options.tokens, encoder.limit))
    shape = encoder_shape(encoder.model, options.expander)
    converted = layers_for(shape, options.target)
    sha = hashlib.sha256(content.encode()).hexdigest()
    told = {"model": encoder.fingerprint, "text": sha, "layers": converted, **{n: getattr(options, n) for n in ("batch", "tokens", "sentences", "expander")}}  # fmt: skip
    work = _Work(options, encoder, pairs, told, report or (lambda *_: None), options.steps + options.post_steps + 3)
    model = _converted(work, converted)
    work.report("converted", 1, work.total)
    losses = _train(work, model, "routed", options.steps, 1)
    seen = batches(encoder, pairs.training, options.batch, options.tokens)
    usage = count_usage(model, seen)
    routed = copy.deepcopy(model)
    kept = shrp.prune(model, usage)
    at_once = copy.deepcopy(model)
    after = _train(work, model, "pruned", options.post_steps, 1 + options.steps) if options.post_steps else []
    quality = _quality(work, {"original": encoder.model, "routed": routed, "pruned": at_once, "tuned": model})
    work.report("quality", work.total - 1, work.total)
    speed = _speed(work, model)
    results = {
        "foveal_compress": 1,
        "model": encoder.name,
        "model_info": {"architecture": type(encoder.model).__name__, "source": encoder.source, "fingerprint": encoder.fingerprint, "pooling": encoder.pooling, **asdict(shape)},
        "text": {"name": text.text_name(options.text), "sha256": sha, "training_sentences": len(pairs.training), "pairs": len(pairs.first)},
        "layers": _layer_rows(usage, kept),
        "quality": quality,
        "parameters": _parameters(encoder.model, model, shape, converted),
        "macs_left": round(shape.macs_left(converted, options.tokens), 5),
        "speed": speed,
        "losses": {"routed": _thin(losses), "pruned": _thin(after)},
        "settings": {k: v for k, v in asdict(options).items() if k not in ("out", "text", "model")},
        "provenance": provenance(),
    }  # fmt: skip
    save_compressed(options.folder, encoder, model, kept, options.expander, options.tokens)
    write_whole(options.folder / "results.json", json.dumps(results, indent=1) + "\n")
    work.report("saved", work.total, work.total)
    return results


def encoder_shape(model: Any, expander: int) -> Shape:
    """Sizes of an encoder of transformers.

    Raises:
        UnsupportedError: its config does not say them.
    """
    layers, config = places(model), model.config
    sizes = [getattr(config, n, None) for n in ("hidden_size", "num_attention_heads", "intermediate_size")]
    if not all(isinstance(n, int) for n in sizes):
        raise UnsupportedError(f"{type(model).__name__} is not supported: its config has no hidden_size, num_attention_heads or intermediate_size.")  # fmt: skip
    inside = sum(p.numel() for _, _, layer in layers for p in layer.parameters())
    dim, heads, ffn = (int(n) for n in sizes if n is not None)
    return Shape(len(layers), dim, heads, ffn, expander, sum(p.numel() for p in model.parameters()) - inside)


def layers_for(shape: Shape, target: float) -> int:
    """The fewest layers to prune so that at least ``target`` of the layers' parameters goes.

    Raises:
        ConfigError: all layers do not reach it.
    """
    for count in range(1, shape.layers + 1):
        if shape.parameters_cut(count) >= target:
            return count
    raise ConfigError(
        f"target is {target}; pruning all {shape.layers} layers cuts {shape.parameters_cut(shape.layers):.3f} of their parameters. "
        "Choose a smaller --target."
    )


def _converted(work: _Work, count: int) -> nn.Module:
    """A copy with its last layers converted; the rest is frozen."""
    model: nn.Module = copy.deepcopy(work.encoder.model)
    some = batches(work.encoder, work.pairs.training[:CALIBRATION], CALIBRATION, work.options.tokens)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(work.options.seed)
        shrp.convert(model, last=count, expander=work.options.expander, init="heads", calibration=some)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, _, layer in places(model):
        if isinstance(layer, Converted):
            layer.requires_grad_(True)
    return model


def _train(work: _Work, model: nn.Module, stage: str, steps: int, before: int) -> list[float]:
    """Distillation on random batches of the training sentences; goes on from the stage's checkpoint."""
    options, sentences = work.options, work.pairs.training

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        at = torch.randperm(len(sentences), generator=generator)[: options.batch]
        (batch,) = batches(work.encoder, [sentences[i] for i in at.tolist()], options.batch, options.tokens)
        with torch.random.fork_rng(devices=[]):  # dropout depends on the step alone, so that resuming changes nothing
            torch.manual_seed(options.seed * 1_000_003 + step)
            made = model(**batch).last_hidden_state
        with torch.no_grad():
            wanted = work.encoder.model(**batch).last_hidden_state
        return distance(made, wanted, batch["attention_mask"], work.encoder.pooling)

    def progress(step: int, total: int, loss: float) -> None:
        work.report(f"{stage}: loss {loss:.3f}", before + step, work.total)

    told = {**work.told, "stage": stage, **({"routed_steps": options.steps} if stage == "pruned" else {})}
    return fit(
        model, loss_of, steps, lr=options.lr if stage == "routed" else options.lr / 2, warmup=min(20, steps), seed=options.seed,
        checkpoint=options.folder / f"{stage}.checkpoint.safetensors", every=EVERY, told=told, progress=progress,
    )  # fmt: skip


def _quality(work: _Work, models: dict[str, nn.Module]) -> dict[str, Any]:
    def both(model: nn.Module) -> tuple[Tensor, Tensor]:
        encoder, pairs, tokens = work.encoder, work.pairs, work.options.tokens
        return embed(encoder, model, pairs.first, tokens), embed(encoder, model, pairs.second, tokens)

    made = {name: both(model) for name, model in models.items()}
    return {name: judge(*own, made["original"], work.options.seed) for name, own in made.items()}


def _speed(work: _Work, model: nn.Module) -> dict[str, Any]:
    """Sentences per second of one batch of held-out sentences, original and pruned in turns."""
    (batch,) = batches(work.encoder, work.pairs.first[: work.options.batch], work.options.batch, work.options.tokens)

    def job(one: nn.Module) -> Callable[[], object]:
        return lambda: one(**batch)

    with torch.inference_mode():
        seconds = interleaved({"original": job(work.encoder.model), "pruned": job(model)}, work.options.repeats)
    ratio = speedups(seconds, "original")["pruned"]
    count = len(batch["input_ids"])
    rate = {name: round(count / sorted(values)[len(values) // 2], 2) for name, values in seconds.items()}
    return {"batch": list(batch["input_ids"].shape), "sentences_per_second": rate, "ratio": ratio.json(), "threads": torch.get_num_threads()}  # fmt: skip


def _layer_rows(usage: Usage, kept: list[shrp.Kept]) -> list[dict[str, Any]]:
    return [
        {
            **asdict(k),
            "share": round(k.share, 5),
            "entropy": round(float(usage.entropy[usage.layers.index(k.layer)]), 5),
        }
        for k in kept
    ]


def _parameters(original: nn.Module, pruned: nn.Module, shape: Shape, converted: int) -> dict[str, Any]:
    """Counted in the modules; the shares of the layers alone and of the whole model."""
    whole, left = (sum(p.numel() for p in m.parameters()) for m in (original, pruned))
    inside = whole - shape.embeddings
    return {
        "original": whole, "pruned": left, "layers_converted": converted, "layers": shape.layers,
        "encoder_cut": round((whole - left) / inside, 5), "whole_cut": round((whole - left) / whole, 5),
    }  # fmt: skip


def _thin(losses: list[float], points: int = 50) -> list[float]:
    step = max(1, len(losses) // points)
    return [round(x, 5) for x in losses[::step]]
