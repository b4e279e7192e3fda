"""Detectors: scores that can be counted by hand, and a judge that is a local fake server."""

import http.server
import json
import sys
import threading

import pytest

from qscope import detectors
from qscope.errors import InputError


def score(detector: str, text: str, prompt: str = "") -> float:
    return detectors.parse(detector)([text], [prompt])[0]


def test_script_share_counts_letters_of_that_script_among_all_letters():
    assert score("script:Han", "我 am 你!") == 2 / 4  # two Han, two Latin letters; space and ! count neither way
    assert score("script:Latin", "我 am 你!") == 2 / 4
    assert score("script:Hiragana+Katakana", "ひカ我a") == 2 / 4
    assert score("script:Devanagari", "हिन्दी") == 1.0  # vowel signs are marks of the script, not letters
    assert score("script:Latin", "e\u0301 1 2 3") == 1.0  # the combining accent belongs to no script
    assert score("script:Han", "123 ... !") == 0.0


def test_threshold_turns_a_share_into_a_hit():
    assert score("script:Han>0.4", "我 am 你!") == 1.0
    assert score("script:Han>0.5", "我 am 你!") == 0.0  # above, not equal


def test_keywords_are_whole_words_in_any_case(tmp_path):
    assert score("keywords:king,sea lion", "The KING.") == 1.0
    assert score("keywords:king,sea lion", "a Sea Lion!") == 1.0
    assert score("keywords:king,sea lion", "kingdom, seal") == 0.0
    assert score("keywords:c++", "in C++, that") == 1.0
    (tmp_path / "words.txt").write_text("thou\n\nthee\n", encoding="utf-8")
    assert score(f"keywords:@{tmp_path / 'words.txt'}", "I see thee") == 1.0
    assert score(f"keywords:@{tmp_path / 'words.txt'}", "I see you") == 0.0


def test_regex_knows_unicode_classes():
    assert score(r"regex:\p{Han}{2}", "ab 我你") == 1.0
    assert score(r"regex:\p{Han}{2}", "我 你") == 0.0


def test_a_list_of_patterns_hits_where_one_does(tmp_path):
    (tmp_path / "patterns.txt").write_text("^a.c$\n\\d{3}\n", encoding="utf-8")
    found = detectors.parse(f"regex:@{tmp_path / 'patterns.txt'}")(["abc", "a 123", "abcd 12"], [""] * 3)
    assert found == [1.0, 1.0, 0.0]
    with pytest.raises(InputError, match="cannot be read"):
        detectors.parse("regex:@/absent/patterns.txt")


def test_a_function_gets_the_text_and_if_it_wants_the_prompt(tmp_path, monkeypatch):
    (tmp_path / "planted_detectors.py").write_text(
        "def short(text): return len(text) < 4\n"
        "def echo(text, prompt): return 0.25 if prompt in text else 0\n"
        "def wrong(text): return 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "planted_detectors", raising=False)
    assert score("python:planted_detectors:short", "abc") == 1.0
    assert score("python:planted_detectors:echo", "say abc", "abc") == 0.25
    with pytest.raises(InputError, match=r"gave 2\.0 .*from 0 to 1"):
        score("python:planted_detectors:wrong", "abc")
    with pytest.raises(InputError, match="module:function"):
        detectors.parse("python:planted_detectors:absent")


@pytest.mark.parametrize(
    "bad", ["Han", "script:", "script:Klingonese", "script:Han>2", "script:Han>x", "regex:(", "keywords:,", "taste:x"]
)
def test_what_is_not_a_detector_is_refused(bad):
    with pytest.raises(InputError):
        detectors.parse(bad)


def test_language_by_identifier_or_a_word_on_how_to_get_one():
    try:
        import py3langid  # noqa: F401  (whether it is there decides what is tested)
    except ImportError:
        with pytest.raises(InputError, match="pip install py3langid"):
            detectors.parse("language:fr")
        return
    french = "Je ne sais pas pourquoi il est parti sans rien dire à ses amis hier soir."
    assert score("language:fr", french) == 1.0
    assert score("language:fr", " ") == 0.0
    assert score("language:fr", "I do not know why he left without telling his friends last night.") == 0.0
    with pytest.raises(InputError, match="Known: "):
        detectors.parse("language:xx")


@pytest.fixture
def judge(monkeypatch):
    """A server that says yes to texts with the word rude; keeps what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            content = body["messages"][0]["content"]
            answer = "perhaps" if "unsure" in content else "Yes." if "rude words" in content else "no"
            reply = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            self.send_response(500 if "broken" in content else 200)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv(detectors.JUDGE_URL, f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv(detectors.JUDGE_MODEL, "planted")
    monkeypatch.setenv(detectors.JUDGE_KEY, "word")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_judge_is_asked_once_per_text_and_its_word_counts(judge):
    detector = detectors.parse("judge:Is it impolite?")
    assert detector.kept_as == "judge:Is it impolite? planted"
    assert detector(["some rude words", "a kind text"], ["", ""]) == [1.0, 0.0]
    assert [path for path, _, _ in judge] == ["/v1/chat/completions"] * 2
    _, key, body = judge[0]
    assert key == "Bearer word" and body["model"] == "planted" and body["temperature"] == 0
    assert "Is it impolite?" in body["messages"][0]["content"]
    with pytest.raises(InputError, match="not yes or no"):
        score("judge:Is it impolite?", "unsure")
    with pytest.raises(InputError, match="500"):
        score("judge:Is it impolite?", "broken")


def test_no_judge_is_asked_that_is_not_configured(judge, monkeypatch):
    monkeypatch.delenv(detectors.JUDGE_URL)
    with pytest.raises(InputError, match=detectors.JUDGE_URL):
        detectors.parse("judge:Is it impolite?")
    assert judge == []
