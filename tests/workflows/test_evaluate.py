"""`qscope evaluate` on a tiny model: every figure against a plain run, window by window, dense and in float64."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from qscope.cli import to_json
from qscope.data import Windows
from qscope.errors import InputError, ModelError, StorageError
from qscope.evaluation.exactness import Exactness
from qscope.evaluation.fidelity import LEFT_OUT, ORDINARY, SET_ASIDE
from qscope.report import evaluate_page, evaluate_text, page_file
from qscope.sae import SAE, SAECard
from qscope.workflows import evaluate, evaluate_pass
from qscope.workflows.evaluate import EvaluateConfig, EvaluateResult, LayerResult, run

FIT, LOSS, TOKENS, CONTEXT = 500, 200, 330, 48


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("corpus") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:40]))
    return str(path)


@pytest.fixture(scope="module")
def base(tiny, corpus):
    return EvaluateConfig(
        text=(corpus,), tokens=TOKENS, fit_tokens=FIT, loss_tokens=LOSS, recall_tokens=50, model=tiny.model,
        sae=tuple(tiny.saes.values()), layers=(0, 2), context_size=CONTEXT, device="cpu", dtype="float32",
        batch_tokens=256,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(base):
    return run(base)


@pytest.fixture(scope="module")
def plain(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval().requires_grad_(False)
    return SimpleNamespace(model=model, tokenizer=AutoTokenizer.from_pretrained(tiny.model))


def windows_by_hand(plain, texts, bos):
    """[(part, ids)] of the same text: whole documents cut into contexts, then into the parts."""
    left, out, avoid, measured = {"fit": FIT, "measure": TOKENS}, [], None, 0
    for number, text in enumerate(texts[:40]):
        ids = plain.tokenizer(text, add_special_tokens=False).input_ids
        for at in range(0, len(ids), CONTEXT):
            if not left or number == avoid:
                break
            name = next(iter(left))
            window = ids[at : at + CONTEXT][: left[name]]
            left[name] -= len(window)
            if not left[name]:
                del left[name]
                avoid = number if name == "fit" else avoid
            part = "fit" if name == "fit" else "loss" if measured < LOSS else "rest"
            measured += len(window) if part != "fit" else 0
            out.append((part, [plain.tokenizer.bos_token_id] * bos + window))
    assert not left and out[-1][0] == "rest"
    return out


class Stub(nn.Module):
    """Stands in a block's place and puts out what it is given."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, *_args, **_kwargs):
        return self.output


def by_hand(plain, texts, sae, layer, bos, ordinary_only):
    """FVU, losses and counts from single windows, without hooks: the block is exchanged for a stub."""
    blocks = plain.model.model.layers
    parts = windows_by_hand(plain, texts, bos)
    kept = {"fit": [], "loss": [], "rest": []}
    for name, ids in parts:
        seen = []
        handle = blocks[layer].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        logits = plain.model(torch.tensor([ids])).logits[0]
        handle.remove()
        kept[name].append((ids, seen[0][0], logits))
    take = slice(bos, None)  # a BOS is not measured
    # No sinks in this model: without a BOS the first token is set aside.
    ordinary = slice(1, None) if ordinary_only else take
    fitted = torch.cat([x[ordinary] for _, x, _ in kept["fit"]]).double()
    mean = fitted.mean(0)
    basis = torch.linalg.svd(fitted - mean, full_matrices=False).Vh[: sae.k]
    pca = lambda x: (mean + (x.double() - mean) @ basis.T @ basis).float()  # noqa: E731
    x = torch.cat([x[ordinary] for name in ("loss", "rest") for _, x, _ in kept[name]])
    variance = (x.double() - x.double().mean(0)).square().sum()
    losses = {name: [] for name in ("clean", "sae", "zero", "mean", "pca")}
    divergence = {name: [] for name in ("sae", "zero", "mean", "pca")}
    for ids, own, logits in kept["loss"]:
        if len(ids) < 2:
            continue
        clean, targets = logits[:-1].double().log_softmax(1), torch.tensor(ids[1:])
        losses["clean"].append(-clean.gather(1, targets[:, None]))
        values = {"sae": sae(own), "zero": own * 0, "mean": mean.float().expand_as(own), "pca": pca(own)}
        for name, value in values.items():
            new = own.clone()
            new[ordinary] = value[ordinary]
            block, blocks[layer] = blocks[layer], Stub(new[None])
            spliced = plain.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(1)
            blocks[layer] = block
            losses[name].append(-spliced.gather(1, targets[:, None]))
            divergence[name].append((clean.exp() * (clean - spliced)).sum(1))
    return SimpleNamespace(
        tokens=len(x),
        fvu=float((sae(x).double() - x.double()).square().sum() / variance),
        pca_fvu=float((pca(x).double() - x.double()).square().sum() / variance),
        ce={name: float(torch.cat(part).mean()) for name, part in losses.items()},
        kl={name: float(torch.cat(part).mean()) for name, part in divergence.items()},
        predictions=sum(map(len, losses["clean"])),
    )


