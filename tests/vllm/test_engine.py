"""vLLM with the plug-in against vLLM without it, to the bit, and against qscope.steer on the Hugging Face model.

One compiled engine serves all steered cases in turn: what an earlier request left behind would show in a later one.
"""

import json
from typing import NamedTuple

import pytest
import torch
import transformers

import qscope
from qscope import embedded
from qscope.model import capture, load_model
from qscope.steering import Edit, Gate, SteeringSpec, steer
from qscope.vllm_plugin import extra_args

LAYER = embedded.DEFAULT_LAYER
PROMPTS = ["The weather today is", "In order to bake a good loaf of bread, you first", "def fibonacci(n):"]
TOKENS = 16
# Two float32 implementations of 30 blocks: 3e-5 between their log-probabilities was seen without steering, 4e-5 with.
CLOSE = 2e-4


class Reference(NamedTuple):
    model: torch.nn.Module
    tokenizer: object
    saes: dict


@pytest.fixture(scope="session")
def real():
    model, tokenizer = load_model(embedded.default_model_path(), device="cpu", dtype="float32")
    return Reference(model, tokenizer, {LAYER: qscope.SAE.from_pretrained(embedded.DEFAULT_SAE)})


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(folder of a Llama with 3 blocks and random weights, folder of an SAE for its block 1, both in memory)."""
    source, folder = embedded.default_model_path(), tmp_path_factory.mktemp("small")
    config = transformers.AutoConfig.from_pretrained(source)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 3, 64, 128
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 1, 32
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(*shape, generator=generator) for shape in ((128, 64), (128, 64), (128,), (64,)))
    sae = qscope.SAE(*rows, k=8)
    sae.save(folder / "sae")
    model, tokenizer = load_model(folder / "model", device="cpu", dtype="float32")
    return folder, Reference(model, tokenizer, {1: sae})


def logits(reference: Reference, spec: SteeringSpec | None, output: dict, layer: int):
    """(log-probabilities of each generated token's place [n, vocabulary], residual of `layer` before its edits)."""
    prompt = len(output["prompt_ids"])
    ids = torch.tensor([output["prompt_ids"] + output["ids"][:-1]])
    with capture(reference.model, [layer]) as residual:  # its hook comes before the steering's
        if spec is None:
            out = reference.model(ids)
        else:
            steering = steer(reference.model, spec, saes=reference.saes, tokenizer=reference.tokenizer)
            steering.prompt_length = prompt
            with steering:
                out = reference.model(ids)
    return out.logits[0, prompt - 1 :].log_softmax(-1), residual[layer][0]


def check_greedy(output: dict, expected: torch.Tensor) -> None:
    """Each token is the reference's most likely one, at the reference's log-probability."""
    ids = torch.tensor(output["ids"])
    assert torch.equal(expected.argmax(-1), ids)
    for at, row in zip(output["logprobs"], expected, strict=True):
        found = {int(i): p for i, p in at.items()}
        assert max(abs(row[i].item() - p) for i, p in found.items()) < CLOSE


def same(first: dict, second: dict) -> bool:
    """To the bit."""
    return first["ids"] == second["ids"] and first["logprobs"] == second["logprobs"]


@pytest.fixture(scope="session")
def features(real):
    """(two features that are active at most tokens of the first prompt, one that is active at some)."""
    ids = real.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with capture(real.model, [LAYER]) as residual:
        real.model(ids)
    counts = real.saes[LAYER].encode_topk(residual[LAYER][0, 1:]).top_indices.long().flatten().bincount()
    often = counts.argsort(descending=True, stable=True)
    some = int((counts == 2).nonzero()[0])
    return int(often[0]), int(often[1]), some


@pytest.fixture(scope="session")
def specs(real, features):
    f, g, some = features
    d = real.saes[LAYER].W_dec
    strength = 20.0 / d[f].norm().item()
    edits = {
        "add": [Edit(LAYER, feature=f, strength=strength)],
        "add generated": [Edit(LAYER, feature=f, strength=strength, tokens="generated")],
        "add 1-2,6": [Edit(LAYER, feature=g, strength=strength, tokens="1-2,6", skip=("first",))],
        "ablate": [Edit(LAYER, feature=f, mode="ablate"), Edit(LAYER, feature=g, mode="ablate")],
        "clamp": [Edit(LAYER, feature=g, mode="clamp", strength=12.0)],
        "scale": [Edit(LAYER, feature=f, mode="scale", strength=4.0)],
        "orthogonalise": [Edit(LAYER, feature=g, mode="orthogonalise")],
        "residual unit": [Edit(LAYER, feature=g, strength=-0.5, unit="residual", scale=40.0)],
        "gated": [Edit(LAYER, feature=f, strength=strength, when=Gate(some))],
        "after": [Edit(LAYER, feature=f, strength=strength, after=" today")],
        "vector": [Edit(LAYER, vector=tuple((0.5 * strength * d[g]).tolist()), strength=1.0)],
        "nothing": [Edit(LAYER, feature=f, strength=0.0)],
    }
    return {name: SteeringSpec(tuple(each)) for name, each in edits.items()}


def ask(prompt: str, spec: SteeringSpec | None = None, read=(), tokens: int = TOKENS) -> dict:
    asked = {"prompt": prompt, "tokens": tokens}
    return asked if spec is None and not read else asked | {"extra": extra_args(spec, read)}


LONG = " ".join(f"Item {i} of the list is number {i * 7 % 31}." for i in range(30))
ALONE = [[ask(p)] for p in PROMPTS] + [[ask(p) for p in PROMPTS], [ask(LONG)], [ask(PROMPTS[0], tokens=64)]]


@pytest.fixture(scope="session")
def plain(run_engine):
    """vLLM as it is: ALONE, step by step."""
    found = run_engine({"model": str(embedded.default_model_path()), "engine": {"max_num_seqs": 8}, "steps": ALONE})
    return found


@pytest.fixture(scope="session")
def steered(run_engine, specs, features):
    """What the engine with the plug-in answers to every case, by name."""
    f, g, some = features
    a, b = specs["add"], specs["ablate"]
    cases = {f"alone {name}": [ask(PROMPTS[0], spec)] for name, spec in specs.items()}
    cases |= {f"plain {i}": step for i, step in enumerate(ALONE)}
    cases["mixed"] = [ask(PROMPTS[0], a), ask(PROMPTS[1], b), ask(PROMPTS[2]), ask(PROMPTS[0])]
    cases["second"] = [ask(PROMPTS[1], b)]
    cases |= {f"long {i}": [ask(LONG, spec)] for i, spec in enumerate([a, None, a, b])}
    cases["read"] = [ask(PROMPTS[0], read=[(LAYER, f), (LAYER, g)]), ask(PROMPTS[1])]
    cases["read steered"] = [ask(PROMPTS[0], a, [(LAYER, some)]), ask(PROMPTS[2], b, [(LAYER, f), (LAYER, some)])]
    cases["read cached"] = [ask(LONG, read=[(LAYER, f)])]
    many = [SteeringSpec((Edit(LAYER, feature=i, strength=1.0),)) for i in range(33)]
    cases["too many"] = [ask(PROMPTS[0], spec, tokens=2) for spec in many]
    cases["exact"] = [
        ask(PROMPTS[0], SteeringSpec((Edit(LAYER, feature=f, strength=1.0, when=Gate(g, mode="exact")),)))
    ]
    cases["no such feature"] = [ask(PROMPTS[0], read=[(LAYER, 10**6)])]
    cases["by name"] = [ask(PROMPTS[0]) | {"extra": {"qscope": "warm"}}]
    cases["no such name"] = [ask(PROMPTS[0]) | {"extra": {"qscope": "cold"}}]
    cases["text"] = [ask(PROMPTS[0]) | {"extra": {"qscope": json.dumps(a.to_json())}}]
    cases["plain again"] = ALONE[0]
    cases["long steered"] = [ask(PROMPTS[0], a, tokens=64)]
    options = {"saes": {str(LAYER): str(embedded.DEFAULT_SAE)}, "specs": {"warm": a.to_json()}}
    job = {"model": str(embedded.default_model_path()), "steps": list(cases.values())}
    job["engine"] = {"max_num_seqs": 8, "additional_config": {"qscope": options}}
    found = run_engine(job)
    assert "error" not in found, found
    return dict(zip(cases, found["steps"], strict=True)) | {"load": found["load"]}


def test_without_steering_the_plug_in_changes_no_bit(plain, steered):
    for i, step in enumerate(plain["steps"]):
        answered = steered[f"plain {i}"]
        assert all(same(*pair) for pair in zip(step, answered, strict=True)), i
    assert same(plain["steps"][0][0], steered["plain again"][0])
    assert same(plain["steps"][0][0], steered["alone nothing"][0])


def test_each_mode_gives_what_the_hugging_face_model_gives(real, specs, steered):
    base = steered["plain 0"][0]
    check_greedy(base, logits(real, None, base, LAYER)[0])
    for name, spec in specs.items():
        (output,) = steered[f"alone {name}"]
        check_greedy(output, logits(real, spec, output, LAYER)[0])
    answers = {json.dumps(steered[f"alone {name}"][0]["logprobs"]) for name in specs}
    assert len(answers) == len(specs)  # each edit, and each choice of its tokens, makes a difference
    assert same(steered["alone nothing"][0], base)


def test_requests_of_one_batch_do_not_touch_each_other(steered):
    first, second, third, fourth = steered["mixed"]
    assert first["ids"] == steered["alone add"][0]["ids"]
    assert second["ids"] == steered["second"][0]["ids"]
    assert third["ids"] == steered["plain 2"][0]["ids"]
    assert fourth["ids"] == steered["plain 0"][0]["ids"]
    assert len({tuple(o["ids"]) for o in steered["mixed"]}) == 4


def test_the_prefix_cache_is_shared_only_between_equal_specs(real, specs, plain, steered):
    cold, unsteered, again, other = (steered[f"long {i}"][0] for i in range(4))
    assert cold["cached"] == 0 and other["cached"] == 0
    assert unsteered["cached"] > 0  # of the unsteered request before
    assert unsteered["ids"] == plain["steps"][4][0]["ids"]
    assert again["cached"] > 0 and again["ids"] == cold["ids"]
    for output, name in ((again, "add"), (other, "ablate")):
        check_greedy(output, logits(real, specs[name], output, LAYER)[0])


@pytest.mark.parametrize(
    ("case", "at", "name", "read"),
    [
        ("read", 0, None, "fg"),
        ("read steered", 0, "add", "s"),
        ("read steered", 1, "ablate", "fs"),
        ("read cached", 0, None, "f"),
    ],
)
def test_activations_are_those_of_a_captured_residual(real, specs, features, steered, case, at, name, read):
    output = steered[case][at]
    _, residual = logits(real, None if name is None else specs[name], output, LAYER)
    ids = [features["fgs".index(letter)] for letter in read]
    sae = real.saes[LAYER]
    expected = (residual @ sae.W_enc[ids].T + sae.b_enc[ids]).relu()
    found = torch.tensor(output["acts"][str(LAYER)])
    assert found.shape == expected.shape and (expected > 0).any()
    # 7e-7 of the first token's 11,651, whose residual is that much larger, and 1.2e-4 elsewhere were seen.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_requests_that_ask_for_what_cannot_be_are_refused_and_leave_nothing(steered):
    words = {"too many": "33 different edits", "exact": "full encode", "no such feature": "has features 0 to"}
    words["no such name"] = "'cold'"
    for case, expected in words.items():
        assert expected in steered[case]["error"], steered[case]


def test_a_spec_by_name_and_as_text(steered):
    assert same(steered["by name"][0], steered["alone add"][0])
    assert same(steered["text"][0], steered["alone add"][0])


def test_times_are_reported(plain, steered, capsys):
    seconds = {
        "plain vLLM": plain["steps"][5][0]["seconds"],
        "plug-in, unsteered": steered["plain 5"][0]["seconds"],
        "plug-in, steered": steered["long steered"][0]["seconds"],
    }
    with capsys.disabled():
        print(f"\nload: {plain['load']:.0f} s plain, {steered['load']:.0f} s with the plug-in")
        print("64 tokens, 1 request: " + ", ".join(f"{name} {1000 * s / 64:.1f} ms" for name, s in seconds.items()))
    assert all(s > 0 for s in seconds.values())


# --- other ways to run it ------------------------------------------------------------------------------------


def small_job(folder, **more) -> dict:
    options = {"qscope": {"saes": {"1": str(folder / "sae")}, "layers": [0]}}
    spec = SteeringSpec((Edit(1, feature=3, strength=3.0), Edit(0, vector=tuple([0.3] * 64), strength=1.0)))
    steps = [[ask(PROMPTS[0], spec, [(1, 3), (1, 5)]), ask(PROMPTS[1])], [ask(PROMPTS[1])]]
    engine = {"max_num_seqs": 4, "additional_config": options, **more.pop("engine", {})}
    return {"model": str(folder / "model"), "engine": engine, "steps": steps, "spec": spec.to_json()} | more


@pytest.mark.parametrize("way", ["eager", "processes", "piecewise"])
def test_eager_and_in_processes_and_split_at_every_attention(run_engine, small, way):
    folder, reference = small
    more = {"engine": {"enforce_eager": way != "piecewise"}, "processes": way == "processes"}
    job = small_job(folder, **more, **({"break": "piecewise"} if way == "piecewise" else {}))
    (first, beside), (alone,) = run_engine(job)["steps"]
    expected, residual = logits(reference, SteeringSpec.from_json(job["spec"]), first, 1)
    check_greedy(first, expected)
    check_greedy(alone, logits(reference, None, alone, 1)[0])
    assert beside["ids"] == alone["ids"]
    sae = reference.saes[1]
    acts = (residual @ sae.W_enc[[3, 5]].T + sae.b_enc[[3, 5]]).relu()
    torch.testing.assert_close(torch.tensor(first["acts"]["1"]), acts, rtol=1e-4, atol=1e-4)


def test_a_model_that_does_not_call_the_operator_does_not_start(run_engine, small):
    found = run_engine(small_job(small[0], engine={"enforce_eager": True}) | {"break": "operator"})
    assert "SteeringNotApplied" in found["error"] and "layers [0, 1]" in found["error"]


def test_layers_of_an_unknown_kind_are_named(run_engine, small, tmp_path):
    config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=small[1].model.config.vocab_size)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    small[1].tokenizer.save_pretrained(tmp_path)
    options = {"qscope": {"layers": [1]}}
    found = run_engine(
        {"model": str(tmp_path), "engine": {"enforce_eager": True, "additional_config": options}, "steps": []}
    )
    assert "SteeringNotApplied" in found["error"] and "GPT2Block" in found["error"]


def test_without_options_a_request_that_asks_is_refused(run_engine, small):
    job = small_job(small[0], engine={"enforce_eager": True, "additional_config": {}})
    found = run_engine(job)
    assert "SteeringNotApplied" in found["steps"][0]["error"] and "ids" in found["steps"][1][0]
