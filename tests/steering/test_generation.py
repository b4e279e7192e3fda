"""Ways of generating and of wrapping a model: where tokens stand, and what `fired` says, against plain generation."""

import copy
import threading

import pytest
import torch
from torch import nn

import qscope
from qscope.errors import InputError
from qscope.model import capture
from qscope.steering import Edit, Gate, SAEReference, SteeringSpec
from tests.steering.conftest import make_model
from tests.steering.test_steer import CLOSE, hooks, logits, preact, spec

EDITS = (
    Edit(0, 3, strength=6.0, tokens="1-4,generated"),
    Edit(1, 4, mode="scale", strength=-2.0, activation="exact", skip=("first",)),
)
FIXED = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None)


def generated(model, saes, given, edits=EDITS, **options):
    with qscope.steer(model, spec(*edits), saes=saes) as steering:
        ids = model.generate(**given, **(FIXED | options))
    return ids, steering.fired


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("kind", ["prompt lookup", "small assistant", "its own assistant"])
def test_rejected_candidates_are_not_in_what_fired(model, saes, prompts, kind):
    one = {"input_ids": prompts["input_ids"][1:].repeat(1, 3)}
    options = {
        "prompt lookup": dict(prompt_lookup_num_tokens=3),
        "small assistant": dict(assistant_model=make_model(1, 1)),
        "its own assistant": dict(assistant_model=model),
    }[kind]
    longer = dict(max_new_tokens=20, min_new_tokens=20)
    same(generated(model, saes, one, **longer, **options), generated(model, saes, one, **longer))


def test_a_prompt_fed_in_chunks(model, saes, prompts):
    edits = (*EDITS, Edit(0, 5, strength=4.0, after=int(prompts["input_ids"][1, 2])))
    expected = generated(model, saes, prompts, edits)
    assert expected[1][1, :, 2].tolist() == [False] * 3 + [True] * 12
    same(generated(model, saes, prompts, edits, prefill_chunk_size=3), expected)


def test_padding_that_generate_finds_itself(model, saes, prompts):
    same(
        generated(model, saes, {"inputs": prompts["input_ids"]}),
        generated(model, saes, prompts),
    )


def test_new_tokens_alone_behind_a_cache(model, saes, prompts):
    edits = (Edit(0, 3, strength=6.0, tokens="prompt"), Edit(1, 4, strength=2.0, tokens="13-16"))
    first = model.generate(prompts["input_ids"][1:], **FIXED, return_dict_in_generate=True)
    turn = torch.cat([first.sequences, prompts["input_ids"][1:, :3]], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    expected = generated(model, saes, {"input_ids": turn}, edits, past_key_values=first.past_key_values)
    new = {"input_ids": turn[:, cache.get_seq_length() :], "attention_mask": torch.ones_like(turn)}
    found = generated(model, saes, new, edits, past_key_values=cache)
    assert found[1][0, :, 0].tolist() == [True] * 4 + [False] * 7
    same((found[0][:, 4:], found[1]), (expected[0][:, turn.shape[1] :], expected[1]))


def test_passes_that_are_not_generates_own(model, saes, prompts):
    """With a negative prompt transformers calls the model twice for each token."""
    _, fired = generated(model, saes, prompts, guidance_scale=2.0)
    assert torch.equal(fired[..., 0], generated(model, saes, prompts)[1][..., 0])


def test_threads_have_to_take_turns(model, saes, prompts):
    """Where tokens stand is known of one pass: the second thread would be steered elsewhere."""
    said = []

    def other():
        with pytest.raises(InputError, match="another thread"):
            model.generate(**prompts, **FIXED)
        said.append(True)

    def meanwhile(ids, scores):
        if not said:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        return scores

    same(generated(model, saes, prompts, logits_processor=[meanwhile]), generated(model, saes, prompts))
    assert said == [True]


# --- wrappers and copies -------------------------------------------------------------------------------------


def test_a_model_compiled_before_is_left_as_it_was(model, saes, prompts):
    compiled = torch.compile(model, backend="eager")
    logits(compiled, prompts)
    same(generated(compiled, saes, prompts), generated(model, saes, prompts))
    with qscope.steer(model, spec(*EDITS), saes=saes):
        expected = logits(model, prompts)
    with qscope.steer(compiled, spec(*EDITS), saes=saes):
        torch.testing.assert_close(logits(compiled, prompts), expected, **CLOSE)
    assert hooks(model) == (0, set())


def test_a_copy_of_a_steered_model_generates_with_its_own_weights(model, saes, prompts):
    with qscope.steer(model, spec(*EDITS), saes=saes):
        other = copy.deepcopy(model)
        expected = model.generate(**prompts, **FIXED)
        assert torch.equal(other.generate(**prompts, **FIXED), expected)
        other.lm_head.weight.neg_()
        assert not torch.equal(other.generate(**prompts, **FIXED), expected)


def test_a_method_that_the_model_object_had_itself_comes_back(model, saes, prompts):
    calls, original = [], model.generate
    mine = model.generate = lambda *a, **k: calls.append(0) or original(*a, **k)
    generated(model, saes, prompts)
    assert len(calls) == 1 and model.__dict__["generate"] is mine


def test_a_wrapper_that_passes_calls_on(model, saes, prompts):
    """As PEFT does: the model inside generates."""

    class Wrapper(nn.Module):
        def __init__(self, base_model):
            super().__init__()
            self.base_model, self.config = base_model, base_model.config

        def generate(self, **options):
            return self.base_model.generate(**options)

    edits = (*EDITS, Edit(0, 5, strength=4.0, after=int(prompts["input_ids"][1, 2])))
    same(generated(Wrapper(model), saes, prompts, edits), generated(model, saes, prompts, edits))


def test_weights_that_are_kept_elsewhere(saes, prompts):
    accelerate = pytest.importorskip(
        "accelerate", reason="moves weights to other devices; no dependency, checked where it is installed"
    )
    offloaded = accelerate.cpu_offload(make_model(), execution_device="cpu")
    saes = copy.deepcopy(saes)
    gated = (*EDITS, Edit(1, 6, strength=5.0, when=Gate(11, layer=0, mode="exact")))
    same(generated(offloaded, saes, prompts, gated), generated(make_model(), saes, prompts, gated))
    assert saes[1].W_enc.device.type == "cpu"


@pytest.fixture(scope="module", params=["Gemma3", "Qwen2VL"])
def multimodal(request):
    import transformers as hf

    text = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    if request.param == "Gemma3":
        seen = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
        text |= dict(head_dim=16, sliding_window=4)
        config = hf.Gemma3Config(text_config=hf.Gemma3TextConfig(**text), vision_config=seen, image_token_id=63)
        return hf.Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3])
    seen = dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2)
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=seen, image_token_id=63, video_token_id=62)
    ).requires_grad_(False)


