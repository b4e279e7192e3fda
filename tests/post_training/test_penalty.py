"""FeaturePenalty on a tiny Qwen3: the definition in plain PyTorch, and every way in which trainers run a model."""

import copy
import functools
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from qscope.errors import InputError, ModelError
from qscope.model import decoder_layers
from qscope.post_training.alpha import Alpha, AlphaLayer
from qscope.post_training.penalty import FeaturePenalty
from tests.post_training.penalty_world import LAYERS, D, make_alpha, make_batch, make_model, make_penalty, make_saes


def plain(model, batch, groups, weight=0.7, alpha=None, targets=(2,), plus_one=False, items=None):
    """The definition, code-exact of SASFT, on hidden_states and the block's own output; float64, no hooks of ours."""
    saes, alpha = make_saes(), make_alpha() if alpha is None else alpha
    kept = {}
    blocks = decoder_layers(model)
    handles = [
        blocks[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: kept.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
        for layer in LAYERS
    ]
    out = model(**batch)
    for handle in handles:
        handle.remove()
    response = batch["labels"] != -100
    total = 0.0
    of = groups[:, None].expand(response.shape) if groups.ndim == 1 else groups
    for layer, ids in LAYERS.items():
        W, b = saes[layer].W_enc[list(ids)].double(), saes[layer].b_enc[list(ids)].double()
        excess = (kept[layer].double() @ W.T + b - alpha[layer].double()[of]).relu()
        counted = response & ~torch.isin(of, torch.tensor(targets))
        count = int(response.sum()) if items is None else items
        total = total + (excess * counted[..., None]).sum() / (len(ids) * count + plus_one)
    return out, weight * total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def run(model, penalty, batch, groups, with_ce=True, **options):
    """Loss of the penalty and gradients of everything."""
    model.zero_grad()
    with penalty.attach(model):
        out = model(**batch)
        loss = penalty.loss(groups, batch["labels"], batch["attention_mask"], **options)
        ((out.loss if with_ce else 0) + loss).backward()
    return loss.detach(), gradients(model)


def close(got, want, scale=1.0):
    """Equal to float32 rounding: each gradient within 2e-6 of the largest of its tensor, some 30 u; the sums in a
    block have D = 32 to 48 terms and several lie one behind the other."""
    assert got.keys() == want.keys()
    for name in want:
        off = (got[name].float() - want[name].float()).abs().max()
        assert off <= scale * 2e-6 * max(want[name].abs().max(), 1e-3), (name, off, want[name].abs().max())


@pytest.mark.parametrize("plus_one", [False, True])
def test_equals_its_definition_with_gradients(plus_one):
    model, (batch, groups) = make_model(), make_batch()
    loss, got = run(model, make_penalty(plus_one=plus_one), batch, groups)
    model.zero_grad()
    out, want = plain(model, batch, groups, plus_one=plus_one)
    (out.loss + want).backward()
    # A dot of 32 terms and a mean: 40 u.
    torch.testing.assert_close(loss.double(), want.detach(), rtol=40 * 2.0**-24, atol=0)
    assert loss.dtype == torch.float32 and want > 0.01
    close(got, gradients(model))


def test_the_gradient_is_that_of_the_penalty_alone_and_reaches_no_later_block():
    model, (batch, groups) = make_model(), make_batch()
    penalty = FeaturePenalty({1: make_saes()[1]}, {1: (5, 9)}, weight=1.0)
    _, got = run(model, penalty, batch, groups, with_ce=False)
    assert got and not any("layers.2" in name or name == "model.norm.weight" for name in got)
    assert got["model.layers.1.mlp.down_proj.weight"].abs().max() > 0


def test_groups_by_token_by_name_and_unknown_ones():
    model, (batch, groups) = make_model(), make_batch()
    named = make_penalty(groups=("a", "b", "c"), target_groups=("c",))
    want, _ = run(model, make_penalty(), batch, groups)
    for given in (["a", "b", "c", "b"], groups, groups[:, None].expand(4, 11), groups.int()):
        torch.testing.assert_close(run(model, named, batch, given)[0], want, rtol=0, atol=0)
    by_token = torch.randint(0, 3, (4, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        run(model, named, batch, by_token)[0].double(), plain(model, batch, by_token)[1], rtol=3e-6, atol=0
    )
    # -1 is not penalised but counts: rows 1 and 3 alone, over all response tokens.
    part, _ = run(model, named, batch, torch.tensor([-1, 1, 2, 1]))
    gone = batch["labels"].clone()
    gone[0] = -100
    alone = plain(model, batch | {"labels": gone}, groups, items=int((batch["labels"] != -100).sum()))[1]
    torch.testing.assert_close(part.double(), alone, rtol=3e-6, atol=0)


def test_zero_when_nothing_exceeds_alpha_and_without_responses():
    model, (batch, groups) = make_model(), make_batch()
    high = {layer: torch.full((3, len(ids)), 1e4) for layer, ids in LAYERS.items()}
    loss, got = run(model, make_penalty(alpha=high), batch, groups, with_ce=False)
    assert loss == 0 and not any(g.any() for g in got.values())
    none = torch.full_like(batch["labels"], -100)
    penalty = make_penalty()
    with penalty.attach(model):
        model(input_ids=batch["input_ids"])
        assert penalty.loss(groups, none) == 0 and penalty.last.response_tokens == 0
        model(input_ids=batch["input_ids"])
        assert penalty.loss(torch.full((4,), 2)) == 0  # all of the features' own group


def test_alpha_zero_needs_no_number_of_groups():
    model, (batch, groups) = make_model(), make_batch()
    loss, _ = run(model, make_penalty(alpha="zero"), batch, groups)
    zero = {layer: torch.zeros(3, len(ids)) for layer, ids in LAYERS.items()}
    torch.testing.assert_close(loss.double(), plain(model, batch, groups, alpha=zero)[1], rtol=3e-6, atol=0)


def test_the_model_is_untouched():
    model, (batch, _) = make_model(), make_batch()
    before, want = model.state_dict().keys(), model(**batch).logits
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    penalty = make_penalty()
    with penalty.attach(model):
        assert torch.equal(model(**batch).logits, want)
    assert model.state_dict().keys() == before and not penalty.state_dict()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not list(penalty.parameters())
    model.penalty = penalty.bfloat16()
    assert model.state_dict().keys() == before and penalty.W_1.dtype == torch.float32


def test_an_exception_leaves_nothing_behind_and_two_penalties_do_not_meet():
    model, (batch, groups) = make_model(), make_batch()
    first, second = make_penalty(), make_penalty(weight=0.1)
    with pytest.raises(ZeroDivisionError), first.attach(model):
        model(**batch)
        1 / 0  # noqa: B018 - raises
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(InputError, match="not attached"):
        first.loss(groups)
    with first.attach(model), second.attach(model):
        model(**batch)
        left, right = (p.loss(groups, batch["labels"]) for p in (first, second))
    torch.testing.assert_close(left / 7, right, rtol=1e-6, atol=0)
    (left + right).backward()


def test_micro_batches_add_up_to_the_batch():
    model, (batch, groups) = make_model(), make_batch()
    for plus_one in (False, True):
        penalty = make_penalty(plus_one=plus_one)
        want_loss, want = run(model, penalty, batch, groups, with_ce=False)
        items = (batch["labels"] != -100).sum()
        model.zero_grad()
        total = 0
        with penalty.attach(model):
            for rows in (slice(0, 1), slice(1, 4)):
                part = {name: t[rows] for name, t in batch.items()}
                model(**part)
                loss = penalty.loss(groups[rows], part["labels"], num_items_in_batch=items)
                loss.backward()
                total += loss.detach()
        torch.testing.assert_close(total, want_loss, rtol=1e-6, atol=0)
        close(gradients(model), want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["hooks inside", "hooks outside"])
def test_gradient_checkpointing(reentrant, inside, monkeypatch):
    model, (batch, groups) = make_model(), make_batch()
    want_loss, want = run(model, make_penalty(), batch, groups)
    if inside:  # as older transformers do it: once without gradients, once more in the backward pass
        from torch.utils.checkpoint import checkpoint

        cls, call = type(model.model.layers[0]), nn.Module.__call__

        def checkpointed(self, hidden, **kwargs):
            return checkpoint(functools.partial(call, self, **kwargs), hidden, use_reentrant=reentrant)

        monkeypatch.setattr(cls, "__call__", checkpointed)
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    penalty = make_penalty()
    loss, got = run(model, penalty, batch, groups)
    torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
    close(got, want)
    with penalty.attach(model):  # what the recomputation put out is not taken for a forward pass
        out = model(**batch)
        (out.loss + penalty.loss(groups, batch["labels"])).backward()
        with pytest.raises(ModelError, match="Nothing was kept"):
            penalty.loss(groups)


def test_bfloat16_model_with_a_float32_loss():
    model, (batch, groups) = make_model(torch.bfloat16), make_batch()
    loss, got = run(model, make_penalty(), batch, groups, with_ce=False)
    want = plain(model, batch, groups)[1]  # float64 of the same bfloat16 residuals
    torch.testing.assert_close(loss.double(), want, rtol=3e-6, atol=0)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.bfloat16 for g in got.values())
    reference = {n: g for n, g in run(make_model(), make_penalty(), batch, groups, with_ce=False)[1].items()}
    name = "model.layers.2.mlp.down_proj.weight"
    cosine = nn.functional.cosine_similarity(got[name].float().flatten(), reference[name].flatten(), dim=0)
    assert cosine > 0.99  # weights and activations are rounded to 8 bits in between


def test_autocast_does_not_round_the_products():
    model, (batch, groups) = make_model(), make_batch()
    penalty = make_penalty()
    with penalty.attach(model), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch)
        loss = penalty.loss(groups, batch["labels"])
        want = plain(model, batch, groups)[1]
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=3e-6, atol=0)


