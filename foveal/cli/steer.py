"""``foveal steer``: what an intervention on attention changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from ..hf.load import LoadedModel
    from ..steer.compare import Answer, Comparison
    from ..steer.request import Request
    from ..steer.spec import Spec

Words = list[str] | None


def steer(
    model: Annotated[
        str, typer.Argument(help="smollm2, small_vlm, a folder, a .gguf file, a Hugging Face id, or an adapter of foveal train vlm.")
    ],
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file; - for standard input.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture that the prompt is about.")] = None,
    scale: Annotated[Words, typer.Option(metavar="HEADS=FACTOR", help="Multiply heads' outputs: 3.5=0, 3.0-4,7.1=0.5, 3=0.")] = None,
    knockout: Annotated[Words, typer.Option(metavar="TOKENS[=FACTOR]", help="Take weight from tokens: 4-9, image, Paris=0.5.")] = None,
    context: Annotated[Words, typer.Option(metavar="[TOKENS=]ALPHA", help="Weigh all but the user's text, or TOKENS, by ALPHA ≤ 1.")] = None,
    var: Annotated[Words, typer.Option(metavar="SINKS[=TRANSFER]", help="Image sinks give weight away: auto, dims:5,11, llava-1.5-7b.")] = None,
    vhr: Annotated[Words, typer.Option(metavar="ALPHA", help="Reinforce heads that react to the image.")] = None,
    spec: Annotated[Path | None, typer.Option(metavar="FILE", help="JSON list of interventions with all their settings; they act first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 32,
    top: Annotated[int, typer.Option(min=1, help="Likeliest first tokens to show.")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write everything to a JSON file.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template; default: where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:  # fmt: skip
    """Answer a prompt without and with changes to MODEL's attention, side by side.

    TOKENS are positions (4-9), image, user, first, or words of the prompt. Interventions act in the order of --spec, then as listed here.
    """
    from ..core.provenance import provenance
    from ..steer.compare import compare
    from ..steer.spec import Spec, build_all, read_specs
    from .guard import note, output, warn, write_json
    from .run import read_prompt

    text = read_prompt(prompt, file)
    specs = read_specs(spec) if spec is not None else []
    given = {"scale": scale, "knockout": knockout, "context": context, "var": var, "vhr": vhr}
    specs += [Spec.parse(kind, words) for kind, several in given.items() for words in several or ()]
    if not specs:
        raise ConfigError(f"nothing to change; give one of {', '.join(f'--{kind}' for kind in given)} or --spec FILE.")
    loaded, request = load(model, text, image, chat, dtype, device, trust_remote_code)
    room = (
        max_new_tokens if loaded.context_limit is None else min(max_new_tokens, loaded.context_limit - request.length)
    )
    if room < 1:
        raise DataError(f"the prompt has {request.length} tokens, but {loaded.name} was made for at most {loaded.context_limit}; shorten it.")  # fmt: skip
    interventions = build_all(specs, loaded.model, request)
    found = compare(loaded.model, request, interventions, max_new_tokens=room, top=top, progress=note)
    show(found, specs, output())
    for name in found.idle:
        warn(f"{name} changed nothing: its hook met no head, row or token to act on.")
    if json is not None:
        facts = {"model": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype, "prompt": text}
        said = [{s.kind: s.target, "amount": s.amount, **s.options} for s in specs]
        write_json(json, {**facts, "interventions": said, **found.to_json(), "provenance": provenance()})
        typer.echo(json)


def load(
    model: str, text: str, image: Path | None, chat: bool | None, dtype: str, device: str, remote: bool
) -> tuple[LoadedModel, Request]:
    """The model, and the prompt as it gets it.

    Raises:
        DataError: the picture cannot be read. ModelError: the model, or a picture for a model that reads none.
    """
    import torch

    from ..hf.load import load_model
    from ..hf.load_vlm import load_vlm, reads_pictures
    from ..steer.request import Request
    from .guard import note
    from .run import encode

    picture = None if image is None else read_picture(image)
    if model == "small_vlm" or model.endswith(".safetensors"):
        return adapter(model, text, picture)
    if picture is None and not reads_pictures(model):
        loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=remote, progress=note)
        ids = torch.tensor([encode(loaded, text, chat)], device=loaded.model.device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        from ..steer.carve import door

        loaded = vlm = load_vlm(model, dtype=dtype, device=device, trust_remote_code=remote, progress=note)
        if not getattr(vlm.processor, "chat_template", None):
            raise ModelError(f"the processor of {loaded.name} has no chat template, so where a picture goes is not known; add chat_template.jinja to its folder.")  # fmt: skip
        made = door(vlm.processor).prepare([] if picture is None else [picture], text)
        place = loaded.model.device
        inputs = {k: v.to(place, loaded.model.dtype) if v.is_floating_point() else v.to(place) for k, v in made.items() if v is not None}  # fmt: skip
    tokenizer: Any = loaded.tokenizer
    decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    return loaded, Request.of(loaded.model, inputs, text, decode)


def adapter(name: str, text: str, picture: Any) -> tuple[LoadedModel, Request]:
    """The small vision-language model with an adapter of ``foveal train vlm``; ``small_vlm`` is the one that foveal ships.

    Raises:
        ConfigError: no picture. ModelError: no such adapter, or a package is missing.
    """
    from ..hf.fingerprint import fingerprint
    from ..hf.load import LoadedModel
    from ..models.small_vlm import PACKAGED, load_small_vlm
    from ..steer.request import Request
    from .guard import note

    path = PACKAGED if name == "small_vlm" else Path(name)
    if picture is None:
        raise ConfigError(f"{Path(name).name} answers questions about a picture; add --image FILE.")
    model, reader, _ = load_small_vlm(path, progress=note)
    inputs = reader.prepare([picture], text)
    nothing: Any = None
    loaded = LoadedModel(model, nothing, path.name, f"file {path.name}", fingerprint(model), "float32", None)
    return loaded, Request.of(model, inputs, text, lambda ids: reader.decode_ids(ids))


def read_picture(path: Path) -> Any:
    """A Pillow image.

    Raises:
        DataError: there is none. ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ConfigError("reading a picture needs Pillow, which is not installed: pip install pillow.") from None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise DataError(f"{path} is no picture that Pillow can read; expected PNG or JPEG.") from None


