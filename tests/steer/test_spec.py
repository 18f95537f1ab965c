"""Interventions in words: what is named in a prompt, how much of it, and every mistake with one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError, UnsupportedError
from foveal.steer import VAR, VHR, ContextSteering, HeadScale, Knockout, apply
from foveal.steer.request import Request, numbers
from foveal.steer.spec import Spec, read_specs
from tests.hf import models
from tests.steer.models import IMAGE, build, prompt

PIECES = ["<s>", "The", " cat", " sat", " on", " the", " c", "at", ".", "\N{REPLACEMENT CHARACTER}", "\N{REPLACEMENT CHARACTER}", " é"]  # fmt: skip


def decode(ids: list[int]) -> str:
    """Tokens 9 and 10 are halves of one character; special tokens have no text."""
    if ids == [9, 10]:
        return "日"
    return "".join("" if i == 0 else PIECES[i] if i < len(PIECES) else f" w{i}" for i in ids)


def request() -> Request:
    model = models.build("llama")
    return Request.of(model, {"input_ids": torch.arange(12)[None]}, "on the cat. 日 é", decode)


def at(flags: Any) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("words", "positions"),
    [
        ("4", [4]), ("0,4-6", [0, 4, 5, 6]), ("first", [0]), ("cat", [2, 6, 7]), (" the cat", [5, 6, 7]), ("text:on", [4]),
        ("sat on", [3, 4]), ("user", [4, 5, 6, 7, 8, 9, 10, 11]), ("日", [9, 10]), ("at.", [7, 8]), ("é", [11]),
    ],
)  # fmt: skip
def test_tokens_are_named_by_position_and_by_words(words: str, positions: list[int]) -> None:
    assert at(request().span(words)) == positions


def test_image_tokens_are_named_and_spell_nothing() -> None:
    model, inputs = build("llava"), prompt("llava")
    found = Request.of(model, inputs, "", lambda ids: "".join(f"w{i} " for i in ids))
    assert at(found.span("image")) == at(inputs["input_ids"][0] == IMAGE)
    with pytest.raises(ConfigError, match=r"do not spell 'w60'"):
        found.span("w60")
    assert at(found.span(f"w{int(inputs['input_ids'][0, 0])}"))[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [("9-99", "names position 99; the prompt has 12 tokens, 0 to 11"), ("dog", "do not spell 'dog'"), ("image", "no picture"), ("", "do not spell ''")],
)  # fmt: skip
def test_tokens_that_are_not_there(words: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        request().span(words)


def test_numbers() -> None:
    assert numbers("3, 5-7,0") == [3, 5, 6, 7, 0]
    for wrong in ("7-5", "-1", "a", "1,,2", ""):
        with pytest.raises(ConfigError, match="expected numbers and rising ranges"):
            numbers(wrong)


def made(kind: str, words: str, **options: Any) -> Any:
    model = build("llava") if kind in ("var", "vhr") else models.build("llama")
    return Spec.parse(kind, words, options).build(model, request())


def test_words_become_interventions() -> None:
    scale = made("scale", "1.0-1,2.3=0.5")
    assert isinstance(scale, HeadScale) and scale.heads == {1: [0, 1], 2: [3]} and scale.factor == 0.5
    assert made("scale", "0").heads == {0: [0, 1, 2, 3]} and made("scale", "0").factor == 0.0
    assert made("scale", "0-1.2=-1").heads == {0: [2], 1: [2]}
    knock = made("knockout", "cat=0.25", layers="0-1", spare="first", renormalise=True)
    assert isinstance(knock, Knockout) and at(knock.keys) == [2, 6, 7] and knock.factor == 0.25
    assert knock.layers == [0, 1] and knock.spare is not None and at(knock.spare) == [0] and knock.renormalise
    steer = made("context", "0.5", generated="scale")
    assert isinstance(steer, ContextSteering) and at(steer.user) == list(range(4, 12)) and steer.generated == "scale"
    assert at(made("context", "sat=5e-1").user) == [3] and made("context", "sat=5e-1").alpha == 0.5
    var = made("var", "dims:5,11=0.3", rho=0.5, tau_mode="energy", tau=0.1)
    assert isinstance(var, VAR) and var.dims == (5, 11) and (var.transfer, var.rho, var.tau) == (0.3, 0.5, 0.1)
    assert made("var", "llava-1.5-7b").profile == "llava-1.5-7b" and made("var", "llava-1.5-7b").transfer == 0.6
    named = made("var", "4,7").sinks
    assert named is not None and at(named) == [4, 7]
    vhr = made("vhr", "1.5", outlier=False)
    assert isinstance(vhr, VHR) and vhr.alpha == 1.5 and not vhr.outlier


def test_sink_dimensions_are_looked_for_and_none_is_an_error() -> None:
    import transformers as hf

    from tests.steer.models import _TEXT, _VISION

    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**{**_TEXT, "num_hidden_layers": 6}), image_token_id=IMAGE
    )  # fmt: skip
    model, inputs = hf.LlavaForConditionalGeneration(config).eval(), prompt("llava", dtype=torch.float32)
    asked = Request.of(model, inputs, "", decode)
    spec = Spec.parse("var", "auto", {"tau": 0.5})
    with pytest.raises(ConfigError, match="has no massive dimensions at its first token"):
        spec.build(model, asked)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(inputs["input_ids"][0, 0]), 17] = 60.0
    found = spec.build(model, asked)
    assert isinstance(found, VAR) and found.dims == (17,) and found.tau_mode == "energy" and found.tau == 0.5
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no image tokens"):
        spec.build(models.build("llama"), request())


@pytest.mark.parametrize(
    ("kind", "words", "options", "says"),
    [
        ("scael", "3.5", {}, "Did you mean 'scale'"),
        ("scale", "3.5=", {}, "what follows = is ''; expected a number"),
        ("scale", "3.5=nan", {}, "expected a number"),
        ("scale", "a.5=0", {}, "'a.5' names no heads"),
        ("scale", "3.=0", {}, "'3.' names no heads"),
        ("scale", "3.5-1=0", {}, "'3.5-1' names no heads"),
        ("scale", "=0", {}, "cannot be read. Write LAYER.HEAD=FACTOR"),
        ("scale", "3.5=0", {"factor": 1}, "has no option 'factor'"),
        ("knockout", "cat=inf", {}, "expected a number"),
        ("knockout", "cat", {"layer": 1}, "Did you mean 'layers'"),
        ("knockout", "cat", {"layers": "x"}, "expected numbers"),
        ("knockout", "cat", {"layers": [0.5]}, 'expected a value like "0-3"'),
        ("knockout", "cat", {"renormalise": 1}, "renormalise is 1; expected a value like false"),
        ("context", "much", {}, "has no α"),
        ("var", "auto", {"rho": True}, "rho is true; expected a value like 0.8"),
        ("vhr", "two", {}, "cannot be read. Write α"),
    ],
)
def test_words_that_cannot_be_read(kind: str, words: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Spec.parse(kind, words, options)
    assert says in str(caught.value)


def test_values_that_do_not_fit_the_model_or_the_paper() -> None:
    model = models.build("llama")
    for words, says in (("7=0", "heads names layer 7; LlamaForCausalLM has layers 0 to 2"), ("1.4=0", "head 4 of layer 1, which has heads 0 to 3")):  # fmt: skip
        with pytest.raises(ConfigError, match=says):
            apply(model, Spec.parse("scale", words).build(model, request()))
    with pytest.raises(ConfigError, match=r"alpha is 2\.0; expected a number above 0 and at most 1"):
        made("context", "2.0")
    with pytest.raises(ConfigError, match=r"factor is -1\.0"):
        made("knockout", "cat=-1")
    with pytest.raises(ConfigError, match=r"var 'llava-1.5': .* or one of llava-1.5-7b"):
        made("var", "llava-1.5")


def test_files_keep_the_order_and_name_the_entry_that_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "steer.json"
    path.write_text(json.dumps([{"vhr": 2}, {"knockout": "cat=0.5", "layers": [0]}, {"scale": "1"}]))
    found = read_specs(path)
    assert [(s.kind, s.target, s.amount) for s in found] == [
        ("vhr", "", 2.0),
        ("knockout", "cat", 0.5),
        ("scale", "1", None),
    ]
    assert found[1].options == {"layers": [0]}
    for content, error, says in (
        ("{", DataError, "is no JSON"), ("[]", ConfigError, "holds no list"), ('[{"layers": 1}]', ConfigError, "entry 0"),
        ('[{"vhr": 2}, {"vhr": 2, "scale": "1"}]', ConfigError, "entry 1: .* names 2 interventions"), ("[3]", ConfigError, "entry 0"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(error, match=says):
            read_specs(path)
    with pytest.raises(DataError, match="does not exist"):
        read_specs(tmp_path / "nowhere.json")
