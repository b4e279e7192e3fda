"""The parts of the vLLM plug-in that need no vLLM: operator, batch bookkeeping, requests. Engines: tests/vllm."""

import sys
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qscope
from qscope import ops, vllm_plugin
from qscope.errors import InputError, SteeringNotApplied
from qscope.steering import Edit, Gate, SAEReference, SteeringSpec
from qscope.vllm_plugin import batch, hooks, layers, options, request, steer_residual_

D, F, T, S, R = 24, 40, 32, 4, 3


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# --- the operator --------------------------------------------------------------------------------------------


def arguments(N: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    rules = [ops.SteerSetting.add(2.0), ops.SteerSetting.ablate(0.5), ops.SteerSetting.orthogonalise()]
    rules.append(ops.SteerSetting.add(1.0).gated(0.1, 0.2))
    return {
        "hidden": draw(N, D).to(dtype),
        "residual": draw(N, D, seed=1).to(dtype),
        "bits": torch.zeros(T, dtype=torch.int32),
        "directions": draw(S, D),
        "settings": ops.settings_tensor(rules),
        "readers": draw(S, D, seed=2),
        "gates": draw(S, D, seed=3),
        "probes": draw(R, D),
        "probe_bias": draw(R),
        "acts": torch.zeros(T, R),
        "status": torch.tensor([0, 1], dtype=torch.int32),
    }


def run(given: dict[str, torch.Tensor]) -> None:
    torch.ops.qscope.steer_residual_(*given.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_both_parts_is_what_steer_add_makes_of_their_sum(dtype):
    given = arguments(9, dtype)
    given["bits"][:9] = torch.tensor([0, 1, 2, 4, 8, 15, 0, 3, 0])
    before = {name: t.clone() for name, t in given.items()}
    run(given)
    mask = (given["bits"][:9, None] >> torch.arange(S)) & 1
    expected = before["hidden"] + before["residual"]
    fired = torch.empty(9, S, dtype=torch.uint8)
    rows = (given[name] for name in ("directions", "settings", "readers", "gates"))
    ops.steer_add_(expected, *rows, mask=mask.to(torch.uint8), fired=fired)
    changed = fired.bool().any(1)
    assert changed.tolist()[:4] == [False, True, True, True]  # token 2 is ablated: its read is above 0
    assert torch.equal((given["hidden"] + given["residual"])[changed], expected[changed])
    for name in ("hidden", "residual"):
        assert torch.equal(given[name][~changed], before[name][~changed])


def test_slot_0_keeps_every_bit_even_beside_nan():
    given = arguments(6)
    given["directions"][0] = torch.nan
    given["bits"][3] = 1
    before = {name: given[name].clone() for name in ("hidden", "residual")}
    run(given)
    others = torch.arange(6) != 3
    assert given["hidden"][3].isnan().all()
    assert all(torch.equal(given[name][others], before[name][others]) for name in before)


def test_probes_read_the_sum_before_it_is_steered():
    given = arguments(5)
    given["bits"][:5] = 1
    h = (given["hidden"] + given["residual"]).double()
    run(given)
    expected = (h @ given["probes"].double().T + given["probe_bias"].double()).relu()
    assert (expected > 0).any() and (expected == 0).any()
    # float32 sums of D products: at most D roundings of the sum of magnitudes each
    bound = D * 2.0**-24 * (h.abs() @ given["probes"].double().abs().T + given["probe_bias"].double().abs())
    assert ((given["acts"][:5] - expected).abs() <= bound).all()
    assert not given["acts"][5:].any()


def test_bit_31_is_a_direction_like_others():
    given = arguments(2)
    for name in ("directions", "readers", "gates"):
        given[name] = draw(32, D)
    given["settings"] = ops.settings_tensor([ops.SteerSetting.add(1.0)] * 32)
    given["bits"].numpy().view(np.uint32)[0] = 1 << 31
    expected = given["hidden"] + given["residual"]
    run(given)
    assert torch.equal(given["hidden"][0] + given["residual"][0], expected[0] + given["directions"][31])
    assert torch.equal(given["hidden"][1] + given["residual"][1], expected[1])


def test_every_pass_is_counted_and_the_operator_survives_a_compiler():
    given = arguments(7)
    given["bits"][2] = 1
    eager = {name: t.clone() for name, t in given.items()}
    run(eager)

    def block(hidden, residual, *rest):
        hidden = hidden * 1.0
        torch.ops.qscope.steer_residual_(hidden, residual, *rest)
        return hidden, residual

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        hidden, _ = compiled(*(t if name == "status" else t.clone() for name, t in given.items()))
        compiled(*given.values())
    assert given["status"][steer_residual_.CALLS] == 2 and eager["status"][steer_residual_.CALLS] == 1
    assert torch.equal(hidden, eager["hidden"]) and torch.equal(given["acts"], eager["acts"])
    torch.library.opcheck(torch.ops.qscope.steer_residual_.default, tuple(arguments(3).values()))


# --- requests ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    """(folder of a small SAE, the SAE)."""
    made = qscope.SAE(draw(F, D), draw(F, D, seed=1), draw(F), draw(D), 4)
    folder = made.save(tmp_path_factory.mktemp("sae") / "sae")
    return str(folder), made


@pytest.fixture
def settings(sae):
    return options.from_json({"saes": {"2": sae[0]}, "layers": [5], "max_directions": 3, "max_reads": 2})


def checked(spec: SteeringSpec, settings, read=(), **more):
    given = {"spec": spec.to_json(), "read": [list(r) for r in read]}
    return request.check(given, settings, D, more.get("tokenizer"), more.get("ids_late", False))


def test_a_request_arrives_as_it_was_sent(settings):
    spec = SteeringSpec(
        (Edit(2, feature=1, strength=2.0, when=Gate(3)), Edit(5, vector=tuple([0.5] * D), tokens="2-4"))
    )
    sent = checked(spec, settings, [(2, 7), (2, 7), (2, 9)])
    assert sent.edits == spec.edits and sent.reads == ((2, 7), (2, 9))
    assert request.received(sent.to_text()) == sent


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit(2, feature=F), f"features 0 to {F - 1}"),
        (Edit(3, feature=1), "steer the layers 2, 5"),
        (Edit(5, feature=1), "no SAE"),
        (Edit(2, feature=1, mode="ablate", activation="exact"), "full encode"),
        (Edit(2, feature=1, strength=1.0, when=Gate(2, mode="exact")), "full encode"),
        (Edit(5, vector=tuple([1.0] * D), when=Gate(2, layer=2)), "own layer only"),
        (Edit(5, vector=(1.0, 2.0)), f"{D} finite numbers"),
    ],
)
def test_what_cannot_be_steered_is_refused_with_the_reason(settings, edit, words):
    with pytest.raises(InputError, match=words):
        checked(SteeringSpec((edit,)), settings)


