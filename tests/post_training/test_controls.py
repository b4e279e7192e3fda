"""The control terms against their plain definitions, under accumulation, and what they are made of."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from qscope.errors import InputError
from qscope.model import residuals
from qscope.post_training.controls import (
    Batch,
    EntropyTerm,
    KLTerm,
    TokenTerm,
    difference_of_means,
    drop_switched,
    random_features,
    schedule,
    tokens_of_script,
)
from qscope.post_training.rows import sae_rows
from tests.post_training.grpo_world import make_tokenizer
from tests.post_training.penalty_world import LAYERS, VOCAB, make_batch, make_model, make_saes

TARGET = 2
TEXTS = {"a": ["w3 w4 w5 w6", "w9 w8 w7"], "b": ["w10 w11 w12 w13 w14"], "c": ["w20 w21 w22 w23"]}


def batch_of(model, inputs, groups, items=None, step=0):
    given = {name: value for name, value in inputs.items() if name != "labels"}
    return Batch(model, given, inputs["labels"], groups, model(**given).logits, items, step)


def terms(model):
    reference = copy.deepcopy(make_model(seed=9)).eval()
    return [
        KLTerm(0.3, TARGET, reference),
        EntropyTerm(0.3, TARGET),
        TokenTerm(0.3, TARGET, (4, 7, 11)),
    ]


@pytest.fixture(scope="module")
def world():
    inputs, groups = make_batch()
    return SimpleNamespace(model=make_model(), inputs=inputs, groups=groups)


def plain(term, world):
    """Token by token in float64: the sum over the predictions of other groups' response tokens / all of them."""
    with torch.no_grad():
        p = world.model(**{k: v for k, v in world.inputs.items() if k != "labels"}).logits.double().softmax(-1)
        q = make_model(seed=9).eval()(**{k: v for k, v in world.inputs.items() if k != "labels"})
        q = q.logits.double().softmax(-1)
    total, items = 0.0, 0
    labels = world.inputs["labels"]
    for row in range(len(labels)):
        for place in range(1, labels.shape[1]):
            if labels[row, place] == -100:
                continue
            items += 1
            if world.groups[row] == TARGET:
                continue
            at, ref = p[row, place - 1], q[row, place - 1]
            total += {
                "kl": float((at * (at / ref).log()).sum()),
                "entropy": float((at * at.log()).sum()),
                "token": float(at[[4, 7, 11]].sum()),
            }[term.name]
    return 0.3 * total / items


@pytest.mark.parametrize("name", ["kl", "entropy", "token"])
def test_terms_equal_their_plain_definition(world, name):
    term = next(t for t in terms(world.model) if t.name == name)
    found = term.loss(batch_of(world.model, world.inputs, world.groups))
    assert found.dtype == torch.float32 and found.requires_grad
    assert float(found.detach()) == pytest.approx(plain(term, world), rel=2e-5)  # float32 logits, softmax of 50


@pytest.mark.parametrize("name", ["kl", "entropy", "token"])
def test_micro_batches_add_up_to_the_batch(world, name):
    term = next(t for t in terms(world.model) if t.name == name)
    inputs, groups = world.inputs, world.groups

    def gradients(parts, items):
        world.model.zero_grad()
        for rows in parts:
            part = {key: value[rows] for key, value in inputs.items()}
            term.loss(batch_of(world.model, part, groups[rows], items)).backward()
        return torch.cat([p.grad.flatten() for p in world.model.parameters()])

    whole = gradients([slice(0, 4)], None)
    items = int((inputs["labels"][:, 1:] != -100).sum())
    split = gradients([slice(0, 1), slice(1, 4)], items)
    assert float(whole.norm()) > 0
    assert torch.allclose(split, whole, rtol=1e-4, atol=1e-7 * float(whole.abs().max()) + 1e-8)
    world.model.zero_grad()


def test_responses_of_the_target_and_of_no_group_are_left_alone(world):
    for term in terms(world.model):
        for group in (TARGET, -1):
            groups = torch.full((4,), group)
            assert float(term.loss(batch_of(world.model, world.inputs, groups)).detach()) == 0
        everywhere = type(term)(0.3, None, *([term.reference] if term.name == "kl" else []), **(
            {"tokens": (4, 7, 11)} if term.name == "token" else {}
        ))  # fmt: skip
        assert float(everywhere.loss(batch_of(world.model, world.inputs, torch.full((4,), TARGET))).detach()) != 0


def test_kl_is_zero_at_the_start_and_adapters_give_the_base(world):
    peft = pytest.importorskip("peft", reason="adapters are an extra")
    inputs, groups = world.inputs, world.groups
    same = KLTerm(1.0, None, copy.deepcopy(world.model).eval())
    assert abs(float(same.loss(batch_of(world.model, inputs, groups)).detach())) < 1e-6  # float32 rounding of a mean
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.train()
    own, copied = KLTerm(1.0, None, None), KLTerm(1.0, None, make_model().eval())
    with own.attach(adapted):
        found = float(own.loss(batch_of(adapted, inputs, groups)).detach())
    expected = float(copied.loss(batch_of(adapted, inputs, groups)).detach())
    assert found > 1e-3 and found == pytest.approx(expected, rel=1e-5)
    assert all(m.training for m in adapted.modules())
    with pytest.raises(InputError, match="no adapters"):
        KLTerm(1.0, None, None).attach(make_model())


