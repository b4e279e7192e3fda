"""What steering does to a model, against plain PyTorch hooks that write the formula out."""

import contextlib
import dataclasses

import pytest
import torch

import qscope
from qscope.errors import InputError, SteeringNotApplied
from qscope.model import capture
from qscope.steering import Edit, Gate, SteeringSpec

# Sums over the 32 numbers of a residual in another order, and what three blocks make of that.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def spec(*edits):
    return SteeringSpec(tuple(edits))


@contextlib.contextmanager
def plain(model, layer, change):
    """A forward hook that replaces the output of a block by change(h)."""
    handle = model.model.layers[layer].register_forward_hook(lambda m, i, h: change(h))
    try:
        yield
    finally:
        handle.remove()


def preact(sae, f, h):
    return h @ sae.W_enc[f] + sae.b_enc[f]


def topk(sae, f, h):
    return sae.encode(h)[..., f]


def logits(model, prompts):
    return model(**prompts, use_cache=False).logits


def real(prompts, values):
    return values[prompts["attention_mask"].bool()]


def typical(sae, h, at_least=0.3):
    """A feature that is among the k of some tokens and not of others."""
    share = (sae.encode(h) > 0).float().mean((0, 1))
    return int((share - at_least).abs().argmin())


@pytest.fixture
def h0(model, prompts):
    with capture(model, [0]) as found:
        model(**prompts)
    return found[0]


MODES = {
    "add": (dict(mode="add", strength=1.5), lambda h, s, f: h + 1.5 * s.W_dec[f]),
    "clamp": (
        dict(mode="clamp", strength=2.0),
        lambda h, s, f: h + (2.0 - preact(s, f, h).relu())[..., None] * s.W_dec[f],
    ),
    "scale": (
        dict(mode="scale", strength=3.0),
        lambda h, s, f: h + 2.0 * preact(s, f, h).relu()[..., None] * s.W_dec[f],
    ),
    "ablate": (dict(mode="ablate"), lambda h, s, f: h - preact(s, f, h).relu()[..., None] * s.W_dec[f]),
    "orthogonalise": (
        dict(mode="orthogonalise"),
        lambda h, s, f: h - (h @ s.W_dec[f] / s.W_dec[f].square().sum())[..., None] * s.W_dec[f],
    ),
    "exact clamp": (
        dict(mode="clamp", strength=2.0, activation="exact"),
        lambda h, s, f: h + (2.0 - topk(s, f, h))[..., None] * s.W_dec[f],
    ),
    "exact scale": (
        dict(mode="scale", strength=3.0, activation="exact"),
        lambda h, s, f: h + 2.0 * topk(s, f, h)[..., None] * s.W_dec[f],
    ),
    "exact ablate": (
        dict(mode="ablate", activation="exact"),
        lambda h, s, f: h - topk(s, f, h)[..., None] * s.W_dec[f],
    ),
    "quantile": (
        dict(strength=0.5, unit="quantile", scale=3.0),
        lambda h, s, f: h + 1.5 * s.W_dec[f],
    ),
    "residual": (
        dict(strength=0.5, unit="residual", scale=6.0),
        lambda h, s, f: h + 3.0 * s.W_dec[f] / s.W_dec[f].norm(),
    ),
}


@pytest.mark.parametrize("name", MODES)
def test_each_mode_is_its_formula(model, saes, prompts, h0, name):
    fields, formula = MODES[name]
    sae = saes[0]
    f = typical(sae, h0)
    with qscope.steer(model, spec(Edit(0, f, **fields)), saes=saes), capture(model, [0]) as found:
        steered = logits(model, prompts)
    with plain(model, 0, lambda h: formula(h, sae, f)):
        expected = logits(model, prompts)
    torch.testing.assert_close(real(prompts, found[0]), real(prompts, formula(h0, sae, f)), **CLOSE)
    torch.testing.assert_close(real(prompts, steered), real(prompts, expected), **CLOSE)
    assert not torch.allclose(real(prompts, found[0]), real(prompts, h0), atol=1e-2)