def test_other_requests_that_are_refused(settings, sae):
    with pytest.raises(request.RequestRefused, match="specs none"):
        request.parse("polite", settings)
    with pytest.raises(request.RequestRefused, match="pairs"):
        request.parse({"read": [3]}, settings)
    with pytest.raises(request.RequestRefused, match="'qscope'"):
        request.parse({"strength": 3}, settings)
    with pytest.raises(request.RequestRefused, match=r"secret\.gguf"):
        checked(SteeringSpec((Edit(5, vector="secret.gguf"),)), settings)
    late = SteeringSpec((Edit(2, feature=1, strength=1.0, after=7),))
    with pytest.raises(request.RequestRefused, match="async_scheduling"):
        checked(late, settings, ids_late=True)
    checked(late, settings)
    other = SteeringSpec((Edit(2, feature=1),), {2: SAEReference(sae[0], "0" * 64)})
    with pytest.raises(request.RequestRefused, match="hash 0000"):
        checked(other, settings)
    checked(SteeringSpec((Edit(2, feature=1),), {2: SAEReference(sae[0], sae[1].weight_hash())}), settings)


def test_a_named_spec_may_hold_a_file_and_arrives_as_numbers(settings, tmp_path):
    vector = draw(D)
    save_file({"v": vector}, tmp_path / "v.safetensors")
    spec = SteeringSpec((Edit(5, vector=f"{tmp_path / 'v.safetensors'}#v", strength=2.0),))
    spec.save(tmp_path / "spec.json")
    named = options.from_json({"layers": [5], "specs": {"it": str(tmp_path / "spec.json")}})
    (edit,) = request.received(request.check("it", named, D, None, False).to_text()).edits
    assert torch.equal(torch.tensor(edit.vector), vector) and edit.strength == 2.0


