"""Side effects against hand counts and against plain PyTorch on a tiny model."""

import json

import numpy as np
import pytest
import torch

from qscope.errors import InputError, StoreError
from qscope.journal import Journal
from qscope.model import load_model
from qscope.workflows import steer_eval_baselines as baselines
from qscope.workflows import steer_eval_inputs as inputs
from qscope.workflows.steer_eval_measures import (
    Question,
    choice_scores,
    choose,
    distinct,
    divergence,
    generate,
    log_probs,
    repetition,
)


@pytest.fixture(scope="module")
def loaded(tiny):
    """Weights made larger: a freshly made model hardly looks at what a token is, and not at all where it stands."""
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
            part.weight.data *= 10
    model.get_input_embeddings().weight.data *= 10
    return model, tokenizer


def test_distinct_and_repetition_by_hand():
    tokens = [1, 2, 1, 2, 1, 2]
    assert distinct(tokens, 1) == 2 / 6
    assert distinct(tokens, 2) == 2 / 5  # 12 21 12 21 12
    assert repetition(tokens) == pytest.approx(1 / 3)  # 1212 2121 1212: the third was said before
    assert distinct([7], 2) == 1.0 and repetition([7]) == 0.0


def test_divergence_by_hand():
    """Two tokens of a vocabulary of two: KL and cross-entropy as one writes them down."""
    base = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
    changed = torch.log(torch.tensor([[[0.25, 0.75], [0.25, 0.75]]]))
    found = divergence(base, changed, torch.tensor([[0, 0, 1, 0]]))
    kl = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert found.kl == pytest.approx([kl], rel=1e-6)
    assert found.cross_entropy == pytest.approx([-np.log(0.75) - np.log(0.25)], rel=1e-6)


def test_log_probs_are_the_models_with_and_without_a_prefix(loaded):
    model, _ = loaded
    ids = torch.arange(24).reshape(2, 12) * 7 % 4096
    with torch.no_grad():
        plain = model(input_ids=ids).logits.log_softmax(-1)
        behind = model(input_ids=torch.cat([torch.tensor([[5, 6], [5, 6]]), ids], 1)).logits.log_softmax(-1)
    assert torch.allclose(log_probs(model, ids), plain[:, 5:-1], atol=1e-5)  # predicts ids[:, 6:]
    assert torch.allclose(log_probs(model, ids, [5, 6]), behind[:, 7:-1], atol=1e-5)
    started = torch.cat([torch.full((2, 1), 9), ids[:, 1:]], 1)
    with torch.no_grad():
        after = model(input_ids=torch.cat([started[:, :1], torch.tensor([[5, 6], [5, 6]]), started[:, 1:]], 1)).logits
    assert torch.allclose(log_probs(model, started, [5, 6], begin=9), after.log_softmax(-1)[:, 7:-1], atol=1e-5)
    loss = torch.nn.functional.cross_entropy(plain[0, 5:-1], ids[0, 6:], reduction="sum")
    base = log_probs(model, ids)
    assert divergence(base, base, ids).cross_entropy[0] == pytest.approx(float(loss), rel=1e-5)
    assert divergence(base, base, ids).kl == [0.0, 0.0]


def test_choices_score_as_when_each_runs_alone(loaded):
    model, tokenizer = loaded
    questions = [
        Question("The with statement is used", ("to wrap a block", "as an operator", "x"), 0),
        Question("An", ("assignment of names to objects", "expression"), 1),
        Question("Boolean operations have a value that is not always", ("a bool", "int"), 0),
    ]
    best, alone = [], []
    for question in questions:
        scores = []
        for choice in question.choices:
            front, back = tokenizer(question.query)["input_ids"], tokenizer(f" {choice}")["input_ids"]
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([front + back])).logits[0].log_softmax(-1)
            scores.append(sum(float(logp[len(front) - 1 + i, t]) for i, t in enumerate(back)) / len(choice))
        best.append(int(np.argmax(scores)))
        alone += scores
    together = choice_scores(model, tokenizer, questions, 3)
    assert [score for mine in together for score in mine] == pytest.approx(
        alone, rel=1e-5
    )  # float32 passes of other shapes
    marked = []
    right = choose(model, tokenizer, questions, 3, mark=marked.append)
    assert right == [b == q.answer for b, q in zip(best, questions, strict=True)]
    assert len(marked) == 3 and marked[0] == max(len(tokenizer(q.query)["input_ids"]) for q in questions)
    turned = [Question(q.query, q.choices, b) for q, b in zip(questions, best, strict=True)]
    assert choose(model, tokenizer, turned, 32) == [True, True, True]


def test_a_padded_batch_generates_what_single_prompts_do(loaded):
    model, tokenizer = loaded
    prompts = ["The", "Boolean operations are evaluated from left to right and", "An assignment"]
    together = generate(model, tokenizer, prompts, 6)
    assert together == [generate(model, tokenizer, [prompt], 6)[0] for prompt in prompts]
    ids = tokenizer(prompts[0])["input_ids"]
    for expected in together[0]:  # greedy by hand, without cache
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        assert token == expected
        ids = [*ids, token]


def test_generation_ends_at_the_end_token(loaded, monkeypatch):
    model, tokenizer = loaded
    found = generate(model, tokenizer, ["The"], 5)[0]
    monkeypatch.setattr(model.generation_config, "eos_token_id", found[2])
    assert generate(model, tokenizer, ["The"], 5)[0] == found[: found.index(found[2])]


# --- baselines -------------------------------------------------------------------------------------------


