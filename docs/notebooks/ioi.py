# %% [markdown]
# # The IOI circuit in SmolLM2
#
# "Then Mary and John met, and John gave a book to" – *Mary*. Which heads know it? We corrupt the prompt so that the right answer
# flips, carry single heads' outputs over from the corrupted run, and read how much of the answer goes with them. Definitions:
# [circuits](../circuits.md).

# %%
import matplotlib.pyplot as plt
import torch

from foveal import lens
from foveal.core.provenance import provenance
from foveal.hf.load import load_model
from foveal.lens.circuits import STAGES, build_pairs, chance, find_circuit, jaccard, names
from foveal.lens.patching import attribute_heads, compare, patch_heads
from foveal.lens.probes import ChosenRows

# %% tags=["parameters"]
MODEL, PROMPTS, SEED = "smollm2", 16, 0

# %%
loaded = load_model(MODEL)
model, tokenizer = loaded.model, loaded.tokenizer
pairs = build_pairs("ioi", tokenizer, PROMPTS, SEED)
runs = compare(model, pairs)
end = int(pairs.place("end")[0, 0])
print("clean:    ", tokenizer.decode(pairs.clean[0, : end + 1]), "→", tokenizer.decode(pairs.correct[:1]))
print("corrupted:", tokenizer.decode(pairs.corrupt[0, : end + 1]), "→", tokenizer.decode(pairs.foil[:1]))
print(f"logit difference: {runs.clean_difference.mean():.2f} clean, {runs.corrupt_difference.mean():.2f} corrupted")

# %% [markdown]
# ## A fast screen, then patching
#
# `attribute_heads` estimates the effect of all heads from one backward pass; `patch_heads` really carries each head's output over.
# An effect of 0 is none, 1 as bad as the whole corruption.

# %%
screen = attribute_heads(runs)
patched = patch_heads(runs)
figure, axes = plt.subplots(figsize=(4, 4), layout="constrained")
axes.axline((0, 0), slope=1, color="0.8")
axes.scatter(screen.effect.numpy(), patched.effect.numpy(), s=9)
for layer, head in patched.top(0.02):
    axes.annotate(f" {layer}.{head}", (screen.effect[layer, head], patched.effect[layer, head]), fontsize=8)
axes.set(title="effect of each head at the end", xlabel="estimated", ylabel="patched")
plt.show()
print("strongest when patched:  ", names(patched.top(0.02)))
print("strongest when estimated:", names(screen.top(0.02)))

# %% [markdown]
# ## The circuit, stage by stage
#
# Path patching asks for direct connections only. First the heads that write the answer (movers), then those that set where movers
# look (inhibition), then those that tell these which name came twice (induction). Each stage keeps the top 2 % of all heads; rings
# mark them.

# %%
circuit = find_circuit(model, pairs)
print(f"right answers: {100 * circuit.accuracy:.0f} % (chance {100 / circuit.choices:.0f} %)")
circuit.plot()

# %%
for found in circuit.stages:
    low, high = found.effects.interval(seed=SEED)
    print(found.stage.name)
    for head in found.heads:
        print(f"  {head[0]:2}.{head[1]}  {found.effects.effect[head]:+.3f}  95 % {low[head]:+.3f} to {high[head]:+.3f}")

# %% [markdown]
# ## What do the movers look at?
#
# `ChosenRows` records the row of the last token. In GPT-2, movers look at the name that is the answer (`io`), not at the one that
# came twice (`s1`, `s2`), and those with a negative effect push against what they look at. Here?

# %%
places = ("io", "s1", "s2")
looks = {head: torch.zeros(len(places), dtype=torch.float64) for head in circuit.stages[0].heads}
for b in range(len(pairs)):
    end = int(pairs.place("end")[b, 0])
    with torch.no_grad(), lens.record(model, ChosenRows((end,))) as rec:
        model(pairs.clean[b : b + 1, : end + 1])
    for layer, head in looks:
        row = rec["rows"].select(layer=layer, head=head).values[0]
        looks[layer, head] += torch.stack([row[int(pairs.place(p)[b, 0])] for p in places]) / len(pairs)
print("head   effect   " + "   ".join(f"{p:>4}" for p in places))
for (layer, head), seen in looks.items():
    effect = circuit.stages[0].effects.effect[layer, head]
    print(f"{layer:2}.{head}  {effect:+.3f}   " + "   ".join(f"{100 * float(s):3.0f}%" for s in seen))

# %% [markdown]
# Three of the six look at the answer, as movers of GPT-2 do; 24.4 among them works against it. The strongest, 23.3, looks at the
# second mention of the repeated name instead and still helps, as a head would that pushes down the name it sees. The two of the last
# layer look at neither name.
#
# ## Would other prompts give the same heads?
#
# A set of heads means something only beside chance. We find the movers again on other prompts and compare: the overlap is Jaccard,
# and `chance` says exactly what two random sets of these sizes share. `foveal inspect MODEL --circuits ioi,colored_objects` makes
# the same comparison between two tasks.

# %%
again = find_circuit(model, build_pairs("ioi", tokenizer, PROMPTS, SEED + 1), stages=STAGES["ioi"][:1])
first, second = set(circuit.stages[0].heads), again.heads
luck = chance(len(first), len(second), circuit.total, len(first & second))
print("movers:", names(first), "and", names(second))
print(
    f"overlap {jaccard(first, second):.2f}; two random sets {luck.mean:.3f}, 95th percentile {luck.q95:.3f}, p {luck.p:.1g}"
)

# %% [markdown]
# A small effect does not mean that a head is unused: others may step in. And few prompts give wide intervals: take 64 or more before
# you believe a single head.
#
# ## Provenance

# %%
here = provenance()
print("model:", loaded.source, "|", loaded.dtype, "| prompts:", dict(pairs.settings))
print({name: here[name] for name in ("foveal", "torch", "transformers", "python", "date")})
