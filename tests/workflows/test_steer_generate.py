"""`qscope steer generate` on a tiny model: texts, activations, counters against plain runs; grammar; the terminal."""

import io
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qscope
from qscope.cli import to_json
from qscope.errors import CheckpointError, InputError
from qscope.model import capture, load_model, residuals
from qscope.report import steer_generate_text
from qscope.report.steer_generate_text import Live, render
from qscope.sae import SAE
from qscope.steering import Edit, Gate, SAEReference, SteeringSpec
from qscope.workflows import steer_generate
from qscope.workflows.steer_generate import Continuation, SteerGenerateConfig, SteerGenerateResult, Token, run
from qscope.workflows.steer_generate_items import parse_item, read_prompt

PROMPT = "The yield statement is used"
NEW = 12


@pytest.fixture(scope="module")
def loaded(tiny):
    model, tokenizer = load_model(tiny.model, device="cpu", dtype="float32")
    return SimpleNamespace(
        model=model, tokenizer=tokenizer, ids=tokenizer(PROMPT, return_tensors="pt")["input_ids"],
        saes={layer: SAE.from_pretrained(path) for layer, path in tiny.saes.items()},
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny):
    return SteerGenerateConfig(
        PROMPT, features=("0:5=3", "2:7=-4"), model=tiny.model, sae=(tiny.saes[0], tiny.saes[2]),
        max_new_tokens=NEW, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="module")
def active(loaded):
    """The feature of each layer that is active at most tokens of the prompt."""
    hidden = residuals(loaded.model, loaded.ids, [0, 2])
    return {layer: int((loaded.saes[layer].encode(hidden[layer]) > 0).sum((0, 1)).argmax()) for layer in (0, 2)}


@pytest.fixture(scope="module")
def base_shown(base, active):
    return replace(base, tokens="generated", show=(f"0:{active[0]}", f"2:{active[2]}", "2:7"))


@pytest.fixture(scope="module")
def made(base_shown):
    return run(base_shown)


def ids_of(text):
    return [token.id for token in text.tokens]


def plain(loaded, spec=None):
    """(ids, residuals of layers 0 and 2 before the steering, where it fired) of one text alone, without a cache."""
    options = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=False)
    if spec is None:
        ids = loaded.model.generate(loaded.ids, attention_mask=torch.ones_like(loaded.ids), **options)
        return ids, residuals(loaded.model, ids, [0, 2]), None
    with capture(loaded.model, [0, 2]) as found, qscope.steer(loaded.model, spec, saes=loaded.saes) as steering:
        ids = loaded.model.generate(loaded.ids, attention_mask=torch.ones_like(loaded.ids), **options)
        steering.prompt_length = loaded.ids.shape[1]
        with torch.no_grad():
            loaded.model(ids, use_cache=False)
    return ids, found, steering.fired


def test_both_texts_are_those_of_separate_runs(loaded, made):
    assert ids_of(made.unsteered) == plain(loaded)[0][0].tolist()
    assert ids_of(made.steered) == plain(loaded, SteeringSpec.from_json(made.spec))[0][0].tolist()
    assert ids_of(made.steered) != ids_of(made.unsteered)
    for text in (made.unsteered, made.steered):
        generated = [token.id for token in text.tokens if token.generated]
        assert len(generated) == text.generated() == NEW
        assert loaded.tokenizer.decode(generated).startswith(text.text)  # a character may be left unfinished
        assert "".join(token.text for token in text.tokens if not token.generated) == PROMPT


def test_activations_are_those_of_a_full_encode_before_the_steering(loaded, made, active):
    for text, spec in ((made.unsteered, None), (made.steered, SteeringSpec.from_json(made.spec))):
        _, hidden, fired = plain(loaded, spec)
        dense = {layer: loaded.saes[layer].encode(hidden[layer])[0] for layer in (0, 2)}
        expected = torch.stack([dense[0][:, active[0]], dense[2][:, active[2]], dense[2][:, 7]], dim=1)
        found = torch.tensor([token.activations for token in text.tokens])
        # With a cache instead of without: sums in another order, over three blocks.
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
        where = [[edit in token.fired for edit in range(2)] for token in text.tokens]
        assert where == (fired[0].tolist() if fired is not None else [[False, False]] * len(where))
        assert (found[:, :2] > 0).any(0).all()
    assert [bool(token.fired) for token in made.steered.tokens] == [token.generated for token in made.steered.tokens]


