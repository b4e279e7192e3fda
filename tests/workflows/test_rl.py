"""`qscope rl` from prompts to the table on a tiny model, resumed; what it measures, by hand; what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra post-training")
from qscope.errors import InputError, StoreError
from qscope.post_training.repetition import DEFAULT
from qscope.report import rl_page, rl_text
from qscope.workflows import rl, rl_arms, rl_measure, rl_result
from qscope.workflows.rl_measure import Measures
from tests.post_training.grpo_world import END, make_model, make_tokenizer, word_sae

WORDS = [f"w{i}" for i in range(2, 50)]


def text(rng, count):
    return " ".join(rng.choice(WORDS, count))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model that loops now and then: the residual at a word points to the head's row of that word."""
    root = tmp_path_factory.mktemp("rl")
    model = make_model()
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        noise = 0.5 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
        model.get_input_embeddings().weight.copy_(0.7 * rows + 0.7 * noise)
    model.save_pretrained(root / "model")
    make_tokenizer().save_pretrained(root / "model")
    word_sae(model)[1].save(root / "sae")
    rng = np.random.default_rng(0)
    for name, count, length in (("train", 24, 3), ("held", 8, 4), ("text", 6, 20)):
        (root / f"{name}.txt").write_text("\n".join(text(rng, length) for _ in range(count)) + "\n")
    return root


def config(world, out, **options):
    given = {
        "prompts": str(world / "train.txt"), "held_out": str(world / "held.txt"), "text": str(world / "text.txt"),
        "out": out, "model": str(world / "model"), "sae": (str(world / "sae"),), "layers": (1,),
        "arms": ("vanilla", "sae"), "seeds": (0,), "steps": 2, "group": 3, "prompts_per_step": 2,
        "max_new_tokens": 40, "prompt_tokens": 64, "mine_prompts": 24, "mine_least": 4, "cause_prompts": 4, "texts": 4,
        "copy_tokens": 5,
        "text_tokens": 20, "count": 2, "draws": 50, "strengths": (8.0,), "learning_rate": 1e-3, "device": "cpu",
        "allow_mismatch": True,
    }  # fmt: skip
    return rl.RLConfig(**(given | options))


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "rl"
    everything = ("vanilla", "sae", "behaviour", "random", "any", "loop", "overlong", "kl", "shaping")
    return out, rl.run(config(world, out, arms=everything))


def test_every_arm_gets_a_line_and_its_own_model(done):
    out, result = done
    by = {line.arm: line for line in result.arms}
    assert list(by) == ["before", "vanilla", "sae", "behaviour", "random", "any", "loop", "overlong", "kl", "shaping"]
    costs = [line.bits_per_byte.value for line in result.arms if line.arm != "overlong"]
    assert len(set(costs)) == len(costs)  # no two arms trained the same thing
    assert [step["reward"] for step in result.curves["overlong"][0]] == pytest.approx(
        [step["reward"] - 1 for step in result.curves["vanilla"][0]]  # here every response is as long as can be
    )
    assert all(line.endless.low <= line.endless.value <= line.endless.high for line in result.arms)
    assert by["vanilla"].against is None and by["sae"].against is not None
    assert json.loads((out / "result.json").read_text())["arms"][0]["arm"] == "before"
    steered = [arm for arm, runs in result.curves.items() if "steered/reward" in runs[0][0]]
    assert steered == ["sae", "behaviour", "random", "any", "loop"]
    assert all(len(runs[0]) == 2 for runs in result.curves.values())
    assert "kl" in result.curves["kl"][0][1] and "kl" not in result.curves["vanilla"][0][1]


def test_features_are_mined_and_their_cause_tried(done):
    _, result = done
    mined = result.mined
    assert mined.mined and mined.layer == 1 and 1 <= len(mined.features) <= 2
    assert mined.strength == 8.0 and [c["strength"] for c in mined.cause["amplify"]] == [0.0, 8.0]
    assert all(row["looping"] > max(row["control"], 0) for row in mined.rows)


def test_a_finished_arm_is_not_run_again_and_a_new_one_is(done, world, monkeypatch):
    out, result = done
    trained = []
    before = rl_arms.train

    def train(arm, seed, *rest):
        trained.append((arm, seed))
        return before(arm, seed, *rest)

    monkeypatch.setattr(rl_arms, "train", train)
    monkeypatch.setattr(rl, "rises", None)  # mining is not done again either
    again = rl.run(config(world, out, arms=("vanilla", "loop"), seeds=(0, 1)))
    assert trained == [("vanilla", 1), ("loop", 1)]
    old = {line.arm: line.each[0] for line in result.arms}
    assert {line.arm: line.each[0] for line in again.arms} == {arm: old[arm] for arm in ("before", "vanilla", "loop")}
    assert [line.seeds for line in again.arms] == [1, 2, 2]
    with pytest.raises(StoreError, match="steps"):
        rl.run(config(world, out, steps=3))


def test_the_same_seed_trains_the_same_model(done, world, tmp_path):
    _, result = done
    other = rl.run(config(world, tmp_path / "again"))
    a, b = ({line.arm: line for line in r.arms}["sae"] for r in (result, other))
    assert (a.bits_per_byte.value, a.each, a.copied.value) == (b.bits_per_byte.value, b.each, b.copied.value)


def test_page_and_text_hold_the_table(done):
    out, result = done
    page, words = rl_page.page(result), rl_text.render(result)
    assert (out / "report.html").read_text() == page
    for arm in ("before", "vanilla", "sae", "behaviour", "random", "any", "loop", "overlong", "kl", "shaping"):
        assert arm in page and arm in words
    assert "SAE-steered negatives against plain DAPO" in words and "<script" not in page