def test_evaluation_without_gradients():
    model, (batch, groups) = make_model(), make_batch()
    want = run(model, make_penalty(), batch, groups)[0]
    penalty = make_penalty()
    with penalty.attach(model):
        with torch.no_grad():
            model(**batch)
            assert torch.equal(penalty.loss(groups, batch["labels"]), want)
            model(**batch)
        with pytest.raises(ModelError, match="No gradient would flow"):
            penalty.loss(groups, batch["labels"])
        model.eval()
        with torch.inference_mode():
            model(**batch)
        loss = penalty.loss(groups, batch["labels"])
    assert torch.equal(loss, want) and not loss.requires_grad


def test_a_tuple_output_and_a_residual_that_is_overwritten():
    model, (batch, groups) = make_model(), make_batch()
    want = run(model, make_penalty(), batch, groups)
    block = model.model.layers[1]
    handle = block.register_forward_hook(lambda _m, _i, out: (out, None))
    after = model.model.layers[2].register_forward_pre_hook(
        lambda _m, args: (args[0][0] if isinstance(args[0], tuple) else args[0], *args[1:])
    )
    got = run(model, make_penalty(), batch, groups)
    assert torch.equal(got[0], want[0])
    handle.remove()
    after.remove()
    overwriting = model.model.layers[2].register_forward_pre_hook(lambda _m, args: (args[0].add_(1), None)[1])
    penalty = make_penalty()
    with penalty.attach(model), torch.no_grad():
        model(**batch)
        with pytest.raises(ModelError, match="overwrites the residual of layer 1"):
            penalty.loss(groups)
    overwriting.remove()


