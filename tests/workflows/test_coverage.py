"""`qscope coverage` on a tiny model: sets, figures and tables against plain runs, item by item; faults; the page."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau

from qscope.cli import to_json
from qscope.errors import InputError
from qscope.report import coverage_page, coverage_text
from qscope.sae import SAE
from qscope.workflows import text_features
from qscope.workflows.coverage import CoverageConfig, run
from qscope.workflows.coverage_inputs import gather, read_scores
from qscope.workflows.coverage_read import random_text
from qscope.workflows.encode import EncodeConfig
from qscope.workflows.encode import run as encode

CONTEXT = 16


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def sets(tmp_path_factory, texts):
    """Three benchmarks: documentation, the same kind in capitals, and sums; their items end in different ways."""
    root = tmp_path_factory.mktemp("coverage")
    plain = [texts[i][i : i + 40 + 3 * i].strip() for i in range(24)]
    return SimpleNamespace(
        root=root,
        items={
            "plain": plain[:9],
            "upper": [text.upper() for text in plain[9:21]],
            "sums": [f"What is {7 * i} + {i * i}?" for i in range(10)],
        },
    )


@pytest.fixture(scope="module")
def base(tiny, sets):
    files = [lines(sets.root / f"{n}.jsonl", [{"prompt": t} for t in items]) for n, items in sets.items.items()]
    return CoverageConfig(
        tuple(files), out=sets.root / "out", model=tiny.model, sae=tuple(tiny.saes.values()), layers=(0, 2),
        context_size=CONTEXT, resamples=20, permutations=19, exclusive=3, device="cpu", dtype="float32", seed=3,
        sensitivity=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(base):
    return run(base)


@pytest.fixture(scope="module")
def plain(tiny, sets):
    """codes(text, layer) -> dense [tokens, F] of the last CONTEXT tokens without the first, one text at a time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(tiny.model)
    saes = {layer: SAE.from_pretrained(path) for layer, path in tiny.saes.items()}

    def tokens(text, start=-CONTEXT, end=None):
        return tokenizer(text, add_special_tokens=False).input_ids[start:end]

    def codes(text, layer, start=-CONTEXT, end=None):
        ids = tokens(text, start, end) if isinstance(text, str) else text
        kept = []
        handle = model.model.layers[layer].register_forward_hook(
            lambda module, inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        model(input_ids=torch.tensor([ids]))
        handle.remove()
        top = saes[layer].encode_topk(kept[0].reshape(-1, 32))
        full = torch.zeros(len(ids), 512, dtype=torch.float64)
        return full.scatter_(1, top.top_indices.long(), top.top_acts.double())[1:].numpy()

    def fires(name, layer):
        """[N, F] at the last token."""
        return np.array([codes(text, layer)[-1] > 0 for text in sets.items[name]])

    return SimpleNamespace(codes=codes, fires=fires, tokenizer=tokenizer, tokens=tokens)


def expected(m, N, n):
    """Chance that n of N items fire each feature, by whole-number binomials."""
    return np.array([1 - math.comb(N - k, n) / math.comb(N, n) for k in m.tolist()])


def test_figures_are_those_of_the_sets_of_single_runs(found, plain, sets):
    names = list(sets.items)
    n = found.match_items
    assert n == 4  # half of the smallest benchmark
    for layer, part in found.layers.items():
        fires = {name: plain.fires(name, int(layer)) for name in names}
        p = {name: expected(f.sum(0), len(f), n) for name, f in fires.items()}
        for b in part.benchmarks:
            own = fires[b.name]
            m, N, size = own.sum(0), len(own), int(own.any(0).sum())
            assert (b.items, b.features, b.mean_size) == (N, size, own.sum(1).mean())
            # Whole numbers and one division each: float64 rounding only.
            curve = [expected(m, N, k).sum() / size for k in range(1, N + 1)]
            assert b.redundancy == pytest.approx(sum(curve) / size, rel=1e-12)
            assert b.saturation_area == pytest.approx(np.mean(curve), rel=1e-12)
            assert dict(b.curve) == pytest.approx({k: curve[k - 1] for k, _ in b.curve}, rel=1e-12)
            assert b.matched_features == pytest.approx(p[b.name].sum(), rel=1e-12)
            area = sum(expected(m, N, k).sum() for k in range(1, n + 1))
            assert b.matched_redundancy == pytest.approx(area / p[b.name].sum() ** 2, rel=1e-12)
            low, high = b.matched_redundancy_interval.low, b.matched_redundancy_interval.high
            assert low < b.matched_redundancy_interval.value < high
            covered = np.median([((m[f] > 1).sum()) / f.sum() for f in own])
            assert b.covered.value == pytest.approx(covered, rel=1e-12)
        assert [(q.a, q.b) for q in part.pairs] == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
        for q in part.pairs:
            a, b = fires[q.a].any(0), fires[q.b].any(0)
            both = (a & b).sum()
            assert (q.shared, q.overlap_ab, q.overlap_ba) == (both, both / a.sum(), both / b.sum())
            assert (q.overlap_min, q.jaccard) == (both / min(a.sum(), b.sum()), both / (a | b).sum())
            common = (p[q.a] * p[q.b]).sum()
            jaccard = common / (p[q.a].sum() + p[q.b].sum() - common)
            assert q.matched_jaccard == pytest.approx(jaccard, rel=1e-12)
            assert q.matched_ab == pytest.approx(common / p[q.a].sum(), rel=1e-12)
            i, j = names.index(q.a), names.index(q.b)
            assert part.matrix[i][j] == part.matrix[j][i] == pytest.approx(jaccard, rel=1e-12)
            assert (part.raw[i][j], part.raw[j][i]) == (q.overlap_ab, q.overlap_ba)
            assert part.relative[i][j] == pytest.approx(q.matched_jaccard / q.one_population, rel=1e-12)
            assert q.above_null.value == pytest.approx(q.matched_jaccard - q.null_jaccard, rel=1e-9)
            assert q.above_cross.value == pytest.approx(q.matched_jaccard - q.cross_null, rel=1e-9)
        union = np.any([f.any(0) for f in fires.values()], axis=0).sum()
        assert part.suite_features == union == part.adding[-1].total
        assert part.adding[-1].share == 1 and sum(step.features for step in part.adding) == union
        for alone in part.marginal:
            others = np.any([f.any(0) for name, f in fires.items() if name != alone.name], axis=0)
            assert alone.unique == (fires[alone.name].any(0) & ~others).sum()


def test_exclusive_features_and_their_strongest_items(found, plain, sets):
    for layer, part in found.layers.items():
        last = {name: np.array([plain.codes(t, int(layer))[-1] for t in items]) for name, items in sets.items.items()}
        rates = {name: (values > 0).mean(0) for name, values in last.items()}
        for b in part.benchmarks:
            elsewhere = np.max([rate for name, rate in rates.items() if name != b.name], axis=0)
            best = np.argsort(-(rates[b.name] - elsewhere), kind="stable")[:3]
            assert [f.feature for f in b.exclusive] == best.tolist()
            for f in b.exclusive:
                assert (f.rate, f.elsewhere) == (rates[b.name][f.feature], elsewhere[f.feature])
                assert len(f.lens) == 8
                value = last[b.name][:, f.feature]
                order = [i for i in np.argsort(-value, kind="stable")[:3] if value[i] > 0]
                assert [item.row for item in f.items] == order
                # The model runs in batches here and text by text there: float32 residuals differ in their last bits.
                assert [item.activation for item in f.items] == pytest.approx(value[order].tolist(), rel=1e-4)
                for item in f.items:
                    ids = plain.tokenizer(sets.items[b.name][item.row], add_special_tokens=False).input_ids
                    assert item.text == plain.tokenizer.decode(ids[-CONTEXT:])


def test_tables_hold_the_same_figures(base, found):
    out = Path(found.out)
    saved = json.loads((out / "coverage.json").read_text())
    assert saved["layers"]["2"]["pairs"] == json.loads(json.dumps(to_json(found)))["layers"]["2"]["pairs"]
    tables = {name: list(csv.DictReader((out / name).open())) for name in found.tables if name.endswith(".csv")}
    for layer, part in found.layers.items():
        rows = [row for row in tables["overlaps.csv"] if row["layer"] == layer]
        assert [float(row["matched_jaccard"]) for row in rows] == [q.matched_jaccard for q in part.pairs]
        assert [float(row["above_null_low"]) for row in rows] == [q.above_null.low for q in part.pairs]
        for b in part.benchmarks:
            items = [row for row in tables["items.csv"] if (row["layer"], row["benchmark"]) == (layer, b.name)]
            assert sum(int(row["in_subset"]) for row in items) == b.subset
            assert sum(float(row["worth"]) for row in items) == pytest.approx(b.features, rel=1e-12)
            counts = [int(row[b.name]) for row in tables["features.csv"] if row["layer"] == layer]
            assert sum(count > 0 for count in counts) == b.features and sum(counts) == b.items * b.mean_size


def test_the_subset_keeps_the_share_that_was_asked_for(base, found, plain, sets):
    rows = list(csv.DictReader((Path(found.out) / "items.csv").open()))
    for layer, part in found.layers.items():
        for b in part.benchmarks:
            fires = plain.fires(b.name, int(layer))
            mine = [r for r in rows if (r["layer"], r["benchmark"]) == (layer, b.name) and r["greedy_place"]]
            order = [int(r["row"]) for r in sorted(mine, key=lambda r: int(r["greedy_place"]))]
            shares = [fires[order[: k + 1]].any(0).sum() / b.features for k in range(len(order))]
            assert shares[-1] >= base.subset > shares[-2]
            assert b.subset_curve[-1] == (len(order), pytest.approx(shares[-1], rel=1e-12))
            assert order[0] == int(fires.sum(1).argmax())


def test_a_second_run_reads_what_the_first_one_kept(base, found, monkeypatch):
    """Killed after reading and started again: the model does not run, and every file has the same bytes."""
    out = Path(found.out)
    before = {name: (out / name).read_bytes() for name in found.tables}

    def refuse(*args):
        raise AssertionError("the model ran again")

    monkeypatch.setattr(text_features, "residuals", refuse)
    assert run(base) == found
    assert {name: (out / name).read_bytes() for name in found.tables} == before


def test_sensitivity_is_what_runs_with_the_other_settings_give(base, found):
    settings = {(m.layer, m.setting): m for m in found.sensitivity}
    assert {"pooling any", "top 1", "top 5"} < {setting for _, setting in settings}
    assert not {"pooling mean", "top 10"} & {setting for _, setting in settings}  # no other sets than those of any, all
    for setting, change in (("top 5", {"top_n": 5}), ("pooling any", {"pooling": "any"})):
        other = run(replace(base, sensitivity=False, html=False, null=False, resamples=0, permutations=0, **change))
        for layer, part in other.layers.items():
            moved = settings[layer, setting]
            hats = [[b.matched_redundancy for b in x.layers[layer].benchmarks] for x in (other, found)]
            pairs = [[q.matched_jaccard for q in x.layers[layer].pairs] for x in (other, found)]
            assert moved.redundancy_tau == pytest.approx(kendalltau(*hats).statistic, abs=1e-12)
            assert moved.pairs_tau == pytest.approx(kendalltau(*pairs).statistic, abs=1e-12)
            assert moved.features == np.mean([b.features for b in part.benchmarks])
    between = settings["0", "layer 0"]
    pairs = [[q.matched_jaccard for q in found.layers[layer].pairs] for layer in ("0", "2")]
    assert between.pairs_tau == pytest.approx(kendalltau(*pairs).statistic, abs=1e-12)


def test_another_sae_is_compared_at_the_same_layer(base, tiny, sets):
    """The same weights under another name move nothing."""
    config = replace(base, layers=(2,), sae=(tiny.saes[2],), sensitivity=False, null=False, html=False, resamples=0)
    result = run(replace(config, other_sae=(tiny.saes[2],), out=sets.root / "other"))
    (moved,) = result.sensitivity
    assert (moved.redundancy_tau, moved.pairs_tau) == (1.0, 1.0)
    assert moved.features == np.mean([b.features for b in result.layers["2"].benchmarks])


def test_random_text_has_the_same_tokens_and_lengths():
    suites = [[np.array([1, 2, 3]), np.array([4])], [np.array([5, 5, 6, 7, 8])]]
    dealt = random_text(suites, seed=1)
    assert [[len(ids) for ids in texts.ids] for texts in dealt] == [[3, 1], [5]]
    tokens = np.concatenate([ids for texts in dealt for ids in texts.ids])
    assert sorted(tokens.tolist()) == [1, 2, 3, 4, 5, 5, 6, 7, 8] and tokens.tolist() != [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert [t.tolist() for t in random_text(suites, seed=1)[0].ids] == [t.tolist() for t in dealt[0].ids]


def test_null_figures_are_those_of_the_random_texts(base, found, plain, sets):
    own = [[np.array(plain.tokens(text)) for text in items] for items in sets.items.values()]
    dealt = dict(zip(sets.items, random_text(own, base.seed), strict=True))
    n = found.match_items

    def jaccard(one, two):
        p, q = (expected(fires.sum(0), len(fires), n) for fires in (one, two))
        return (p * q).sum() / (p.sum() + q.sum() - (p * q).sum())

    part = found.layers["2"]
    fires = {name: plain.fires(name, 2) for name in sets.items}
    null = {name: np.array([plain.codes(ids.tolist(), 2)[-1] > 0 for ids in dealt[name].ids]) for name in dealt}
    for q in part.pairs:
        assert q.null_jaccard == pytest.approx(jaccard(null[q.a], null[q.b]), rel=1e-12)
        cross = (jaccard(fires[q.a], null[q.b]) + jaccard(null[q.a], fires[q.b])) / 2
        assert q.cross_null == pytest.approx(cross, rel=1e-12)
    for b in part.benchmarks:
        assert b.null_features == pytest.approx(expected(null[b.name].sum(0), b.items, n).sum(), rel=1e-12)


def test_forms_of_one_set_lie_together_and_copies_cannot_be_told_apart(base, sets):
    """A benchmark, its copy, and other text: the copy shares everything, more than one population would."""
    sums = [{"prompt": f"What is {3 * i} + {i}?"} for i in range(16)]
    files = (
        lines(sets.root / "one.jsonl", sums),
        lines(sets.root / "copy.jsonl", sums),
        str(sets.root / "plain.jsonl"),
    )
    config = replace(base, benchmarks=files, sensitivity=False, html=False, layers=(), sae=base.sae[:1])
    (part,) = run(replace(config, out=sets.root / "copies", permutations=99)).layers.values()
    copy, *far = part.pairs
    assert (copy.jaccard, copy.overlap_min, copy.p_one_population) == (1.0, 1.0, 1.0)
    assert copy.relative > 0.95
    for pair in far:
        assert pair.p_one_population == 0.01 and pair.relative < 0.7
        assert pair.matched_jaccard < copy.matched_interval.low
    assert {part.merges[0][0], part.merges[0][1]} == {0, 1}


# --- input -----------------------------------------------------------------------------------------------


def write(tmp_path, rows, name="b.jsonl"):
    return lines(tmp_path / name, rows)


def test_templates_prefix_answer_and_samples(tmp_path):
    rows = [{"q": f"Question {i}?", "choices": ["yes", "no"], "answer": "yes"} for i in range(12)]
    path = write(tmp_path, rows)
    (tmp_path / "shots.txt").write_text("Q: 1?\nA: yes\n\n")
    config = CoverageConfig(
        (f"set={path}",), template="Q: {q}\\n{choices}\\nA:", prefix_file=tmp_path / "shots.txt", answer_field="answer"
    )
    (benchmark,) = gather(config)
    assert benchmark.name == "set"
    assert benchmark.items[1].text == "Q: 1?\nA: yes\n\nQ: Question 1?\nyes\nno\nA: yes"
    small, large = (gather(replace(config, max_items=n, seed=4))[0] for n in (3, 7))
    assert (len(small.items), small.sampled_from) == (3, 12)
    assert set(small.items) < set(large.items)
    assert {i.row for i in gather(replace(config, max_items=3, seed=5))[0].items} != {i.row for i in small.items}
    mixed = replace(config, benchmarks=(path, f"other={path}"), template_of=("other={answer}!",), field_of=("b=q",))
    first, second = gather(replace(mixed, prefix_file=None, answer_field=None))
    assert (first.items[0].text, second.items[0].text) == ("Question 0?", "yes!")


def test_duplicates_and_empty_rows_are_counted(tmp_path):
    rows = [{"prompt": text} for text in ("a b", "c d", "a b", " ", "a b")] + [{"prompt": ""}]
    path = write(tmp_path, rows)
    (kept,) = gather(CoverageConfig((path,)))
    (dropped,) = gather(CoverageConfig((path,), drop_duplicates=True))
    assert (len(kept.items), kept.duplicates, kept.dropped, kept.empty) == (4, 2, 0, 2)
    assert (len(dropped.items), dropped.duplicates, dropped.dropped) == (2, 2, 2)
    assert [item.row for item in dropped.items] == [0, 1]


def test_long_items_are_cut_where_told(base, plain, sets, tmp_path):
    """The last token is that of the whole item, or the one after which it was cut."""
    config = replace(base, sensitivity=False, null=False, html=False, layers=(), sae=base.sae[:1], resamples=0)
    long = [f"{t} {t[::-1]}" for t in sets.items["plain"]]
    assert min(len(plain.tokenizer(t).input_ids) for t in long) > CONTEXT
    path = write(tmp_path, [{"prompt": text} for text in [*long, "short text here"]])
    for truncate, span in (("left", (-CONTEXT, None)), ("right", (0, CONTEXT))):
        result = run(replace(config, benchmarks=(path,), truncate=truncate, out=tmp_path / truncate))
        facts = result.benchmarks[0]
        assert facts.truncated == len(long) == 9
        assert facts.longest == max(len(plain.tokenizer(t).input_ids) for t in long)
        counts = {int(r["feature"]): int(r["b"]) for r in csv.DictReader((tmp_path / truncate / "features.csv").open())}
        fires = np.array([plain.codes(t, 0, *span)[-1] > 0 for t in [*long, "short text here"]]).sum(0)
        assert counts == {int(j): int(fires[j]) for j in np.flatnonzero(fires)}


def test_feature_stores_give_what_their_text_gives(base, tiny, sets, tmp_path):
    for name in ("plain", "sums"):
        encode(
            EncodeConfig(
                (str(sets.root / f"{name}.jsonl"),), out=tmp_path / name, field="prompt", model=tiny.model,
                sae=(tiny.saes[2],), layers=(2,), context_size=512, device="cpu", dtype="float32",
            )
        )  # fmt: skip
    config = replace(
        base, layers=(2,), sae=(tiny.saes[2],), context_size=512, sensitivity=False, html=False, null=False
    )
    stores = (str(tmp_path / "plain"), str(tmp_path / "sums"))
    from_stores = run(replace(config, benchmarks=stores, out=tmp_path / "s"))
    files = tuple(str(sets.root / f"{name}.jsonl") for name in ("plain", "sums"))
    from_files = run(replace(config, benchmarks=files, out=tmp_path / "f"))
    mixed = run(replace(config, benchmarks=(stores[0], files[1]), out=tmp_path / "m", null=True))
    bare = [[replace(b, exclusive=()) for b in result.layers["2"].benchmarks] for result in (from_stores, from_files)]
    assert bare[0] == bare[1] and from_stores.layers["2"].pairs == from_files.layers["2"].pairs
    for one, two in zip(from_stores.layers["2"].benchmarks, from_files.layers["2"].benchmarks, strict=True):
        assert [[i.row for i in f.items] for f in one.exclusive] == [[i.row for i in f.items] for f in two.exclusive]
    assert mixed.layers["2"].pairs[0].matched_jaccard == from_files.layers["2"].pairs[0].matched_jaccard
    assert mixed.layers["2"].pairs[0].null_jaccard is not None
    with pytest.raises(InputError, match="has no layer 0; it has 2"):
        run(replace(config, benchmarks=stores, layers=(0,), out=tmp_path / "n"))
    with pytest.raises(InputError, match="other weights of the SAE of layer 2"):
        run(replace(config, benchmarks=(stores[0], files[1]), sae=(tiny.saes[0],), allow_mismatch=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field": "question"}, "has no field 'question'. Its fields: prompt, answer"),
        ({"template": "{question}"}, "has no field 'question'"),
        ({"answer_field": "label"}, "has no field 'label'.*--answer-field"),
        ({"benchmarks": ("FILE", "FILE")}, "Two benchmarks are called 'b'"),
        ({"benchmarks": ("EMPTY",)}, "The benchmark empty .* is empty: the text of all its 2 rows"),
        ({"benchmarks": ("FOLDER",)}, "no feature store"),
        ({"benchmarks": ("nowhere.jsonl",)}, "There is no file"),
        ({"field_of": ("c=answer",)}, "--field-of 'c=answer'.*names?: b"),
        ({"prefix_file": Path("nowhere")}, "--prefix-file nowhere cannot be read"),
    ],
)
def test_bad_input_is_refused(tmp_path, change, message):
    path = write(tmp_path, [{"prompt": f"item {i}", "answer": "x"} for i in range(4)])
    empty = write(tmp_path, [{"prompt": ""}, {"prompt": "  "}], "empty.jsonl")
    names = {"FILE": path, "EMPTY": empty, "FOLDER": str(tmp_path)}
    given = tuple(names.get(name, name) for name in change.pop("benchmarks", ("FILE",)))
    with pytest.raises(InputError, match=message):
        gather(CoverageConfig(given, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subset": 0.0}, "--subset"),
        ({"threshold": -1.0}, "--threshold"),
        ({"threshold": math.nan}, "--threshold"),
        ({"top_n": 0}, "--top-n is 0"),
        ({"control": "b"}, "--control was given without --scores"),
        ({"benchmarks": ()}, "No benchmark"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        CoverageConfig(**({"benchmarks": ("b.jsonl",)} | change))


def test_beyond_half_of_the_smallest_benchmark_there_are_no_intervals(base):
    full = run(replace(base, match_items=9, html=False, sensitivity=False))
    assert full.layers["0"].pairs[0].matched_interval is None
    assert any("no intervals" in note for note in full.notes)


# --- scores of models ------------------------------------------------------------------------------------


def table(path, head, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
    return path


def test_models_that_lack_scores_are_named_and_left_out(tmp_path):
    rows = [("m1", 0.1, 0.2, 5), ("m2", 0.2, "", 5), ("m3", 0.3, 0.1, 5), ("m4", 0.5, 0.6, 5)]
    path = table(tmp_path / "scores.csv", ("model", "a", "b", "other"), rows)
    scores = read_scores(path, ("a", "b", "c"))
    assert scores.models == ("m1", "m3", "m4") and scores.values.tolist() == [[0.1, 0.2], [0.3, 0.1], [0.5, 0.6]]
    assert "1 models lack a score in scores.csv and are left out: m2" in scores.notes
    assert "scores.csv has no scores for: c" in scores.notes
    with pytest.raises(InputError, match="has 2 models with a score on every benchmark \\(1 lack a score: m2\\)"):
        read_scores(table(tmp_path / "few.csv", ("model", "a", "b"), [row[:3] for row in rows[:3]]), ("a", "b"))
    with pytest.raises(InputError, match="needs at least two"):
        read_scores(path, ("a", "x"))
    with pytest.raises(InputError, match="where a score is expected"):
        read_scores(table(tmp_path / "word.csv", ("model", "a", "b"), [("m1", "good", 0.1)]), ("a", "b"))


def test_scores_stand_beside_features(base, found, sets, tmp_path):
    generator = np.random.default_rng(0)
    scores = generator.random((6, 3))
    path = table(
        tmp_path / "scores.csv", ("model", *sets.items), [(f"m{i}", *row) for i, row in enumerate(scores.tolist())]
    )
    each = []
    for name, items in sets.items.items():
        rows = [[f"item {i}", *generator.integers(0, 2, 4).tolist()] for i in range(len(items))]
        each.append(f"{name}={table(tmp_path / f'{name}.csv', ('id', 'm1', 'm2', 'm3', 'm4'), rows)}")
    config = replace(base, sensitivity=False, html=False, null=False, out=tmp_path / "out")
    result = run(replace(config, scores=path, control="sums", item_scores=tuple(each)))
    part = result.layers["2"].performance
    rho = np.corrcoef(scores.T)
    assert [pair.similarity for pair in part.pairs] == pytest.approx([rho[0, 1], rho[0, 2], rho[1, 2]], rel=1e-12)
    held = (rho[0, 1] - rho[0, 2] * rho[1, 2]) / math.sqrt((1 - rho[0, 2] ** 2) * (1 - rho[1, 2] ** 2))
    assert [pair.partial for pair in part.pairs] == [pytest.approx(held, rel=1e-9), None, None]
    overlap = [pair.overlap_min for pair in found.layers["2"].pairs]
    (direct,) = [a for a in part.agreements if a.overlap == "all items" and not a.partial]
    assert direct.pearson == pytest.approx(np.corrcoef(overlap, rho[np.triu_indices(3, 1)])[0, 1], rel=1e-9)
    assert [r.models for r in part.redundancies] == [4, 4, 4] and -1 <= part.redundancy_spearman <= 1
    hats = [b.redundancy for b in found.layers["2"].benchmarks]
    assert [r.features for r in part.redundancies] == hats
    with pytest.raises(InputError, match="--control other is no benchmark with scores"):
        run(replace(config, scores=path, control="other"))
    with pytest.raises(InputError, match=r"has 9 rows, and .*upper\.jsonl has 12"):
        run(replace(config, item_scores=(f"upper={tmp_path / 'plain.csv'}",)))
    with pytest.raises(InputError, match="NAME=TABLE is accepted"):
        run(replace(config, item_scores=("nothing",)))


# --- report ----------------------------------------------------------------------------------------------


def test_page_and_text(found):
    text = coverage_text.render(found)
    page = Path(found.html).read_text()
    assert "plain: 9 items" in text and f"wrote {found.html}" in text
    for layer in found.layers:
        assert f"layer {layer}:" in text and f"<h2>Layer {layer}</h2>" in page
    assert page.count('<svg class="map"') == 6 and page.count('class="branch"') == 4
    assert "<script" not in page and " src=" not in page and page.count(" href=") == 1  # the empty icon
    best = max(found.layers["2"].pairs, key=lambda pair: pair.matched_jaccard)
    assert f"{best.a}, {best.b}: size-matched Jaccard {best.matched_jaccard:.3f}" in page
    assert coverage_page.write(replace(found, html=None)) is None


def test_one_benchmark_alone_has_no_pairs(base, sets):
    result = run(replace(base, benchmarks=base.benchmarks[:1], out=sets.root / "alone"))
    part = result.layers["0"]
    assert (part.pairs, part.merges, result.sensitivity) == ((), (), ())
    assert "Families" not in coverage_page.page(result) and "Saturation" in coverage_page.page(result)


def test_benchmarks_that_fire_nothing_have_no_figures(base, sets):
    result = run(replace(base, threshold=1e9, layers=(), sae=base.sae[:1], out=sets.root / "silent"))
    part = result.layers["0"]
    assert part.suite_features == 0
    for b in part.benchmarks:
        assert (b.features, b.silent, b.subset) == (0, b.items, 0)
        assert (b.redundancy, b.matched_redundancy, b.covered, b.random_subset) == (None,) * 4
    for pair in part.pairs:
        assert (pair.jaccard, pair.matched_jaccard, pair.relative, pair.p_one_population) == (None,) * 4
    json.dumps(to_json(result), allow_nan=False)
    assert "–" in coverage_page.page(result) and "–" in coverage_text.render(result)
