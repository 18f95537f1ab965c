# %% [markdown]
# # Why a policy hurts one layer
#
# A sliding window is cheap and drops everything far away. Most layers do not mind, a few do. We find the layer that it hurts most,
# the head in it, and the pairs of tokens that this head misses, and give them back. Definitions: [policies](../policies.md),
# [recording under a policy](../lens.md).

# %%
import matplotlib.pyplot as plt
import torch

import foveal
from foveal import Policy, lens
from foveal.core.provenance import provenance
from foveal.data import text as texts
from foveal.hf.load import load_model
from foveal.lens.probes import Lost
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import Rule
from foveal.tune.meter import DenseLogits, Meter

# %% tags=["parameters"]
MODEL, TOKENS, WINDOW, SINKS, SEED = "smollm2", 256, 32, 4, 0

# %%
loaded = load_model(MODEL)
model, tokenizer = loaded.model, loaded.tokenizer
ids = texts.tokens(tokenizer, texts.load_text())
span = texts.split(ids, TOKENS, search=0, seed=SEED, ahead=texts.prefix(tokenizer)).held_out
window = SlidingWindow(window=WINDOW, sinks=SINKS)
layers = model.config.num_hidden_layers
heads = model.config.num_attention_heads

meter, dense = Meter(model), DenseLogits()
meter.quality(span, None, dense)  # keeps the dense model's predictions
everywhere = meter.quality(span, Policy.uniform(window), dense).kl
print(f"{window} in all {layers} layers: KL to dense attention {everywhere:.3f} nats a token")

# %% [markdown]
# ## Mass lost
#
# What does the window drop? The probe `lost` sums, for every row, the dense attention on pairs that the policy does not keep, and
# remembers the heaviest of them. This is what `foveal inspect MODEL --compare policy.json` shows.

# %%
with torch.no_grad(), foveal.attach(model, Policy.uniform(window)), lens.record(model, Lost(6)) as rec:
    model(span)
lost = rec["lost.mass"].values.nanmean(-1)  # (layer, head)
print(f"dropped on average: {100 * lost.mean():.0f} % of the attention")

# %% [markdown]
# ## Harm, layer by layer
#
# Now the window in one layer at a time, all others dense: the distance (KL) of the predictions from the dense model's. If lost mass
# were harm, the two pictures would look alike.

# %%
harm = torch.zeros(layers, dtype=torch.float64)
for layer in range(layers):
    harm[layer] = meter.quality(span, Policy(layers=((layer, Rule(window)),)), dense).kl
figure, (above, below) = plt.subplots(2, 1, figsize=(8, 4.5), sharex=True, layout="constrained")
above.bar(range(layers), 100 * lost.mean(-1).numpy())
above.set(title="mass lost, %")
below.bar(range(layers), 1000 * harm.numpy(), color="tab:red")
below.set(title="harm: KL to dense attention, 0.001 nats", xlabel="layer")
plt.show()
worst, spare = int(harm.argmax()), int(lost.mean(-1).argmax())
rank = torch.corrcoef(torch.stack([lost.mean(-1).argsort().argsort(), harm.argsort().argsort()]).double())[0, 1]
print(
    f"Layer {worst} is hurt most: KL {harm[worst]:.4f}, though it loses {100 * lost[worst].mean():.0f} % of its mass;"
)
print(
    f"layer {spare} loses {100 * lost[spare].mean():.0f} %, for a KL of {harm[spare]:.4f}. Rank correlation over layers: {rank:.2f}."
)

# %% [markdown]
# Lost mass says where to look, not what hurts: early layers drop the most and hardly miss it.
#
# ## Which head of that layer?
#
# Again one at a time: the window in this layer, but one head stays dense. How much of the harm does that head's return undo?

# %%
undone = torch.zeros(heads, dtype=torch.float64)
for head in range(heads):
    rule = Rule(window, heads=((head, head, Rule(Dense())),))
    undone[head] = 1 - meter.quality(span, Policy(layers=((worst, rule),)), dense).kl / harm[worst]
for head in range(heads):
    print(
        f"head {worst}.{head}: loses {100 * lost[worst, head]:3.0f} % of its mass; left dense, it undoes {100 * undone[head]:+4.0f} % of the harm"
    )

# %% [markdown]
# ## What does it miss?
#
# The heaviest pairs that the window took from this head: the token that looks, and what it would have looked at.

# %%
head = int(undone.argmax())
weight, query, key = (rec[f"lost.{part}"].select(layer=worst, head=head).values for part in ("weight", "query", "key"))


def around(at: int) -> str:
    """The token with a little of the text before it and one token after."""
    before = tokenizer.decode(span[0, max(0, at - 3) : at])
    return repr(f"{before}[{tokenizer.decode(span[0, at : at + 1])}]{tokenizer.decode(span[0, at + 1 : at + 2])}")


for w, q, k in zip(weight.tolist(), query.tolist(), key.tolist(), strict=True):
    if w > 0:
        print(f"{w:.2f}  {around(q)} at {q}  →  {around(k)} at {k}, {q - k} tokens back")

# %% [markdown]
# This piece of text is a table drawn with signs. The head looks for the same place in an earlier line and for what came next there:
# it copies, and what it would copy lies outside the window.
#
# ## Give it back
#
# The window everywhere, but the few layers that it hurts stay dense. For comparison as many layers by lost mass, and as many that
# it hurts least.

# %%
count = max(1, layers // 6)
choices = {
    "none": [],
    "the most hurt": harm.argsort(descending=True)[:count].tolist(),
    "the most mass lost": lost.mean(-1).argsort(descending=True)[:count].tolist(),
    "the least hurt": harm.argsort()[:count].tolist(),
}
for name, kept in choices.items():
    policy = Policy(Rule(window), tuple((layer, Rule(Dense())) for layer in sorted(kept)))
    print(f"dense layers: {name:18} {sorted(kept)!s:24} KL {meter.quality(span, policy, dense).kl:.3f}")

# %% [markdown]
# A few dense layers undo most of the harm, if they are the right ones: those that lose the most mass, or as many others, undo next to
# nothing. One short text tells about this text. `foveal tune MODEL` searches the same choice over your own text and length, with held-out
# text for the verdict, and counts what it costs.
#
# ## Provenance

# %%
here = provenance()
print("model:", loaded.source, "|", loaded.dtype, "| text:", texts.text_name(), f"| {TOKENS} tokens, seed {SEED}")
print({name: here[name] for name in ("foveal", "torch", "transformers", "python", "date")})
