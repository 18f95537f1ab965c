"""Latent loops and mediation: identities of the spec sheet's section 6, and guards that withhold a verdict."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, ShapeError
from foveal.lens.chain import Chain
from foveal.lens.latents import AddNoise, LatentLoop, MatchedNoise, Share, Zero, effective_rank, moments, similarity
from foveal.lens.mediation import Effects, audit, compare_answers, instrument, latent_effects, mediate, probe

from ..hf import models

B, N, K = 3, 9, 4


def tiny(name: str = "llama") -> Any:
    return models.build(name, "sdpa").double()


def loop(model: Any, ids: torch.Tensor, **changes: Any) -> LatentLoop:
    """What the model itself samples first is taken as the start token, so that the first prompt thinks."""
    first = int(model(input_ids=ids[:1]).logits[0, -1].argmax())
    return LatentLoop(model, **{"start_id": first, "end_id": None, "max_latent": K, **changes})


def greedy(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    out = []
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            out.append(int(ids[0, -1]))
    return out


# --- the loop -----------------------------------------------------------------------------------------------------------


def test_the_identity_hook_reproduces_clean_generation():
    model, ids = tiny(), models.tokens(1, N)
    clean = loop(model, ids).generate(ids, 8)
    hooked = loop(model, ids, hook=lambda b, k, z: z).generate(ids, 8)
    assert clean.tokens == hooked.tokens and torch.equal(clean.latents[0], hooked.latents[0])
    assert clean.emission == 1 and hooked.fired == 0 and len(clean.latents[0]) % K == 0


def test_no_latent_steps_is_ordinary_decoding():
    model, ids = tiny(), models.tokens(1, N)
    run = loop(model, ids, max_latent=0).generate(ids, 8)
    assert run.tokens[0] == greedy(model, ids, 8) and run.emission == 0


def test_feeding_back_the_decoded_token_makes_latent_steps_ordinary():
    """phi(h) = E(decode(h)): K tokens are left out of the text, everything else is greedy decoding."""
    model, ids = tiny(), models.tokens(1, N)
    embed = model.get_input_embeddings().weight
    run = loop(model, ids, phi=lambda h: embed[model.lm_head(h).argmax(-1)]).generate(ids, 3)
    plain = greedy(model, ids, 3 + K)
    assert run.tokens[0][:3] == [plain[0], *plain[1 + K : 3 + K]] or plain[0] in plain[1 + K : 3 + K]
    assert [int((embed == z).all(-1).nonzero()[0]) for z in run.latents[0][:K]] == plain[1 : 1 + K]


def test_incremental_decoding_equals_one_forward():
    model, ids = tiny(), models.tokens(1, N)
    run = loop(model, ids).generate(ids, 4)
    embed = model.get_input_embeddings()
    start, after = run.tokens[0][0], run.tokens[0][1]
    x = torch.cat([embed(ids), embed(torch.tensor([[start]])), run.latents[0][None, :K]], 1)
    with torch.no_grad():
        assert int(model(inputs_embeds=x).logits[0, -1].argmax()) == after
        for k in range(K):
            again = model(inputs_embeds=x[:, : N + 1 + k], output_hidden_states=True).hidden_states[-1][0, -1]
            torch.testing.assert_close(again, run.latents[0][k], rtol=0, atol=1e-4)


def test_modes_are_per_sequence():
    """A batch gives what each prompt gives alone, although only some of them think."""
    model, ids = tiny(), models.tokens(B, N)
    one = loop(model, ids)
    both = one.generate(ids, 6)
    assert 0 < both.emission < 1
    for b in range(B):
        alone = one.generate(ids[b : b + 1], 6)
        assert alone.tokens[0] == both.tokens[b]
        torch.testing.assert_close(alone.latents[0], both.latents[b], rtol=0, atol=1e-9)


def test_the_end_token_is_put_down_after_exactly_k_steps():
    model, ids = tiny(), models.tokens(1, N)
    run = loop(model, ids, end_id=60).generate(ids, 5)
    assert run.tokens[0][1] == 60 and len(run.latents[0]) >= K


# --- what can be done to latents ----------------------------------------------------------------------------------------


def test_noise_identities():
    z = torch.randn(5, K, 8, dtype=torch.float64)
    mean, std = moments(z)
    assert torch.equal(MatchedNoise(mean, torch.zeros_like(std))(0, 0, z[0, 0]), mean), "std 0 replaces by the mean"
    assert torch.equal(AddNoise(0.0)(1, 2, z[1, 2]), z[1, 2]), "σ = 0 is the identity"
    noise = MatchedNoise(mean, std, seed=3)
    assert torch.equal(noise(1, 2, z[0, 0]), noise(1, 2, z[3, 1])) and not torch.equal(
        noise(1, 2, z[0, 0]), noise(2, 1, z[0, 0])
    )
    many = torch.stack([noise(i, 0, z[0, 0]) for i in range(4000)])
    torch.testing.assert_close(many.mean(0), mean, rtol=0, atol=0.08)
    torch.testing.assert_close(many.std(0), std, rtol=0, atol=0.08)
    assert not Zero()(0, 0, z[0, 0]).any()


def test_similarity_identities():
    z = torch.randn(40, K, 512, generator=torch.Generator().manual_seed(0))
    found = similarity(z, [0, 1] * 20)
    torch.testing.assert_close(found.intra.diagonal(), torch.ones(K, dtype=torch.float64))
    assert found.inter.abs().max() < 3 / math.sqrt(512), "independent Gaussian latents"
    shared = similarity(z[:1, :1].expand(5, K, -1))
    torch.testing.assert_close(shared.inter, torch.ones(K, dtype=torch.float64))
    weights = torch.tensor([20 * 19 * 2, 20 * 20 * 2], dtype=torch.float64) / (40 * 39)
    torch.testing.assert_close(found.inter, weights[0] * found.within + weights[1] * found.across)
    offset = similarity(z + 10)
    assert offset.inter.min() > 0.9 and similarity(z + 10, centered=True).inter.abs().max() < 0.1


def test_effective_rank():
    assert effective_rank(torch.ones(K, 8)) == pytest.approx(1)
    assert effective_rank(3 * torch.eye(K, 8)) == pytest.approx(K)


# --- mediation ----------------------------------------------------------------------------------------------------------


def test_a_linear_chain_has_the_textbook_effects():
    """Z = aX, Y = bZ + cX: NIE = a·b·dx, NDE = c·dx, TE is their sum."""
    a, b, c = 1.7, -0.4, 2.2
    x, other = torch.randn(2, 50, dtype=torch.float64)
    effects = mediate(lambda x, z: b * z + c * x, lambda x: a * x, x, other)
    dx = other - x
    for got, expected in (
        (effects.indirect, a * b * dx),
        (effects.direct, c * dx),
        (effects.total, effects.direct + effects.indirect),
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
    shifted = mediate(lambda x, z: b * z + c * x, lambda x: a * x, x, x + 1)
    assert shifted.proportion == pytest.approx(a * b / (a * b + c))
    assert math.isnan(Effects(torch.randn(50), torch.ones(50), torch.ones(50)).proportion)
    assert json.loads(json.dumps(shifted.to_json()))["instances"] == 50


def test_do_z_leaves_every_logit_before_the_latents_alone():
    model, ids = tiny(), models.tokens(B, N)
    chain = Chain(model, K, (5, 6))
    embed = model.get_input_embeddings()
    z = chain.think(ids)
    for other in (z, torch.zeros_like(z)):
        with torch.no_grad():
            logits = model(inputs_embeds=torch.cat([embed(ids), other], 1)).logits[:, :N]
            torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=0, atol=1e-9)


def test_only_blind_latents_make_the_latents_the_one_way():
    """Prompt keys hidden from everything after it: the answer given Z does not depend on X. Hidden from the suffix alone, it still does."""
    model, ids = tiny(), models.tokens(2, N)
    chains = {blind: Chain(model, K, (5, 6), hidden=(0, N), blind=blind) for blind in ("latents", "suffix")}
    with torch.no_grad():
        z = chains["latents"].think(ids)
        assert torch.equal(z, Chain(model, K, (5, 6)).think(ids)), "thinking sees the prompt in every chain"
        same, leaking = ([chain.answer(ids[b : b + 1], z[:1]) for b in range(2)] for chain in chains.values())
        torch.testing.assert_close(same[0], same[1], rtol=0, atol=1e-9)
        assert not torch.allclose(leaking[0], leaking[1], atol=1e-3)
        assert not torch.allclose(same[0], chains["latents"].answer(ids[:1], z[1:]), atol=1e-3)
    effects = latent_effects(chains["latents"], ids[:1], ids[1:], torch.tensor([3]))
    assert float(effects.direct.abs()) < 1e-9 and float(effects.total - effects.indirect) == pytest.approx(0, abs=1e-9)


def test_answers_to_hidden_latents_are_invariant_to_z():
    """Blocking the edges to latents of all later tokens, suffix included, leaves no trace of Z."""
    model, ids = tiny(), models.tokens(2, N)
    embed = model.get_input_embeddings()
    tail = embed(torch.tensor([[5, 6]])).expand(2, -1, -1)
    allowed = torch.ones(N + K + 2, N + K + 2, dtype=torch.bool).tril()
    allowed[N + K :, N : N + K] = False
    z = Chain(model, K, (5,)).think(ids)
    with torch.no_grad():
        a, b = (
            model(
                inputs_embeds=torch.cat([embed(ids), some, tail], 1), attention_mask=allowed.expand(2, 1, -1, -1)
            ).logits[:, N + K :]
            for some in (z, torch.randn_like(z))
        )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_chain_equals_the_loop():
    """Thinking after a prompt that ends in the start token is what the loop records."""
    model, ids = tiny(), models.tokens(1, N)
    one = loop(model, ids)
    run = one.generate(ids, 2)
    z = Chain(model, K, (1,)).think(torch.cat([ids, torch.tensor([[one.start_id]])], 1))
    torch.testing.assert_close(z[0], run.latents[0][:K], rtol=0, atol=1e-9)


def test_guards_withhold_a_verdict():
    model, ids = tiny(), models.tokens(8, N)
    chain = Chain(model, K, (5,))
    gold = chain.answer(ids, chain.think(ids)).argmax(-1).detach()
    report = audit(
        chain, ids, gold, {"none": lambda b, k, z: z, "share": Share(torch.full((models.HIDDEN,), 3.0)), "zero": Zero()}
    )
    assert report.clean == 1
    assert report.corruptions["none"].verdict.startswith("withheld: the hook changed no latent")
    assert report.corruptions["share"].fired == 1 and report.corruptions["share"].moved > 0
    assert report.corruptions["share"].lost == -report.corruptions["share"].change
    blind = compare_answers(torch.eye(3), torch.eye(3), torch.arange(3), 1.0)
    assert blind.verdict == "withheld: the change never reached the logits"
    wrong = compare_answers(torch.eye(20), torch.eye(20).roll(1, 0), torch.arange(20), 1.0)
    assert wrong.change == -1 and wrong.verdict == "the answer depends on the latents"
    faint = compare_answers(torch.eye(20), 0.9 * torch.eye(20), torch.arange(20), 1.0)
    assert faint.changed == 0 and "hardly any answer changed" in faint.verdict
    assert json.loads(json.dumps(report.to_json()))["corruptions"]["zero"]["verdict"] and "<table" in report.html()
    shared = chain.think(ids, Share(torch.ones(models.HIDDEN)))
    torch.testing.assert_close(similarity(shared).inter, torch.ones(K, dtype=torch.float64))


def test_a_probe_reads_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (120,), generator=g)
    told = torch.nn.functional.one_hot(labels, 3).double() @ torch.randn(3, 10, generator=g, dtype=torch.float64)
    found = probe(told + 0.1 * torch.randn(120, 10, generator=g), labels + 40)
    assert found.accuracy > 0.95 and found.shuffled < 0.6 and 1 / 3 <= found.majority < 0.5
    assert probe(torch.randn(120, 10, generator=g), labels).accuracy < 0.55


def test_the_instrument_needs_both_models_to_differ():
    model, ids = tiny(), models.tokens(12, N)
    results = []
    for hidden in (None, (0, N)):
        chain = Chain(model, K, (5, 6), hidden=hidden, blind="latents")
        z = chain.think(ids)
        gold = chain.answer(ids, z).argmax(-1).detach()
        noise = {"matched noise": MatchedNoise(*(m.detach() for m in moments(z)))}
        results.append((audit(chain, ids, gold, noise), latent_effects(chain, ids, ids.roll(1, 0), gold)))
    check = instrument(*results)
    assert check.mediated_bottleneck == pytest.approx(1) and check.drop_bottleneck >= 0
    assert not instrument(results[0], results[0]).valid, "one model twice is no check"
    with pytest.raises(ConfigError, match="no corruption 'zero'"):
        instrument(*results, noise="zero")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: LatentLoop(m, 1, 2, -1), ConfigError, "max_latent is -1"),
        (
            lambda m: LatentLoop(m, 1, 2, 1).generate(torch.zeros(3, dtype=torch.long), 1),
            ShapeError,
            "expected \\(B, N\\)",
        ),
        (lambda m: Chain(m, 1, (1,), blind="x"), ConfigError, "blind is 'x'"),
        (lambda m: Chain(m, 1, ()), ConfigError, "at least one id"),
        (
            lambda m: Chain(m, 2, (1,)).answer(models.tokens(1, 4), torch.zeros(1, 3, 32)),
            ShapeError,
            "latents has shape",
        ),
        (lambda m: audit(Chain(m, 0, (1,)), models.tokens(2, 4), torch.zeros(2), {}), ConfigError, "steps=0"),
        (lambda m: audit(Chain(m, 1, (1,)), models.tokens(2, 4), torch.zeros(3), {}), ShapeError, "gold has shape"),
        (lambda m: similarity(torch.zeros(1, 2, 3)), ShapeError, "M of 2"),
        (lambda m: probe(torch.zeros(4, 2), torch.zeros(3)), ShapeError, "features has shape"),
        (lambda m: probe(torch.zeros(4, 2), torch.zeros(4)), ConfigError, "folds is 5"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, says):
    with pytest.raises(error, match=says):
        call(models.build("llama"))