def test_the_exact_clamp_is_the_reconstruction_with_the_error_term_kept(model, saes, prompts, h0):
    sae, f = saes[0], typical(saes[0], h0)
    acts = sae.encode(h0)
    changed = acts.clone()
    changed[..., f] = 2.0
    expected = sae.decode(changed) + (h0 - sae.decode(acts))
    edit = Edit(0, f, mode="clamp", strength=2.0, activation="exact")
    with qscope.steer(model, spec(edit), saes=saes), capture(model, [0]) as found:
        model(**prompts)
    torch.testing.assert_close(real(prompts, found[0]), real(prompts, expected), **CLOSE)


@pytest.mark.parametrize("mode", ["preact", "exact"])
@pytest.mark.parametrize("where", [(0, 0), (1, 0), (1, 1)])
def test_a_gate_opens_where_a_full_encode_says(model, saes, prompts, mode, where):
    at, gate_layer = where
    with capture(model, [gate_layer, at]) as found:
        model(**prompts)
    h, sae = found[gate_layer], saes[gate_layer]
    f = typical(sae, h)
    active = topk(sae, f, h) > 0.4 if mode == "exact" else preact(sae, f, h) > 0.4
    gate = Gate(f, layer=gate_layer, threshold=0.4, mode=mode)
    with qscope.steer(model, spec(Edit(at, 7, strength=4.0, when=gate)), saes=saes) as steering:
        with capture(model, [at]) as steered:
            model(**prompts)
    expected = active & prompts["attention_mask"].bool()
    assert 0 < expected.sum() < expected.numel()
    assert torch.equal(steering.fired[..., 0], expected)
    moved = (steered[at] - found[at]).abs().amax(-1) > 0
    assert torch.equal(moved, expected)


def test_a_preact_gate_may_open_where_an_exact_one_does_not(model, saes, prompts, h0):
    f = typical(saes[0], h0)
    fired = {}
    for mode in ("preact", "exact"):
        with qscope.steer(model, spec(Edit(0, 7, strength=1.0, when=Gate(f, mode=mode))), saes=saes) as steering:
            model(**prompts)
        fired[mode] = steering.fired
    assert bool((fired["preact"] | ~fired["exact"]).all())
    assert fired["preact"].sum() > fired["exact"].sum()


def test_strength_0_changes_no_bit(model, saes, prompts):
    edits = [Edit(layer, 3, strength=0.0, when=gate) for layer in (0, 1) for gate in (None, Gate(5))]
    before = logits(model, prompts)
    text = model.generate(**prompts, max_new_tokens=6, do_sample=False)
    with qscope.steer(model, spec(*edits), saes=saes) as steering:
        assert torch.equal(logits(model, prompts), before)
        assert not steering.fired.any()
        assert torch.equal(model.generate(**prompts, max_new_tokens=6, do_sample=False), text)


def test_all_edits_of_a_layer_read_the_residual_as_it_comes_in(model, saes, prompts, h0):
    sae = saes[0]
    edits = [Edit(0, 3, strength=2.0), Edit(0, 4, mode="ablate"), Edit(0, 5, mode="clamp", strength=1.0)]
    expected = (
        h0
        + 2.0 * sae.W_dec[3]
        - preact(sae, 4, h0).relu()[..., None] * sae.W_dec[4]
        + (1.0 - preact(sae, 5, h0).relu())[..., None] * sae.W_dec[5]
    )
    with qscope.steer(model, spec(*edits), saes=saes), capture(model, [0]) as found:
        model(**prompts)
    torch.testing.assert_close(real(prompts, found[0]), real(prompts, expected), **CLOSE)


def test_more_directions_than_the_operator_takes(model, saes, prompts, h0):
    sae = saes[0]
    edits = [Edit(0, f, mode="scale", strength=0.5) for f in range(40)]
    expected = h0 - 0.5 * (h0 @ sae.W_enc[:40].T + sae.b_enc[:40]).relu() @ sae.W_dec[:40]
    with qscope.steer(model, spec(*edits), saes=saes) as steering, capture(model, [0]) as found:
        model(**prompts)
    torch.testing.assert_close(real(prompts, found[0]), real(prompts, expected), **CLOSE)
    assert torch.equal(
        steering.fired, ((h0 @ sae.W_enc[:40].T + sae.b_enc[:40]) > 0) & prompts["attention_mask"][..., None].bool()
    )


# --- which tokens --------------------------------------------------------------------------------------------


def fired_in_generate(model, prompts, saes, edit, **options):
    with qscope.steer(model, spec(edit), saes=saes, tokenizer=options.pop("tokenizer", None)) as steering:
        model.generate(**prompts, max_new_tokens=4, min_new_tokens=4, do_sample=False, **options)
    return steering.fired[..., 0]


