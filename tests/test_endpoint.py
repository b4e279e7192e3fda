"""The client of an OpenAI-compatible endpoint, against a local server that fails as it is told to."""

import pytest

from qscope import endpoint
from qscope.endpoint import Endpoint, EndpointError, NonsenseError, ask
from qscope.errors import InputError
from tests.stand_in import serving

YES = {"yes": True, "no": False}


@pytest.fixture
def served():
    """A server and a client of it that notes its waits instead of sleeping."""
    with serving() as server:
        waits: list[float] = []
        client = Endpoint(server.base + "/", "planted", "word", timeout=0.3, retries=3, wait=8.0, sleep=waits.append)
        yield server, client, waits


def chat(client: Endpoint) -> str:
    return client.chat([{"role": "user", "content": "well?"}], 5)


def test_a_request_is_what_the_protocol_asks_for(served):
    server, client, waits = served
    server.answers = ["fine"]
    assert chat(client) == "fine" and waits == []
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer word"
    assert body == {
        "model": "planted",
        "messages": [{"role": "user", "content": "well?"}],
        "temperature": 0.0,
        "max_tokens": 5,
    }
    assert client.counts.as_dict() == {
        "requests": 1, "answers": 1, "failures": 0, "timeouts": 0, "nonsense": 0, "given_up": 0
    }  # fmt: skip


def test_failures_are_retried_each_time_later_and_counted(served):
    server, client, waits = served
    server.answers = [500, b"no json", "fine"]
    assert chat(client) == "fine"
    assert 4 <= waits[0] <= 8 and 8 <= waits[1] <= 16  # twice as long each time, shortened by up to half
    assert (client.counts.requests, client.counts.answers, client.counts.failures) == (3, 1, 2)


def test_the_wait_has_an_end(served):
    server, client, waits = served
    client.retries = 9
    server.answers = [503] * 9 + ["fine"]
    assert chat(client) == "fine" and max(waits) <= endpoint.LONGEST_WAIT


def test_the_endpoint_says_when_to_come_back(served):
    server, client, waits = served
    server.answers = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "9999"}), "fine"]
    assert chat(client) == "fine" and waits == [7.0, endpoint.LONGEST_WAIT]


def test_a_request_that_takes_too_long_is_counted_as_such(served):
    server, client, _ = served
    server.answers = [("sleep", 0.8), "fine"]
    assert chat(client) == "fine"
    assert (client.counts.timeouts, client.counts.failures) == (1, 0)


def test_after_all_retries_it_ends_with_what_to_do(served):
    server, client, waits = served
    server.answers = [500] * 4
    with pytest.raises(EndpointError, match=r"in 4 attempts \(HTTPError: .*500.*QSCOPE_JUDGE_URL.*goes on from there"):
        chat(client)
    assert len(waits) == 3 and client.counts.given_up == 1 and len(server.asked) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_what_will_not_go_away_is_not_tried_again(served, status):
    server, client, waits = served
    server.answers = [status]
    with pytest.raises(EndpointError, match=str(status)):
        chat(client)
    assert waits == [] and len(server.asked) == 1


@pytest.mark.parametrize(
    "body", [b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"\xff\xfe"]
)
def test_what_is_no_chat_completion_is_a_failure(served, body):
    server, client, _ = served
    server.answers = [body, "fine"]
    assert chat(client) == "fine" and client.counts.failures == 1


def test_nobody_there(served):
    _, client, waits = served
    client.base = "http://127.0.0.1:9/v1"  # the discard port
    with pytest.raises(EndpointError, match="URLError"):
        chat(client)
    assert len(waits) == 3 and client.counts.failures == 4


def test_nonsense_is_put_back_to_the_model_and_counted(served):
    server, client, _ = served
    server.answers = ["perhaps", "yes"]
    assert ask(client, "rude?", YES.get, "Answer yes or no.") is True
    again = server.asked[1][2]["messages"]
    assert [m["role"] for m in again] == ["user", "assistant", "user"]
    assert again[1]["content"] == "perhaps" and "Answer yes or no." in again[2]["content"]
    assert (client.counts.answers, client.counts.nonsense, client.counts.given_up) == (2, 1, 0)
    server.answers = ["perhaps", "who knows", "I"]
    with pytest.raises(NonsenseError, match="'I', 3 times not as it was asked to"):
        ask(client, "rude?", YES.get, "Answer yes or no.")
    assert (client.counts.nonsense, client.counts.given_up) == (4, 1)
    server.answers = ["no"]
    assert ask(client, "rude?", YES.get, "Answer yes or no.") is False  # what is read may be falsy


def test_nothing_is_sent_that_is_not_configured(served, monkeypatch):
    server, _, _ = served
    for base, model in (("", "m"), ("ftp://h/v1", "m"), ("localhost:8000", "m"), (server.base, "")):
        monkeypatch.setenv(endpoint.JUDGE_URL, base)
        monkeypatch.setenv(endpoint.JUDGE_MODEL, model)
        with pytest.raises(InputError, match=r"The test asks another model, and none .*QSCOPE_JUDGE_URL"):
            Endpoint.from_environment("The test")
    with pytest.raises(InputError, match="Accepted: the base URL"):
        Endpoint("file:///etc", "m")
    assert server.asked == []


def test_the_key_is_not_shown(served):
    assert "word" not in repr(served[1])
