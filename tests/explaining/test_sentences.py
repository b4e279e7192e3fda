"""Sentences made by rule, prompts, and how a model's answers are read."""

from types import SimpleNamespace

import pytest

from qscope.endpoint import Counts
from qscope.errors import InputError
from qscope.explaining import prompts
from qscope.explaining.contexts import Passage, gather
from qscope.explaining.judges import ModelJudge, Verdict
from qscope.explaining.local_model import LocalModel
from qscope.explaining.sentences import model_sentence, plain_sentence
from tests.explaining.planted_codes import KINGS, SILENT, decode, source


class Scripted:
    """A model that answers from a list."""

    def __init__(self, *answers: str) -> None:
        self.name, self.counts, self.answers, self.asked = "scripted", Counts(), list(answers), []

    def chat(self, messages, max_tokens):
        self.asked.append(messages)
        return self.answers.pop(0)


@pytest.fixture(scope="module")
def evidence():
    return {one.feature: one for one in gather(source(), 3, [KINGS, SILENT])}


def test_marks_stand_around_runs_and_outside_spaces():
    passage = Passage(0, 0, 0, (0, 1, 2, 4), (0.0, 5.0, 4.0, 0.0))
    assert prompts.marked(passage, prompts.firing(passage), decode) == "the <<king King>> sat"
    assert prompts.marked(passage, [True, False, False, True], decode) == "<<the>> king King <<sat>>"
    assert prompts.marked(passage, [False] * 4, decode) == "the king King sat"


def test_text_that_looks_like_a_mark_is_taken_apart():
    passage = Passage(0, 0, 0, (1, 11, 4), (0.0, 0.0, 3.0))  # " king <<" " sat"
    assert prompts.marked(passage, prompts.firing(passage), decode) == " king < < <<sat>>"
    assert "-----\n king < < sat\n-----" in prompts.detect_question("x", passage, decode)


def test_the_plain_sentence_names_words_a_passage_and_raised_tokens(evidence):
    text = plain_sentence(evidence[KINGS], [" crown", "dom\n"], decode)
    assert text.startswith('fires on "king" (100 % of its activation), as in "')
    assert text.endswith('"; raises "crown", "dom"') and "\n" not in text
    assert "\u27e6king\u27e7" in text.casefold()
    assert plain_sentence(evidence[SILENT], [], decode) == "fires nowhere in these texts"


def test_what_a_model_is_asked_to_explain(evidence):
    text = prompts.explain_question(evidence[KINGS], [" crown"], decode)
    for passage in evidence[KINGS].strongest:
        assert prompts.marked(passage, prompts.firing(passage), decode).replace("\n", "\u21b5") in text
    assert '" king" (' in text and 'makes more likely: " crown"' in text and text.endswith(prompts.EXPLAIN_FORM)
    assert "more likely" not in prompts.explain_question(evidence[KINGS], [], decode)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Explanation: kings of  any kind.", "kings of any kind."),
        ('I think so.\n**Explanation:** "kings"\nMore.', "kings"),
        ("explanation : kings", "kings"),
        ("Kings.", None),
        ("Explanation:", None),
        ("Explanation: ...", None),
        ("Explanation: " + "k" * 301, None),
    ],
)
def test_answers_are_read_in_one_form_only(answer, text):
    assert prompts.read_explanation(answer) == text


def test_a_model_writes_the_sentence_or_is_counted(evidence):
    model = Scripted("Kings!", "Explanation: kings")
    assert model_sentence(model, evidence[KINGS], [], decode) == "kings"
    assert model.counts.nonsense == 1 and prompts.EXPLAIN_FORM in model.asked[1][-1]["content"]
    model = Scripted("a", "b", "c")
    assert model_sentence(model, evidence[KINGS], [], decode) is None and model.counts.given_up == 1


def test_a_model_judges_each_passage_with_yes_or_no(evidence):
    passage = evidence[KINGS].positives[0]
    model = Scripted("Yes.", "no, never", "dunno", "dunno", "dunno", "no")
    judge = ModelJudge(model, "kings", decode)
    assert judge.detect(passage) == Verdict(True, 1.0) and judge.detect(passage) == Verdict(False, 0.0)
    assert judge.detect(passage) is None and model.counts.nonsense == 3
    assert judge.fuzz(passage, prompts.firing(passage)) == Verdict(False, 0.0)
    assert "<<" not in model.asked[0][0]["content"] and "<<" in model.asked[-1][0]["content"]
    assert all("described so: kings" in asked[0]["content"] for asked in model.asked)


def test_a_local_model_needs_a_chat_template():
    with pytest.raises(InputError, match="no chat template"):
        LocalModel(None, SimpleNamespace(chat_template=None), "gpt2")


def test_a_local_model_answers_greedily_and_refuses_what_is_too_long():
    torch = pytest.importorskip("torch")
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(["<end>", "<user>", "yes", "no", "well", "?"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=6, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    local = LocalModel(model, tokenizer, "tiny")
    asked = [{"role": "user", "content": "well well no"}]
    ids = [4, 4, 3]
    for _ in range(5):  # the plain greedy loop
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    kept = ids[3:] if 0 not in ids[3:] else ids[3 : ids.index(0, 3)]
    assert local.chat(asked, 5) == tokenizer.decode(kept) == local.chat(asked, 5)
    assert (local.counts.requests, local.counts.answers) == (2, 2)
    with pytest.raises(InputError, match="--contexts"):
        local.chat([{"role": "user", "content": "well " * 21}], 5)
