"""Context awareness in a tiny decoder: does the indicator token win back what tuning on answers from memory takes from the context?

A decoder learns facts (one value per key) and to read passages of ``key value`` pairs, which then overrule the facts. It is tuned on chats
of which 20 % are answered from the passage and 80 % from memory: most of the latter have passages without the keys that are asked, the
others passages that contradict the facts and are ignored. Passages of chats are short, those of the test long, as in the paper.

Marks on exactly the chats that are answered from the passage can win by construction, because the token then tells what nothing else
does. So the verdict rests on the recipe's own marks, for which the plainly tuned model scores the chats by its attention, and on a control
with as many marks on random chats. True marks show what perfect scores would reach.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...bench.results import rounded
from ...lens.context import BETA, marked, middle_layer, template_shift
from ...recipes.conditional_sft import SFTOptions, add_indicator, asked, conditional_sft, mark, shuffled_marks
from ...recipes.fit import fit, stage_at
from .command import run_measures
from .results import summary, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SIGNS = ("<s>", "<end>", "<user>", "<assistant>", "?")
KEYS, VALUES, ASKED = 32, 32, 4
DIM, DEPTH, HEADS = 128, 2, 4
STAGES = ((200, 6), (60, 12), (80, 20))
"""Pretraining: (steps, most pairs in a passage)."""
TOKENS, RATE = 2048, 3e-3
CHATS, SHORT, LONG = 2000, (4, 6), 20
"""Chats to tune on (a few hundred are learned by heart), pairs in their passages, and in those of the test."""
SHARES = {"passage": 0.2, "ignored": 0.3, "memory": 0.5}
"""Of the chats: answered from a passage that contradicts the facts, from memory against such a passage, from memory where the passage lacks
the keys."""
TUNING = SFTOptions(steps=500, batch=16, lr=1e-3)
HELD_OUT, SHIFTS, SEEDS = 128, 32, 5
NEAR, MOST_SEEDS = 0.02, 0.8
LEARNED = 0.2
"""What the token has to add on short passages where marks are true; a seed in which it adds less has not learned it and shows nothing."""


class Smeared(nn.Embedding):
    """Embeddings to which half of the token before is added, so that a value knows its key and one layer can find it."""

    def forward(self, input: Tensor) -> Tensor:
        """``(B, N)`` tokens to ``(B, N, dim)``."""
        x = super().forward(input)
        return x + 0.5 * nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def words() -> tuple[str, ...]:
    """The vocabulary, in the order of its numbers."""
    return (*SIGNS, *(f"k{i}" for i in range(KEYS)), *(f"v{i}" for i in range(VALUES)))


def tokenizer() -> PreTrainedTokenizerBase:
    """Words between spaces, ``<s>`` first, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    out = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>")
    out.chat_template = (
        "<s>{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }} <end>{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}"
    )
    return out