@pytest.mark.parametrize("bos", [False, True], ids=["no bos", "bos"])
def test_figures_equal_a_plain_run_of_each_window(tiny, texts, plain, base, found, bos):
    result = run(replace(base, bos=True)) if bos else found
    for layer in (0, 2):
        own, sae = result.layers[str(layer)], SAE.from_pretrained(tiny.saes[layer])
        for fit, loss, only in ((own.ordinary, own.splice_ordinary, True), (own.all, own.splice_all, False)):
            want = by_hand(plain, texts, sae, layer, bos, only)
            assert (fit.tokens, loss.tokens) == (want.tokens, want.predictions)
            # Single windows and padded batches round float32 activations differently.
            assert fit.fvu == pytest.approx(want.fvu, rel=1e-5)
            assert fit.pca_fvu == pytest.approx(want.pca_fvu, rel=1e-5)
            for name, value in want.ce.items():
                assert getattr(loss, f"ce_{name}") == pytest.approx(value, rel=1e-5), name
            for name, value in want.kl.items():
                assert getattr(loss, f"kl_{name}") == pytest.approx(value, rel=1e-4), name
            ce = want.ce
            recovered = (ce["zero"] - ce["sae"]) / (ce["zero"] - ce["clean"])
            assert loss.loss_recovered == pytest.approx(
                recovered, abs=2e-5 * abs(ce["sae"] / (ce["zero"] - ce["clean"]))
            )
        counts = own.tokens
        assert (counts.measured, counts.fitted, counts.nan_rows, counts.sinks) == (TOKENS, FIT, 0, 0)
        assert own.all.tokens == TOKENS and own.ordinary.tokens == TOKENS - counts.first
        assert (counts.first == 0) == bos
        assert own.exactness.tokens == 50 and own.exactness.recall_exact == 1


def test_a_perfect_sae_loses_nothing(base, tmp_path):
    """relu(x) - relu(-x) = x to the bit: FVU 0, the model's logits unchanged, everything recovered."""
    eye = torch.eye(32)
    rows = torch.cat([eye, -eye])
    sae = SAE(rows, rows.clone(), torch.zeros(64), torch.zeros(32), k=64, card=SAECard(layer=1))
    path = sae.save(tmp_path / "perfect")
    own = run(replace(base, sae=(str(path),), layers=(1,))).layers["1"]
    for fit, loss in ((own.ordinary, own.splice_ordinary), (own.all, own.splice_all)):
        assert (fit.fvu, fit.explained_variance, fit.mse) == (0.0, 1.0, 0.0)
        assert (loss.ce_increase, loss.kl_sae, loss.ce_increase_error) == (0.0, 0.0, 0.0)
        assert (loss.loss_recovered, loss.loss_recovered_mean, loss.kl_recovered) == (1.0, 1.0, 1.0)
        assert loss.ce_zero > loss.ce_clean
    assert own.all.l0 == pytest.approx(32, abs=0.1)


def test_the_same_run_gives_the_same_bits_and_layers_do_not_disturb_each_other(base, found, tiny):
    assert to_json(run(base)) == to_json(found)
    alone = run(replace(base, sae=(tiny.saes[2],), layers=(2,)))
    assert to_json(alone.layers["2"]) == to_json(found.layers["2"])


def test_without_the_shortcut_the_figures_are_the_same(base, found, monkeypatch):
    monkeypatch.setattr(evaluate_pass.Pass, "shortcut_holds", lambda *_: False)
    assert to_json(run(base)) == to_json(found)


def test_shortcut_is_taken_here_and_not_where_it_changes_the_logits(base, tiny, monkeypatch):
    taken = []
    honest = evaluate_pass.Pass.shortcut_holds
    monkeypatch.setattr(evaluate_pass.Pass, "shortcut_holds", lambda *args: taken.append(honest(*args)) or taken[-1])
    run(base)
    assert taken == [True, True]
    taken.clear()
    # Blocks that are passed over disturb what comes later: the clean logits are not met.
    monkeypatch.setattr(evaluate_pass, "spliced", lambda block, hidden: _disturbed(block, hidden))
    run(replace(base, sae=(tiny.saes[0],), layers=(0,)))
    assert taken == [False]