def test_peft_lora():
    peft = pytest.importorskip("peft")
    base, (batch, groups) = make_model(), make_batch()
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))
    loss, got = run(model, make_penalty(), batch, groups)
    model.zero_grad()
    out, want = plain(model, batch, groups)
    (out.loss + want).backward()
    torch.testing.assert_close(loss.double(), want.detach(), rtol=3e-6, atol=0)
    close(got, gradients(model))
    assert got and all("lora" in name for name in got)


def test_compiled_model():
    model, (batch, groups) = make_model(), make_batch()
    want_loss, want = run(model, make_penalty(), batch, groups)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(**batch)  # compiled before the hooks: it is compiled again
    model.zero_grad()
    penalty = make_penalty()
    with penalty.attach(compiled):
        out = compiled(**batch)
        loss = penalty.loss(groups, batch["labels"], batch["attention_mask"])
        (out.loss + loss).backward()
    torch.testing.assert_close(loss.detach(), want_loss, rtol=1e-5, atol=0)
    close(gradients(model), want, scale=5)


def test_any_directions_take_the_same_path():
    model, (batch, groups) = make_model(), make_batch()
    saes = make_saes()
    rows = {layer: saes[layer].W_enc[list(ids)] for layer, ids in LAYERS.items()}
    bias = {layer: saes[layer].b_enc[list(ids)] for layer, ids in LAYERS.items()}
    same = FeaturePenalty.from_directions(rows, bias, alpha=make_alpha(), target_groups=(2,), weight=0.7)
    want = run(model, make_penalty(), batch, groups)
    got = run(model, same, batch, groups)
    assert torch.equal(got[0], want[0])
    close(got[1], want[1], scale=0)
    unit = FeaturePenalty.from_directions({0: torch.eye(D)[:1]})
    assert unit.b_0.tolist() == [0.0]