def draw(kind: str, rows: int, pairs: int, facts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """User's tokens ``(rows, 2·pairs + 1 + ASKED)``, a passage and the keys that are asked, and the answers ``(rows, 2·ASKED)``.

    Args:
        kind: "passage": the passage holds the keys and contradicts ``facts``, and is right; "ignored": it is not; "memory": it lacks them.
        facts: ``(KEYS,)`` value of each key.
    """
    key = torch.rand(rows, KEYS, generator=generator).argsort(1)
    told = (facts[key] + 1 + torch.randint(VALUES - 1, key.shape, generator=generator)) % VALUES
    which = torch.rand(rows, pairs, generator=generator).argsort(1)[:, :ASKED]
    if kind == "memory":
        which = pairs + torch.arange(ASKED).expand(rows, -1)  # keys beyond the passage
    listed = torch.stack([len(SIGNS) + key, len(SIGNS) + KEYS + told], -1)
    passage = listed[:, :pairs].flatten(1)
    answer = listed.gather(1, which[..., None].expand(-1, -1, 2))
    if kind != "passage":
        answer[..., 1] = len(SIGNS) + KEYS + facts[key.gather(1, which)]
    question = torch.full((rows, 1), SIGNS.index("?"))
    return torch.cat([passage, question, answer[..., 0]], 1), answer.flatten(1)


def decoder(seed: int) -> PreTrainedModel:
    """A small Llama with smeared embeddings and room for one more word."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = len(words()) + 1
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size, hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
                num_key_value_heads=HEADS, max_position_embeddings=256, initializer_range=DIM**-0.5,
            )
        )  # fmt: skip
        embedding = Smeared(size, DIM)
        nn.init.normal_(embedding.weight, std=DIM**-0.5)
        model.set_input_embeddings(embedding)
    return model


def pretrained(seed: int, facts: Tensor) -> PreTrainedModel:
    """A decoder that knows ``facts`` and reads passages; without any template."""
    model, lengths = decoder(seed), [steps for steps, _ in STAGES]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        most = STAGES[stage_at(step, lengths)][1]
        pairs = int(torch.randint(ASKED, most + 1, (1,), generator=generator))
        rows = max(1, TOKENS // (2 * pairs + 3 * ASKED + 2) // 2)
        parts = [draw(kind, rows, pairs, facts, generator) for kind in ("passage", "memory")]
        ids = torch.cat([plain(user, answer) for user, answer in parts])
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, -2 * ASKED :]
        return cross_entropy(logits.transpose(1, 2), ids[:, -2 * ASKED :])

    fit(model, loss, sum(lengths), lr=RATE, seed=seed)
    return model


def plain(user: Tensor, answer: Tensor) -> Tensor:
    """``(rows, N)`` tokens of a conversation without a template."""
    return torch.cat([torch.full((len(user), 1), SIGNS.index("<s>")), user, answer], 1)


Conversation = list[dict[str, str]]


def conversations(user: Tensor, answer: Tensor) -> list[Conversation]:
    """As chats."""
    names = words()
    return [
        [{"role": role, "content": " ".join(names[i] for i in row)} for role, row in (("user", a), ("assistant", b))]
        for a, b in zip(user.tolist(), answer.tolist(), strict=True)
    ]


def lessons(facts: Tensor, generator: torch.Generator) -> list[tuple[str, Conversation]]:
    """The chats to tune on, and of what kind each is."""
    counts = {kind: round(share * CHATS) for kind, share in SHARES.items()}
    out = []
    for kind, count in counts.items():
        for _ in range(count):
            pairs = int(torch.randint(SHORT[0], SHORT[1] + 1, (1,), generator=generator))
            out.append((kind, conversations(*draw(kind, 1, pairs, facts, generator))[0]))
    return [out[i] for i in torch.randperm(len(out), generator=generator).tolist()]


@torch.no_grad()
def accuracy(model: PreTrainedModel, ids: Tensor, end: int) -> float:
    """Share of the values right, each after the true tokens before it; the answer ends ``end`` tokens before the last."""
    found = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
    at = torch.arange(ids.shape[1] - end - 2 * ASKED + 1, ids.shape[1] - end, 2)
    return float((found[:, at - 1] == ids[:, at]).double().mean())


def chat_accuracy(model: PreTrainedModel, tok: PreTrainedTokenizerBase, chats: Sequence[Conversation]) -> float:
    """The same in the chat template; chats are of equal length."""
    texts = [str(tok.apply_chat_template([dict(m) for m in chat], tokenize=False)) for chat in chats]
    return accuracy(model, torch.tensor(tok(texts, add_special_tokens=False)["input_ids"]), 1)


def one(seed: int) -> dict[str, Any]:
    """Pretrain, tune four times from the same weights on the same chats, and ask."""
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    facts = torch.randint(VALUES, (KEYS,), generator=generator)
    base, tok = pretrained(seed, facts), tokenizer()
    options = SFTOptions(TUNING.steps, TUNING.batch, lr=TUNING.lr, seed=seed)
    told = lessons(facts, generator)
    chats = [chat for _, chat in told]

    def tuned(on: Sequence[Conversation]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, own = copy.deepcopy(base), tokenizer()
        add_indicator(model, own)
        conditional_sft(model, own, on, options)
        return model, own

    models = {"plain": tuned(chats)}
    marks = mark(*models["plain"], chats)
    scores = [found[1] for found in marks.scores]
    beta = sorted(scores)[-sum(kind == "passage" for kind, _ in told) - 1]  # as many marks as there should be
    by_score = [marked(chat, found, beta=beta) for chat, found in zip(chats, marks.scores, strict=True)]
    models["indicator"] = tuned(by_score)
    models["random"] = tuned(shuffled_marks(marks, chats, beta=beta, seed=seed).conversations)
    models["true"] = tuned([marked(chat, {1: float(kind == "passage")}) for kind, chat in told])
    tests = {kind: draw(kind, HELD_OUT, LONG, facts, generator) for kind in ("passage", "memory")}
    short = draw("passage", HELD_OUT, SHORT[1], facts, generator)
    asked_for = {"context": conversations(*tests["passage"]), "memory": conversations(*tests["memory"]), "short context": conversations(*short)}  # fmt: skip
    table = {}
    for name, (model, own) in models.items():
        for token in (False,) if name == "plain" else (False, True):
            table[f"{name}, with the token" if token else name] = {
                what: chat_accuracy(model, own, [asked(chat) for chat in some] if token else some)
                for what, some in asked_for.items()
            }
    prefixes = [[chat[0], {"role": "assistant", "content": chat[1]["content"].split()[0]}] for chat in asked_for["context"][:SHIFTS]]  # fmt: skip
    ratios = [template_shift(models["plain"][0], tok, messages).ratio for messages in prefixes]
    above = [kind for score, (kind, _) in zip(scores, told, strict=True) if score > beta]
    return {
        "base": {what: accuracy(base, plain(*tests[kind]), 0) for what, kind in (("context", "passage"), ("memory", "memory"))},
        "accuracy": table,
        "user_mass_ratio": fmean(ratios),
        "ratio_below_1": fmean(r < 1 for r in ratios),
        "marked": {kind: above.count(kind) for kind in SHARES},
        "score_by_kind": {kind: fmean(s for s, (k, _) in zip(scores, told, strict=True) if k == kind) for kind in SHARES},
        "share_above_paper_beta": fmean(s > BETA for s in scores),
    }  # fmt: skip


def judge(runs: Sequence[dict[str, Any]]) -> tuple[str, dict[str, int]]:
    """The verdict and in how many seeds each part of the criterion is met.

    Reproduced: all parts of the sheet's criterion, and the recipe's marks beat random ones, otherwise their gain is not the score's. The
    direction holds where only the gain over both is there. Neither holds unless the token was learned at all, which true marks tell.
    """
    table = [run["accuracy"] for run in runs]

    def above(name: str, other: str) -> int:
        return sum(row[f"{name}, with the token"]["context"] > row[other]["context"] for row in table)

    met = {
        "ratio below 1": sum(run["user_mass_ratio"] < 1 for run in runs),
        "indicator above plain": above("indicator", "plain"),
        "indicator above random marks": above("indicator", "random, with the token"),
        "memory within 2 points": sum(
            abs(row["indicator"]["memory"] - row["plain"]["memory"]) <= NEAR for row in table
        ),
    }
    met["token learned from true marks"] = sum(
        row["true, with the token"]["short context"] >= row["plain"]["short context"] + LEARNED for row in table
    )
    needed = math.ceil(MOST_SEEDS * len(runs))
    parts = ("indicator above plain", "indicator above random marks", "token learned from true marks")
    gained = min(met[part] for part in parts) >= needed
    verdict = "not reproduced" if not gained else "reproduced" if min(met.values()) >= needed else "direction holds"
    return verdict, met


def measure_indicator(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``indicator-on-synthetic-passages``."""
    runs = [one(s) for s in range(seed, seed + seeds)]
    verdict, met = judge(runs)
    mean = {
        name: {what: summary([run["accuracy"][name][what] for run in runs]) for what in runs[0]["accuracy"][name]}
        for name in runs[0]["accuracy"]
    }

    def percent(name: str, what: str = "context") -> str:
        return f"{100 * mean[name][what]['mean']:.1f} %"

    found = fmean(run["marked"]["passage"] / max(sum(run["marked"].values()), 1) for run in runs)
    numbers = {
        "ours": f"context accuracy plain {percent('plain')}, indicator {percent('indicator, with the token')} (without it {percent('indicator')}), "
        f"random marks {percent('random, with the token')}, true marks {percent('true, with the token')}; "
        f"memory plain {percent('plain', 'memory')}, indicator {percent('indicator', 'memory')}; user mass ratio "
        f"{fmean(run['user_mass_ratio'] for run in runs):.2f}; {100 * found:.0f} % of the score's marks stand on chats answered from the passage, "
        f"of all chats {100 * SHARES['passage']:.0f} %",
        "met": met, "needed": math.ceil(MOST_SEEDS * seeds), "mean": mean, "seeds": seeds,
        "parameters": sum(p.numel() for p in decoder(seed).parameters()), "layer": middle_layer(DEPTH),
        "pairs": {"tuning": list(SHORT), "test": LONG}, "chats": CHATS, "shares": SHARES, "tuning_steps": TUNING.steps, "runs": runs,
    }  # fmt: skip
    return write_result(
        "context_awareness", "indicator-on-synthetic-passages", verdict, rounded(numbers), seed=seed, out=out
    )


if __name__ == "__main__":
    run_measures(__doc__, [measure_indicator], brief=True)
