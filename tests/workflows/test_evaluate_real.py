"""`qscope evaluate` on the embedded model, its held-out text and the shipped SAE, at a size for a test."""

import json

import pytest

from qscope import embedded, packages
from qscope.cli import dispatch
from qscope.errors import QscopeError
from qscope.sae import SAE

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What the command writes; skipped only where no registry answers and nothing is cached."""
    try:
        embedded.default_model_path()
        text = embedded.demo_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    except QscopeError as error:
        if packages.hub_reachable():
            raise
        pytest.skip(f"needs the embedded model and text: {error}")
    folder = tmp_path_factory.mktemp("evaluation")
    options = "--tokens 768 --loss-tokens 256 --fit-tokens 1024 --recall-tokens 64 --device cpu"
    status = dispatch(
        [
            "evaluate",
            "--text",
            str(text),
            *options.split(),
            "--html",
            f"{folder}/page.html",
            "--out",
            f"{folder}/figures.json",
        ]
    )
    assert status == 0 and (folder / "page.html").stat().st_size > 5000
    return json.loads((folder / "figures.json").read_text())["layers"][str(embedded.DEFAULT_LAYER)]


def test_shipped_sae_reconstructs_and_beats_pca(figures):
    fit = figures["ordinary"]
    measured = SAE.from_pretrained(embedded.DEFAULT_SAE).card.training
    assert fit["l0"] == pytest.approx(32, abs=0.1)
    assert abs(fit["fvu"] - measured["fvu"]) < 0.06  # another sample of the same sources
    assert fit["fvu"] < 0.5 * fit["pca_fvu"]
    assert 0.9 < fit["norm_ratio"] < 1 and abs(fit["scale"] - 1) < 0.05


def test_first_tokens_are_the_sinks_and_carry_the_variance(figures):
    counts = figures["tokens"]
    assert counts["first_sinks"] == counts["first"] >= 1 and counts["sinks"] <= counts["first"] + 2
    assert counts["set_aside_variance"] > 0.9


def test_the_model_works_on_with_the_reconstruction(figures):
    loss = figures["splice_ordinary"]
    assert loss["ce_clean"] < loss["ce_sae"] < loss["ce_pca"] < loss["ce_mean"] < loss["ce_zero"]
    assert loss["loss_recovered"] > 0.97 and loss["kl_sae"] < 0.1 * loss["kl_pca"]
    assert figures["splice_all"]["ce_sae"] > loss["ce_sae"]  # it was trained without sinks
    assert figures["exactness"]["recall_exact"] == 1