def test_schedule_and_figures():
    model, (batch, groups) = make_model(), make_batch()
    penalty = make_penalty(weight=lambda step: 0.1 * step)
    with penalty.attach(model):
        model(**batch)
        loss = penalty.loss(groups, batch["labels"], step=3)
    figures = penalty.last.as_dict()
    assert figures["penalty_weight"] == pytest.approx(0.3)
    assert figures["penalty"] == pytest.approx(0.3 * figures["penalty_unweighted"]) == pytest.approx(loss.item())
    response = batch["labels"] != -100
    assert figures["penalty_response_tokens"] == int(response.sum())
    assert figures["penalty_penalised_tokens"] == int(response[[0, 1, 3]].sum())
    # From the definition: mean over features of the mean excess is the layer's loss x response / penalised.
    parts = sum(figures[f"penalty_excess_{layer}"] for layer in LAYERS)
    share = figures["penalty_penalised_tokens"] / figures["penalty_response_tokens"]
    assert parts * share == pytest.approx(figures["penalty_unweighted"], rel=1e-5)
    assert 0 < figures["penalty_active_1"] < 1 and not penalty.last.loss.requires_grad


# --- several processes -----------------------------------------------------------------------------------


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for kind in ("ddp", "fsdp2"):
        found = _step_of_two(rank, kind)
        if rank == 0:
            torch.save(found, folder / f"{kind}.pt")
    dist.destroy_process_group()


def _step_of_two(rank, kind):
    """Gradients after one step in which the processes have 1 and 3 of the 4 rows."""
    model, (batch, groups) = make_model(), make_batch()
    items = (batch["labels"] != -100).sum()
    rows = slice(0, 1) if rank == 0 else slice(1, 4)
    part, own = {name: t[rows] for name, t in batch.items()}, groups[rows]
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    penalty = make_penalty()
    with penalty.attach(wrapped):
        out = wrapped(**{name: t for name, t in part.items() if name != "labels"})
        # Gradients are averaged over processes: twice the loss, over the tokens of both, adds up to the batch.
        loss = penalty.loss(own, part["labels"], part["attention_mask"], num_items_in_batch=items) * 2
        (out.logits.square().sum() / 1000 * 2 + loss).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in grads.items()}


def test_two_processes_equal_one(tmp_path):
    """DistributedDataParallel and FSDP2, over gloo."""
    model, (batch, groups) = make_model(), make_batch()
    penalty = make_penalty()
    with penalty.attach(model):
        out = model(**{name: t for name, t in batch.items() if name != "labels"})
        loss = penalty.loss(groups, batch["labels"], batch["attention_mask"])
        (out.logits.square().sum() / 1000 + loss).backward()
    mp.spawn(_worker, (_free_port(), tmp_path), nprocs=2)
    for kind in ("ddp", "fsdp2"):
        close(torch.load(tmp_path / f"{kind}.pt", weights_only=True), gradients(model))


