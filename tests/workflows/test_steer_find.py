"""`qscope steer find` on a tiny model: figures against plain runs, text by text and dense; choice, spec, page."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qscope.cli import to_json
from qscope.errors import InputError, ModelError
from qscope.model import capture
from qscope.report import steer_find_page, steer_find_text
from qscope.sae import SAE
from qscope.steering.spec import SteeringSpec
from qscope.workflows.steer_find import SteerFindConfig, run
from qscope.workflows.steer_find_texts import TEST, TRAIN, gather

CONTEXT = 24


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, texts):
    """Documentation as negative texts, the same kind of text in capitals as positive ones."""
    root = tmp_path_factory.mktemp("sets")
    parts = [text[i * 150 : i * 150 + 130].strip() for text in texts[:30] for i in range(2)]
    parts = [part for part in parts if len(part) > 60]
    return SimpleNamespace(
        root=root,
        positive=lines(root / "positive.jsonl", [part.upper() for part in parts[:20]]),
        one=lines(root / "one.jsonl", parts[20:34]),
        two=lines(root / "two.jsonl", parts[34:44]),
        other=lines(root / "other.jsonl", [part.upper() for part in parts[44:]]),
    )


@pytest.fixture(scope="module")
def base(tiny, sets):
    return SteerFindConfig(
        positive=(sets.positive,), negative=(sets.one, sets.two), model=tiny.model, sae=tuple(tiny.saes.values()),
        layers=(0, 2), top=4, choose=2, bootstrap=20, context_size=CONTEXT, device="cpu", dtype="float32", seed=5,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(base):
    return run(base)


@pytest.fixture(scope="module")
def plain(tiny):
    """Text -> layer -> dense codes [tokens, F] of its first CONTEXT tokens, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    saes = {layer: SAE.from_pretrained(path) for layer, path in tiny.saes.items()}

    def codes(text, skip=1):
        ids = tokenizer(text, add_special_tokens=False).input_ids[:CONTEXT]
        kept = {}
        handles = [
            model.model.layers[layer].register_forward_hook(
                lambda module, inputs, output, layer=layer: kept.__setitem__(
                    layer, output[0] if isinstance(output, tuple) else output
                )
            )
            for layer in saes
        ]
        model(input_ids=torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        dense = {}
        for layer, sae in saes.items():
            top = sae.encode_topk(kept[layer].reshape(-1, 32))
            full = torch.zeros(len(ids), 512, dtype=torch.float64)
            dense[layer] = full.scatter_(1, top.top_indices.long(), top.top_acts.double())[skip:].numpy()
        return dense

    return SimpleNamespace(codes=codes, saes=saes, tokenizer=tokenizer, model=model)


def test_scores_are_those_of_single_runs_on_the_training_texts(base, found, plain):
    texts = gather(base)
    assert [texts.count(TEST, side) for side in (True, False)] == [5, 6]
    dense = [plain.codes(text.text) for text in texts.all]
    train = texts.part == TRAIN
    assert texts.groups == ("one.jsonl", "two.jsonl")
    for name, layer in found.layers.items():
        value = np.array([d[int(name)].mean(0) for d in dense])
        rate = np.array([(d[int(name)] > 0).mean(0) for d in dense])
        p, n = train & texts.positive, train & ~texts.positive
        fires = np.array([(d[int(name)] > 0).any(0) for d in dense])
        eligible = fires[train].sum(0) >= 3
        assert layer.ranked == eligible.sum()
        difference = value[p].mean(0) - value[n].mean(0)
        best = np.argsort(-np.where(eligible, difference, -np.inf), kind="stable")[:4]
        assert [f.feature for f in layer.features] == best.tolist()
        tokens = np.concatenate([d[int(name)] for d, use in zip(dense, p, strict=True) if use])
        for f in layer.features:
            # The model runs in batches here and text by text there: float32 residuals differ in their last bits.
            assert f.mean_difference == pytest.approx(difference[f.feature], rel=1e-4)
            assert f.rate_difference == pytest.approx(rate[p].mean(0)[f.feature] - rate[n].mean(0)[f.feature], abs=1e-9)
            mine, other = value[p][:, f.feature], value[n][:, f.feature]
            pairs = (mine[:, None] > other[None]) + 0.5 * (mine[:, None] == other[None])
            assert f.auroc == pytest.approx(pairs.mean(), abs=1e-12)
            own = tokens[:, f.feature]
            assert f.scale == pytest.approx(np.quantile(own[own > 0], 0.99), rel=1e-4)
            assert f.density_positive == pytest.approx((own > 0).mean(), rel=1e-12)
            assert f.dense == (f.density_negative > 0.1)
            test_p, test_n = (value[(texts.part == TEST) & side] for side in (texts.positive, ~texts.positive))
            expected = test_p[:, f.feature].mean() - test_n[:, f.feature].mean()
            assert f.held_out.mean_difference == pytest.approx(expected, rel=1e-4, abs=1e-6)
        any_rate = fires[p].mean(0) - fires[n].mean(0)
        assert layer.top1.difference.value == pytest.approx(any_rate[eligible].max(), abs=1e-12)


def test_the_chosen_layer_features_and_spec(base, found, plain):
    tops = {int(n): layer.top1.difference.value for n, layer in found.layers.items()}
    assert found.layer == max(tops, key=lambda n: (tops[n], -n))
    layer = found.layers[str(found.layer)]
    fitting = [f for f in layer.features if not f.dense and f.mean_difference > 0]
    assert found.chosen == tuple(f.feature for f in fitting[:2])
    spec = SteeringSpec.from_json(found.spec)
    assert [(e.layer, e.feature, e.unit, e.strength, e.mode) for e in spec.edits] == [
        (found.layer, f.feature, "quantile", 1.0, "add") for f in fitting[:2]
    ]
    assert [e.scale for e in spec.edits] == [f.scale for f in fitting[:2]]
    reference = spec.saes[found.layer]
    assert reference.hash == plain.saes[found.layer].weight_hash()
    assert SAE.from_pretrained(reference.source, layer=found.layer).weight_hash() == reference.hash
    assert f"median residual norm of layer {found.layer}: {layer.residual_norm:.6g}" in (spec.note or "")


def test_held_out_texts_change_nothing_but_their_own_figures(base, found, sets):
    """The positive test texts are replaced by others: ranking, choice, intervals and scales stay as they were."""
    texts = gather(base)
    swapped = [t.text if p == TRAIN else t.text[::-1] for t, p in zip(texts.all, texts.part, strict=True)]
    files = []
    for name, side in (("p", texts.positive), ("n", ~texts.positive)):
        rows = [text for text, use in zip(swapped, side & (texts.part == TRAIN), strict=True) if use]
        files.append(lines(sets.root / f"train-{name}.jsonl", rows))
    alone = run(replace(base, positive=(files[0],), negative=(files[1],), test=0.0))
    assert alone.layer == found.layer
    for name, layer in alone.layers.items():
        for f, g in zip(layer.features, found.layers[name].features, strict=True):
            assert (f.feature, f.held_out) == (g.feature, None) and g.held_out is not None
            assert f.mean_difference == pytest.approx(g.mean_difference, rel=1e-4)
            assert f.scale == pytest.approx(g.scale, rel=1e-4)


def test_the_same_call_gives_the_same_result(base, found):
    assert to_json(run(base)) == to_json(found)


def test_output_scores_and_targets(base, found, plain):
    chosen = run(replace(base, targets=(" the", " a"), prompts=("It is", "This"), amplify=3.0))
    assert chosen.targets == (" the", " a")
    feature = chosen.layers["2"].features[0]
    sae, norm = plain.saes[2], plain.model.model.norm
    logits = norm(sae.W_dec[feature.feature]) @ plain.model.lm_head.weight.T
    assert feature.lens == tuple(plain.tokenizer.decode([i]) for i in logits.topk(10).indices.tolist())
    ids = [plain.tokenizer(text, add_special_tokens=False).input_ids[0] for text in (" the", " a")]
    assert feature.lens_target == pytest.approx(float((logits[ids].mean() - logits.mean()) / logits.std()), rel=1e-4)
    assert 0 <= feature.output_score <= 1
    change, row = [], sae.W_dec[feature.feature]
    step = 0.3 * chosen.layers["2"].residual_norm * row / row.norm()
    for prompt in ("It is", "This"):
        one = torch.tensor([plain.tokenizer(prompt, add_special_tokens=False).input_ids])
        with capture(plain.model, [2]) as residual:
            before = plain.model(one).logits[0, -1]
        h = residual[2][0, -1] + step  # layer 2 is the last block: the norm and the unembedding follow
        after = norm(h) @ plain.model.lm_head.weight.T
        change.append(float(after.log_softmax(-1)[ids].logsumexp(0) - before.log_softmax(-1)[ids].logsumexp(0)))
    assert feature.target_change == pytest.approx(sum(change) / 2, rel=1e-3)
    without = run(replace(base, prompts=("",)))
    assert without.targets == () and without.layers["2"].features[0].output_score is None
    by_effect = run(replace(base, choose=1, choose_by="target_change"))
    effects = {
        (int(n), f.feature): f.target_change
        for n, layer in by_effect.layers.items()
        for f in layer.features
        if not f.dense and f.mean_difference > 0
    }
    assert len({n for n, _ in effects}) == 2
    assert (by_effect.layer, *by_effect.chosen) == max(effects, key=effects.__getitem__)


def test_paraphrases_are_ranked_on_their_own(base, found, sets):
    again = run(replace(base, paraphrase_positive=(sets.positive,), paraphrase_negative=(sets.one, sets.two), test=0.0))
    alone = run(replace(base, test=0.0))
    for name, layer in again.layers.items():
        assert layer.paraphrase.jaccard.value == 1.0  # the same texts again
        assert layer.paraphrase.rank_correlation.value == pytest.approx(1.0, abs=1e-3)
        assert [f.feature for f in layer.features] == [f.feature for f in alone.layers[name].features]
        assert [f.mean_difference for f in layer.features] == pytest.approx(
            [f.mean_difference for f in alone.layers[name].features], rel=1e-4
        )
    assert found.layers["0"].paraphrase is None
    other = run(replace(base, paraphrase_positive=(sets.other,), paraphrase_negative=(sets.two,)))
    assert other.layers["0"].paraphrase.rank_correlation.value < 0.999


def test_tokens_left_out(base, sets, plain):
    """--drop-prefix and --drop-shared, as the app does with two texts."""
    a, b = "alpha beta gamma delta one two", "alpha beta gamma delta three four two"
    files = [lines(sets.root / f"pair-{i}.jsonl", [text]) for i, text in enumerate((a, b))]
    small = replace(
        base, positive=(files[0],), negative=(files[1],), test=0.0, min_texts=1, bootstrap=0, prompts=("",), choose=1
    )
    ids = [plain.tokenizer(text, add_special_tokens=False).input_ids for text in (a, b)]
    prefix = next(i for i, (x, y) in enumerate(zip(*ids, strict=False)) if x != y)
    kept = {
        "no": [len(i) - 1 for i in ids],
        "pair": [len(i) - prefix for i in ids],
    }
    shared = sum(sum(x not in set(ids[1 - n]) for x in row[1:]) for n, row in enumerate(ids))
    for scope, counts in kept.items():
        assert run(replace(small, drop_prefix=scope)).layers["0"].tokens.kept == sum(counts)
    assert run(replace(small, drop_shared="pair")).layers["0"].tokens.kept == shared
    assert run(replace(small, drop_shared="set", drop_prefix="set")).layers["0"].tokens.kept == shared
    both = run(replace(small, bos=True)).layers["0"].tokens
    assert both.kept + both.extreme == both.tokens == sum(map(len, ids))  # the BOS is the sink, first tokens count
    short = lines(sets.root / "short.jsonl", [a, "x"])
    with_short = run(replace(small, positive=(short,)))
    assert with_short.notes == ("1 texts without a token that counts were left out",)
    assert with_short.layers["0"].features[0].mean_positive == pytest.approx(
        run(small).layers["0"].features[0].mean_positive, rel=1e-4
    )
    with pytest.raises(InputError, match="no longer stand in pairs"):
        run(replace(small, positive=(lines(sets.root / "twice.jsonl", [a, a]),), drop_prefix="pair"))
    with pytest.raises(InputError, match="No feature of layer 0 fires in 3 of the 2"):
        run(replace(small, min_texts=3))


def test_diagnosis_of_one_response(base, sets, plain, tmp_path):
    response = tmp_path / "bad.txt"
    response.write_text("THE SAME WORDS THE SAME WORDS THE SAME WORDS")
    config = replace(
        base, positive=(), negative=(), response=str(response), neutral=(sets.one, sets.two), choose=1,
        spec=tmp_path / "bad.json", out=tmp_path / "bad-out.json", html=tmp_path / "bad.html",
    )  # fmt: skip
    found = run(config)
    assert found.layers == {} and set(found.diagnosis) == {"0", "2"}
    texts = [json.loads(row)["text"] for path in (sets.one, sets.two) for row in Path(path).read_text().splitlines()]
    dense = [plain.codes(text) for text in (response.read_text(), *texts)]
    for name, layer in found.diagnosis.items():
        value = np.array([d[int(name)].mean(0) for d in dense])
        with np.errstate(invalid="ignore"):
            z = (value[0] - value.mean(0)) / value.std(0, ddof=1)
        z[value[0] <= 0] = -np.inf
        assert layer.features[0].z == pytest.approx(z.max(), rel=1e-4)
        for f in layer.features:
            assert f.z == pytest.approx(z[f.feature], rel=1e-3)
            assert f.activation == pytest.approx(value[0, f.feature], rel=1e-4)
            assert f.dense == (f.pool_rate > 0.1)
    spec = SteeringSpec.load(tmp_path / "bad.json")
    assert (spec.edits[0].strength, spec.edits[0].feature) == (-1.0, found.chosen[0])
    same = run(replace(config, response=response.read_text(), spec=None))
    assert to_json(same.diagnosis["0"]) == to_json(found.diagnosis["0"])
    text = steer_find_text.render(found)
    assert f"wrote {tmp_path / 'bad.json'}" in text and (tmp_path / "bad.html").stat().st_size > 4000
    assert json.loads((tmp_path / "bad-out.json").read_text())["chosen"] == [found.chosen[0]]


def test_page_text_and_json(found, tmp_path):
    result = replace(found, html=str(tmp_path / "page.html"), out=str(tmp_path / "found.json"))
    text = steer_find_text.render(result)
    page = (tmp_path / "page.html").read_text()
    for name, layer in found.layers.items():
        assert f"layer {name}:" in text and f'id="layer-{name}"' in page
        for f in layer.features:
            assert f"{f.feature}" in text and f"{f.feature}</dt>" in page
    assert "<script" not in page and "://" not in page and "@@" not in page
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(to_json(result)))
    hostile = replace(found, targets=("<script>alert(1)</script>",))
    assert "<script>alert" not in steer_find_page.page(hostile)


