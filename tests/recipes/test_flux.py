"""Training of Flux's routers: both hosts, the identities 1 and 6, frozen models, resuming, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foveal.core.errors import ConfigError, DataError, UnsupportedError
from foveal.layers.layer_router import LayerRouters
from foveal.models import DecoderLM, shifted_factory
from foveal.patterns import BlockTopK, Dense, Flux, SlidingWindow
from foveal.recipes.flux import FluxTraining, RoutedTask, sample_losses, train_flux
from foveal.recipes.flux_hosts import host_of
from foveal.recipes.flux_tasks import LOCAL, RETRIEVAL, padded, synthetic_tasks, text_tasks
from tests.hf.models import build

VOCAB = 130
HOW = FluxTraining(steps=6, rows=3, pool=4, sparse=SlidingWindow(5), lr=0.02, multiplier_lr=0.1)


def decoder(shifted=False, seed=0):
    attention = shifted_factory(16, 4, 2) if shifted else None
    return DecoderLM(VOCAB, 16, 2, 4, 2, attention=attention, seed=seed).eval()


def chain():
    return torch.softmax(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), -1)


def tasks(**fields):
    return synthetic_tasks(**{"length": 40, "pairs": 6, "asked": 2, "table": chain(), **fields})


def small(vocab, length=14):
    """One task of random tokens, its prompts of different lengths."""

    def draw(rows, generator):
        made = []
        for i in range(rows):
            ids = torch.randint(3, vocab, (length - i,), generator=generator)
            made.append((ids[:-4], ids[-4:]))
        return padded(made)

    return RoutedTask("random", 0.5, draw)


def parameters(module):
    return [p.detach().clone() for p in module.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("model", [decoder(), decoder(True), build("llama"), build("qwen3")], ids=["decoder", "shifted", "llama", "qwen3"])  # fmt: skip
def test_routers_learn_and_the_model_stays(model):
    own = isinstance(model, DecoderLM)
    given = tasks() if own else [small(61)]
    before, flags = parameters(model), [p.requires_grad for p in model.parameters()]
    implementation = None if own else model.config._attn_implementation
    calls = []
    trained = train_flux(model, given, HOW, progress=lambda *x: calls.append(x))
    assert same(parameters(model), before) and [p.requires_grad for p in model.parameters()] == flags
    assert own or model.config._attn_implementation == implementation
    assert [c[:2] for c in calls] == [(i + 1, 6) for i in range(6)]
    assert set(trained.history[0]["loss"]) == {t.name for t in given}
    start = LayerRouters(len(trained.routers.layers), trained.routers.head_dim, HOW.pool, HOW.seed)
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), trained.routers.parameters(), strict=True)]
    assert all(moved), "every parameter of every router had a gradient"
    again = train_flux(model, given, replace(HOW, chunk=1))
    for a, b in zip(trained.routers.parameters(), again.routers.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), "chunks change nothing but memory"


def test_routers_learn_to_tell_the_tasks_apart():
    how = replace(HOW, steps=50, lr=0.05, multiplier_lr=0.2)
    trained = train_flux(decoder(), tasks(targets=(0.0, 1.0)), how)
    shares = {name: [h["sparsity"][name] for h in trained.history] for name in (RETRIEVAL, LOCAL)}
    assert max(shares[name][0] for name in shares) < 0.3, "they start full"
    gap = sum(shares[LOCAL][-15:]) - sum(shares[RETRIEVAL][-15:])
    assert gap / 15 > 0.3


@pytest.mark.parametrize("model", [decoder(), build("llama")], ids=["decoder", "llama"])
def test_identity_1_where_the_window_holds_everything_the_router_has_no_say(model):
    task = tasks()[0] if isinstance(model, DecoderLM) else small(61)
    batch = task.draw(2, torch.Generator().manual_seed(1))
    outs = []
    for bias in (4.5, -4.5):
        with host_of(model) as host:
            routers = LayerRouters(host.layers, host.head_dim, 4)
            for layer in routers.layers:
                layer.get_parameter("V3.bias").data[1] = bias
            for sparse, bound in ((SlidingWindow(40), 0.0), (SlidingWindow(30, 10), 1e-6)):
                how = replace(HOW, sparse=sparse)
                loss, share = sample_losses(host, routers, batch, slice(0, 2), how, 1.0)
                grads = torch.autograd.grad(loss.sum(), list(routers.parameters()), allow_unused=True)
                assert all(g is None or float(g.abs().max()) <= bound for g in grads)
                assert all(abs(s - (bias < 0)) < 0.05 for s in share.tolist())
                outs.append(loss)
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)


@pytest.mark.parametrize("model", [decoder(), build("llama")], ids=["decoder", "llama"])
def test_a_sure_router_gives_the_loss_of_its_branch(model):
    """Soft gates at their ends, and straight-through gates at any, equal the model under the pattern itself."""
    task = tasks()[0] if isinstance(model, DecoderLM) else small(61)
    batch = task.draw(2, torch.Generator().manual_seed(1))

    def forward(pattern):
        ids = batch.ids[:, :-1]
        if isinstance(model, DecoderLM):
            return model(ids, pattern)
        import foveal

        with foveal.attach(model, pattern):
            return model(input_ids=ids, use_cache=False).logits

    for bias, pattern, mode in ((40.0, Dense(), "soft"), (-40.0, HOW.sparse, "soft"), (1.0, Dense(), "st"), (-1.0, HOW.sparse, "st")):  # fmt: skip
        with host_of(model) as host:
            routers = LayerRouters(host.layers, host.head_dim, 4)
            for layer in routers.layers:
                layer.get_parameter("V3.bias").data[1] = bias
            loss, _ = sample_losses(host, routers, batch, slice(0, 2), replace(HOW, mode=mode), 1.0)
        with torch.no_grad():
            logits = forward(pattern)
        for i in range(2):
            at = batch.scored[i, 1:]
            want = torch.nn.functional.cross_entropy(logits[i][at], batch.ids[i, 1:][at])
            assert float(loss[i].detach()) == pytest.approx(float(want), abs=1e-5)


def test_training_and_inference_read_the_same_prompt(tmp_path):
    """The decision after training is that of the training forward without noise: same tokens, same pooling."""
    model = decoder()
    routers, g = LayerRouters(2, 4, 4), torch.Generator().manual_seed(0)
    for layer in routers.layers:
        layer.get_parameter("W1.weight").data.mul_(50)
        layer.get_parameter("V3.weight").data.copy_(300 * torch.randn(2, 4, generator=g))
        layer.get_parameter("V3.bias").data.zero_()
    batch = tasks()[0].draw(5, torch.Generator().manual_seed(3))
    with host_of(model) as host:
        _, share = sample_losses(host, routers, batch, slice(0, 5), replace(HOW, mode="st"), 1.0)
    routers.save(tmp_path / "r")
    from foveal.patterns.flux import decisions

    run = model.begin(batch.ids[:, : int(batch.prompt[0])], Flux.of_file(tmp_path / "r", sparse=HOW.sparse))
    with torch.no_grad():
        model(batch.ids[:, : int(batch.prompt[0])], run=run)
    made = decisions(run.selections)
    assert made.omega.tolist() == pytest.approx(share.tolist(), abs=1e-6)
    assert 0 < float(made.omega.mean()) < 1


@pytest.mark.parametrize("backbone", [0.0, 1e-3])
def test_resuming_equals_an_uninterrupted_run(tmp_path, backbone):
    how = replace(HOW, backbone_lr=backbone, mode="st")
    whole = train_flux(decoder(), tasks(), how)
    file, stopped = tmp_path / "run" / "checkpoint", decoder()

    def stop(step, steps, said):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_flux(stopped, tasks(), how, checkpoint=file, every=2, progress=stop)
    model = decoder()
    seen = []
    rest = train_flux(model, tasks(), how, checkpoint=file, every=2, progress=lambda step, *_: seen.append(step))
    assert seen == [5, 6], "four steps were kept"
    assert rest.history == whole.history
    assert same(parameters(rest.routers), parameters(whole.routers))
    assert same(parameters(rest.multipliers), parameters(whole.multipliers))
    with pytest.raises(ConfigError, match="was made with"):
        train_flux(decoder(), tasks(), replace(how, lr=0.5), checkpoint=file)
    with pytest.raises(ConfigError, match="was made with"):
        train_flux(decoder(), tasks(targets=(0.1, 0.2)), how, checkpoint=file)


def test_the_switch_trains_the_projections_alone():
    for model in (decoder(), build("llama")):
        given = tasks() if isinstance(model, DecoderLM) else [small(61)]
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train_flux(model, given, replace(HOW, steps=2, backbone_lr=1e-3))
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed and all(".qkv." in n or "_proj." in n for n in changed)
        assert not any("o_proj" in n or "mlp" in n for n in changed)


def test_synthetic_tasks_are_seeded_and_score_the_answer():
    for task in tasks():
        a, b = (task.draw(3, torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, task.draw(3, torch.Generator().manual_seed(6)).ids)
        assert a.ids.shape == (3, 40) and a.prompt.tolist() == [36] * 3
        assert not a.scored[:, :36].any() and a.scored[:, 36:].any(1).all()


def test_text_tasks_ask_for_a_fact_and_go_on_with_the_text(tmp_path):
    from transformers import AutoTokenizer

    from foveal.data.text import load_text, tokens
    from tests.tune.tiny import save_tiny_model

    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path))
    ids = tokens(tokenizer, load_text()[:20_000])
    retrieval, local = text_tasks(tokenizer, ids, 320, tail=16)
    got = retrieval.draw(3, torch.Generator().manual_seed(1))
    for i in range(3):
        end = int(got.prompt[i])
        prompt = tokenizer.decode(got.ids[i, :end])
        answer = tokenizer.decode(got.ids[i][got.scored[i]]).strip()
        assert answer.isdigit() and len(answer) == 5 and answer in prompt.partition("\n\n")[0] + prompt
        assert got.scored[i, :end].sum() == 0 and got.scored[i].sum() == got.scored[i, end:].sum() > 0
        assert prompt.rstrip().endswith("is")
    tail = local.draw(2, torch.Generator().manual_seed(1))
    assert tail.ids.shape == (2, 320) and tail.prompt.tolist() == [304, 304] and tail.scored.sum(1).tolist() == [16, 16]
    with pytest.raises(ConfigError, match="leave no distance"):
        text_tasks(tokenizer, ids, 40, tail=16)
    with pytest.raises(DataError, match="Pass a longer text"):
        text_tasks(tokenizer, ids[:100], 320, tail=16)


def test_bad_input_is_refused():
    model = decoder()
    with pytest.raises(ConfigError, match="at least one"):
        train_flux(model, [], HOW)
    with pytest.raises(ConfigError, match="a name of its own"):
        train_flux(model, [small(61), small(61)], HOW)
    with pytest.raises(ConfigError, match="from 0 to 1"):
        train_flux(model, tasks(targets=(0.4, 1.5)), HOW)
    for field, value in (("steps", 0), ("rows", 0), ("lr", -1.0), ("clip", 0.0), ("warmup", 2.0), ("mode", "hard")):
        with pytest.raises(ConfigError, match=field):
            FluxTraining(**{field: value})
    with pytest.raises(UnsupportedError, match="before rotation"):
        train_flux(build("gpt2"), [small(61)], HOW)
    with pytest.raises(UnsupportedError, match="PreTrainedModel"):
        train_flux(torch.nn.Linear(2, 2), [small(61)], HOW)
    bad = decoder()
    bad.head.weight.data[:] = float("nan")
    with pytest.raises(DataError, match="'retrieval' is nan at step 0"):
        train_flux(bad, tasks(), HOW)


def test_content_based_branches_train_too():
    from foveal.core.budget import Budget

    how = replace(HOW, steps=2, sparse=BlockTopK(Budget(tokens=8), q_block=4, kv_block=4))
    assert len(train_flux(decoder(), tasks(), how).history) == 2