def columns(prompts, chosen):
    """bool [rows, 8 + 3]: from positions counted over real tokens."""
    lengths = prompts["attention_mask"].sum(1)
    position = torch.arange(11)[None] - (8 - lengths)[:, None]
    return torch.tensor(
        [[chosen(int(p), int(n)) if p >= 0 else False for p in row] for row, n in zip(position, lengths, strict=True)]
    )


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        (dict(tokens="all"), lambda p, n: True),
        (dict(tokens="prompt"), lambda p, n: p < n),
        (dict(tokens="generated"), lambda p, n: p >= n),
        (dict(tokens="5"), lambda p, n: p == 5),
        (dict(tokens="0,2,5-8"), lambda p, n: p in (0, 2, 5, 6, 7, 8)),
        (dict(tokens="generated,1-2"), lambda p, n: p >= n or p in (1, 2)),
        (dict(skip=("first",)), lambda p, n: p > 0),
        (dict(tokens="0-3", skip=("first",)), lambda p, n: 0 < p < 4),
    ],
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_tokens_in_generate(model, saes, prompts, fields, chosen, use_cache):
    found = fired_in_generate(model, prompts, saes, Edit(1, 3, strength=1.0, **fields), use_cache=use_cache)
    assert torch.equal(found, columns(prompts, chosen))


@pytest.mark.parametrize("use_cache", [True, False])
def test_after_a_token_and_special_tokens(model, saes, prompts, use_cache):
    prompts["input_ids"][:, 5] = 33
    prompts["input_ids"][1, 2] = 63

    class Tokenizer:
        all_special_ids = (63, 0)

        def encode(self, text, add_special_tokens):
            return {"<x>": [33], "two": [1, 2]}[text]

    edit = Edit(1, 3, strength=1.0, after="<x>")
    found = fired_in_generate(model, prompts, saes, edit, use_cache=use_cache, tokenizer=Tokenizer())
    assert found.int().tolist() == [[0] * 6 + [1] * 5] * 2
    edit = Edit(1, 3, strength=1.0, tokens="prompt", skip=("special",))
    found = fired_in_generate(model, prompts, saes, edit, use_cache=use_cache, tokenizer=Tokenizer())
    assert found.int().tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]]
    with pytest.raises(InputError, match="2 tokens"):
        qscope.steer(model, spec(Edit(1, 3, strength=1.0, after="two")), saes=saes, tokenizer=Tokenizer())
    with pytest.raises(InputError, match="needs the tokenizer"):
        qscope.steer(model, spec(edit), saes=saes)


def test_direct_calls_with_a_cache(model, saes, prompts):
    ids = prompts["input_ids"][1:]
    with qscope.steer(model, spec(Edit(1, 3, strength=1.0, tokens="generated")), saes=saes) as steering:
        first = model(input_ids=ids, use_cache=True)
        model(input_ids=ids[:, :2], past_key_values=first.past_key_values, use_cache=True)
        assert steering.fired[0, :, 0].int().tolist() == [0] * 8 + [1] * 2
        steering.prompt_length = 4
        model(input_ids=ids)
        assert steering.fired[0, :, 0].int().tolist() == [0] * 4 + [1] * 4


# --- generation ----------------------------------------------------------------------------------------------

EVERYTHING = (
    Edit(0, 3, strength=6.0, tokens="generated"),
    Edit(0, 9, mode="clamp", strength=3.0, tokens="1-4,generated", when=Gate(5)),
    Edit(1, 4, mode="scale", strength=-2.0, activation="exact", skip=("first",)),
    Edit(1, 6, strength=5.0, when=Gate(11, layer=0, mode="exact")),
)


@pytest.mark.parametrize("options", [{}, dict(num_beams=3), dict(num_beams=2, num_return_sequences=2)])
def test_with_a_cache_as_without(model, saes, prompts, options):
    texts = []
    for use_cache in (True, False):
        with qscope.steer(model, spec(*EVERYTHING), saes=saes):
            texts.append(model.generate(**prompts, max_new_tokens=8, do_sample=False, use_cache=use_cache, **options))
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], model.generate(**prompts, max_new_tokens=8, do_sample=False, **options))