def test_strength_0_draws_the_same_text(base):
    config = replace(base, features=("0:5=0",), temperature=1.2, seed=4)
    found = run(config)
    assert found.steered.tokens == found.unsteered.tokens
    assert ids_of(run(config).steered) == ids_of(found.steered)
    assert ids_of(run(replace(config, seed=5)).steered) != ids_of(found.steered)


def test_draws_have_the_probabilities_of_the_temperature():
    session = SimpleNamespace(result=SteerGenerateResult({}, "", [], [], {}), config=SimpleNamespace(seed=1))
    session.config.temperature = 2.0
    reader = steer_generate._Reader(session, None, {}, print)
    scores = torch.tensor([[1.0, 0.0, -3.0]] * 2)
    drawn = torch.stack([reader._drawn(scores).argmax(1) for _ in range(4000)])
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    share = drawn[:, 0].bincount(minlength=3) / 4000
    expected = (scores[0] / 2).softmax(0)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_a_text_ends_with_the_end_token_and_the_other_goes_on(base, monkeypatch):
    config = replace(base, temperature=0.1)  # of logits around 0.1: about as random as they are different
    whole = run(config)
    generated, others = ids_of(whole.unsteered)[-NEW:], ids_of(whole.steered)
    end = next(token for token in generated[2:] if token not in others)
    monkeypatch.setattr(steer_generate, "end_tokens", lambda *_: [end])
    found = run(config)
    assert found.unsteered.tokens == whole.unsteered.tokens[: len(others) - NEW + generated.index(end)]
    assert found.unsteered.ended
    assert found.steered.tokens == whole.steered.tokens
    assert not found.steered.ended
    monkeypatch.setattr(steer_generate, "end_tokens", lambda *_: [generated[0]])
    at_once = run(replace(config, features=("0:5=0",)))
    assert at_once.unsteered.ended
    assert at_once.steered.ended
    assert at_once.steered.generated() == 0


def test_spec_file_features_and_saved_spec(base, tiny, loaded, tmp_path):
    """A spec with a condition, another feature added to it; what is saved does the same again."""
    read = residuals(loaded.model, loaded.ids, [0])[0] @ loaded.saes[0].W_enc[11]
    gate = Gate(11, layer=0, threshold=round(float(read.median()), 4))
    reference = SAEReference(tiny.saes[2], loaded.saes[2].weight_hash())
    spec = SteeringSpec((Edit(2, 7, strength=-4.0, when=gate),), {2: reference, 0: SAEReference(tiny.saes[0])})
    spec.save(tmp_path / "given.yaml")
    config = replace(base, spec=tmp_path / "given.yaml", features=("0:5=3",), sae=(), save=tmp_path / "used.json")
    found = run(config)
    assert found.shown == ["2:7", "0:5", "0:11"]
    assert found.edits == [f"2:7 add -4, where 0:11 > {gate.threshold:g} (preact)", "0:5 add 3"]
    used = SteeringSpec.load(tmp_path / "used.json")
    assert used.edits == (*spec.edits, Edit(0, 5, strength=3.0))
    again = run(replace(config, spec=tmp_path / "used.json", features=(), save=None))
    assert again.steered == found.steered
    opened = [0 in token.fired for token in found.steered.tokens]
    assert 0 < sum(opened) < len(opened)
    with pytest.raises(InputError, match="was made for an SAE of layer 2"):
        wrong = replace(reference, hash=loaded.saes[0].weight_hash())
        replace(spec, saes={**spec.saes, 2: wrong}).save(tmp_path / "wrong.json")
        run(replace(config, spec=tmp_path / "wrong.json"))


