"""The names of the released Qwen-Scope groups."""

import pytest

from qscope.checkpoints import registry
from qscope.errors import CheckpointError


def test_groups_are_those_of_the_report():
    assert len(registry.GROUPS) == 14
    assert sum(group.layers for group in registry.GROUPS) == 2 * (28 + 36 + 24 + 32 + 64) + 2 * 48 + 2 * 40 == 544
    assert len({group.backbone for group in registry.GROUPS}) == 7
    for group in registry.GROUPS:
        expansion = 64 if "W128K" in group.name else 16
        assert group.d_sae == expansion * group.d_model
        assert group.k in (50, 100)


@pytest.mark.parametrize("group", registry.GROUPS, ids=lambda group: group.name)
def test_grammar_gives_back_every_group(group):
    parts = registry.parse_name(group.repository)
    assert parts == (group.name, group.backbone.removeprefix("Qwen/"), group.d_sae, group.k)
    assert registry.find(group.repository) is group
    assert registry.check_layer(group, group.layers - 1) == group.layers - 1


def test_name_in_a_cache_path():
    path = "hub/models--Qwen--SAE-Res-Qwen3.5-27B-W80K-L0_100/snapshots/0123/layer5.sae.pt"
    group = registry.find(path)
    assert group is not None
    assert (group.backbone, group.d_model, group.d_sae, group.k) == ("Qwen/Qwen3.5-27B", 5120, 81920, 100)


@pytest.mark.parametrize(
    "text", ["", "gpt2", "SAE-Res-Qwen3-8B-Base-W64K", "SAE-Res-X-W64K-L0_50.old", "SAE-Res-X-W64-L0_50"]
)
def test_other_names_are_not_groups(text):
    assert registry.parse_name(text) is None


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B-Base", "Qwen3.5-35B-A3B-Base"])
def test_mixture_of_experts_pairing_is_crossed(model):
    assert registry.require_group(f"Qwen/SAE-Res-{model}-W32K-L0_50") is not None
    assert registry.require_group(f"Qwen/SAE-Res-{model}-W128K-L0_100") is not None
    for wrong in ("W32K-L0_100", "W128K-L0_50"):
        with pytest.raises(CheckpointError, match="not a released") as caught:
            registry.require_group(f"Qwen/SAE-Res-{model}-{wrong}")
        assert f"Qwen/SAE-Res-{model}-W32K-L0_50, Qwen/SAE-Res-{model}-W128K-L0_100." in str(caught.value)


def test_unknown_model_lists_all_groups_and_other_owners_are_let_through():
    with pytest.raises(CheckpointError) as caught:
        registry.require_group("Qwen/SAE-Res-Qwen4-1B-W32K-L0_50")
    assert all(group.repository in str(caught.value) for group in registry.GROUPS)
    assert registry.require_group("someone/SAE-Res-Other-1B-W32K-L0_50") is None


@pytest.mark.parametrize("layer", [36, -1, None, True, 1.0])
def test_layers_that_do_not_exist(layer):
    group = registry.find("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50")
    assert group is not None
    with pytest.raises(CheckpointError, match="layers 0 to 35"):
        registry.check_layer(group, layer)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("layer0.sae.pt", 0), ("layer27.sae.pt", 27), ("layer.sae.pt", None), ("xlayer1.sae.pt", None)],
)
def test_layer_in_a_file_name(name, layer):
    assert registry.layer_of(name) == layer
    if layer is not None:
        assert registry.file_name(layer) == name
