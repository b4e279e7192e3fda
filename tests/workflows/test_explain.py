"""`qscope explain` over a planted store: figures by hand, a local server as endpoint, runs that stop and go on."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qscope import endpoint
from qscope.classification.rule import Clause, FeatureRule, RuleSAE, Source
from qscope.classification.rule_file import load_rule, save_rule
from qscope.endpoint import EndpointError
from qscope.errors import InputError, StoreError
from qscope.explaining.journal import Journal, load_explanations
from qscope.report import explain_page, explain_text, inspect_page, inspect_text
from qscope.store import StoreWriter, pack_layer, shard_arrays
from qscope.store_format import ModelIdentity, SAEIdentity, StoreSettings
from qscope.workflows import inspect
from qscope.workflows.explain import ExplainConfig, run
from tests.explaining.planted_codes import BESIDE, KINGS, QUEENS, SILENT, WORDS, source
from tests.stand_in import serving

SAE_HASH = "1" * 64
SPACES = str.maketrans({" ": "\u0120", "\n": "\u010a"})


def write_store(folder: Path, sha256: str = SAE_HASH) -> Path:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({word.translate(SPACES): i for i, word in enumerate(WORDS)}, []))
    raw.decoder = decoders.ByteLevel()
    codes = source()
    values, indices, keep = codes.codes[3]
    settings = StoreSettings(
        qscope_version="0", device="cpu", model=ModelIdentity(name="tiny", sha256="0" * 64), tokenizer_sha256="0" * 64,
        saes=[SAEIdentity(layer=3, sha256=sha256, d_sae=16, k=2)], dtype="float32", precision="exact",
        context_size=64, shard_bytes=1 << 20,
    )  # fmt: skip
    with StoreWriter.open(folder, settings) as writer:
        packed = pack_layer(np.where(keep[:, None], values, 0), np.where(keep[:, None], indices, 0), 16)
        packed["flags"] |= np.where(keep, 0, 2).astype(np.uint8)
        half = len(codes.token) // 2 + 17  # within a document
        for number, rows in enumerate((slice(half), slice(half, None))):
            arrays = (getattr(codes, name)[rows] for name in ("document", "position", "token"))
            part = {name: array[rows] for name, array in packed.items()}
            writer.add(number, str(number), shard_arrays(*arrays, {3: part}))
        writer.save_tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))
        writer.complete()
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("explain") / "codes")


@pytest.fixture
def config(store, tmp_path) -> ExplainConfig:
    features = (f"3:{KINGS}", str(BESIDE), str(SILENT))
    return ExplainConfig(store, features=features, out=tmp_path / "out", html=tmp_path / "p.html")


def oracle(question: str) -> str:
    """Explains rightly, and judges by that explanation."""
    if "Explanation:" in question:
        return "Explanation: the word king"
    passage = question.split("-----")[1].casefold()
    if "<<" in passage:
        return "yes" if "<<king" in passage else "no"
    return "Yes." if " king" in passage else "No."


@pytest.fixture
def served(monkeypatch):
    with serving(oracle) as server:
        monkeypatch.setenv(endpoint.JUDGE_URL, server.base)
        monkeypatch.setenv(endpoint.JUDGE_MODEL, "oracle")
        monkeypatch.delenv(endpoint.JUDGE_KEY, raising=False)
        monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.0)
        yield server


def test_features_are_explained_without_any_model(config, monkeypatch):
    monkeypatch.delenv(endpoint.JUDGE_URL, raising=False)
    result = run(config)
    kings, beside, silent = result.explanations
    assert [one.key for one in result.explanations] == [(3, KINGS), (3, BESIDE), (3, SILENT)]
    assert kings.text.startswith('fires on "king" (100 %') and kings.text == kings.plain
    assert silent.text == "fires nowhere in these texts" and silent.scores["detection"].balanced_accuracy is None
    assert kings.scores["detection"].balanced_accuracy == kings.scores["fuzzing"].balanced_accuracy == 1.0
    assert beside.tokens[0].text == " rope" and kings.count == (source().codes[3].indices[:, 0] == KINGS).sum() - 40
    both = [kings.scores["detection"].balanced_accuracy, beside.scores["detection"].balanced_accuracy]
    assert result.scores["detection"].features == 2
    assert result.scores["detection"].balanced_accuracy == pytest.approx(sum(both) / 2, rel=1e-12)
    assert result.exit_status == 0 and result.requests == {} and "give --model" in result.notes[0]


def test_a_second_run_makes_nothing_and_other_options_make_it_again(config):
    first, again = run(config), run(config)
    assert (first.made, again.made) == (3, 0) and again.explanations == first.explanations
    other = run(dataclasses.replace(config, seed=1))
    assert other.made == 3 and other.explanations != first.explanations
    assert run(dataclasses.replace(config, judge="none")).explanations[0].scores == {}
    lines = (config.out / "explanations.jsonl").read_text().splitlines()
    assert len(lines) == 9  # the last line of a feature counts
    found = load_explanations(config.out, SAE_HASH)
    assert found[3, KINGS].made.judge == "none" and len(found) == 3


def test_an_endpoint_explains_and_judges(config, served):
    result = run(dataclasses.replace(config, features=(str(KINGS),), explainer="endpoint", judge="endpoint"))
    (one,) = result.explanations
    assert one.text == "the word king" and one.plain.startswith('fires on "king"') and one.made.explainer == "oracle"
    assert one.scores["detection"].balanced_accuracy == one.scores["fuzzing"].balanced_accuracy == 1.0
    examples = sum(s.positives + s.negatives for s in one.scores.values()) - one.scores["near"].positives
    assert result.requests["endpoint oracle"] == {
        "requests": examples + 1, "answers": examples + 1, "failures": 0, "timeouts": 0, "nonsense": 0, "given_up": 0,
    }  # fmt: skip
    shown = one.passages[0].text.replace("\n", "\u21b5")
    assert "<<" in shown and shown in served.asked[0][2]["messages"][0]["content"]


def test_failures_and_nonsense_are_retried_counted_and_survived(config, served):
    served.answers = [500, ("sleep", 0.6), "Kings.", "Explanation: the word king", "well", "hm", "dunno"]
    result = run(
        dataclasses.replace(config, features=(str(KINGS),), explainer="endpoint", judge="endpoint", timeout=0.2)
    )
    counts = result.requests["endpoint oracle"]
    assert (counts["failures"], counts["timeouts"], counts["nonsense"], counts["given_up"]) == (1, 1, 4, 1)
    detection = result.explanations[0].scores["detection"]
    assert detection.unanswered == 1 and detection.balanced_accuracy == 1.0  # of the others
    assert "1 examples unanswered" in explain_text.render(result)


def test_a_model_that_cannot_explain_leaves_the_plain_sentence_and_says_so(config, served):
    served.answers = ["Kings."] * 3
    result = run(dataclasses.replace(config, features=(str(KINGS),), explainer="endpoint"))
    (one,) = result.explanations
    assert one.text == one.plain and "never answered as it was asked to" in one.problem
    assert result.exit_status == 2 and any("3:7: oracle never" in note for note in result.notes)


def test_an_endpoint_that_goes_away_loses_one_feature_at_most(config, served):
    both = dataclasses.replace(config, features=(str(KINGS), str(QUEENS)), explainer="endpoint", retries=1)
    served.answers = ["Explanation: the word king", 503, 503]
    with pytest.raises(EndpointError, match="goes on from there"):
        run(both)
    assert set(load_explanations(config.out, SAE_HASH)) == {(3, KINGS)}
    asked = len(served.asked)
    result = run(both)
    assert result.made == 1 and len(served.asked) == asked + 1


def test_nothing_is_begun_without_the_endpoint(config, monkeypatch):
    monkeypatch.delenv(endpoint.JUDGE_URL, raising=False)
    with pytest.raises(InputError, match=r"^--judge endpoint asks another model, and none is configured"):
        run(dataclasses.replace(config, judge="endpoint"))
    assert not config.out.exists()


def test_a_run_that_is_killed_goes_on(config):
    """SIGKILL after the first line; a torn line is cut off."""
    code = (
        "import os, signal, sys; sys.path[:0] = ['.', 'kernels']\n"
        "from pathlib import Path\n"
        "from qscope.explaining import journal\n"
        "put = journal.Journal.put\n"
        "def once(self, one):\n"
        "    put(self, one)\n"
        "    with open(self.path, 'ab') as f: f.write(b'{\"layer\": 3, \"fea')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.put = once\n"
        "from qscope.workflows.explain import ExplainConfig, run\n"
        "store, out, *features = sys.argv[1:]\n"
        "run(ExplainConfig(Path(store), features=tuple(features), out=Path(out)))\n"
    )
    command = [sys.executable, "-c", code, str(config.store), str(config.out), *config.features]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert set(load_explanations(config.out, SAE_HASH)) == {(3, KINGS)}
    result = run(config)
    assert result.made == 2 and len(load_explanations(config.out, SAE_HASH)) == 3


def test_features_of_another_sae_are_refused(config, tmp_path):
    run(config)
    with pytest.raises(InputError, match=r"of another SAE \(sha256 111111111111, here 222222222222\)"):
        load_explanations(config.out, "2" * 64)
    with pytest.raises(InputError, match="of another SAE"):
        load_explanations(config.out / "explanations.jsonl", {3: "2" * 64})
    assert load_explanations(config.out, {4: "2" * 64}) == {}  # another layer is not asked for
    other = write_store(tmp_path / "other", "2" * 64)
    with pytest.raises(InputError, match="into another folder"):
        run(dataclasses.replace(config, store=other))
    with pytest.raises(InputError, match="of another SAE"):
        inspect.run(inspect.InspectConfig(other, explanations=config.out))


def test_two_at_once_and_foreign_folders_are_refused(config):
    with Journal(config.out, {3: SAE_HASH}), pytest.raises(StoreError, match="another process"):
        run(config)
    (config.out.parent / "full").mkdir()
    (config.out.parent / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a folder of explanations"):
        run(dataclasses.replace(config, out=config.out.parent / "full"))


@pytest.mark.parametrize("line", ["no json", "{}", '{"format": 9}'])
def test_what_is_no_explanation_is_refused_with_its_line(config, line):
    run(config)
    with open(config.out / "explanations.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match="no explanation in line 4"):
        load_explanations(config.out, SAE_HASH)
    with pytest.raises(InputError, match="cannot be read"):
        load_explanations(config.out / "absent", SAE_HASH)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"features": ("x",)}, "LAYER:ID"),
        ({"features": ("16",)}, "has 0 to 15"),
        ({"sample": 0}, "--sample is 0"),
        ({"timeout": float("nan")}, "--timeout is nan"),
        ({"window": 0}, "window is 0"),
        ({"rule_out": Path("r.json")}, "without --rule"),
    ],
)
def test_options_that_cannot_be(config, options, said):
    with pytest.raises(InputError, match=said):
        run(dataclasses.replace(config, **options))


def test_features_are_drawn_among_those_that_fire(config):
    result = run(dataclasses.replace(config, features=(), sample=5))
    assert [one.feature for one in result.explanations] == sorted([QUEENS, BESIDE, KINGS])


def rule(sha256: str = SAE_HASH) -> FeatureRule:
    return FeatureRule(
        clauses=(Clause(3, KINGS), Clause(3, 11, meaning="as it was")),
        classes=("royal", "other"),
        source=Source("tiny", "0" * 64, "0" * 64, (RuleSAE(3, sha256, 16, 2),), 64),
    )


def test_a_rule_gets_its_meanings(config, tmp_path):
    save_rule(rule(), tmp_path / "rule.json")
    given = {"features": (), "rule": tmp_path / "rule.json", "rule_out": tmp_path / "named.json"}
    result = run(dataclasses.replace(config, **given))
    named = load_rule(tmp_path / "named.json")
    assert [one.feature for one in result.explanations] == [KINGS, 11]
    assert [c.meaning for c in named.clauses] == [result.explanations[0].text, "fires nowhere in these texts"]
    save_rule(rule("3" * 64), tmp_path / "rule.json")
    with pytest.raises(InputError, match="fitted with an SAE for layer 3"):
        run(dataclasses.replace(config, **given))


def test_inspect_shows_them(config):
    run(config)
    shown = inspect.run(inspect.InspectConfig(config.store, explanations=config.out, html=config.html))
    meanings = {f.id: f.meaning for f in shown.features}
    assert meanings[QUEENS] is None and meanings[KINGS].detection == 1.0 and meanings[KINGS].by == "plain"
    text = inspect_text.tables(shown, 160)
    assert 'fires on "king" (100 % of its activation), as in "' in text
    page = inspect_page.page(shown)
    assert "(detection 1.00, fuzzing 1.00)" in page
    one = inspect.run(inspect.InspectConfig(config.store, explanations=config.out, feature=KINGS))
    assert "detection 1.00" in inspect_text.tables(one, 60).replace("\n", " ")
    assert json.loads(json.dumps(one.to_json()))["features"][0]["meaning"]["fuzzing"] == 1.0


def test_the_page_holds_everything_and_runs_nothing(config, served):
    hostile = "<script>alert(1)</script> << ][ \u202e"
    served.answers = [f"Explanation: {hostile}"]
    result = run(dataclasses.replace(config, features=(str(KINGS),), explainer="endpoint"))
    text = explain_text.render(result)
    page = config.html.read_text()
    assert "1 feature explained" in page and "<script" not in page and "&lt;script&gt;" in page
    assert "<mark>king</mark>" in page.casefold() and "\u202e" not in page + text
    assert page == explain_page.page(result) and str(config.html) in text