def test_a_static_cache_as_a_growing_one(model, saes, prompts):
    texts = []
    for kind in ("dynamic", "static"):
        with qscope.steer(model, spec(*EVERYTHING), saes=saes):
            texts.append(model.generate(**prompts, max_new_tokens=8, do_sample=False, cache_implementation=kind))
    assert torch.equal(*texts)


def test_left_padding_changes_nothing(model, saes, prompts):
    with qscope.steer(model, spec(*EVERYTHING), saes=saes):
        both = model.generate(**prompts, max_new_tokens=8, do_sample=False)
        alone = model.generate(prompts["input_ids"][:1, 3:], max_new_tokens=8, do_sample=False)
    assert torch.equal(both[0, 8:], alone[0, 5:])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("many", [False, True])
def test_a_spec_for_each_sequence_equals_separate_runs(model, saes, prompts, beams, many):
    wide = spec(*(Edit(0, f, mode="scale", strength=0.0) for f in range(30))) if many else spec(*EVERYTHING[1:])
    specs = [spec(*EVERYTHING[:3]), None, wide, spec(*EVERYTHING[:3])]
    batch = {name: tensor[[0, 1, 1, 1]] for name, tensor in prompts.items()}
    with qscope.steer(model, specs, saes=saes) as steering:
        together = model.generate(**batch, max_new_tokens=6, do_sample=False, num_beams=beams)
    assert not steering.fired[beams : 2 * beams].any()
    for row, one in enumerate(specs):
        single = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        with qscope.steer(model, one, saes=saes) if one else contextlib.nullcontext():
            alone = model.generate(**single, max_new_tokens=6, do_sample=False, num_beams=beams)
        assert torch.equal(together[row], alone[0])
    with qscope.steer(model, specs, saes=saes), pytest.raises(InputError, match="multiple"):
        model(prompts["input_ids"])


def test_turns_that_share_a_cache(model, saes, prompts):
    """A second turn given with the cache of the first equals the same turn without one."""
    ids = prompts["input_ids"][1:]
    with qscope.steer(model, spec(*EVERYTHING[2:]), saes=saes):
        first = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        turn = torch.cat([first.sequences, ids[:, :3]], dim=1)
        cached = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=6, do_sample=False)
        assert torch.equal(cached, model.generate(turn, max_new_tokens=6, do_sample=False))


def test_compiled_models_are_steered_and_released(model, saes, prompts):
    plainly = logits(model, prompts)
    with qscope.steer(model, spec(*EVERYTHING[:2]), saes=saes):
        expected = logits(model, prompts)
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, prompts), expected, **CLOSE)
    torch.testing.assert_close(logits(compiled, prompts), plainly, **CLOSE)
    # What was compiled without the hooks is thrown away when a steering comes.
    with qscope.steer(model, spec(*EVERYTHING[:2]), saes=saes):
        torch.testing.assert_close(logits(compiled, prompts), expected, **CLOSE)


def test_a_pass_that_goes_around_the_hooks_is_noticed(model, saes, prompts):
    with pytest.raises(SteeringNotApplied, match="in the with-block"):
        with qscope.steer(model, spec(EVERYTHING[0]), saes=saes):
            pass
    with pytest.raises(SteeringNotApplied, match="by generate"):
        with qscope.steer(model, spec(Edit(2, vector=(1.0,) * 32, strength=1.0))):
            model.model.layers[2]._forward_hooks.clear()
            model.generate(**prompts, max_new_tokens=1)


# --- coming and going ----------------------------------------------------------------------------------------


def hooks(model):
    found = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return sum(found), {"generate", "prepare_inputs_for_generation", "_qscope_steering"} & set(model.__dict__)


def test_detaching_leaves_nothing(model, saes, prompts):
    before = logits(model, prompts)
    with pytest.raises(ZeroDivisionError), qscope.steer(model, spec(*EVERYTHING), saes=saes):
        raise ZeroDivisionError
    assert hooks(model) == (0, set())
    outer = qscope.steer(model, spec(EVERYTHING[0]), saes=saes).attach()
    inner = qscope.steer(model, spec(EVERYTHING[2]), saes=saes).attach()
    with pytest.raises(InputError, match="attached already"):
        inner.attach()
    outer.detach()  # not in the order of attaching
    with qscope.steer(model, spec(EVERYTHING[2]), saes=saes):
        model(**prompts)
    inner.detach()
    inner.detach()
    assert hooks(model) == (0, set())
    assert torch.equal(logits(model, prompts), before)