def _disturbed(block, hidden):
    from qscope.evaluation.splice import spliced

    return spliced(block, hidden * 1.5)


def test_no_loss_and_no_recall_where_not_asked_for(base, found):
    own = run(replace(base, loss_tokens=0, recall_tokens=0)).layers["0"]
    assert own.splice_all is None and own.exactness is None
    # The same tokens, in other batches.
    assert own.tokens.first == found.layers["0"].tokens.first
    assert own.ordinary.densities == found.layers["0"].ordinary.densities
    assert own.ordinary.fvu == pytest.approx(found.layers["0"].ordinary.fvu, rel=1e-5)


def test_against_itself_and_another(base, tiny):
    result = run(replace(base, loss_tokens=0, sae=(tiny.saes[0],), layers=(0,), against=(tiny.saes[0],)))
    own = result.layers["0"].stability
    assert own.matched_cosine == pytest.approx(1, abs=1e-6) and own.matched_share == 1 and own.matched == 512
    text = evaluate_text.render(result)
    assert "greedy matching: mean cosine 1.000, 100.0 % at 0.7 or more" in text


# --- parts of the text, sinks ----------------------------------------------------------------------------


def test_parts_cut_windows_and_leave_the_document_in_which_the_fit_ends():
    first = Windows(np.array([0] * 5 + [1] * 6), np.arange(11), np.arange(11), np.array([0, 4, 5, 9, 11]))
    second = Windows(np.array([1] * 3 + [2] * 7), np.arange(10), np.arange(11, 21), np.array([0, 3, 7, 10]))
    cut = list(evaluate_pass.parts([first, second], fit=6, measure=5))
    shown = [(n, [w.token[a:b].tolist() for a, b in zip(w.starts, w.starts[1:], strict=False)]) for n, w in cut]
    assert shown == [
        ("fit", [[0, 1, 2, 3], [4], [5]]),
        ("measure", [[14, 15, 16, 17], [18]]),  # the rest of document 1, tokens 6 to 13, is passed over
    ]
    ((name, windows),) = evaluate_pass.parts([first], 0, 10)
    assert (name, windows.starts.tolist()) == ("measure", [0, 4, 5, 9, 10])


def layer_pass():
    gen = torch.Generator().manual_seed(0)
    W = torch.randn(40, 8, generator=gen)
    found = evaluate_pass.LayerPass(SAE(W, W.clone(), torch.zeros(40), torch.zeros(8), k=3), "exact", 0)
    x = torch.randn(60, 8, generator=gen)
    first = torch.zeros(60, dtype=torch.bool)
    first[::20] = True
    x[::20] *= 200
    for part in torch.arange(60).split(25):
        found.fit(x[part], first[part])
    return found, x, first


def test_sinks_first_tokens_and_nan_rows_are_told_apart_and_counted():
    found, x, first = layer_pass()
    found.finish_fit(4)
    x, first = x.clone(), first.clone()
    x[5] *= 300  # a sink that is not first
    first[6] = True  # a first token that is no sink
    x[7, 2] = torch.nan
    x[8, 2] = torch.inf
    _, group = found.measure(x, first)
    assert group[[0, 5, 6, 7, 8, 9]].tolist() == [SET_ASIDE] * 3 + [LEFT_OUT] * 2 + [ORDINARY]
    counts = found.token_counts()
    assert (counts.measured, counts.ordinary, counts.nan_rows) == (58, 53, 2)
    assert (counts.sinks, counts.first, counts.first_sinks) == (4, 4, 3)
    assert (counts.fitted, counts.fitted_ordinary) == (60, 57)
    fit = found.fidelity.fit(ordinary_only=True)
    assert fit.tokens == 53 and fit.fvu > 0
    assert counts.set_aside_variance > 0.99


def test_sinks_do_not_bend_the_ordinary_basis():
    found, x, first = layer_pass()
    found.finish_fit(4)
    own = x[~first].double()
    torch.testing.assert_close(found.bases["ordinary"].mean, own.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.bases["all"].mean, x.double().mean(0), rtol=1e-10, atol=1e-12)


# --- reports ---------------------------------------------------------------------------------------------