def test_the_salt_tells_specs_and_saes_apart_and_not_reads(settings, sae, tmp_path):
    one, same, two = (checked(SteeringSpec((Edit(2, feature=1, strength=s),)), settings) for s in (1.0, 1.0, 2.0))
    with_read = checked(SteeringSpec(one.edits), settings, [(2, 7)])
    assert one.salt == same.salt == with_read.salt != two.salt and one.salt is not None
    assert checked(SteeringSpec(()), settings, [(2, 7)]).salt is None
    other = qscope.SAE(draw(F, D), draw(F, D), draw(F), draw(D), 4).save(tmp_path / "other")
    assert checked(SteeringSpec(one.edits), options.from_json({"saes": {"2": str(other)}})).salt != one.salt


@pytest.mark.parametrize("given", [{"layer": [1]}, {}, {"saes": [3]}, {"layers": [1], "max_directions": 33}, "x"])
def test_options_that_are_wrong_are_named(given):
    with pytest.raises(InputError, match="additional_config"):
        options.from_json(given)


# --- the batch -----------------------------------------------------------------------------------------------


@pytest.fixture
def steering(settings):
    blocks = {}
    for layer in settings.all_layers:
        blocks[layer] = nn.Module()
        shapes = {"bits": (T,), "directions": (3, D), "settings": (3, 8), "readers": (3, D), "gates": (3, D)}
        shapes |= {"probes": (2, D), "probe_bias": (2,), "acts": (T, 2), "status": (2,)}
        for name, shape in shapes.items():
            kind = torch.int32 if name in ("bits", "status") else torch.float32
            blocks[layer].register_buffer(f"qscope_{name}", torch.zeros(shape, dtype=kind))
    return batch.BatchSteering(settings, blocks, D)


def no_ids(name, count):
    raise AssertionError("the ids of a token were asked for")


def bits(steering, layer: int, count: int) -> list[int]:
    return steering.layers[layer].qscope_bits[:count].tolist()


def test_bits_follow_the_requests_of_a_batch_and_never_stay_behind(steering, settings):
    first = checked(SteeringSpec((Edit(2, feature=1, strength=1.0), Edit(2, feature=2, mode="ablate"))), settings)
    second = checked(SteeringSpec((Edit(2, feature=2, mode="ablate", tokens="generated"),)), settings)
    steering.add("a", first, prompt=3)
    steering.add("b", second, prompt=2)
    steering.fill([("x", 0, 2), ("a", 0, 3), ("b", 0, 2)], no_ids)
    assert bits(steering, 2, 8) == [0, 0, 3, 3, 3, 0, 0, 0] and bits(steering, 5, 8) == [0] * 8
    steering.fill([("b", 2, 1), ("x", 2, 1), ("a", 3, 1)], no_ids)
    assert bits(steering, 2, 8) == [2, 0, 3, 0, 0, 0, 0, 0]  # equal edits share a place
    steering.remove("a")
    steering.fill([("x", 3, 1), ("b", 3, 1)], no_ids)
    assert bits(steering, 2, 8) == [0, 2, 0, 0, 0, 0, 0, 0]
    steering.remove("b")
    steering.fill([("x", 4, 1)], no_ids)
    assert bits(steering, 2, 8) == [0] * 8


