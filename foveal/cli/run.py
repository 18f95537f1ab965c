"""``foveal run``: generate text with a policy."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..hf.load import LoadedModel
    from ..policies import Policy


def run(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a Hugging Face id.")],
    policy: Annotated[
        Path | None, typer.Option(help="policy.json from foveal tune; without it, the model's own attention.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file; - for standard input.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling, above temperature 0.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: where there is one.")
    ] = None,
    impl: Annotated[str, typer.Option(help="Attention implementation (see foveal info), or auto.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:
    """Generate text with MODEL under a policy, and stream it."""
    text = read_prompt(prompt, file)
    from ..hf.load import load_model
    from ..policies import Policy
    from .generate import generate
    from .guard import note

    chosen = Policy.load(policy) if policy is not None else None
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=note)
    ids = encode(loaded, text, chat)
    room = check_length(loaded, len(ids), max_new_tokens, chosen)
    generate(loaded, ids, chosen, max_new_tokens=room, temperature=temperature, seed=seed, impl=impl)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt of exactly one of the two options.

    Raises:
        typer.BadParameter: neither or both are given.
        DataError: it is empty, or the file cannot be read.
    """
    if (prompt is None) == (file is None):
        raise typer.BadParameter("give exactly one of --prompt TEXT and --file FILE")
    if file is not None:
        from ..data.text import load_text

        text = sys.stdin.read() if str(file) == "-" else load_text(file)
    else:
        text = prompt or ""
    if not text.strip():
        raise DataError("the prompt is empty; expected text in --prompt or --file.")
    return text


def encode(loaded: LoadedModel, text: str, chat: bool | None) -> list[int]:
    """Token ids of the prompt, in the chat template when there is one and ``chat`` is not False."""
    tokenizer = loaded.tokenizer
    template = getattr(tokenizer, "chat_template", None)
    if chat and not template:
        raise ConfigError(f"{loaded.name} has no chat template; use --no-chat.")
    if template and chat is not False:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(tokenizer(str(rendered), add_special_tokens=False, verbose=False).input_ids)
    return list(tokenizer(text, verbose=False).input_ids)


def check_length(loaded: LoadedModel, length: int, max_new_tokens: int, policy: Policy | None) -> int:
    """How many tokens may be generated; warns where the policy was not tested.

    Raises:
        DataError: the prompt leaves no room in the model's context.
    """
    from .guard import warn

    limit = loaded.context_limit
    if limit is not None and length >= limit:
        raise DataError(
            f"the prompt has {length} tokens, but {loaded.name} was made for at most {limit}; shorten the prompt."
        )
    if limit is not None and length + max_new_tokens > limit:
        warn(
            f"--max-new-tokens {max_new_tokens} goes beyond the model's {limit} tokens; at most {limit - length} are made."
        )
        max_new_tokens = limit - length
    if policy is not None and policy.context is not None:
        low, high = policy.context
        if not low <= length <= high:
            tested = f"{low} tokens" if low == high else f"{low} to {high} tokens"
            warn(f"the prompt has {length} tokens, and the policy was tested at {tested}; its figures may not hold.")
    return max_new_tokens


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
