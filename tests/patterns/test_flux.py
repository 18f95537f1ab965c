"""Routed attention on foveal's own decoder: decisions per row, kept for decoding; identities 1, 2, 7, 8 and 9 of the spec sheet."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, UnsupportedError
from foveal.core.weights import file_sha256
from foveal.layers.layer_router import LayerRouters
from foveal.models import DecoderLM, Memory
from foveal.patterns import Dense, Flux, MoBA, SlidingWindow, Triangle, XAttention
from foveal.patterns.flux import Routed, decisions, prompt_spans
from foveal.policies import Policy, Rule
from tests.support import Host

VOCAB, DIM, DEPTH, HEADS, KV_HEADS, POOL = 40, 32, 3, 4, 2, 3
WINDOW = SlidingWindow(5, 2)


@pytest.fixture(scope="module")
def model():
    return DecoderLM(VOCAB, DIM, DEPTH, HEADS, KV_HEADS, seed=1).double().eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Routers that decide by content ("mixed"), that are always full, and that are always sparse."""
    folder, made = tmp_path_factory.mktemp("routers"), {}
    for name, bias in (("mixed", None), ("full", 9.0), ("sparse", -9.0)):
        routers = LayerRouters(DEPTH, DIM // HEADS, POOL)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in routers.layers:
                layer.get_parameter("V3.bias")[1] = bias or 0.0
                if bias is None:
                    layer.get_parameter("W1.weight").mul_(20)  # content counts for more than biases
                    layer.get_parameter("V3.weight").copy_(100 * torch.randn(2, DIM // HEADS, generator=g))
        made[name] = folder / f"{name}.safetensors"
        routers.save(made[name])
    return made


def ids(rows=6, length=20, seed=0):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def ran(model, tokens, policy, memory=None, **options):
    with torch.no_grad():
        run = model.begin(tokens, policy, memory, **options)
        return model(tokens, run=run), decisions(run.selections)


def flux(files, name="mixed", **fields):
    return Flux.of_file(files[name], **{"sparse": WINDOW, **fields})


def test_the_fixture_decides_differently_by_row_and_layer(model, files):
    _, made = ran(model, ids(), flux(files))
    assert made.full.shape == (DEPTH, 6) and made.full.any() and not made.full.all()
    assert len({tuple(row) for row in made.full.T.tolist()}) > 1


def test_identity_1_a_window_over_everything_makes_the_decision_void(model, files):
    dense, _ = ran(model, ids(), Dense())
    for name in files:
        out, _ = ran(model, ids(), flux(files, name, sparse=SlidingWindow(18, 2)))
        assert torch.allclose(out, dense, atol=1e-12)


def test_identity_2_all_full_equals_dense_and_all_sparse_the_pattern(model, files):
    assert torch.equal(ran(model, ids(), flux(files, "full"))[0], ran(model, ids(), Dense())[0])
    assert torch.equal(ran(model, ids(), flux(files, "sparse"))[0], ran(model, ids(), WINDOW)[0])


def test_rows_with_different_decisions_equal_each_row_alone(model, files):
    out, made = ran(model, ids(), flux(files))
    for i in range(6):
        alone, own = ran(model, ids()[i : i + 1], flux(files))
        assert torch.equal(own.full[:, 0], made.full[:, i])
        assert torch.allclose(alone[0], out[i], atol=1e-12)
        rules = tuple((j, Rule(Dense() if full else WINDOW)) for j, full in enumerate(own.full[:, 0].tolist()))
        assert torch.allclose(ran(model, ids()[i : i + 1], Policy(layers=rules))[0], alone, atol=1e-12)


def test_padding_on_the_left_changes_neither_decision_nor_output(model, files):
    tokens, pads = ids(3), (4, 0, 9)
    padded, valid = torch.zeros(3, 29, dtype=torch.long), torch.zeros(3, 29, dtype=torch.bool)
    for i, (row, left) in enumerate(zip(tokens, pads, strict=True)):
        padded[i, left : left + 20], valid[i, left : left + 20] = row, True
    spans = prompt_spans(BaseMask.build(29, 29, causal=True, valid=valid), 3)
    assert spans.tolist() == [[p, p + 20] for p in pads]
    out, made = ran(model, padded, flux(files), valid=valid)
    _, plain = ran(model, tokens, flux(files))
    assert torch.equal(made.full[0], plain.full[0]), "layer 0 reads the same tokens"
    for i in range(3):  # positions count padding here, so each row is compared with itself alone
        alone, own = ran(model, padded[i : i + 1], flux(files), valid=valid[i : i + 1])
        assert torch.equal(own.full[:, 0], made.full[:, i])
        assert torch.allclose(alone[0][valid[i]], out[i][valid[i]], atol=1e-12)


def test_a_row_of_padding_alone_is_no_prompt_and_no_error(model, files):
    valid = torch.tensor([[True] * 6, [False] * 6])
    out, made = ran(model, ids(2, 6), flux(files), valid=valid)
    assert made.full.shape == (DEPTH, 2)
    assert torch.allclose(out[0], ran(model, ids(2, 6)[:1], flux(files))[0][0], atol=1e-12)


@pytest.mark.parametrize("sparse", [SlidingWindow(6, 2), SlidingWindow(8, 4, block=4)], ids=["tokens", "blocks"])
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 12])
def test_identity_7_decoding_keeps_the_decision_of_the_prompt(model, files, sparse, prompt):
    tokens, memory = ids(6, 24, seed=2), Memory()
    policy = flux(files, sparse=sparse)
    first, made = ran(model, tokens[:, :prompt], policy, memory)
    outs = [first]
    for at in range(prompt, 24):
        out, now = ran(model, tokens[:, at : at + 1], policy, memory)
        assert torch.equal(now.full, made.full)
        outs.append(out)
    got = torch.cat(outs, 1)
    for i in range(6):
        rules = tuple((j, Rule(Dense() if full else sparse)) for j, full in enumerate(made.full[:, i].tolist()))
        frozen, _ = ran(model, tokens[i : i + 1], Policy(layers=rules))
        assert torch.allclose(got[i], frozen[0], atol=1e-10)


def test_identity_8_only_the_ends_of_the_prompt_reach_layer_0(model, files):
    def logits(tokens):
        run = model.begin(tokens, flux(files))
        with torch.no_grad():
            model(tokens, run=run)
        return run.selections[0].state.logits

    tokens = ids(1)
    middle = tokens.clone()
    middle[:, POOL:-POOL] = (middle[:, POOL:-POOL] + 1) % VOCAB
    assert torch.equal(logits(middle), logits(tokens))
    end = tokens.clone()
    end[:, -POOL] = (end[:, -POOL] + 1) % VOCAB
    assert not torch.allclose(logits(end), logits(tokens), atol=1e-6)


def test_identity_9_causal_given_a_decision(model, files):
    tokens, other = ids(1, 24), ids(1, 24)
    other[:, 15] = (other[:, 15] + 1) % VOCAB
    outs = []
    for given in (tokens, other):
        memory = Memory()
        first, _ = ran(model, given[:, :12], flux(files), memory)
        rest, _ = ran(model, given[:, 12:], flux(files), memory)
        outs.append(torch.cat([first, rest], 1))
    assert torch.equal(outs[0][:, :15], outs[1][:, :15])
    assert not torch.allclose(outs[0][:, 15:], outs[1][:, 15:], atol=1e-6)


@pytest.mark.parametrize(
    ("full", "sparse"),
    [(Dense(), Triangle(5, 2, dense_rows=4)), (XAttention(Budget(mass=0.9), 4, 128), WINDOW), (Dense(), XAttention(Budget(mass=0.5), 4, 8))],
    ids=["triangle", "xattention beside streaming", "xattention"],
)  # fmt: skip
def test_every_option_runs_by_rows_and_decodes(model, files, full, sparse):
    policy, memory = flux(files, full=full, sparse=sparse), Memory()
    out, made = ran(model, ids(), policy, memory)
    step, _ = ran(model, ids(6, 1, seed=9), policy, memory)
    for i in range(6):
        rules = tuple((j, Rule(full if f else sparse)) for j, f in enumerate(made.full[:, i].tolist()))
        own = Memory()
        assert torch.allclose(ran(model, ids()[i : i + 1], Policy(layers=rules), own)[0][0], out[i], atol=1e-12)
        assert torch.allclose(
            ran(model, ids(6, 1, seed=9)[i : i + 1], Policy(layers=rules), own)[0][0], step[i], atol=1e-12
        )


def test_rows_that_cannot_share_a_call_are_refused(model, files):
    with pytest.raises(UnsupportedError, match=r"routed differently.*Groups"):
        ran(model, ids(), flux(files, sparse=MoBA(4, 1)))


def test_what_was_decided_must_be_known(model, files):
    memory = Memory()
    ran(model, ids(), Dense(), memory)
    with pytest.raises(UnsupportedError, match=r"layers\.0 decided for this request is not known after 20 tokens"):
        ran(model, ids(6, 1), flux(files), memory)
    memory = Memory()
    ran(model, ids(), flux(files), memory)
    for held in (memory.keys, memory.values):
        held |= {i: t[:4] for i, t in held.items()}
    with pytest.raises(UnsupportedError, match="6 requests were routed and 4 rows go on"):
        ran(model, ids(4, 1), flux(files), memory)


def test_a_new_prompt_is_decided_anew(files):
    g = torch.Generator().manual_seed(3)
    pattern, base = flux(files), BaseMask.build(8, 8, causal=True)
    old = Routed(torch.tensor([True]), torch.zeros(1, 2))
    seen = set()
    for _ in range(12):
        q = torch.randn(1, HEADS, 8, 8, generator=g)
        _, state = pattern.select(q, q[:, :2], SelectContext(base, pre_rope_q=q), old)
        assert state is not old
        seen.add(bool(state.full))
    assert len(seen) == 2
    with pytest.raises(UnsupportedError, match="queries before rotation"):
        pattern.select(q, q[:, :2], SelectContext(base), None)


def test_packed_documents_are_refused():
    with pytest.raises(UnsupportedError, match="packed documents"):
        prompt_spans(Host(9, 9, documents=((4, 5),)).base(), 1)


def test_after_a_crop_the_decision_stays_and_reordered_rows_are_refused_when_they_differ(files):
    pattern, logits = flux(files), torch.zeros(2, 2)
    mixed = Routed(torch.tensor([True, False]), logits, ("a", "b"))
    kept = pattern.after_move(mixed, False)
    assert torch.equal(kept.full, mixed.full) and kept.states == (None, None)
    with pytest.raises(UnsupportedError, match="reordered"):
        pattern.after_move(mixed, True)
    for same in (True, False):
        assert pattern.after_move(Routed(torch.tensor([same, same]), logits), True) is not None
    assert pattern.after_move(None, True) is None and WINDOW.after_move("x", False) is None


def test_json_names_the_file_its_digest_and_both_branches(files):
    pattern = flux(files, full=XAttention())
    stored = json.loads(json.dumps(pattern.to_json()))
    assert stored["router_sha256"] == file_sha256(files["mixed"]) and stored["sparse"]["window"] == 5
    policy = Policy.uniform(pattern)
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert {pattern} == policy.patterns() and len({pattern, flux(files)}) == 2
    assert str(Flux.of_file(files["mixed"]).sparse) == "sliding_window(window=2048, sinks=128, block=128)"


def test_a_policy_and_its_router_may_move_together(files, tmp_path, model, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "router.safetensors").write_bytes(files["mixed"].read_bytes())
    pattern = Flux("router.safetensors", file_sha256(files["mixed"]), WINDOW)
    Policy.uniform(pattern).save(tmp_path / "a" / "policy.json")
    (tmp_path / "a").rename(tmp_path / "b")
    loaded = Policy.load(tmp_path / "b" / "policy.json")
    assert torch.equal(ran(model, ids(), loaded)[0], ran(model, ids(), flux(files))[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is no file"):
        ran(model, ids(), pattern)


def test_foreign_routers_are_refused(files, tmp_path):
    with pytest.raises(ConfigError, match="trained for 3 layers and this model has 4"):
        flux(files).check_model(lambda: "", 4)
    LayerRouters(DEPTH, 8).save(tmp_path / "own", model="a" * 64, architecture="Some")
    pattern = Flux.of_file(tmp_path / "own")
    pattern.check_model(lambda: "a" * 64, DEPTH)
    with pytest.raises(ConfigError, match=r"weights aaaaaaaaaaaa .Some. and this model's are bbbbbbbbbbbb"):
        pattern.check_model(lambda: "b" * 64, DEPTH)
    (tmp_path / "other").write_bytes(files["full"].read_bytes())
    with pytest.raises(ConfigError, match="Give router_sha256"):
        Flux(str(tmp_path / "other"), pattern.router_sha256).check_model(lambda: "a" * 64, DEPTH)
    with pytest.raises(ConfigError, match="foveal train flux"):
        Flux.of_file(tmp_path / "none")


def test_the_report_of_decisions(model, files):
    _, made = ran(model, ids(), flux(files))
    assert made.omega.tolist() == pytest.approx([1 - sum(row) / DEPTH for row in made.full.T.tolist()])
    lines = str(made).splitlines()
    assert len(lines) == 6 and all("of 3 layers sparse (Ω 0." in x or "(Ω 1." in x for x in lines)
    assert decisions({}) is None