def test_directions_are_found_where_they_were_planted():
    rng = np.random.default_rng(3)
    planted = np.zeros(16)
    planted[4] = 1.0
    noise = rng.standard_normal((80, 16)) * 0.1
    positive, negative = noise[:40] + 5 + 2 * planted, noise[40:] + 5
    fits = {f.name: np.array(f.direction) for f in baselines.fit(positive, negative, baselines.NAMES, 0)}
    difference = positive.mean(0) - negative.mean(0)
    assert fits["difference of means"] == pytest.approx(difference / np.linalg.norm(difference), abs=1e-12)
    for name, direction in fits.items():
        assert np.linalg.norm(direction) == pytest.approx(1, abs=1e-12), name
        assert direction[4] > 0.99, name
    again = baselines.fit(positive, negative, baselines.NAMES, 0)
    assert [f.direction for f in again] == [tuple(fits[f.name].tolist()) for f in again]


def test_pca_is_the_direction_of_most_variance_whatever_the_labels_say():
    rng = np.random.default_rng(3)
    spread = rng.standard_normal(60)[:, None] * np.eye(8)[2] * 10
    labels = np.concatenate([np.eye(8)[5][None].repeat(30, 0), np.zeros((30, 8))])
    both = spread + labels
    (fit,) = baselines.fit(both[:30], both[30:], ["PCA"], 0)
    assert abs(fit.direction[2]) > 0.99


def test_equal_texts_give_no_direction():
    with pytest.raises(InputError, match="no direction"):
        baselines.fit(np.ones((3, 4)), np.ones((3, 4)), ["difference of means"], 0)
    with pytest.raises(InputError, match="1 negative"):
        baselines.fit(np.ones((3, 4)), np.ones((1, 4)), ["PCA"], 0)


def test_pooling_is_the_mean_behind_the_first_token_or_the_last(loaded):
    model, tokenizer = loaded
    texts = ["An assignment", "Boolean operations are evaluated from left to right", "The"]
    found = {p: baselines.pooled(model, tokenizer, texts, 1, p, 6, rows=2) for p in ("mean", "last")}
    for i, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"][:6]])
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[2][0].double()
        rest = hidden[1:] if len(hidden) > 1 else hidden
        rest = rest[rest.norm(dim=1) <= 10 * rest.norm(dim=1).median()]
        assert found["mean"][i] == pytest.approx(rest.mean(0).numpy(), abs=1e-5)  # float32 passes of other shapes
        assert found["last"][i] == pytest.approx(hidden[-1].numpy(), abs=1e-5)


def test_random_arms_are_drawn_from_the_seed():
    assert baselines.random_features([3, 5, 9, 11], [5], 9, 0) == baselines.random_features([11, 9, 3], [5], 9, 0)
    assert sorted(baselines.random_features([3, 5, 9, 11], [5], 9, 0)) == [3, 9, 11]
    one, two = baselines.random_directions(12, 2, 0)
    assert np.linalg.norm(one) == pytest.approx(1) and one != two
    assert baselines.random_directions(12, 2, 0) == [one, two] != baselines.random_directions(12, 2, 1)


def test_the_typical_norm_knows_no_first_token_and_no_sink():
    hidden = torch.ones(2, 5, 4)
    hidden[:, 0] = 1e6
    hidden[1, 3] = 1e3
    assert baselines.typical_norm(hidden) == 2.0


# --- inputs and journal ----------------------------------------------------------------------------------


def test_prompts_of_the_training_texts_are_refused():
    training = ["Tell me about  KINGS.", "A long story in which the old prompt stands in the middle of it."]
    held_out = ["About queens.", "kings"]  # short ones must be equal, not parts
    assert inputs.check_held_out(held_out, training, False) == []
    for prompt in ("tell me about kings.", "the old prompt stands in the"):
        with pytest.raises(InputError, match="1 of 3 prompts occur"):
            inputs.check_held_out([*held_out, prompt], training, False)
        assert inputs.check_held_out([*held_out, prompt], training, True) == [prompt]


def test_questions_are_read_or_the_line_is_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "Q", "choices": ["a", "b"], "answer": 1}\n\n')
    assert inputs.read_questions(str(path), 5) == [Question("Q", ("a", "b"), 1)]
    path.write_text('{"query": "Q", "choices": ["a", "b"], "answer": 2}\n')
    with pytest.raises(InputError, match="line 1 is no question"):
        inputs.read_questions(str(path), 5)


def test_neutral_texts_are_the_first_tokens_of_long_documents(loaded, tmp_path):
    _, tokenizer = loaded
    path = tmp_path / "n.jsonl"
    texts = ["short", "Boolean operations are evaluated from left to right", "An assignment of names to objects"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = inputs.neutral_windows(tokenizer, str(path), "text", 5, 4)
    assert found.tolist() == [tokenizer(text)["input_ids"][:4] for text in texts[1:]]
    with pytest.raises(InputError, match="no document of 99 tokens"):
        inputs.neutral_windows(tokenizer, str(path), "text", 5, 99)


def test_the_journal_keeps_whole_lines_and_cuts_off_a_torn_one(tmp_path):
    with Journal(tmp_path / "run", {"a": 1}, "steering evaluation") as journal:
        journal.put("x", 0, value=[1.5])
        with pytest.raises(StoreError, match="another process"):
            Journal(tmp_path / "run", {"a": 1}, "steering evaluation")
    path = tmp_path / "run" / "journal.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": ["y"], "val')
    with Journal(tmp_path / "run", {"a": 1}, "steering evaluation") as journal:
        assert journal.get("x", 0) == [1.5] and journal.get("y") is None
        journal.put("y", value=2)
    assert path.read_bytes() == whole + b'{"key": ["y"], "value": 2}\n'
    with pytest.raises(StoreError, match=r"other options: a: 1 -> 2"):
        Journal(tmp_path / "run", {"a": 2}, "steering evaluation")
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(StoreError, match="damaged in line 1"):
        Journal(tmp_path / "run", {"a": 1}, "steering evaluation")