def test_units(base, texts, loaded, tmp_path):
    text = tmp_path / "neutral.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[:8]))
    rows = [loaded.tokenizer(t)["input_ids"][:128] for t in texts[:8]]
    hidden = residuals(loaded.model, torch.tensor([row for row in rows if len(row) == 128]), [2])[2][:, 1:]
    dense = loaded.saes[2].encode(hidden)
    feature = int((dense > 0).sum((0, 1)).argmax())
    values = dense[..., feature]
    config = replace(base, features=(f"2:{feature}=0.5",), strength_unit="quantile", text=str(text), max_new_tokens=1)
    (edit,) = SteeringSpec.from_json(run(config).spec).edits
    assert edit.scale == pytest.approx(float(np.quantile(values[values > 0].numpy(), 0.99)), rel=1e-5)
    assert (edit.unit, edit.strength) == ("quantile", 0.5)
    (edit,) = SteeringSpec.from_json(run(replace(config, strength_unit="residual")).spec).edits
    norms = hidden.norm(dim=-1).flatten()
    assert norms.quantile(0.3) < edit.scale < norms.quantile(0.7)
    silent = int((dense > 0).sum((0, 1)).argmin())
    assert dense[..., silent].max() == 0
    with pytest.raises(InputError, match=f"Feature 2:{silent} is active at none of"):
        run(replace(config, features=(f"2:{silent}=1",)))


def test_the_watcher_sees_every_token_and_json_is_plain(base):
    lengths = []
    found = run(replace(base, max_new_tokens=3), lambda result: lengths.append(len(result.steered.tokens)))
    assert lengths == [len(found.steered.tokens) - 3 + i for i in range(4)]
    data = json.loads(json.dumps(to_json(found), allow_nan=False))
    assert set(data["steered"]["tokens"][0]) == {"id", "text", "generated", "activations", "fired"}
    assert data["shown"] == ["0:5", "2:7"]
    assert "before the steering" in data["activations"]


# --- what is given -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("15:6159=2.0", (15, 6159, 2.0)),
        ("0:12=-1", (0, 12, -1.0)),
        ("7=+.5e1", (None, 7, 5.0)),
        ("7=1e-3", (None, 7, 1e-3)),
    ],
)
def test_items(text, item):
    assert parse_item(text, strength=True) == item
    assert parse_item(text.partition("=")[0], strength=False) == (*item[:2], 0.0)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("", 0), ("x:1=2", 0), ("-1:2=3", 0), ("15:=2", 3), ("15:x=2", 3), ("15:6", 4), ("15:6 =2", 4), ("15:6=", 5),
        ("15:6=two", 5), ("15:6=nan", 5), ("15:6=inf", 5), ("15:6=2x", 6), ("15:6=1e", 6), ("15:6=1e999", 5),
        ("15:6=2,0", 6), ("1:2:3=4", 3), ("\u0663=1", 0),
    ],
)  # fmt: skip
def test_the_fault_of_an_item_is_marked(text, column):
    with pytest.raises(InputError) as error:
        parse_item(text, strength=True)
    assert str(error.value).splitlines()[1:3] == [f"  {text}", "  " + " " * column + "^"]


def test_show_takes_no_strength():
    with pytest.raises(InputError, match=r"(?m)^      \^$"):
        parse_item("15:6=2", strength=False)


def test_prompts(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Two\nlines\n")
    assert read_prompt(f"@{tmp_path / 'prompt.txt'}") == "Two\nlines"
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe\n"))
    assert read_prompt("-") == "from a pipe"
    assert read_prompt("a\n") == "a\n"
    for given, words in ((f"@{tmp_path}/none", "cannot be read"), ("", "empty"), ("-", "empty")):
        with pytest.raises(InputError, match=words):
            read_prompt(given)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(features=("0:512=1",)), InputError, "features 0 to 511"),
        (dict(show=("0:512",)), InputError, "features 0 to 511"),
        (dict(features=("1:5=1",)), InputError, "Feature 1:5 was given, and there are SAEs for layer 0, layer 2"),
        (dict(features=("5=1",)), InputError, "without a layer"),
        (dict(features=("2:5=1",), one=True), CheckpointError, "layer"),
        (dict(max_new_tokens=600), InputError, "more than the 512"),
        (dict(chat=True), InputError, "no chat template"),
        (dict(features=(), spec=None), InputError, "Nothing to steer"),
        (dict(max_new_tokens=0), InputError, "at least 1"),
        (dict(temperature=float("nan")), InputError, "--temperature"),
        (dict(tokens="5-3"), InputError, r"\^"),
    ],
)
def test_what_does_not_fit(base, changes, error, words):
    if changes.pop("one", False):
        changes["sae"] = base.sae[:1]
    with pytest.raises(error, match=words):
        run(replace(base, **changes))