def test_two_at_once_add_up(model, saes, prompts, h0):
    sae = saes[0]
    with qscope.steer(model, spec(Edit(0, 3, strength=1.0)), saes=saes):
        with qscope.steer(model, spec(Edit(0, 4, strength=2.0)), saes=saes), capture(model, [0]) as found:
            model(**prompts)
    torch.testing.assert_close(real(prompts, found[0]), real(prompts, h0 + sae.W_dec[3] + 2 * sae.W_dec[4]), **CLOSE)


def test_gradients_pass_through(model, saes, prompts):
    model.requires_grad_(True)
    with qscope.steer(model, spec(Edit(0, 3, strength=2.0), Edit(0, 4, mode="ablate")), saes=saes):
        logits(model, prompts).square().sum().backward()
    found = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    sae = saes[0]
    mask = prompts["attention_mask"][..., None]

    def change(h):
        return h + mask * (2 * sae.W_dec[3] - preact(sae, 4, h).relu()[..., None] * sae.W_dec[4])

    with plain(model, 0, change):
        logits(model, prompts).square().sum().backward()
    torch.testing.assert_close(found, model.model.embed_tokens.weight.grad, rtol=1e-4, atol=1e-3)


# --- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(0, 96, strength=1.0), "features 0 to 95"),
        (Edit(0, -1, strength=1.0), "features 0 to 95"),
        (Edit(3, 1, strength=1.0), "layers 0 to 2"),
        (Edit(2, 1, strength=1.0), "there is no SAE"),
        (Edit(2, vector=(1.0,) * 31, strength=1.0), "32 finite numbers"),
        (Edit(2, vector=(0.0,) * 32, mode="orthogonalise"), "all 0"),
        (Edit(1, 1, strength=1.0, when=Gate(96)), "features 0 to 95"),
        (Edit(2, vector="missing.safetensors", strength=1.0), "no file"),
    ],
)
def test_edits_that_do_not_fit_the_model(model, saes, edit, words):
    with pytest.raises(InputError, match=words):
        qscope.steer(model, spec(edit), saes=saes)


def test_a_spec_for_another_sae_is_refused_unless_told(model, saes):
    from qscope.steering import SAEReference

    made_for = {0: SAEReference("somewhere", saes[1].weight_hash())}
    other = SteeringSpec((Edit(0, 3, strength=1.0),), made_for)
    with pytest.raises(InputError, match="was made for an SAE of layer 0"):
        qscope.steer(model, other, saes=saes)
    qscope.steer(model, other, saes=saes, allow_mismatch=True)
    right = dataclasses.replace(other, saes={0: SAEReference("somewhere", saes[0].weight_hash())})
    qscope.steer(model, right, saes=saes)


def test_embeddings_instead_of_ids(model, saes, prompts):
    embeds = model.get_input_embeddings()(prompts["input_ids"][1:])
    with qscope.steer(model, spec(Edit(1, 3, strength=1.0, tokens="2,generated")), saes=saes) as steering:
        model.generate(inputs_embeds=embeds, max_new_tokens=3, min_new_tokens=3)
    assert steering.fired[0, :, 0].int().tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    with qscope.steer(model, spec(Edit(1, 3, strength=1.0, after=5)), saes=saes):
        with pytest.raises(InputError, match="ids of all tokens"):
            model.generate(inputs_embeds=embeds, max_new_tokens=3)


@pytest.mark.parametrize("record", [True, False])
def test_compiled_decoding_is_compiled_once(model, saes, prompts, record):
    """Nothing that the hooks look at may change from token to token: it would be compiled again for each."""
    from torch._dynamo.utils import counters
    from transformers import CompileConfig

    fixed = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation="static")
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True
    edits = (Edit(0, 3, strength=6.0, tokens="generated"), Edit(0, 4, mode="clamp", strength=2.0, when=Gate(5)))
    with qscope.steer(model, spec(*edits), saes=saes, record=record) as steering:
        expected = model.generate(**prompts, **fixed)
        fired = steering.fired if record else None
        counters.clear()
        assert torch.equal(model.generate(**prompts, **fixed, compile_config=compiling), expected)
        assert counters["stats"]["unique_graphs"] == 1
        if record:
            assert torch.equal(steering.fired, fired)
