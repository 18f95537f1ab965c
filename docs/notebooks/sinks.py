# %% [markdown]
# # Attention sinks in SmolLM2
#
# The first token of a text takes a large share of all attention, whatever it says. We look at where that begins, which block
# makes it, and what becomes of the model when that block may not. Everything streams: no map of attention is kept whole.
# Definitions: [sinks](../sinks.md), [recording](../lens.md).

# %%
import matplotlib.pyplot as plt
import torch

from foveal import lens
from foveal.core.provenance import provenance
from foveal.data import text as texts
from foveal.hf.load import load_model
from foveal.lens.probes import Mass
from foveal.lens.sink_mlp import clamp_mlp, formation, mlp_inputs
from foveal.lens.sinks import scan_sinks
from foveal.tune.meter import Meter

# %% tags=["parameters"]
MODEL, TOKENS, SEED = "smollm2", 512, 0

# %%
loaded = load_model(MODEL)
model, tokenizer = loaded.model, loaded.tokenizer
ids = texts.tokens(tokenizer, texts.load_text())
span = texts.split(ids, TOKENS, search=0, seed=SEED, ahead=texts.prefix(tokenizer)).held_out
print("The text begins:", repr(tokenizer.decode(span[0, :40])))
print("Its first token:", repr(tokenizer.decode(span[0, :1])))

# %% [markdown]
# ## Who looks at the first token?
#
# `Mass` gives the share of every row on given keys. A column is a head, a row a layer; uniform attention would give the first
# token less than 2 %.

# %%
with torch.no_grad(), lens.record(model, Mass({"first": [0]})) as rec:
    model(span)
share = rec["mass"].values[..., 0].nanmean(-1)  # (layer, head)

figure, axes = plt.subplots(figsize=(4.5, 5), layout="constrained")
image = axes.imshow(share.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
axes.set(title="attention on the first token", xlabel="head", ylabel="layer")
figure.colorbar(image, ax=axes)
plt.show()
print(
    f"{100 * share.mean():.0f} % of all attention; {100 * (share > 0.5).double().mean():.0f} % of the heads give it more than half."
)

# %% [markdown]
# ## Its residual stream is massive
#
# `scan_sinks` follows the norm of every token through the blocks. The primary sink is the first token whose norm jumps; its
# window runs from the block that writes the vector to the one that takes it away again.

# %%
scan = scan_sinks(model, span)
primary = scan.sinks[0].primary
norms = scan.trace.norms[0]  # (layer, token)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.semilogy(norms[:, primary.position].numpy(), label=f"token {primary.position}")
left.semilogy(norms.nanmedian(-1).values.numpy(), label="median token")
left.set(title="norm of the residual stream", xlabel="layer")
left.legend()
right.bar(range(len(scan.attention)), [first.share for first in scan.attention])
right.set(title="attention on the first token", xlabel="layer", ylim=(0, 1))
plt.show()
print(f"Token {primary.position} is massive after the layers {primary.on} to {primary.off - 1}:")
print(f"norm {primary.norm:.0f} where the median is {primary.median_norm:.0f}.")

# %% [markdown]
# There are two plateaus: a small one in the first third of the blocks, and the massive one. The attention on the first token follows
# both.
#
# ## One MLP writes it
#
# `formation` compares what goes through the MLP of that block at the first token with other tokens: the cosine between the
# intermediates, and the norm of what comes out.

# %%
others = list(range(1, span.shape[1], max(1, span.shape[1] // 8)))
made = formation(model, span, primary.on, others, primary.position)
print(f"The MLP of block {primary.on} writes {made.primary_norm:.0f} at token {primary.position},")
print("and at others:", ", ".join(f"{norm:.0f}" for norm in made.norms))
for stage, cosine in made.cosines.items():
    print(f"  {stage:5} cosine to the sink's, mean over them: {cosine.mean():+.2f}")

# %% [markdown]
# ## What if it may not?
#
# `clamp_mlp` cuts what this one MLP writes along that direction, here to the norm that it writes elsewhere. One token of one
# block changes; we measure how much attention the first token still gets in later layers, and the loss on the second half of
# the text.

# %%
with torch.no_grad():
    mlp, entering = mlp_inputs(model, span, primary.on)
    written = mlp(entering)[0]
usual = float(written.norm(dim=-1).median())
meter = Meter(model)
before = meter.quality(span, None).nll.mean()
with clamp_mlp(model, primary.on, written[primary.position], norm=usual, protect=()) as flagged:
    after = meter.quality(span, None).nll.mean()
    clamped = scan_sinks(model, span)
later = range(primary.on + 1, len(scan.attention))
for name, found, loss in (("as it is", scan, before), ("clamped", clamped, after)):
    mean = sum(found.attention[i].share for i in later) / max(len(later), 1)
    print(f"{name:9} attention on the first token in later layers {100 * mean:4.1f} %, loss {loss:.2f} nats")
print("tokens that were clamped:", flagged[0].nonzero()[:, 1].tolist())

# %% [markdown]
# One vector at one token is gone, and with it the first token's share of the attention; the loss on text hundreds of tokens later
# rises. So the sink is part of how the model works: heads that have nothing to say put their attention there. Policies should keep
# the first token visible (`sinks=` of `SlidingWindow`), and whoever quantises activations meets its norm.
#
# ## Others
#
# Deep models on long reasoning texts also turn ordinary tokens along the same direction for some layers: secondary sinks. On short
# prose none is the usual answer.

# %%
print(
    "secondary sinks:",
    len(scan.sinks[0].secondary),
    "| others along the primary's direction:",
    len(scan.sinks[0].found),
)

# %% [markdown]
# ## Provenance

# %%
here = provenance()
print("model:", loaded.source, "|", loaded.dtype, "| text:", texts.text_name(), f"| {TOKENS} tokens, seed {SEED}")
print({name: here[name] for name in ("foveal", "torch", "transformers", "python", "date")})