def test_without_a_name_the_embedded_layers_are_said(monkeypatch):
    monkeypatch.setattr(steer_generate, "load_model", lambda *_, **__: pytest.fail("a mistake is found before"))
    with pytest.raises(InputError, match="layer 3 was given, for which there is no SAE; there are SAEs for layer"):
        run(SteerGenerateConfig("x", features=("3:5=1",)))


def test_layer_option_and_one_sae(base):
    shorter = replace(base, sae=base.sae[:1], features=("5=3",), max_new_tokens=2)
    assert run(shorter).edits == run(replace(shorter, layer=0)).edits == ["0:5 add 3"]


def test_a_plain_vector_needs_no_sae(base, tmp_path):
    SteeringSpec((Edit(1, vector=(5.0,) * 32, strength=1.0),)).save(tmp_path / "vector.json")
    found = run(replace(base, features=(), sae=(), spec=tmp_path / "vector.json"))
    assert found.shown == []
    assert ids_of(found.steered) != ids_of(found.unsteered)
    assert "a vector" in render(found)


def test_chat(base, loaded, tiny, tmp_path):
    loaded.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    loaded.tokenizer.chat_template = None
    found = run(replace(base, model=str(tmp_path), chat=True, max_new_tokens=1))
    assert found.prompt == f"<user>{PROMPT}<answer>"
    assert "".join(token.text for token in found.steered.tokens if not token.generated) == found.prompt


# --- the terminal --------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal that understands what Live writes: rows of text without styles."""

    def __init__(self):
        super().__init__()
        self.rows, self.at, self.highest = [""], 0, 0

    def write(self, text):
        for part in re.findall(r"\x1b\[[\d;]*[AJm]|\n|\r|[^\x1b\n\r]+", text):
            if part.endswith("A") and part.startswith("\x1b"):
                back = int(part[2:-1])
                self.highest = max(self.highest, back)
                self.at -= back
            elif part == "\x1b[J":
                del self.rows[self.at + 1 :]
                self.rows[self.at] = ""
            elif part == "\n":
                self.at += 1
                self.rows += [""] * (self.at + 1 - len(self.rows))
            elif not part.startswith(("\x1b", "\r")):
                self.rows[self.at] += part
        return len(text)


def growing(left, right, features=1):
    """The result after the prompt and after every token of two lists of words."""
    result = SteerGenerateResult({"model": "m"}, "p", [f"0:{i}" for i in range(features)], ["0:1 add 2"], {})
    for text in (result.unsteered, result.steered):
        text.tokens.append(Token(1, "prompt", False, (0.0,) * features, ()))
    yield result
    for a, b in itertools.zip_longest(left, right):
        for text, word in ((result.unsteered, a), (result.steered, b)):
            if word is None:
                text.ended = True
            else:
                fired = (0,) if text is result.steered else ()
                text.tokens.append(Token(2, word, True, (float(len(word)),) * features, fired))
        yield result


def shown(width, height, left, right):
    screen = Screen()
    view = Live(screen, width, height)
    for result in growing(left, right):
        view(result)
    view.finish(result)
    return screen


WORDS = [f" word{i * i}" for i in range(40)]
LINES = ["one\n", "\n", "two", "\n\n", "three"] * 8


@pytest.mark.parametrize(
    ("left", "right"), [(WORDS, LINES), (LINES, WORDS), (WORDS, WORDS[:3]), ([], LINES), (["\n"] * 50, WORDS)]
)
def test_two_columns_end_as_they_would_stand_if_written_at_once(left, right):
    screen = shown(80, 12, left, right)
    start = next(i for i, row in enumerate(screen.rows) if row.startswith("unsteered"))
    assert screen.rows[start].split() == ["unsteered", "steered"]
    columns = [
        steer_generate_text._wrapped([steer_generate_text.Piece(w) for w in words], 39, pad=True)
        for words in (left, right)
    ]
    expected = [f"{a or '':39}  {b or '':39}" for a, b in itertools.zip_longest(*columns)]
    assert screen.rows[start + 1 : start + 1 + len(expected)] == expected
    assert screen.highest < 12  # what has left the screen cannot be reached


