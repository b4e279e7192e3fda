"""The module for serving against the full pre-activations, the sparse rule and the encoder."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qscope.classification.rule import Clause, FeatureRule, MulticlassRule, RuleSAE, Source
from qscope.classification.rule_module import RuleModule, preact_activations
from qscope.errors import InputError
from qscope.finding.pooled import pool
from qscope.sae import SAE

D, F, K, B, S = 24, 64, 5, 7, 9
LAYERS = (2, 6)


def make_saes(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    found = {}
    for layer in LAYERS:
        W = torch.randn(F, D, generator=generator).to(dtype)
        bias = (0.5 * torch.randn(F, generator=generator)).to(dtype)
        found[layer] = SAE(W, W.clone(), bias, torch.zeros(D, dtype=dtype), K).requires_grad_(False)
    return found


SAES = make_saes()


def source(saes):
    names = tuple(RuleSAE(layer, sae.weight_hash(), F, K) for layer, sae in saes.items())
    return Source("tiny", "a" * 64, "b" * 64, names, 64)


SOURCE = source(SAES)


def rule(*clauses, membership="preact", pooling="any", classes=("yes", "no"), where=SOURCE):
    return FeatureRule(clauses=clauses, classes=classes, source=where, pooling=pooling, membership=membership)


def residuals(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(B, S, D, generator=generator).to(dtype) for layer in LAYERS}


def masks(seed):
    found = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    found[1] = False  # a text without tokens that count
    found[2] = torch.arange(S) == 4
    return found


def dense_definition(found, residual, mask, saes=SAES):
    """(scores, decisions) from ReLU(x W^T + b) of ALL features in float32, text by text."""
    scores, decisions = [], []
    for text in range(B):
        values = []
        for clause in found.clauses:
            sae = saes[clause.layer]
            acts = torch.relu(residual[clause.layer][text].float() @ sae.W_enc.float().T + sae.b_enc.float())
            own = acts[mask[text], clause.feature].double()
            empty = len(own) == 0
            values.append(
                0.0 if empty else {"any": own.amax, "mean": own.mean, "last": lambda o=own: o[-1]}[found.pooling]()
            )
        scores.append(max(float(v) / c.scale for v, c in zip(values, found.clauses, strict=True)))
        decisions.append(any(float(v) > c.threshold for v, c in zip(values, found.clauses, strict=True)))
    return np.array(scores), np.array(decisions)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_decisions_are_those_of_the_full_pre_activations(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    places = st.tuples(st.sampled_from(LAYERS), st.integers(0, F - 1))
    clauses = [
        Clause(layer, f, data.draw(st.floats(0, 12)), data.draw(st.floats(0.1, 10)))
        for layer, f in data.draw(st.lists(places, min_size=1, max_size=5, unique=True))
    ]
    found = rule(*clauses, pooling=data.draw(st.sampled_from(["any", "mean", "last"])))
    residual, mask = residuals(data.draw(st.integers(0, 30)), dtype), masks(data.draw(st.integers(0, 9)))
    module = RuleModule.from_saes(found, SAES, check=False)
    out = module(residual, mask)
    scores, decisions = dense_definition(found, residual, mask)
    # float32 dot products of 24 terms, each below 30: rounding of at most 24 x 30 x 2^-24 = 4e-5
    np.testing.assert_allclose(out.scores.numpy(), scores, rtol=1e-5, atol=4e-5 / min(found.scales))
    near = np.abs(out.values.numpy() - found.thresholds) < 1e-4
    clear = ~near.any(axis=1)
    np.testing.assert_array_equal(out.decisions.numpy()[clear], decisions[clear])
    assert out.scores[1] == 0 and not out.decisions[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_the_encoders_own(dtype):
    """To the bit, wherever the feature is among the K largest: both are float64 sums rounded to float32."""
    saes = make_saes(dtype)
    residual = residuals(3, dtype)
    found = rule(*(Clause(layer, f) for layer in LAYERS for f in range(0, F, 2)), where=source(saes))
    acts = RuleModule.from_saes(found, saes)(residual, torch.ones(B, S, dtype=torch.bool))
    module = RuleModule.from_saes(found, saes)
    each = module.activations(residual)
    seen = 0
    for i, clause in enumerate(found.clauses):
        top_acts, top_indices = saes[clause.layer].encode_topk(residual[clause.layer])
        member = top_indices == clause.feature
        seen += int(member.sum())
        expected = torch.where(member, top_acts, 0).sum(-1)
        assert torch.equal(each[..., i][member.any(-1)], expected[member.any(-1)])
    assert seen > 200
    assert torch.equal(acts.values, each.double().amax(1))


def test_the_module_and_the_sparse_rule_agree():
    """Pre-activations of all features as codes; masks, two layers, thresholds that are activations themselves."""
    residual, mask = residuals(5), masks(2)
    text = np.repeat(np.arange(B), S)
    codes = {}
    for layer, sae in SAES.items():
        acts = preact_activations(residual[layer].reshape(B * S, D), sae.W_enc, sae.b_enc).numpy()
        ids = np.broadcast_to(np.arange(F, dtype=np.int32), acts.shape)
        codes[layer] = pool(acts, ids, text, mask.reshape(-1).numpy(), B)
    for pooling in ("any", "last", "mean"):
        plain = rule(Clause(2, 3), Clause(6, 3), Clause(2, 60), pooling=pooling)
        values = plain.values(codes, "preact")
        for row in (0, 3, 5):  # exactly at an activation: does not fire
            found = plain.with_thresholds(values[row], [0.5, 2.0, 7.0])
            out = RuleModule.from_saes(found, SAES, check=False)(residual, mask)
            np.testing.assert_allclose(out.values.numpy(), values, rtol=1e-15)  # means: the order of the sum
            np.testing.assert_allclose(out.scores.numpy(), found.score_values(values), rtol=1e-15)
            if pooling != "mean":
                np.testing.assert_array_equal(out.decisions.numpy(), found.decide(codes, "preact"))


def test_what_is_masked_or_not_finite_does_not_matter():
    residual, mask = residuals(1), masks(1)
    found = rule(Clause(2, 1, 0.5), Clause(6, 2, 0.5))
    module = RuleModule.from_saes(found, SAES, check=False)
    before = module(residual, mask)
    dirty = {layer: torch.where(mask[..., None], x, torch.nan) for layer, x in residual.items()}
    for one, two in zip(before, module(dirty, mask), strict=True):
        assert torch.equal(one, two)
    place = tuple(mask.nonzero()[::3].T)
    without = mask.clone()
    without[place] = False
    for pooling in ("any", "mean", "last"):
        module = RuleModule.from_saes(rule(Clause(2, 1), Clause(6, 2), pooling=pooling), SAES, check=False)
        expected = torch.stack([module(residual, m).values[:, i] for i, m in enumerate((without, mask))], dim=1)
        for bad in (torch.inf, -torch.inf):  # left out at its layer as if it were masked, whatever the sign
            broken = {**residual, 2: residual[2].clone()}
            broken[2][(*place, 0)] = bad
            assert torch.equal(module(broken, mask).values, expected)
    empty = module({layer: x[:, :0] for layer, x in residual.items()}, mask[:, :0])
    assert (empty.scores == 0).all() and not empty.decisions.any()


def several():
    names = ("de", "en", "fr")
    parts = [
        rule(Clause(2, 5 * i, 3.0, 2.0), Clause(6, 5 * i + 1, 4.0), classes=(name, "others"))
        for i, name in enumerate(names)
    ]
    return MulticlassRule(classes=names, rules=tuple(parts), majority=2)


def test_several_classes():
    found, residual, mask = several(), residuals(8), masks(3)
    out = RuleModule.from_saes(found, SAES)(residual, mask)
    each = [RuleModule.from_saes(part, SAES)(residual, mask) for part in found.rules]
    assert torch.equal(out.scores, torch.stack([part.scores for part in each], dim=1))
    values = [part.values.numpy() for part in each]
    np.testing.assert_array_equal(out.decisions.numpy(), found.decide_values(values))
    assert out.decisions[1] == 2 and len(set(out.decisions.tolist())) == 3 and out.decisions.dtype == torch.int64
    loud = rule(Clause(2, 4, 1e6, 1e-6))  # the largest score by far, and never fires
    quiet = MulticlassRule(classes=("a", "b"), rules=(loud, rule(Clause(2, 4, 0.0))), majority=1)
    assert set(RuleModule.from_saes(quiet, SAES)(residual, mask).decisions.tolist()) == {1}
    same = rule(Clause(2, 4, 0.0))
    equal = MulticlassRule(classes=("a", "b"), rules=(same, same), majority=1)
    fired = RuleModule.from_saes(equal, SAES)(residual, torch.ones(B, S, dtype=torch.bool)).decisions
    assert set(fired.tolist()) == {0}  # the lowest class of equals


def test_files(tmp_path):
    for found in (rule(Clause(6, 9, 0.25, 3.0, meaning="law"), Clause(2, 1)), several()):
        module = RuleModule.from_saes(found, SAES)
        path = module.save(tmp_path / "rule.safetensors")
        again = RuleModule.load(path)
        assert again.rule == found and path.stat().st_size < 8000
        assert module.save(tmp_path / "twice.safetensors").read_bytes() == path.read_bytes()
        residual, mask = residuals(2), masks(0)
        for one, two in zip(module(residual, mask), again(residual, mask), strict=True):
            assert torch.equal(one, two)
        assert set(module.state_dict()) == {"weight", "bias", "threshold", "scale"}
        again.load_state_dict(module.state_dict())
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:40], whole.replace(b"qscope-rule-module", b"qscope-rule-modul_")):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError):
            RuleModule.load(tmp_path / "bad")
    with pytest.raises(InputError):
        RuleModule.load(tmp_path / "missing")


def test_a_cast_changes_nothing():
    found = rule(Clause(6, 9, 1 / 3, 3.1), Clause(2, 1, 0.7))
    module = RuleModule.from_saes(found, SAES)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.nn.Sequential(module).to(torch.bfloat16).half()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert module.to("meta").weight.device.type == "meta"


def test_it_compiles_whole():
    for found in (rule(Clause(6, 9, 0.25), Clause(2, 1, 2.0), pooling="last"), several()):
        module = RuleModule.from_saes(found, SAES, check=False)
        residual, mask = residuals(2), masks(0)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for one, two in zip(module(residual, mask), compiled(residual, mask), strict=True):
            assert torch.equal(one, two)


def test_what_cannot_be_served():
    with pytest.raises(InputError, match="thresholds hold for the membership 'topk'"):
        RuleModule.from_saes(rule(Clause(2, 1), membership="topk"), SAES)
    with pytest.raises(InputError, match=r"needs the SAE of layer 6; given: \[2\]"):
        RuleModule.from_saes(rule(Clause(6, 1)), {2: SAES[2]})
    with pytest.raises(InputError, match="this SAE is another"):
        RuleModule.from_saes(rule(Clause(6, 1)), {6: SAES[2]})
    with pytest.raises(InputError, match="rule has 1 features"):
        RuleModule(rule(Clause(6, 1)), torch.zeros(2, D), torch.zeros(2))
