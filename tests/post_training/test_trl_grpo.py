"""Groups with a rare negative: rows, advantages, masks, weights and log-probabilities against a computation by hand."""

import math

import pytest
import torch

pytest.importorskip("trl", reason="needs the extra post-training")

from qscope.errors import InputError
from qscope.post_training.negatives import LoopNegative, SteeredNegative
from qscope.post_training.repetition import endless
from tests.post_training.grpo_world import END, GROUP, LENGTH, batch, by_length, make_model, make_trainer, say, word_sae

WORD = 20
LAST = [i % GROUP == GROUP - 1 for i in range(2 * GROUP)]


def steered(model, **options):
    return {"model": model, "negative": SteeredNegative([say(WORD)], word_sae(model))} | options


def responses(output):
    both = zip(output["completion_ids"], output["completion_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in both]


def logps(model, prompt_ids, prompt_mask, ids):
    """Log-probabilities of `ids` [B, T] behind the prompts, by the definition."""
    whole = torch.cat([prompt_ids, ids], dim=1)
    mask = torch.cat([prompt_mask, torch.ones_like(ids)], dim=1)
    logits = model(input_ids=whole, attention_mask=mask).logits.float()
    at = prompt_ids.shape[1] - 1
    return logits[:, at:-1].log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)


def test_one_row_of_every_group_is_steered_and_the_others_are_not(tmp_path):
    trainer = make_trainer(tmp_path, **steered(make_model()))
    _, output = batch(trainer)
    assert output["steered"].tolist() == LAST
    share = [sum(token == WORD for token in ids) / len(ids) for ids in responses(output)]
    assert all(s == 1.0 for s, last in zip(share, LAST, strict=True) if last)
    assert all(s < 0.5 for s, last in zip(share, LAST, strict=True) if not last)
    assert list(trainer._logs["extra"]["steered"]) == LAST


def test_without_a_negative_it_is_trls_own(tmp_path):
    from trl import GRPOTrainer

    found = []
    for kind in (None, "trl"):
        trainer = make_trainer(tmp_path)
        if kind:
            trainer.__class__ = GRPOTrainer
        torch.manual_seed(3)
        _, output = batch(trainer)
        found.append((output, trainer._compute_loss(trainer.model, output)))
    (ours, loss), (theirs, other) = found
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if isinstance(ours[name], torch.Tensor))
    assert torch.equal(loss, other)


