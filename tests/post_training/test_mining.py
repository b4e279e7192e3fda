"""Rises of features between occurrences of a token, by hand and planted; and whether they cause repetition."""

import math

import numpy as np
import pytest
import torch

from qscope.errors import InputError
from qscope.model import residuals
from qscope.post_training.mining import Cause, causal_check, rises, steering_spec, wilson
from qscope.post_training.repetition import endless
from qscope.post_training.rollouts import Rollout, rollouts
from tests.post_training.grpo_world import END, make_model, make_tokenizer, word_sae

WORD = 20


@pytest.fixture(scope="module")
def world():
    model = make_model().eval()
    return model, make_tokenizer(), word_sae(model)


def plain_rise(model, sae, sample):
    """The definition, a token at a time, through the dense activations."""
    hidden = residuals(model, torch.tensor([[*sample.prompt, *sample.response]]), [1])[1][0][len(sample.prompt) :]
    pre = hidden @ sae.W_enc.T + sae.b_enc
    dense = torch.zeros_like(pre).scatter(1, pre.topk(sae.k).indices, pre.topk(sae.k).values.relu()).double()
    changes = []
    for token in dict.fromkeys(sample.response):
        places = [i for i, t in enumerate(sample.response) if t == token]
        if len(places) > 1:
            changes.append(dense[places[-1]] - dense[places[0]])
    return torch.stack(changes).mean(0).detach().numpy()


def samples(seed, count, length=14):
    rng = np.random.default_rng(seed)
    return [Rollout([3, 4], rng.integers(5, 12, length).tolist(), False) for _ in range(count)]


def test_rises_are_their_definition(world):
    model, _, saes = world
    looping, control = samples(0, 3), samples(1, 4)
    found = rises(model, saes, looping, [*control, Rollout([3], [5, 6, 7], True), Rollout([3], [], True)])[1]
    assert found.samples == (3, 4)  # without an id that occurs twice a sample says nothing
    rows = np.stack([plain_rise(model, saes[1], s) for s in looping])
    base = np.stack([plain_rise(model, saes[1], s) for s in control])
    np.testing.assert_allclose(found.looping, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.control, base.mean(0), rtol=1e-5, atol=1e-6)
    spread = np.sqrt(rows.var(0, ddof=1) / 3 + base.var(0, ddof=1) / 4)
    want = np.divide(rows.mean(0) - base.mean(0), spread, out=np.zeros_like(spread), where=spread > 0)
    np.testing.assert_allclose(found.t, want, rtol=1e-3, atol=1e-4)
    assert np.abs(want).max() > 0.5


def test_ranked_leaves_out_what_falls_or_rises_less_than_in_controls(world):
    model, _, saes = world
    found = rises(model, saes, samples(0, 3), samples(1, 3))[1]
    order = found.ranked(50)
    assert order and all(found.looping[f] > 0 and found.looping[f] > found.control[f] for f in order)
    assert [found.t[f] for f in order] == sorted((found.t[f] for f in order), reverse=True)
    assert found.ranked(2) == order[:2]


def test_a_planted_feature_is_first(world):
    """A block that adds the direction of feature 30 at second and later occurrences of a token in looping texts."""
    model, _, saes = world
    looping, control = samples(2, 6), samples(3, 6)
    known = {tuple([*s.prompt, *s.response]) for s in looping}
    direction = saes[1].W_dec[30].detach()

    def plant(module, args, kwargs, output):
        h = output[0] if isinstance(output, tuple) else output
        if tuple(plant.ids) in known:
            again = [plant.ids[i] in plant.ids[:i] for i in range(len(plant.ids))]
            h = h + torch.tensor(again, dtype=h.dtype)[None, :, None] * 20 * direction
        return (h, *output[1:]) if isinstance(output, tuple) else h

    note = model.model.register_forward_pre_hook(
        lambda m, a, k: setattr(plant, "ids", k["input_ids"][0].tolist()), with_kwargs=True
    )
    handle = model.model.layers[1].register_forward_hook(plant, with_kwargs=True)
    try:
        found = rises(model, saes, looping, control)[1]
    finally:
        note.remove()
        handle.remove()
    assert found.ranked(1) == [30]
    assert found.looping[30] == pytest.approx(20, rel=0.2) and abs(found.control[30]) < 2