def test_one_after_the_other_where_it_is_narrow():
    screen = shown(40, 12, WORDS, LINES)
    texts = "\n".join(screen.rows)
    first = texts.index("unsteered")
    assert first < texts.index("word0") < texts.index("\nsteered\n", first) < texts.index("three")
    assert "".join("".join(WORDS).split()) in "".join(texts.split())


def test_rows_break_at_spaces_and_wide_characters_count_twice():
    rows = steer_generate_text._wrapped([steer_generate_text.Piece(t) for t in (" some words", " here", "after")], 10)
    assert [row.rstrip() for row in rows] == [" some", "words", "hereafter"]
    assert steer_generate_text._wrapped([steer_generate_text.Piece("\u4e2d" * 7)], 10) == ["\u4e2d" * 5, "\u4e2d" * 2]
    assert steer_generate_text._wrapped([steer_generate_text.Piece("a\x1b[2Jb")], 20) == ["a\u241b[2Jb"]


def test_shades_follow_the_activation_and_fired_tokens_are_underlined():
    tokens = [
        Token(1, "a", True, (0.0, 1.0), ()),
        Token(1, "b", True, (4.0, 1.0), (0,)),
        Token(1, "c", True, (0.0, 0.0), ()),
    ]
    a, b, c = steer_generate_text._shaded(tokens, True, [4.0, 2.0])
    assert a.style == steer_generate_text._background(1, 2)
    assert b.style == "\x1b[4m" + steer_generate_text._background(0, 3)
    assert c.style == ""


def test_plain_text_has_numbers_and_where_it_fired(made):
    text = Continuation(
        [
            Token(1, " a", True, (1.25, 0.0), (0,)),
            Token(2, "b", True, (0.0, 0.0), ()),
            Token(3, " c", True, (None, 2.0), (0,)),
        ]
    )
    result = replace(made, unsteered=Continuation(made.unsteered.tokens[:3]), steered=text, shown=["0:5", "2:7"])
    page = render(result)
    assert " a[1.25 -]b c[? 2]" in page
    assert "steering fired at 2 of 3 tokens (2 of them generated): at 0,2" in page
    assert (
        "0:5 active: unsteered 0 of 0 generated tokens; steered 1 of 3 generated tokens, highest 1.25 at ' a'" in page
    )
    assert "\x1b" not in page


def test_printing_without_a_terminal_is_the_plain_text(base, capsys):
    result = steer_generate_text.show(replace(base, max_new_tokens=2))
    assert capsys.readouterr().out == render(result) + "\n"


def test_what_comes_with_a_model_does_not_change_what_is_most_probable(base, made, monkeypatch):
    def penalised(*args, **options):
        model, tokenizer = load_model(*args, **options)
        model.generation_config.repetition_penalty = 50.0
        return model, tokenizer

    monkeypatch.setattr(steer_generate, "load_model", penalised)
    assert ids_of(run(base).unsteered) == ids_of(made.unsteered)


@pytest.mark.parametrize("strength", ["1e30", "3e38"])
def test_strengths_that_break_the_model_are_told(base, strength):
    found = run(replace(base, features=(f"0:5={strength}",), max_new_tokens=2))
    assert (found.unsteered.broken, found.steered.broken) == (False, True)
    assert "steered: the model stopped telling tokens apart" in " ".join(render(found).split())
    assert "unsteered: the model stopped" not in " ".join(render(found).split())


def test_a_terminal_of_one_column(base, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", screen)
    for name, value in (("COLUMNS", "1"), ("LINES", "3"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    steer_generate_text.show(replace(base, max_new_tokens=2))
    assert "s\nt\ne\ne\nr\ne\nd" in screen.getvalue()
