"""``foveal eval``: make the items, read them under every arm, write figures and report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import ConfigError
from ..core.provenance import provenance
from ..data import text
from ..hf.families import depth, sites
from ..hf.load import LoadedModel, load_model
from ..policies.policy import Policy
from ..tune.journal import Journal, write_whole
from .base import Material, Passage, Quiz, Task, task, tasks
from .options import EvalOptions
from .reader import Reader
from .scores import passage_change, passage_figures, quiz_change, quiz_figures

SCHEMA = 1
DENSE = "dense"
"""Name of the model's own attention."""
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Arm:
    """One attention that is measured: its name, its key in the journal, its policy (None: the model's own)."""

    name: str
    key: str
    policy: Policy | None


def run_eval(
    options: EvalOptions, report: Report | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure every task under the model's own attention and every policy; write ``results.json`` and ``report.html``.

    Args:
        options: what to do. report: ``report(what, done, total)`` after every unit. say: called before a step without units.

    Returns:
        The results, as written to ``results.json``.

    Raises:
        FovealError: with one clear message; what was measured stays in the journal and the next run goes on from there.
    """
    say = say or (lambda _: None)
    arms = _arms(options.policies)
    chosen = _tasks(options, len(arms) > 1)
    content = text.load_text(options.text)
    loaded = load_model(options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code, progress=say)  # fmt: skip
    _check(options, loaded, arms)
    material = _material(options, loaded, content)
    items = {name: one.items(material) for name, one in chosen.items()}
    sha = hashlib.sha256(content.encode()).hexdigest()
    journal = Journal(options.folder / "journal.jsonl", options.digest(model_sha=loaded.fingerprint, text_sha=sha))
    _measure(Reader(loaded.model, options.impl), journal, items, arms, report or (lambda *_: None))
    info = {"name": text.text_name(options.text), "sha256": sha, "tokens": len(material.ids)}
    results = _results(options, loaded, material, info, {n: _figures(one, items[n], arms, journal, options) for n, one in chosen.items()}, arms)  # fmt: skip
    write_whole(options.folder / "results.json", json.dumps(results, indent=1) + "\n")
    from .report import write_report

    write_report(results, options.folder / "report.html")
    return results


def _arms(files: Sequence[str]) -> list[Arm]:
    arms = [Arm(DENSE, DENSE, None)]
    for file in files:
        policy = Policy.load(file)
        said = json.dumps(policy.to_json(), sort_keys=True)
        name = policy.name or f"policy {len(arms)}"
        if name in [arm.name for arm in arms]:
            name = f"{name} ({len(arms)})"
        arms.append(Arm(name, hashlib.sha256(said.encode()).hexdigest()[:12], policy))
    if len({arm.key for arm in arms}) < len(arms):
        raise ConfigError(f"two of the policies {', '.join(files)} are the same; give each --policy once.")
    return arms


def _tasks(options: EvalOptions, with_policy: bool) -> dict[str, Task]:
    """The tasks asked for, in the order of the report; without a policy those that compare with dense are left out."""
    names = [name for name in tasks() if not options.tasks or name in options.tasks]
    made = {name: task(name) for name in names}
    alone = [name for name, one in made.items() if one.needs_policy and not with_policy]
    if alone and options.tasks:
        raise ConfigError(
            f"task {alone[0]!r} compares a policy with dense, and there is none; pass --policy policy.json."
        )
    return {name: one for name, one in made.items() if name not in alone}


def _check(options: EvalOptions, loaded: LoadedModel, arms: Sequence[Arm]) -> None:
    limit = loaded.context_limit
    if limit is not None and options.context > limit:
        raise ConfigError(
            f"context is {options.context}, but {loaded.name} was made for at most {limit} tokens; pass --context {limit} or less."
        )
    model = loaded.model
    for arm in arms:
        if arm.policy is not None:
            arm.policy.check_fits(depth(model, sites(model)), type(model).__name__, loaded.fingerprint)
    if hasattr(model, "set_attn_implementation") and model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")


def _material(options: EvalOptions, loaded: LoadedModel, content: str) -> Material:
    template = bool(getattr(loaded.tokenizer, "chat_template", None))
    if options.chat and not template:
        raise ConfigError(f"{loaded.name} has no chat template; use --no-chat.")
    chat = template if options.chat is None else options.chat
    ids = text.tokens(loaded.tokenizer, content)
    ahead = text.prefix(loaded.tokenizer)
    return Material(loaded.tokenizer, ids, ahead, options.context, options.trials, options.seed, chat)


def _measure(
    reader: Reader, journal: Journal, items: dict[str, list[Passage | Quiz]], arms: Sequence[Arm], report: Report
) -> None:
    """Every item under every arm that is not in the journal; an item that two tasks share is read once."""
    units = {(item.key, arm.name): (name, item, arm) for name, own in items.items() for item in own for arm in arms}
    for done, (name, item, arm) in enumerate(units.values()):
        key = f"{item.key}.{arm.key}"
        report(f"{name}: {item.key.partition('.')[2]} under {arm.name}", done, len(units))
        if key not in journal:
            if isinstance(item, Passage):
                got = reader.passage(item, arm.policy, arm.name)
            else:
                got = reader.quiz(item, arm.policy, arm.name)
            journal.put(key, got)
    report("done", len(units), len(units))


def _figures(
    one: Task, items: Sequence[Passage | Quiz], arms: Sequence[Arm], journal: Journal, options: EvalOptions
) -> dict[str, Any]:
    units = {arm.name: [journal[f"{item.key}.{arm.key}"] for item in items] for arm in arms}
    dense, seed = units[DENSE], options.seed
    out: dict[str, Any] = {"title": one.title, "about": one.about, "measure": one.measure, "axes": one.axes}
    if one.axes is not None:
        out["arms"] = {name: quiz_figures(own, one.axes, seed) for name, own in units.items()}
        out["change"] = {name: quiz_change(own, dense, seed) for name, own in units.items() if name != DENSE}
        return out
    shown = {name: own for name, own in units.items() if not (one.needs_policy and name == DENSE)}
    out["arms"] = {n: passage_figures(own, one.measure, options.context, seed) for n, own in shown.items()}
    if one.measure == "nll":
        out["change"] = {name: passage_change(own, dense, seed) for name, own in units.items() if name != DENSE}
    return out


def _results(options: EvalOptions, loaded: LoadedModel, material: Material, info: dict[str, Any], figures: dict[str, Any], arms: Sequence[Arm]) -> dict[str, Any]:  # fmt: skip
    model = loaded.model
    return {
        "foveal_eval": SCHEMA,
        "model": loaded.name,
        "model_info": {
            "architecture": type(model).__name__, "source": loaded.source, "fingerprint": loaded.fingerprint,
            "layers": depth(model, sites(model)), "parameters": sum(p.numel() for p in model.parameters()),
        },
        "context": options.context,
        "dtype": loaded.dtype,
        "chat": material.chat,
        "text": info,
        "arms": [{"name": arm.name, "policy": None if arm.policy is None else arm.policy.to_json()} for arm in arms],
        "tasks": figures,
        "settings": {k: v for k, v in asdict(options).items() if k not in ("out", "text", "policies", "model")},
        "provenance": provenance(),
    }  # fmt: skip