def test_tokens_are_chosen_over_chunks_of_a_prompt(steering, settings):
    tokenizer = type("T", (), {"all_special_ids": [9]})()
    edits = (Edit(2, feature=1, tokens="1,4-5"), Edit(2, feature=2, after=7, skip=("special",)))
    steering.add("a", checked(SteeringSpec(edits), settings, tokenizer=tokenizer), prompt=6)
    known = torch.tensor([[5, 7, 9, 5, 5, 9, 5]])
    chunks = []
    for start, count in ((0, 2), (2, 4), (6, 1)):
        steering.fill([("a", start, count)], lambda name, end: known[:, :end])
        chunks += bits(steering, 2, count)
    assert chunks == [0, 1, 0, 2, 3, 1, 2]


def test_a_place_is_free_again_when_its_last_request_leaves(steering, settings):
    specs = [checked(SteeringSpec((Edit(2, feature=f, strength=1.0),)), settings) for f in range(4)]
    for name, one in zip("abc", specs, strict=False):
        steering.add(name, one, 1)
    steering.add("also b", specs[1], 1)
    with pytest.raises(SteeringNotApplied, match="max_directions"):
        steering.add("d", specs[3], 1)
    steering.remove("b")
    steering.remove("d")
    steering.remove("a")
    steering.add("d", specs[3], 1)
    steering.fill([("d", 0, 1), ("also b", 0, 1)], no_ids)
    assert bits(steering, 2, 2) == [1, 2]
    row = options.load_sae(settings.saes[2], 2).W_dec[3]
    assert torch.equal(steering.layers[2].qscope_directions[0], row)


def test_admission_counts_what_unfinished_requests_use(settings):
    admitted = hooks.Admitted(settings)
    specs = [checked(SteeringSpec((Edit(2, feature=f, strength=1.0),)), settings) for f in range(4)]
    for name, one in zip("abcd", [*specs[:3], specs[0]], strict=True):
        admitted.enter(name, one)
    with pytest.raises(request.RequestRefused, match="4 different edits of layer 2"):
        admitted.enter("e", specs[3])
    admitted.leave("a")
    with pytest.raises(request.RequestRefused, match="4 different edits"):
        admitted.enter("e", specs[3])  # d has the same edit as a
    admitted.leave("d")
    admitted.enter("e", specs[3])


def test_an_edit_that_stands_twice_is_applied_twice(steering, settings):
    twice = checked(SteeringSpec((Edit(2, feature=1, tokens="0"), Edit(2, feature=1, tokens="0-1"))), settings)
    steering.add("a", twice, 2)
    steering.fill([("a", 0, 2)], no_ids)
    assert bits(steering, 2, 2) == [3, 2]


def test_what_was_read_is_kept_by_position_and_taken_once(steering, settings):
    steering.add("mine-0123abcd", checked(SteeringSpec(()), settings, [(2, 7), (2, 3)]), 3)
    steering.add("min+0123abcd", checked(SteeringSpec(()), settings, [(2, 3)]), 1)
    steering.add("mine-2-0123abcd", checked(SteeringSpec(()), settings, [(2, 3)]), 1)
    for start, count in ((2, 2), (0, 2)):  # recomputed after a preemption: any order
        steering.fill([("mine-2-0123abcd", 0, 1), ("mine-0123abcd", start, count)], no_ids)
        assert steering.layers[2].qscope_status[steer_residual_.READING] == 1
        acts = steering.layers[2].qscope_acts
        acts[:] = torch.arange(T * 2).view(T, 2) + 100 * start
        steering.collect()
    steering.remove("mine-0123abcd")
    found = steering.take(["mine", "other"])
    assert found == [{2: [[2.0, 3.0], [4.0, 5.0], [202.0, 203.0], [204.0, 205.0]]}, None]
    assert steering.take(["mine"]) == [None]
    assert steering.take(["mine-2"]) != [None]  # of an unfinished request, too
    assert steering.take(["mine-2"]) == [None]
    assert steering.take(["min"]) == [None]
    row = options.load_sae(settings.saes[2], 2)
    assert torch.equal(steering.layers[2].qscope_probes, row.W_enc[[7, 3]])