def test_page_and_json_hold_the_figures(base, found, tmp_path):
    result = replace(found, html=tmp_path / "new" / "page.html", out=tmp_path / "figures.json")
    assert evaluate_page.write_files(result) == [result.html, result.out]
    stored = json.loads(result.out.read_text())
    assert stored["layers"]["2"]["ordinary"]["fvu"] == found.layers["2"].ordinary.fvu
    page = result.html.read_text()
    for layer in found.layers.values():
        assert f"<td>{evaluate_page.num(layer.ordinary.fvu)}</td>" in page
        assert f"<td>{evaluate_page.num(layer.splice_all.loss_recovered)}</td>" in page
    assert "<h2>Suite</h2>" in page and page.count("<svg") == 2 + 2 * 3
    assert "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "new"]


def test_names_on_the_page_are_text(found):
    hostile = replace(found.layers["0"], sae="<img src=x onerror=alert(1)>\n\u202e", mismatch="<b>")
    page = evaluate_page.page(replace(found, model="<script>", layers={"0": hostile}))
    assert "<img" not in page and "<script" not in page and "<b>" not in page and "\u202e" not in page


def test_a_failed_write_leaves_the_old_file(found, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def refuse(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(page_file.os, "replace", refuse)
    with pytest.raises(StorageError, match=r"No space left.*--html"):
        evaluate_page.write_files(replace(found, html=path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_text_has_a_table_for_a_suite(found):
    text = evaluate_text.render(found)
    own = found.layers["0"]
    assert (
        text.splitlines()[2].split()[:4] == ["layer", "FVU", "PCA", "L0"]
        and f"FVU {evaluate_page.num(own.ordinary.fvu)} (explained variance" in text
    )
    assert f"{own.tokens.measured:,} tokens: {own.tokens.ordinary:,} ordinary, 0 attention sinks" in text
    assert "recall  exact 1.000000" in text


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.0, "0.0000"), (1e-7, "1e-07"), (0.12345, "0.1235"), (12.3456, "12.346"),
                         (123456.7, "123,457"), (-2.5, "-2.5000")],
)  # fmt: skip
def test_numbers(value, shown):
    assert evaluate_page.num(value) == shown


# --- only exactness, refusals ----------------------------------------------------------------------------


def test_exactness_alone(base):
    result = run(replace(base, exactness=True, tokens=70))
    assert list(result.layers) == ["0", "2"] and result.exit_status == 0
    own = result.layers["2"]
    assert own.exactness.tokens == 70 and own.ordinary is None and own.tokens is None
    assert "70 tokens against float64 scores" in evaluate_text.render(result)


def test_a_missing_feature_is_a_fault():
    wrong = Exactness(9, 0, 0.857143, 0.9, 0, 7.0, 7, 0, None, 300, 7)
    layer = LayerResult("sae", 24, 300, 7, exactness=wrong)
    result = EvaluateResult("model", {"3": layer}, {})
    assert result.exit_status == 1
    assert "exact 0.857143" in evaluate_text.render(result)
    assert replace(result, layers={"3": replace(layer, exactness=replace(wrong, nan_rows=9))}).exit_status == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(tokens=0), "--tokens is 0"),
        (dict(loss_tokens=-1), "--loss-tokens is -1"),
        (dict(exactness=True, against=("x",)), "--exactness does only"),
    ],
)
def test_refuses(options, word):
    with pytest.raises(InputError, match=word):
        EvaluateConfig(**options)


def test_refuses_too_little_text_and_another_width(base, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A text of few words. " * 20)
    with pytest.raises(InputError, match=r"The text ended after .* fewer --fit-tokens"):
        run(replace(base, text=(str(short),)))
    with pytest.raises(InputError, match="rank 8 at layer 0 was to be fitted on 7 ordinary tokens"):
        run(replace(base, fit_tokens=8))
    rows = torch.eye(16)
    narrow = SAE(rows, rows.clone(), torch.zeros(16), torch.zeros(16), k=2).save(tmp_path / "narrow")
    with pytest.raises(ModelError, match="width 16 for layer 0"):
        run(replace(base, against=(str(narrow),)))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="ended after 0 tokens"):
        run(replace(base, text=(str(tmp_path / "empty.txt"),)))
    with pytest.raises(InputError, match="holds no text"):
        run(replace(base, exactness=True, text=(str(tmp_path / "empty.txt"),)))


def test_default_size():
    assert (EvaluateConfig().measured, EvaluateConfig(exactness=True).measured) == (16384, 1024)
    assert evaluate.TOKENS == 16384