def test_named_features_need_no_response_that_repeats(world, tmp_path):
    options = {"features": (7, 9), "max_new_tokens": 16, "arms": ("vanilla",), "steps": 1}
    result = rl.run(config(world, tmp_path / "out", **options))
    assert result.mined.features == (7, 9) and not result.mined.mined and result.mined.rows == ()
    assert result.mined.cause["suppress"] == [] and "0 sampled responses" in result.notes[0]


# --- measures --------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """A model that copies: the token behind the last occurrence of the current one, if there was one."""

    def __init__(self, copies):
        super().__init__()
        self.weight, self.copies = torch.nn.Parameter(torch.zeros(1)), copies

    def forward(self, input_ids, use_cache=False):
        row = input_ids[0].tolist()
        logits = torch.zeros(1, len(row), 50)
        for i, token in enumerate(row):
            before = [j for j in range(i) if row[j] == token]
            logits[0, i, row[before[-1] + 1] if self.copies and before else 49] = 5.0
        return type("Out", (), {"logits": logits})


def test_copy_task_asks_for_a_copy_and_counts_it():
    tokenizer = make_tokenizer()
    context, ids = rl_measure.copy_task(tokenizer, "w5 w6 w7 w8 w9", 4, chat=False)
    assert ids == [5, 6, 7, 8] and context == ids * 2  # this tokenizer has no line break to put between
    assert rl_measure.copy_task(tokenizer, "w5 w6", 4, chat=False) is None
    context = [*ids, 3, *ids, 3]
    assert rl_measure.copy_share(Echo(True), context, ids) == 1.0
    assert rl_measure.copy_share(Echo(False), context, ids) == 0.0
    assert rl_measure.copy_share(Echo(True), context, [5, 6, 9, 8]) == 0.5  # 9 is not next, and nothing followed it yet


def test_cost_is_the_negative_log_likelihood_over_bytes():
    model, tokenizer = make_model().eval(), make_tokenizer()
    ids = [5, 6, 17, 8]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    nats, size = rl_measure.cost(model, tokenizer, ids)
    assert nats == pytest.approx(-sum(scores[i, ids[i + 1]].item() for i in range(3)), rel=1e-5)
    assert size == len(" w6 w17 w8")
    assert rl_measure.bits_per_byte(np.log(2) * 20, 10) == pytest.approx(2)


def runs(*endless):
    count = len(endless[0])
    other = {"ended": [0] * count, "lengths": [5] * count, "repeated": [0.0] * count, "nats": [1.0], "bytes": [1]}
    return [Measures(endless=list(row), **other, copied=[1.0], samples=[]) for row in endless]


def test_intervals_of_known_tables():
    found = {"before": runs([1, 1]), "vanilla": runs([1, 0, 1, 0], [1, 0, 1, 0]), "sae": runs([0] * 4, [0] * 4)}
    before, vanilla, sae = rl_result.lines(found, {}, draws=500, seed=0)
    assert (before.endless.low, before.endless.value, before.endless.high) == (1, 1, 1)
    assert vanilla.endless.value == 0.5 and 0 <= vanilla.endless.low < 0.5 < vanilla.endless.high <= 1
    assert sae.against.value == -0.5 and sae.against.low == -vanilla.endless.high  # paired: the same draws
    assert vanilla.bits_per_byte.value == pytest.approx(1 / np.log(2))
    said = rl_result.verdicts((before, vanilla, replace(sae, endless=vanilla.endless)))
    assert said == (
        "SAE-steered negatives against plain DAPO: no difference that the intervals show, 50.0% against 50.0% endless.",
    )
    assert "more," in rl_result.verdicts(rl_result.lines({"vanilla": runs([0] * 4), "sae": runs([1] * 4)}, {}, 9, 0))[0]


def test_split_by_the_detector():
    from qscope.post_training.rollouts import Rollout

    loop, plain, empty = Rollout([1], [7] * 40, False), Rollout([1], [7, 8], True), Rollout([1], [], True)
    assert rl_measure.split([loop, plain, empty], DEFAULT) == ([loop], [plain])


# --- refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"group": 1}, "--group is 1"),
        ({"rows": 4}, "divisor of group"),
        ({"seeds": ()}, "--seeds"),
        ({"arms": ("sae", "sae")}, "twice"),
        ({"features": (3,), "layers": (0, 1)}, "the one they belong to"),
        ({"strengths": (0.0,)}, "above 0"),
        ({"temperature": 0.0}, "above 0"),
        ({"repeats": 1.0}, "repeats of at least 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(world, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        config(world, tmp_path, **options)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"chat": True}, "no chat template"),
        ({"rewards": ("nothing",)}, "The reward 'nothing'"),
        ({"copy_tokens": 30}, "no text of 30 tokens"),
        ({"prompt_tokens": 1}, "0 of 24 training prompts"),
        ({"max_new_tokens": 100}, "made for 128 tokens together"),
        ({"max_new_tokens": 8}, "Only 0 looping samples"),
    ],
)
def test_what_cannot_be_run_is_refused(world, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        rl.run(config(world, tmp_path / "out", **options))


def test_training_prompts_are_not_measured_on(world, tmp_path):
    with pytest.raises(InputError, match="24 held-out prompts are training prompts too"):
        rl.run(config(world, tmp_path / "out", held_out=str(world / "train.txt")))


def gives_nan(text):
    return float("nan")


def test_a_reward_that_is_nan_ends_the_run_and_names_it(world, tmp_path):
    with pytest.raises(InputError, match=f"python:{__name__}:gives_nan gave nan"):
        rl.run(config(world, tmp_path / "out", rewards=(f"python:{__name__}:gives_nan",)))
    assert END == 1
