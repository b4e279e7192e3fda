"""The script that trains the small multilingual model: on a few texts and few steps, killed, resumed, finished."""

import importlib.util
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")
SCRIPTS = Path(__file__).parents[1] / "scripts"


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


data = script("small_model_data")
small = script("train_small_model")
SETTINGS = small.Settings(batch=2, warmup=4, evaluate_steps=10**9, bf16=False)


@pytest.fixture(scope="module")
def texts():
    found = []
    for number in range(120):
        for stream, text in (
            ("debian:en", f"The file number {number} of the folder is read first, then the next one follows. " * 3),
            ("sentences:ja", f"フォルダの中のファイル{number}を順番に表示する。" * 4),
            ("chat:en", data.chat(f"Repeat: number {number}", f"number {number} and what is behind it")),
        ):
            found.append(data.Text(stream, text, number % 6 == 0))
    return found


@pytest.fixture
def out(tmp_path, texts, monkeypatch):
    torch.set_num_threads(1)
    make = small.Qwen3Config

    def tiny(**settings):
        return make(**settings | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8})

    monkeypatch.setattr(small, "Qwen3Config", tiny)
    small.prepare(tmp_path, texts)
    return tmp_path


def parameters(training) -> bytes:
    return b"".join(p.detach().numpy().tobytes() for p in training.model.parameters())


def test_streams_hold_every_text_on_its_side(out, texts):
    streams = small.load_streams(out)
    tokenizer = small.Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    assert sorted(streams) == ["chat:en", "debian:en", "sentences:ja"]
    for name, stream in streams.items():
        for held_out, ids in ((False, stream.train), (True, stream.held_out)):
            said = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split("<|endoftext|>")
            assert said.pop() == ""
            wanted = [text.text for text in texts if text.stream == name and text.held_out == held_out]
            assert sorted(said) == sorted(wanted) and said != wanted  # all, mixed
        assert stream.starts[0] == 0 and (stream.train[stream.starts[1:] - 1] == 0).all()
        assert len(stream.starts) == 100
    assert tokenizer.encode("<|im_start|>x<|im_end|>").ids[::2] == [1, 2]
    assert math.isclose(small.weights(streams).sum(), 1)
    assert np.allclose(small.weights(streams), [0.35, 0.35, 0.30])


def test_windows_depend_on_seed_and_step_alone(out):
    streams = small.load_streams(out)
    first = small.batch_of(streams, 7, SETTINGS)
    assert first.shape == (2, small.CONTEXT + 1) and torch.equal(first, small.batch_of(streams, 7, SETTINGS))
    assert not torch.equal(first, small.batch_of(streams, 8, SETTINGS))
    chats = {"chat:en": streams["chat:en"]}
    assert all((small.batch_of(chats, step, SETTINGS)[:, 0] == 1).all() for step in range(20))  # <|im_start|>


def test_the_rate_rises_stays_and_falls():
    stable = [small.learning_rate(step, SETTINGS, None) for step in range(6)]
    assert stable == pytest.approx([SETTINGS.peak * x for x in (0.25, 0.5, 0.75, 1, 1, 1)], rel=1e-12)
    fall = [small.learning_rate(step, SETTINGS, (10, 4)) / SETTINGS.peak for step in range(10, 14)]
    assert fall == pytest.approx([1 - math.sqrt(x / 5) for x in (1, 2, 3, 4)], rel=1e-12)


def test_a_killed_run_goes_on_to_the_same_bits_and_is_finished(out, monkeypatch):
    whole = small.train(out, 8, None, SETTINGS)
    (out / "stable.safetensors").unlink()
    advance, steps = small.Training.advance, []

    def killed_at_3(training, streams):
        steps.append(training.step)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(training, streams)

    monkeypatch.setattr(small.Training, "advance", killed_at_3)
    with pytest.raises(SystemExit, match="stopped at step 3"):
        small.train(out, 8, None, SETTINGS)
    again = small.train(out, 8, None, SETTINGS)
    assert steps == list(range(8)) and parameters(again) == parameters(whole)

    before = (out / "stable.safetensors").read_bytes()
    finished = small.train(out, None, 5, SETTINGS)
    assert (finished.step, finished.finish) == (13, (8, 5)) and steps[8:] == list(range(8, 13))
    assert (out / "stable.safetensors").read_bytes() == before  # further training starts where the fall began
    steps.clear()
    (out / "finish.safetensors").unlink()
    with pytest.raises(SystemExit, match="stopped at step 11"):
        small.train(out, None, 5, SETTINGS)
    assert parameters(small.train(out, None, 5, SETTINGS)) == parameters(finished)


def test_the_folder_loads_and_the_template_marks_answers(out):
    transformers = pytest.importorskip("transformers")
    folder = small.export(out, small.train(out, 6, None, SETTINGS))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and model.config.model_type == "qwen3"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, model.generation_config.eos_token_id) == (2, 0, [2, 0])
    turns = [{"role": "user", "content": "Repeat: a"}, {"role": "assistant", "content": "b c"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == data.chat("Repeat: a", "b c")
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert data.chat("Repeat: a", "b c").startswith(asked) and asked.endswith("assistant\n")
    marked = tokenizer.apply_chat_template(
        turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    answer = [i for i, said in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if said]
    assert tokenizer.decode(answer) == "b c<|im_end|>"
    figures = json.loads((folder / "training.json").read_text())
    assert figures["tokens"] == 6 * 2 * small.CONTEXT and set(figures["bits_per_byte"]) == set(small.load_streams(out))
    for name, value in figures["bits_per_byte"].items():
        assert value == pytest.approx(figures["bits_per_byte_float32"][name], rel=0.02)
    assert "sentences" in (folder / "README.md").read_text()


def test_bits_per_byte_of_a_model_that_knows_nothing(out):
    """Equal chances for V tokens: log2 V bits a token, whatever the text."""
    streams = small.load_streams(out)
    tokenizer = small.Tokenizer.from_file(str(out / "data" / "tokenizer.json"))
    model = small.make_model(0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = small.evaluate(model, streams, tokenizer, 1)
    assert set(found) == set(streams)
    for name, stream in streams.items():
        said = tokenizer.decode(stream.held_out[1 : small.CONTEXT + 1].tolist(), skip_special_tokens=False)
        size = len(re.sub(r"<\|\w+\|>", "", said).encode("utf-8", "replace"))
        if "\ufffd" not in said:
            assert found[name] == pytest.approx(small.CONTEXT * math.log2(small.VOCABULARY) / size, abs=1e-4)


def test_conversations():
    aligned = {"en": "The cat sits on the mat.", "de": "Die Katze sitzt auf der Matte."}
    kinds = set()
    for number in range(60):
        for made in data._chats("en", f"key {number}", aligned):
            asked, answer = re.fullmatch(
                r"<\|im_start\|>user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)<\|im_end\|>\n", made.text
            ).groups()
            if made.stream == "chat:de":
                assert (asked, answer) == (f"Translate into German: {aligned['en']}", aligned["de"])
            elif answer == aligned["en"]:
                assert asked in [f"{request} {aligned['en']}" for request in data.REPEAT["en"]]
            else:
                assert any(f"{request} {aligned['en']}" == f"{asked} {answer}" for request in data.CONTINUE["en"])
            kinds.add((made.stream, answer))
    assert len(kinds) == 3
    assert list(data._chats("en", "key", {"en": "too short"})) == []
    assert data._halves("一二三四五六七八九十", "zh") == ("一二三四五", "六七八九十")
    assert data._halves("今日は、いい天気です", "ja") == ("今日は、", "いい天気です")
