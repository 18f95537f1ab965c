"""Generation for ``foveal run``: the text goes to stdout as it comes, what it took to stderr."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer

from ..core.errors import ModelError
from .guard import note

if TYPE_CHECKING:
    from ..hf.load import LoadedModel
    from ..policies import Policy


class Clock(TextStreamer):
    """Prints the text as it comes, and remembers when each token came."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first call brings the prompt
        super().put(value)


class Finite(LogitsProcessor):
    """Stops at the first NaN: a model whose logits are NaN would go on with token 0 for ever."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if torch.isnan(scores).any():
            raise ModelError(
                f"the logits after token {input_ids.shape[1]} are NaN; try --dtype float32, or run without --policy."
            )
        return scores


def generate(
    loaded: LoadedModel,
    ids: list[int],
    policy: Policy | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    impl: str = "auto",
) -> str:
    """Generate after the prompt ``ids``, streaming the text to stdout; returns the text.

    Raises:
        ConfigError: the policy does not fit the model.
        UnsupportedError: the model cannot take a policy.
        ModelError: NaN logits.
    """
    import foveal

    from ..hf.generation import generation_config
    from ..hf.growing import growing_cache

    model: Any = loaded.model
    given = torch.tensor([ids], device=model.device)
    clock = Clock(loaded.tokenizer)
    attached: Any = contextlib.nullcontext()
    if policy is not None:
        attached = foveal.attach(model, policy, impl=impl)
    with attached as handle, torch.inference_mode(), torch.random.fork_rng():
        if policy is not None:
            policy.check_fits(handle.num_layers, type(model).__name__, loaded.fingerprint)
        torch.manual_seed(seed)
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            past_key_values=growing_cache(model),
            generation_config=generation_config(model, max_new_tokens, temperature),
            streamer=clock,
            logits_processor=LogitsProcessorList([Finite()]),
        )
        routed = None if policy is None else handle.decisions()
    made = out[0, len(ids) :]
    if routed is not None:
        note(f"routed: {routed}")
    note(_summary(len(ids), clock.times, policy))
    return str(loaded.tokenizer.decode(made, skip_special_tokens=True))


def _summary(prompt: int, times: list[float], policy: Policy | None) -> str:
    with_ = f"policy {policy.name or 'without a name'}" if policy is not None else "the model's own attention"
    count = len(times) - 1
    if count < 1:
        return f"{prompt} prompt tokens, nothing generated, with {with_}"
    said = f"{prompt} prompt tokens in {times[1] - times[0]:.2f} s"
    if count > 1:
        said += f", then {count - 1} tokens at {(count - 1) / (times[-1] - times[1]):.1f} per second"
    return f"{said}, with {with_}"