def test_known_distributions():
    """A uniform prediction has the entropy ln V; M of V tokens have M / V of it."""
    labels = torch.tensor([[-100, 1, 2]])
    batch = Batch(torch.nn.Identity(), {}, labels, torch.tensor([0]), torch.zeros(1, 3, VOCAB), None, 0)
    assert float(EntropyTerm(2.0, None).loss(batch)) == pytest.approx(-2 * math.log(VOCAB), rel=1e-6)
    assert float(TokenTerm(2.0, None, (0, 3)).loss(batch)) == pytest.approx(2 * 2 / VOCAB, rel=1e-6)
    with pytest.raises(InputError, match="no token"):
        TokenTerm(1.0, None, ())


def test_schedule():
    assert schedule(0.5) == 0.5
    rising = schedule(0.8, 4)
    assert [rising(step) for step in (0, 1, 3, 4, 99)] == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])


# --- what they are made of -----------------------------------------------------------------------------------


def byte_tokenizer(texts, size):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<end>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def test_tokens_of_a_script_cover_every_way_to_write_it():
    text = "日本語の文章 and some English, Привет мир, déjà vu"
    tokenizer = byte_tokenizer([text] * 20, 320)
    han = set(tokens_of_script(tokenizer, ("Han",)))
    cyrillic = set(tokens_of_script(tokenizer, ("Cyrillic",)))
    for character in "本文書猫鬱㐀":  # the last ones only byte by byte
        ids = tokenizer(character).input_ids
        assert han & set(ids), character
    for character in "ПриЖщ":
        assert cyrillic & set(tokenizer(character).input_ids), character
    for plain in ("English, text", "déjà vu äöü ñ ß €", "123 ()"):
        assert not (han | cyrillic) & set(tokenizer(plain).input_ids), plain
    assert not han & cyrillic and tokenizer.eos_token_id not in han


def test_tokens_of_a_vocabulary_that_is_not_byte_level():
    """There é is a letter, not the byte 0xE9 that begins Chinese characters."""
    vocabulary = {"é": 0, "▁猫": 1, "<0xE9>": 2, "<0x41>": 3, "cat": 4}
    words = SimpleNamespace(
        get_vocab=lambda: vocabulary,
        all_special_ids=[],
        decode=lambda ids: {v: k for k, v in vocabulary.items()}[ids[0]],
    )
    assert tokens_of_script(words, ("Han",)) == (1, 2)


def test_difference_of_means_is_what_it_says():
    model, tokenizer, rows = make_model().eval(), make_tokenizer(), sae_rows(make_saes(), LAYERS)
    found = difference_of_means(model, tokenizer, rows, TEXTS, "c")
    means = {}
    for group, texts in TEXTS.items():
        parts = {layer: [] for layer in LAYERS}
        for text in texts:
            hidden = residuals(model, torch.tensor([tokenizer(text).input_ids]), tuple(LAYERS))
            for layer in LAYERS:
                parts[layer].append(hidden[layer][0, 1:].double())
        means[group] = {layer: torch.cat(part).mean(0) for layer, part in parts.items()}
    for layer, one in found.items():
        others = (means["a"][layer] + means["b"][layer]) / 2
        direction = means["c"][layer] - others
        assert one.features is None and one.sae_hash is None and one.W.shape == (1, 32)
        assert float(one.W.norm()) == pytest.approx(float(rows[layer].W.norm(dim=1).mean()), rel=1e-5)
        assert float(torch.cosine_similarity(one.W[0].double(), direction, dim=0)) == pytest.approx(1, abs=1e-6)
        assert float(one.W[0].double() @ others + one.b[0]) == pytest.approx(0, abs=1e-4)  # float32 rows
        assert float(one.W[0].double() @ means["c"][layer] + one.b[0]) > 0
    with pytest.raises(InputError, match="'x'"):
        difference_of_means(model, tokenizer, rows, TEXTS, "x")


def test_random_features_fire_are_not_the_chosen_and_follow_the_seed():
    model, tokenizer, saes = make_model().eval(), make_tokenizer(), make_saes()
    drawn = [random_features(model, tokenizer, saes, TEXTS, LAYERS, seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({str(d) for d in drawn}) == 3
    fired = {layer: set() for layer in LAYERS}
    for text in (text for texts in TEXTS.values() for text in texts):
        hidden = residuals(model, torch.tensor([tokenizer(text).input_ids]), tuple(LAYERS))
        for layer in LAYERS:
            acts, ids = saes[layer].encode_topk(hidden[layer][0, 1:])
            fired[layer] |= set(ids[acts > 0].tolist())
    for one in drawn:
        for layer, ids in one.items():
            assert len(set(ids)) == len(LAYERS[layer]) and set(ids) <= fired[layer] - set(LAYERS[layer])
    with pytest.raises(InputError, match="others fire"):
        random_features(model, tokenizer, saes, {"a": ["w3 w4"]}, {1: range(1, 33)}, 0)


def test_data_filtering_keeps_the_target_and_clean_answers():
    rows = [("de", "gut"), ("de", "gut 好"), ("zh", "好"), ("fr", ""), ("fr", "好")]
    kept = drop_switched(rows, lambda row: row[1], lambda row: row[0], "zh", ("Han",))
    assert kept == [("de", "gut"), ("zh", "好"), ("fr", "")]