def test_a_spec_file_is_written_and_loads(base, tmp_path):
    result = run(replace(base, spec=tmp_path / "french.yaml", layers=(2,), sae=base.sae[1:]))
    assert SteeringSpec.load(tmp_path / "french.yaml").to_json() == result.spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"builtin": "language:fr"}, "exactly one"),
        ({"negative": ()}, "--positive and --negative belong together"),
        ({"paraphrase_positive": ("x",)}, "--paraphrase-positive and --paraphrase-negative belong together"),
        ({"response": "text", "positive": (), "negative": ()}, "--response and --neutral belong together"),
        ({"top": 0}, "--top is 0; it must be at least 1"),
        ({"test": 1.5}, "--test is 1.5"),
        ({"amplify": float("nan")}, "--amplify is nan"),
    ],
)
def test_options_that_do_not_fit_are_refused(base, change, message):
    with pytest.raises(InputError, match=message):
        replace(base, **change)


def test_texts_and_layers_that_do_not_fit_are_refused(base, sets, tmp_path):
    with pytest.raises(InputError, match=r"'unlikelyhood zz' is [2-9] tokens"):
        run(replace(base, targets=("unlikelyhood zz",)))
    with pytest.raises(ModelError, match="layers 0 to 2"):
        run(replace(base, layers=(0, 7), allow_mismatch=True))
    with pytest.raises(InputError, match="The positive set of the given files"):
        run(replace(base, negative=(sets.positive,)))
    one = lines(tmp_path / "one.jsonl", ["a single text of the pool"])
    with pytest.raises(InputError, match="--neutral holds one text"):
        run(replace(base, positive=(), negative=(), response="some text", neutral=(one,)))
