"""Context awareness on SmolLM2-135M-Instruct: needle recall and the retrieval head's attention, with and without the chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...bench.results import rounded
from ...data.chat import read_chat
from ...data.retrieval import NEEDLES, Prompt, hide
from ...data.text import load_text
from ...lens.context import TemplateShift, middle_layer, recall, template_shift
from .command import run_measures
from .results import sign_test, write_result

LENGTHS, DEPTHS, ANSWER = (200, 400, 600, 800, 1000), (0.0, 0.25, 0.5, 0.75, 1.0), 24


def prompts(tokenizer: Any) -> list[Prompt]:
    """The 5 × 5 grid, with another needle in every cell in turn."""
    text = load_text()
    cells = [(length, depth) for length in LENGTHS for depth in DEPTHS]
    return [hide(tokenizer, text, NEEDLES[i % len(NEEDLES)], length, depth) for i, (length, depth) in enumerate(cells)]


def messages(prompt: Prompt, prefix: bool = True) -> list[dict[str, str]]:
    """As a conversation."""
    begun = [{"role": "assistant", "content": prompt.prefix}] if prefix else []
    return [{"role": "user", "content": prompt.user}, *begun]


@torch.inference_mode()
def answer(loaded: Any, prompt: Prompt, *, template: bool, prefix: bool) -> float:
    """Recall of one prompt."""
    chat = read_chat(loaded.tokenizer, messages(prompt, prefix), template=template)
    ids = chat.ids[None].to(loaded.model.device)
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False)
    return recall(prompt.needle.keywords, loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def _loaded() -> Any:
    from ...hf.load import load_model

    return load_model("smollm2")


def measure_template(*, seed: int = 0, out: Path | None = None, load: Callable[[], Any] = _loaded) -> dict[str, Any]:
    """Claim ``template-costs-recall``: 75 greedy answers."""
    loaded = load()
    ways = {"plain, prefix": (False, True), "template, prefix": (True, True), "template, no prefix": (True, False)}
    grid = prompts(loaded.tokenizer)
    scores = {name: [answer(loaded, p, template=t, prefix=b) for p in grid] for name, (t, b) in ways.items()}
    means = {name: sum(some) / len(some) for name, some in scores.items()}
    base = means["plain, prefix"]
    test = sign_test([a - b for a, b in zip(scores["plain, prefix"], scores["template, prefix"], strict=True)])
    numbers = {
        "ours": ", ".join(f"{name} {100 * value:.0f} %" for name, value in means.items()),
        "recall": means, "ratio": means["template, prefix"] / base if base else None, "sign_test": test, "prompts": len(grid),
        "by_prompt": [{"tokens": p.length, "depth": p.depth, **{name: scores[name][i] for name in ways}} for i, p in enumerate(grid)],
    }  # fmt: skip
    lower = means["template, prefix"] < base
    verdict = "reproduced" if lower and test["p"] < 0.05 else "direction holds" if lower else "not reproduced"
    return write_result("context_awareness", "template-costs-recall", verdict, rounded(numbers), seed=seed, out=out)


def measure_allocation(*, seed: int = 0, out: Path | None = None, load: Callable[[], Any] = _loaded) -> dict[str, Any]:
    """Claim ``template-moves-attention``."""
    loaded = load()
    grid = prompts(loaded.tokenizer)
    shifts: list[TemplateShift] = [template_shift(loaded.model, loaded.tokenizer, messages(p)) for p in grid]
    ratios = [s.ratio for s in shifts]
    test = sign_test([1 - r for r in ratios])
    mean = {side: {role: sum(getattr(getattr(s, side), role) for s in shifts) / len(shifts) for role in ("user", "assistant", "template", "bos")} for side in ("plain", "templated")}  # fmt: skip
    numbers = {
        "ours": f"user mass {100 * mean['plain']['user']:.1f} % plain, {100 * mean['templated']['user']:.1f} % with the template; ratio below 1 in {test['positive']} of {len(ratios)}",
        "mean": mean, "ratio_mean": sum(ratios) / len(ratios), "sign_test": test,
        "layer": middle_layer(loaded.model.config.num_hidden_layers), "ratios": ratios,
    }  # fmt: skip
    fewer = test["positive"] > test["negative"]
    verdict = "reproduced" if fewer and test["p"] < 0.05 else "direction holds" if fewer else "not reproduced"
    return write_result("context_awareness", "template-moves-attention", verdict, rounded(numbers), seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_template, measure_allocation], brief=True)