def show(found: Comparison, specs: list[Spec], console: Any) -> None:
    """Both answers, the first tokens, and what proves that the change happened."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    answers = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Answers")
    for name in ("before", "after"):
        answers.add_column(name, overflow="fold", ratio=1)
    answers.add_row(Text(found.before.text), Text(found.after.text), end_section=True)
    answers.add_row(*(Text(chances(side), style="dim") for side in (found.before, found.after)))
    console.print(answers)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="First token")
    for name in ("token", "before", "after"):
        table.add_column(name, justify="left" if name == "token" else "right")
    for token, before, after in found.first:
        table.add_row(Text(repr(token)), f"{100 * before:.2f} %", f"{100 * after:.2f} %")
    console.print(table)
    for one, guard in zip(specs, found.guards, strict=True):
        rest = {k: v for k, v in guard.items() if k not in ("intervention", "fired")}
        said = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
        mark = "fired" if guard["fired"] else "did not fire"
        console.print(Text(f"{one.kind} {one.target}".strip() + f": {mark} ({said})"), soft_wrap=True)
    console.print(
        f"first token: largest change of a logit {found.logit_change:.4g}, KL(before ‖ after) {found.divergence:.4g} nats; "
        f"the answers share their first {found.same_tokens} tokens",
        markup=False,
        soft_wrap=True,
    )


def chances(answer: Answer, count: int = 5) -> str:
    """The first tokens of an answer, each with its probability."""
    pairs = list(zip(answer.tokens, answer.probabilities, strict=True))
    shown = "  ".join(f"{token!r} {100 * p:.1f} %" for token, p in pairs[:count])
    return shown + (" …" if len(pairs) > count else "")


def add_to(app: typer.Typer) -> None:
    app.command("steer")(steer)
