"""Sources: cleaning, sampling that repeats, steering that acts, an endpoint that fails, functions."""

import http.server
import json
import sys
import threading

import pytest
import torch

from qscope.endpoint import Endpoint, EndpointError
from qscope.errors import InputError
from qscope.sae import SAE
from qscope.synthesis.sampling import LocalText, Sampling
from qscope.synthesis.sources import (
    ChatSource,
    ContinueSource,
    EndpointSource,
    FunctionSource,
    Request,
    SteeredSource,
    cleaned,
)
from qscope.synthesis.targets import Target

SHORT = Sampling(max_new_tokens=8)


@pytest.mark.parametrize(
    "text, found",
    [
        ("\n - 'a text' \nmore", "a text"),
        ("3) it is", "it is"),
        ("Text: “so”", "so"),
        ("'tis so", "'tis so"),
        ("...", ""),
        ("", ""),
        ("2001 was a year", "2001 was a year"),
    ],
)
def test_cleaned(text, found):
    assert cleaned(text) == found


def test_an_answer_may_have_lines():
    assert cleaned("a\n\nb", one_line=False) == "a\nb"


@pytest.fixture(scope="module")
def local():
    """A 2-block Llama of width 32 with a tokenizer of bytes, its last token the end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<|end|>": 256}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    return LocalText(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


def test_sampling_repeats_for_a_seed_and_leaves_the_global_state(local):
    before = torch.random.get_rng_state()
    first = local.continued(["ab", "abcdef"], SHORT, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert local.continued(["ab", "abcdef"], SHORT, seed=1) == first
    assert local.continued(["ab", "abcdef"], SHORT, seed=2) != first


def test_a_line_ends_at_a_line_break(local, monkeypatch):
    """Where the model would put a line break at every third place, one line has at most that one."""
    (line_break,) = local.breaks
    assert local.tokenizer.decode([line_break]) == "\n"
    whole = local.model.forward

    def forward(*args, **kwargs):
        found = whole(*args, **kwargs)
        turn[0] += 1
        found.logits[..., line_break] += 1e6 if turn[0] % 3 == 0 else -1e6
        return found

    monkeypatch.setattr(local.model, "forward", forward)
    for one_line, breaks in ((True, 1), (False, 2)):
        turn = [0]
        (text,) = local.continued(["ab"], Sampling(8, temperature=0.0), 0, one_line=one_line)
        assert text.count("\n") == breaks, (one_line, text)
        assert not one_line or text.endswith("\n")


def test_prompts_that_do_not_fit_and_a_missing_template_are_explained(local):
    with pytest.raises(InputError, match="made for 128"):
        local.continued(["a" * 125], SHORT, 0)
    with pytest.raises(InputError, match="no chat template"):
        ChatSource(local, SHORT).write([Request("hello")], 0)


def test_continue_goes_on_from_the_passages_of_the_target_only(local):
    target = Target(1, 3)
    asked = []
    local_continued = local.continued

    class Spy(LocalText):
        def continued(self, prompts, *args, **kwargs):
            asked.extend(prompts)
            return local_continued(prompts, *args, **kwargs)

    source = ContinueSource(Spy(local.model, local.tokenizer, "tiny"), SHORT)
    texts = source.write(
        [Request("", ("fires",), ("other",), target), Request("", (), ("other",), target), Request("", (), ("other",))],
        0,
    )
    assert asked == ["- fires\n-", "-", "- other\n-"]
    assert texts[1] == ""  # nothing to go on


def test_steering_acts_on_each_row_with_its_own_feature(local):
    """A decoder row that equals the output row of a byte, strong enough, makes that byte the greedy choice.

    From the second token on: the first one is predicted at the last token of the prompt, which is not steered.
    """
    weight = local.model.lm_head.weight.detach()
    rows = torch.nn.functional.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)), dim=1)
    wanted = [local.tokenizer(c)["input_ids"][0] for c in "xq"]
    for feature, token in enumerate(wanted):
        rows[feature] = torch.nn.functional.normalize(weight[token] - weight.mean(0), dim=0)
    sae = SAE(rows, rows.clone(), torch.zeros(64), torch.zeros(32), k=4).requires_grad_(False)
    source = SteeredSource(local, Sampling(4, temperature=0.0), {1: sae}, strength=1.0)
    requests = [Request("", (), ("ab",), Target(1, feature, scale=1000.0)) for feature in (0, 1)]
    assert [text[-3:] for text in source.write(requests, 0)] == ["xxx", "qqq"]
    plain = source.write([Request("", (), ("ab",)), Request("", (), ("ab",))], 0)
    assert plain[0] == plain[1] and not plain[0].endswith("xxx")


class _Fake(http.server.BaseHTTPRequestHandler):
    answers: list = []  # noqa: RUF012  (set by each test)
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        self.seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        answer = self.answers.pop(0) if self.answers else 500
        if isinstance(answer, int):
            self.send_error(answer)
            return
        body = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = http.server.HTTPServer(("127.0.0.1", 0), _Fake)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Fake.seen = []
    yield Endpoint(f"http://127.0.0.1:{server.server_port}/v1", "fake", retries=2, sleep=lambda _: None)
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_again_counted_and_given_up(endpoint):
    source = EndpointSource(endpoint, SHORT)
    _Fake.answers = [500, "- a text", "...", "", "“at last”", "", "", ""]
    assert source.write([Request("write"), Request("write")], 0) == ["a text", "at last"]
    assert (endpoint.counts.failures, endpoint.counts.nonsense, endpoint.counts.answers) == (1, 2, 4)
    assert source.write([Request("write")], 0) == [""]  # three times nothing: an attempt without a text
    assert endpoint.counts.given_up == 1
    with pytest.raises(EndpointError, match="3 attempts"):
        source.write([Request("write")], 0)


def test_a_function_writes(tmp_path, monkeypatch):
    (tmp_path / "planted_source.py").write_text(
        "def write(prompt, target): return f'{prompt} for {target.feature}' if target else ' any \\n text '\n"
        "def wrong(prompt, target): return 3\n"
        "value = 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = FunctionSource.load("python:planted_source:write")
    assert source.write([Request("this", target=Target(1, 7)), Request("that")], 0) == ["this for 7", "any text"]
    with pytest.raises(InputError, match="gave int"):
        FunctionSource.load("python:planted_source:wrong").write([Request("")], 0)
    for name in ("python:planted_source:absent", "python:absent_module:f", "python:", "python:planted_source:value"):
        with pytest.raises(InputError, match="cannot be used"):
            FunctionSource.load(name)
    sys.modules.pop("planted_source", None)