# --- layers --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden, residual):
        return hidden * 1.5, residual + hidden


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.config = type("Config", (), {"num_hidden_layers": 3, "hidden_size": D})()


def test_layers_are_exchanged_counted_and_missed(monkeypatch):
    monkeypatch.setattr(layers, "LAYERS", {(Block.__module__, "Block")})
    model = Model()
    found = layers.install(model, (0, 2), T, 3, 2)
    assert [type(block).__name__ for block in model.layers] == ["SteeredBlock", "Block", "SteeredBlock"]
    assert not any("qscope" in name for name in model.state_dict())
    found[0].qscope_directions[1] = 1.0
    found[0].qscope_settings[1] = ops.settings_tensor([ops.SteerSetting.add(2.0)])[0]
    found[0].qscope_bits[1] = 2
    before = layers.calls(found)
    hidden, residual = model.layers[0](draw(3, D), draw(3, D, seed=1))
    plain = 2.5 * draw(3, D) + draw(3, D, seed=1)
    torch.testing.assert_close(hidden + residual - plain, torch.tensor([0.0, 2.0, 0.0])[:, None].expand(3, D))
    with pytest.raises(SteeringNotApplied, match=r"layers \[2\]"):
        layers.check_called(before, layers.calls(found))
    model.layers[2](draw(3, D), draw(3, D))
    layers.check_called(before, layers.calls(found))


def test_a_layer_of_another_kind_is_refused_by_name():
    with pytest.raises(SteeringNotApplied, match=r"is a Block with the forward of .*Block, and it is not known"):
        layers.install(Model(), (1,), T, 3, 2)
    with pytest.raises(SteeringNotApplied, match="layers 0 to 2"):
        layers.install(Model(), (3,), T, 3, 2)


def test_the_buffers_are_the_operators_arguments():
    names = [a.name for a in torch.ops.qscope.steer_residual_.default._schema.arguments]
    assert names == ["hidden", "residual", *layers.BUFFERS] and list(arguments(1)) == names


# --- another vLLM --------------------------------------------------------------------------------------------


@pytest.fixture
def other_vllm(monkeypatch):
    """A vLLM that has none of the names which the plug-in wraps; its EngineArgs."""

    class EngineArgs:
        additional_config: ClassVar[dict] = {}

        def create_engine_config(self):
            return "made"

    modules = {name: ModuleType(name) for name in ("vllm", "vllm.engine", "vllm.engine.arg_utils", "vllm.plugins")}
    modules["vllm"].__version__ = "9.9"
    modules["vllm.engine.arg_utils"].EngineArgs = EngineArgs
    modules["vllm.plugins"].plugins_loaded = True
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(vllm_plugin, "_registered", False)
    monkeypatch.setattr(vllm_plugin, "_problem", None)
    return EngineArgs


def test_a_vllm_of_other_make_runs_but_does_not_pretend_to_steer(other_vllm):
    vllm_plugin.register()
    args = other_vllm()
    assert args.create_engine_config() == "made"
    args.additional_config = {"qscope": {"layers": [1]}}
    with pytest.raises(SteeringNotApplied, match=r"vLLM 9\.9 is not one"):
        args.create_engine_config()


def test_a_request_is_not_made_for_a_vllm_that_left_the_plug_in_out(other_vllm):
    with pytest.raises(SteeringNotApplied, match="VLLM_PLUGINS"):
        vllm_plugin.extra_args("warm")