def test_loss_and_gradient_are_those_of_a_hand_computation(tmp_path):
    model = make_model()
    trainer = make_trainer(tmp_path, length_cap=0.5, epsilon_high=0.28, **steered(model))
    _, output = batch(trainer)
    said = responses(output)
    # Advantages, equation 9 of DAPO: within the group, with TRL's 1e-4 beside the standard deviation (of n - 1).
    rewards = [len(ids) + 0.1 * ids[0] for ids in said]
    advantages = []
    for group in (rewards[:GROUP], rewards[GROUP:]):
        mean = sum(group) / GROUP
        spread = math.sqrt(sum((r - mean) ** 2 for r in group) / (GROUP - 1))
        advantages += [(r - mean) / (spread + 1e-4) for r in group]
    # Weights: a negative counts at most half as many tokens as a normal response of its group.
    weights = [1.0] * len(said)
    for group in range(2):
        rows = range(group * GROUP, (group + 1) * GROUP)
        normal = sum(len(said[i]) for i in rows[:-1]) / (GROUP - 1)
        weights[rows[-1]] = min(1.0, 0.5 * normal / len(said[rows[-1]]))
    assert min(weights) < 1
    weighted = [a * w for a, w in zip(advantages, weights, strict=True)]
    assert output["advantages"].tolist() == pytest.approx(weighted, 1e-5)
    tokens = sum(w * len(ids) for w, ids in zip(weights, said, strict=True))
    assert float(output["num_items_in_batch"]) == pytest.approx(tokens, 1e-6)
    # Masks: every token up to and with the end token.
    for ids, mask, text in zip(output["completion_ids"], output["completion_mask"], said, strict=True):
        assert mask.tolist() == [1] * len(text) + [0] * (len(mask) - len(text))
        assert END not in text[:-1] and (len(text) == ids.shape[0] or text[-1] == END or len(text) == LENGTH)
    # At the first inner step the ratio is 1, and the loss - sum A / tokens.
    loss = trainer._compute_loss(model, output)
    want = -sum(a * w * len(ids) for a, w, ids in zip(advantages, weights, said, strict=True)) / tokens
    assert loss.item() == pytest.approx(want, abs=1e-5)
    own = torch.autograd.grad(loss, model.parameters())
    plain = logps(model, output["prompt_ids"], output["prompt_mask"], output["completion_ids"])
    factor = torch.tensor(weighted)[:, None]
    ratio = (plain - plain.detach()).exp()
    by_hand = -(torch.min(ratio * factor, ratio.clamp(0.8, 1.28) * factor) * output["completion_mask"]).sum() / tokens
    for a, b in zip(own, torch.autograd.grad(by_hand, model.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # two orders of summation in float32


def test_cap_of_none_leaves_trls_numbers(tmp_path):
    trainer = make_trainer(tmp_path, length_cap=None, **steered(make_model()))
    _, output = batch(trainer)
    assert float(output["num_items_in_batch"]) == float(output["completion_mask"].sum())


def test_old_log_probabilities_by_choice(tmp_path):
    """Of the policy (TRL's own, where inner steps need them), or of the steered model that wrote the response."""
    found = {}
    for kind in ("unsteered", "behaviour"):
        model = make_model()
        trainer = make_trainer(tmp_path, old_logps=kind, num_iterations=2, **steered(model))
        torch.manual_seed(5)
        _, output = batch(trainer)
        real = output["completion_mask"].bool()
        found[kind] = output["old_per_token_logps"][real], real
        plain = logps(model.eval(), output["prompt_ids"], output["prompt_mask"], output["completion_ids"])[real]
        last = output["steered"][:, None].expand_as(real)[real]
        torch.testing.assert_close(found[kind][0][~last], plain[~last], rtol=1e-5, atol=1e-5)
        if kind == "unsteered":
            torch.testing.assert_close(found[kind][0], plain, rtol=1e-5, atol=1e-5)
        else:
            assert bool((found[kind][0][last] > -0.01).all())  # nothing else could have been said
            assert bool((plain[last] < -1).all())


def test_behaviour_is_the_default_of_nobody_and_one_step_needs_no_old_log_probabilities(tmp_path):
    _, output = batch(make_trainer(tmp_path, **steered(make_model())))
    assert "old_per_token_logps" not in output
    _, output = batch(make_trainer(tmp_path, old_logps="behaviour", **steered(make_model())))
    assert output["old_per_token_logps"].shape == output["completion_ids"].shape


def test_a_loop_stands_in_for_the_last_row(tmp_path):
    trainer = make_trainer(tmp_path, negative=LoopNegative(shortest=2, longest=3), max_completion_length=80)
    _, output = batch(trainer)
    said = responses(output)
    assert [endless(ids) for ids in said] == LAST
    assert all(len(said[i]) == 80 and END not in said[i] for i, last in enumerate(LAST) if last)
    assert output["steered"].tolist() == LAST


def test_a_loop_is_made_of_the_response(tmp_path):
    made = LoopNegative(2, 4, seed=1)
    for _ in range(30):
        ids = list(range(10, 19))
        loop = made.loop([*ids, END], 50, [END])
        start = next(i for i in range(len(loop)) if loop[: i + 1] != ids[: i + 1])
        assert start >= 2 and len(loop) == 50
        period = start - ids.index(loop[start])
        assert 2 <= period <= 4 and all(loop[i] == loop[i - period] for i in range(start, 50))
    longer = [made.loop(list(range(100, 150)), 50, [END]) for _ in range(30)]
    assert all(len(set(loop)) <= 25 for loop in longer)  # half of it is loop, also where the response was cut
    assert made.loop([], 50, [END]) == [] and made.loop([END], 50, [END]) == [END]


def test_several_specs_are_drawn_from(tmp_path):
    negative = SteeredNegative([say(word) for word in range(10, 40)], {}, seed=0)
    drawn = [negative.draw().edits[0].feature for _ in range(20)]
    assert len(set(drawn)) > 8
    again = SteeredNegative([say(word) for word in range(10, 40)], {}, seed=0)
    assert [again.draw().edits[0].feature for _ in range(20)] == drawn


def test_training_logs_the_negatives_and_lowers_their_probability(tmp_path):
    model = make_model()
    prompt = torch.tensor([[3, 4, 5]])
    loop = torch.full((1, LENGTH), WORD)
    before = logps(model.eval(), prompt, torch.ones_like(prompt), loop).sum().item()

    def punish(completion_ids, **_):
        return [-float(ids.count(WORD) > 2) for ids in completion_ids]

    trainer = make_trainer(
        tmp_path, punish, log_completions=True, max_steps=4, **steered(model.train(), learning_rate=3e-3)
    )
    trainer.train()
    after = logps(model.eval(), prompt, torch.ones_like(prompt), loop).sum().item()
    assert after < before - 1
    history = [row for row in trainer.state.log_history if "steered/reward" in row]
    assert [row["steered/reward"] for row in history] == [-1.0] * 4
    assert all(0 < row["steered/weight"] <= 1 and row["steered/length"] == LENGTH for row in history)
    import pandas

    table = pandas.concat(pandas.read_parquet(f) for f in sorted(tmp_path.glob("completions/*.parquet")))
    assert table["steered"].mean() == 1 / GROUP


def test_nan_is_refused_and_none_counts_as_in_trl(tmp_path):
    def broken(completion_ids, **_):
        return [float("nan")] + [0.0] * (len(completion_ids) - 1)

    with pytest.raises(InputError, match="reward broken gave nan for 1 of 8"):
        batch(make_trainer(tmp_path, broken))

    def sometimes(completion_ids, **_):
        return [None, *by_length(completion_ids[1:])]

    _, output = batch(make_trainer(tmp_path, sometimes))
    assert output["advantages"][0] == 0 and output["advantages"].isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": "grpo"}, "loss_type 'grpo'"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions"),
        ({"length_cap": 0.0}, "length_cap"),
        ({"old_logps": "steered"}, "unsteered or behaviour"),
        ({"old_logps": "behaviour", "negative": LoopNegative()}, "no policy wrote"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        make_trainer(tmp_path, **({"negative": SteeredNegative([say(WORD)], {})} | options))
