"""What ``generate`` is told: the model's own configuration, with the length and the sampling that a caller asks for."""

from __future__ import annotations

import copy
from typing import Any


def generation_config(model: Any, max_new_tokens: int, temperature: float = 0.0) -> Any:
    """A copy of the model's ``GenerationConfig``; ``temperature`` 0 is greedy, above it whole distributions are sampled.

    Where no padding token is set, the first end token serves.
    """
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(model.config)
    config: Any = copy.deepcopy(own)
    config.max_new_tokens, config.max_length, config.do_sample = max_new_tokens, None, temperature > 0
    config.temperature, config.top_p, config.top_k = (temperature, 1.0, 0) if temperature > 0 else (None, None, None)
    if config.pad_token_id is None:
        stop = config.eos_token_id
        config.pad_token_id = stop[0] if isinstance(stop, list) else stop
    return config