def test_the_text_trunk_of_a_multimodal_model(multimodal, prompts):
    """Called directly, it is given embeddings and masks of another kind."""
    ids = prompts["input_ids"]
    ids[:, 5] = 33
    edits = (
        Edit(1, vector=(1.0,) * 32, strength=1.0, tokens="1-2"),
        Edit(1, vector=(1.0,) * 32, after=33, strength=1.0),
    )
    expected = torch.zeros(2, 8, 2, dtype=torch.bool)
    expected[0, 4:6, 0] = expected[1, 1:3, 0] = expected[:, 6:, 1] = True
    assert torch.equal(generated(multimodal, None, prompts, edits)[1][:, :8], expected)
    with qscope.steer(multimodal, spec(*edits)) as steering:
        multimodal(**prompts)
    assert torch.equal(steering.fired, expected)


# --- what a pass leaves behind -------------------------------------------------------------------------------


def test_a_pass_that_ends_before_a_layer_has_not_fired_there(model, saes, prompts):
    with qscope.steer(model, spec(*EDITS[:1], Edit(1, 3, strength=1.0)), saes=saes) as steering:
        with capture(model, [0], stop=True):
            model(**prompts)
        assert steering.fired.any(1).tolist() == [[True, False]] * 2


def test_another_sequence_begins_anew(model, saes, prompts):
    with qscope.steer(model, spec(EDITS[0]), saes=saes) as steering:
        cache = model(prompts["input_ids"][1:], use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        model(prompts["input_ids"][:, :2], past_key_values=cache)
        assert steering.fired.tolist() == [[[True]] * 2] * 2


def test_embeddings_have_no_special_tokens(model, saes, prompts):
    class Tokenizer:
        all_special_ids = (0, 1)

    embeds = model.get_input_embeddings()(prompts["input_ids"])
    edit = Edit(1, 3, strength=1.0, skip=("special",))
    with qscope.steer(model, spec(edit), saes=saes, tokenizer=Tokenizer()):
        with pytest.raises(InputError, match="given embeddings"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2)


@pytest.mark.parametrize("gradients", [False, True])
def test_autocast_leaves_the_steering_in_float32(model, saes, prompts, gradients):
    model.requires_grad_(gradients)
    sae, rows = saes[0], prompts["attention_mask"].bool()
    edits = [Edit(0, f, mode="scale", strength=0.5, when=Gate(5, layer=0)) for f in range(40)]
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0].detach().clone()))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
        model(**prompts, use_cache=False)
        with qscope.steer(model, spec(*edits), saes=saes):
            model(**prompts, use_cache=False)
    h, steered = seen
    z = (h @ sae.W_enc[:40].T + sae.b_enc[:40]).relu() * (preact(sae, 5, h) > 0)[..., None]
    torch.testing.assert_close(steered[rows], (h - 0.5 * z @ sae.W_dec[:40])[rows], **CLOSE)


def test_specs_of_a_batch_that_may_mean_different_saes(saes, model):
    def of(source, hash):
        return SteeringSpec((Edit(0, 3, strength=1.0),), {0: SAEReference(source, hash)})

    right = saes[0].weight_hash()
    with pytest.raises(InputError, match="different SAEs of layer 0, a and b"):
        qscope.steer(model, [of("a", None), of("b", right)])
    with pytest.raises(InputError, match="with the hash ffffffff"):  # not the right one of the two
        qscope.steer(model, [of("a", right), of("b", "f" * 64)], saes=saes)
    qscope.steer(model, [of("a", right), of("b", right)], saes=saes)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(after=64), "token ids 0 to 63"),
        (dict(strength=1e39), "too large for a float32"),
        (dict(strength=1e38, unit="quantile", scale=1e3), "too large for a float32"),
    ],
)
def test_numbers_that_cannot_be(model, saes, fields, words):
    with pytest.raises(InputError, match=words):
        qscope.steer(model, spec(Edit(0, 3, **({"strength": 1.0} | fields))), saes=saes)


@pytest.mark.parametrize("given", [None, 5, {0: "x"}])
def test_arguments_of_the_wrong_kind(model, saes, given):
    with pytest.raises(InputError, match=r"accepted|`saes` has to map"):
        qscope.steer(model, *((given,) if not isinstance(given, dict) else (spec(EDITS[0]),)), saes=given or None)