# --- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, word",
    [
        ({"features": {1: (64,)}}, "0 to 63"),
        ({"features": {1: ()}}, "1 to 32 different"),
        ({"features": {1: (3, 3)}}, "different"),
        ({"features": {0: (3,)}}, "SAEs of the layers"),
        ({"features": {}}, "at least one"),
        ({"features": None}, "without features"),
        ({"alpha": "mean"}, "'zero'"),
        ({"alpha": {1: torch.zeros(3, 2)}}, "no entry for layer 2"),
        ({"alpha": {1: torch.zeros(3, 2), 2: torch.zeros(2, 3)}}, "one row a group"),
        ({"alpha": {1: torch.zeros(3, 2), 2: torch.zeros(3, 2)}}, r"\[G, 3\]"),
        ({"alpha": {1: torch.zeros(3, 2), 2: torch.full((3, 3), float("nan"))}}, "NaN"),
        ({"target_groups": ("de",)}, "no names of groups"),
        ({"target_groups": (3,)}, "0 to 2"),
        ({"groups": ("a", "b", "c"), "target_groups": ("de",)}, "a, b, c"),
        ({"groups": ("a", "b")}, "one row a group"),
        ({"groups": ("a", "a", "b")}, "once"),
    ],
)
def test_refuses_at_construction(options, word):
    given = {"features": LAYERS, "alpha": make_alpha()} | options
    with pytest.raises(InputError, match=word):
        FeaturePenalty(make_saes(), **given)


def test_refuses_alpha_of_another_sae_or_of_other_features():
    def alpha(saes, features):
        rows = FeaturePenalty(saes, features).rows
        layers = {
            layer: AlphaLayer(torch.zeros(2, len(one.b)), one.fingerprint(), one.features, one.sae_hash)
            for layer, one in rows.items()
        }
        return Alpha(("a", "b"), (1, 1), 0, layers)

    assert FeaturePenalty(make_saes(), LAYERS, alpha=alpha(make_saes(), LAYERS)).groups == ("a", "b")
    with pytest.raises(InputError, match="may mean other things"):
        FeaturePenalty(make_saes(), LAYERS, alpha=alpha(make_saes(seed=9), LAYERS))
    with pytest.raises(InputError, match="was not estimated for the features"):
        FeaturePenalty(make_saes(), LAYERS, alpha=alpha(make_saes(), {1: (9, 5), 2: LAYERS[2]}))
    with pytest.raises(InputError, match="for the layers"):
        FeaturePenalty(make_saes(), LAYERS, alpha=alpha(make_saes(), {1: (5, 9)}))


def test_refuses_at_the_loss():
    model, (batch, groups) = make_model(), make_batch()
    penalty = make_penalty()
    cases = [
        (lambda: penalty.loss(groups[:3]), InputError, "one for each sequence"),
        (lambda: penalty.loss(groups.float()), InputError, "whole numbers"),
        (lambda: penalty.loss(groups + 1), InputError, "0 to 2"),
        (lambda: penalty.loss(["de"] * 4), InputError, "no names"),
        (lambda: penalty.loss(groups, batch["labels"][:, 1:]), InputError, "must be equal"),
        (lambda: penalty.loss(groups, None, torch.ones(4, 12)), InputError, "attention_mask"),
    ]
    with penalty.attach(model):
        with pytest.raises(ModelError, match="Nothing was kept"):
            penalty.loss(groups)
        for call, error, word in cases:
            model(**batch)
            with pytest.raises(error, match=word):
                call()
        with pytest.raises(InputError, match="attached already"):
            penalty.attach(model)
    for weight in (-1.0, float("nan")):
        bad = make_penalty(weight=weight)
        with bad.attach(model), pytest.raises(InputError, match="weight"):
            model(**batch)
            bad.loss(groups)


def test_refuses_a_model_that_does_not_fit():
    model = make_model()
    with pytest.raises(InputError, match="layers 0 to 2"):
        FeaturePenalty.from_directions({3: torch.zeros(1, D)}).attach(model)
    narrow = FeaturePenalty.from_directions({1: torch.zeros(1, 16)})
    with pytest.raises(InputError, match="width 16"):
        narrow.attach(model)
    assert not any(m._forward_hooks for m in model.modules()) and copy.copy(narrow)._attached is None
    with pytest.raises(InputError, match="NaN"):
        FeaturePenalty.from_directions({1: torch.full((1, D), float("nan"))})
