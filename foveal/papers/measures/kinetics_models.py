"""Kinetics' sparse budgets on public reasoning models: generated sums, sampled answers, dense and with few keys per step.

Every method samples a question's answers with the same random numbers after the same dense prefill. Costs are those of the published
formulas at an H200's FLOP per byte; a choice is one for all questions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...bench.results import rounded
from ...data.chat import read_chat
from ...data.sums import Sum, sums
from ...policies.kinetics import DENSE, HARDWARE, Method, ModelShape
from ...policies.kinetics_allocation import Choice, Trace, best_within, by_question, common_choices, envelope
from . import gpu
from .kinetics_frontier import policy
from .results import write_result

if TYPE_CHECKING:
    from ...hf.load import LoadedModel

MODELS = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B")
BUDGETS = (128, 512)
TERMS, QUESTIONS, TRIALS, TEMPERATURE, TOKENS = (8, 16, 24), 16, 16, 0.6, 4096
LOSS, GAIN, CAPABLE = 0.02, 0.05, 0.3
"""Points that sparse may lose at equal trials, points that it must win at the lowest common cost, and the dense coverage that counts as able."""
INTENSITY = HARDWARE["h200"].intensity


def methods(budgets: tuple[int, ...]) -> tuple[Method, ...]:
    return (DENSE, *(Method("topk", budget=budget) for budget in budgets))


def shape_of(loaded: LoadedModel) -> ModelShape:
    """What the cost law needs, from the model itself."""
    config: Any = loaded.model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return ModelShape(loaded.name, parameters, config.num_hidden_layers, heads, kv_heads, head_dim)


@torch.inference_mode()
def sampled(
    loaded: LoadedModel, ids: Tensor, method: Method, *, trials: int, tokens: int, seed: int
) -> tuple[list[list[int]], list[bool]]:
    """``trials`` continuations of ``ids`` ``(1, N)``, each up to and with its end token, and whether there was one."""
    import foveal

    from ...hf.generation import generation_config
    from ...hf.growing import growing_cache

    model: Any = loaded.model
    how = policy(method)
    config = generation_config(model, tokens, TEMPERATURE)
    config.num_return_sequences = trials
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    attached: Any = contextlib.nullcontext() if how is None else foveal.attach(model, how)
    with attached, torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=growing_cache(model), generation_config=config
        )
    new = rows[:, ids.shape[1] :].tolist()
    cut = [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in new]
    return cut, [row[-1] in ends for row in cut]


def answered(
    loaded: LoadedModel, question: Sum, shape: ModelShape, method: Method, name: str, *, trials: int, tokens: int, seed: int
) -> tuple[Trace, int]:  # fmt: skip
    """``trials`` sampled answers to one question, and how many were cut off, which are wrong."""
    template = bool(getattr(loaded.tokenizer, "chat_template", None))
    chat = read_chat(loaded.tokenizer, [{"role": "user", "content": question.question}], template=template)
    ids = chat.ids.to(loaded.model.device)[None]
    rows, ended = sampled(loaded, ids, method, trials=trials, tokens=tokens, seed=seed)
    texts = [str(loaded.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    right = tuple(whole and question.right(text) for text, whole in zip(texts, ended, strict=True))
    return Trace(name, shape, method, len(chat.ids), tuple(map(len, rows)), right), ended.count(False)


def compared(traces: list[Trace]) -> dict[str, Any]:
    """Coverage by method and trials; the largest loss of the best sparse budget at equal trials; its lead at the lowest common cost."""
    found = common_choices(by_question(traces, intensity=INTENSITY))

    def of(kind: str) -> list[Choice]:
        return [choice for choice in found if choice.method.kind == kind]

    def by_method(of_choice: Callable[[Choice], float]) -> dict[str, dict[int, float]]:
        rows: dict[str, dict[int, float]] = {}
        for choice in sorted(found, key=lambda choice: choice.trials):
            rows.setdefault(str(choice.method), {})[choice.trials] = of_choice(choice)
        return rows

    dense, sparse = {choice.trials: choice for choice in of("dense")}, of("topk")
    best = {n: max(choice.accuracy for choice in sparse if choice.trials == n) for n in dense}
    low = min(dense.values(), key=lambda choice: choice.cost)
    within = best_within(envelope(sparse), low.cost)
    return {
        "coverage": by_method(lambda choice: choice.accuracy),
        "teflops": by_method(lambda choice: choice.cost / 1e12),
        "largest_loss": max(choice.accuracy - best[n] for n, choice in dense.items()),
        "lead_at_lowest_cost": (0.0 if within is None else within.accuracy) - low.accuracy,
        "dense_best": max(choice.accuracy for choice in dense.values()),
    }


def judge(rows: dict[str, dict[str, Any]]) -> str:
    able = all(row["dense_best"] >= CAPABLE for row in rows.values())
    keeps = all(row["largest_loss"] <= LOSS + 1e-9 for row in rows.values())
    wins = all(row["lead_at_lowest_cost"] >= GAIN - 1e-9 for row in rows.values())
    if not able or not (keeps or wins):
        return "not reproduced"
    return "reproduced" if keeps and wins else "direction holds"


def measure_quality(
    *,
    out: Path | None = None,
    models: tuple[str, ...] = MODELS,
    device: str = gpu.DEVICE,
    budgets: tuple[int, ...] = BUDGETS,
    terms: tuple[int, ...] = TERMS,
    questions: int = QUESTIONS,
    trials: int = TRIALS,
    tokens: int = TOKENS,
    seed: int = 0,
) -> dict[str, Any]:
    """Claim ``sparse-quality-real-models``.

    Args:
        models: as for :func:`foveal.load_model`. budgets: keys per decoding step. terms: numbers of the sums, ``questions`` of each.
        trials: answers per question and method. tokens: at most, of an answer; one that is cut off is wrong.

    Raises:
        ModelError: a model is not there.
    """
    from ...hf.load import load_model

    rows = {}
    for name in models:
        loaded = load_model(name, device=device)
        shape, generator = shape_of(loaded), torch.Generator().manual_seed(seed)
        asked = {f"{n}/{i}": one for n in terms for i, one in enumerate(sums(questions, n, generator))}
        found = [
            answered(loaded, one, shape, method, where, trials=trials, tokens=tokens, seed=seed + number)
            for number, (where, one) in enumerate(asked.items())
            for method in methods(budgets)
        ]
        traces = [trace for trace, _ in found]
        lengths = [n for trace in traces for n in trace.lengths]
        rows[name] = compared(traces) | {
            "answer_tokens": sum(lengths) / len(lengths),
            "cut_off": sum(cut for _, cut in found) / len(lengths),
            "dtype": loaded.dtype,
        }
        del loaded
    shown = "; ".join(
        f"{name}: best sparse {-100 * row['largest_loss']:+.1f} points at equal trials, "
        f"{100 * row['lead_at_lowest_cost']:+.1f} at the lowest common cost, dense {100 * row['dense_best']:.0f} %"
        for name, row in rows.items()
    )
    numbers = {
        "ours": shown,
        "criterion": {"loss_at_most": LOSS, "lead_at_least": GAIN, "dense_at_least": CAPABLE},
        "task": f"sums of {', '.join(map(str, terms))} numbers, {questions} each, {trials} answers at temperature {TEMPERATURE}",
        "flop_per_byte": INTENSITY,
        "tokens_at_most": tokens,
        "models": rows,
    }
    return write_result("kinetics", "sparse-quality-real-models", judge(rows), rounded(numbers), seed=seed, out=out)