def test_too_few_samples_are_refused(world):
    model, _, saes = world
    with pytest.raises(InputError, match="Only 1 looping samples"):
        rises(model, saes, samples(0, 1), samples(1, 3))
    with pytest.raises(InputError, match="Only 0 control samples"):
        rises(model, saes, samples(0, 2), [Rollout([3], [4, 5], True)] * 3)


def test_amplifying_raises_and_suppressing_lowers_the_repetition_ratio(world):
    """In a model that says what the residual points at, the feature of a word makes loops of that word."""
    model, tokenizer, saes = world
    norms = {1: rises(model, saes, samples(0, 2), samples(1, 2))[1].residual_norm}

    def count(prompts, spec):
        answers = rollouts(model, tokenizer, prompts, 40, seed=1, spec=spec, saes=saes)
        return sum(endless(a.response, a.ended) for a in answers)

    prompts = [[i, i + 1] for i in range(3, 11)]
    found = causal_check(count, lambda s: steering_spec({1: (WORD,)}, s, norms), prompts, [], (1.0, 40.0))
    assert [c.strength for c in found["amplify"]] == [0.0, 1.0, 40.0] and found["suppress"] == []
    assert found["amplify"][0].hits == 0 and found["amplify"][2].hits >= 7  # one ends before it is steered
    assert found["amplify"][2].interval[0] > found["amplify"][0].interval[1]

    add = 40 * norms[1] * torch.nn.functional.normalize(saes[1].W_dec[WORD].detach(), dim=0)

    def prone(_module, _inputs, output):
        return (output[0] + add, *output[1:]) if isinstance(output, tuple) else output + add

    handle = model.model.layers[1].register_forward_hook(prone)
    try:
        found = causal_check(count, lambda s: steering_spec({1: (WORD,)}, s, norms), [], prompts, (40.0,))
    finally:
        handle.remove()
    assert found["suppress"][0].hits >= 7 and found["suppress"][1].hits == 0
    assert found["suppress"][1].strength == -40


def test_strength_is_shared_by_the_features():
    spec = steering_spec({2: (7, 9), 0: (1,)}, 0.6, {0: 3.0, 2: 5.0})
    assert [(e.layer, e.feature, e.scale) for e in spec.edits] == [(0, 1, 3.0), (2, 7, 5.0), (2, 9, 5.0)]
    assert all(e.amount == pytest.approx(0.2 * e.scale) and e.tokens == "generated" for e in spec.edits)


def test_wilson_interval_of_known_cases():
    assert wilson(0, 10) == (pytest.approx(0, abs=1e-12), pytest.approx(0.2775, abs=1e-4))
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(0, 0) == (0.0, 1.0) and math.isclose(Cause(1.0, 3, 4).ratio, 0.75)


def test_rollouts_stop_at_the_end_token_and_leave_random_numbers_alone(world):
    model, tokenizer, saes = world
    end = steering_spec({1: (END,)}, 40.0, {1: 10.0})
    torch.manual_seed(9)
    before = torch.get_rng_state()
    answers = rollouts(model, tokenizer, [[3], [4, 5, 6]], 20, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    assert answers == rollouts(model, tokenizer, [[3], [4, 5, 6]], 20, seed=0)
    assert answers != rollouts(model, tokenizer, [[3], [4, 5, 6]], 20, seed=1)
    assert all(a.ended == (len(a.response) < 20) and END not in a.response for a in answers)
    short = rollouts(model, tokenizer, [[3], [4, 5, 6]], 20, seed=0, spec=end, saes=saes)
    assert all(a.ended and len(a.response) <= 1 for a in short)
    with pytest.raises(InputError, match="empty one"):
        rollouts(model, tokenizer, [[]], 5)
