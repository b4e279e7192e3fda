"""Rewards by name, as TRL calls them: numbers by hand, and what is refused."""

import math

import pytest
import torch

from qscope.errors import InputError
from qscope.post_training.rewards import checked, feature_reward, parse, soft_overlong
from tests.post_training.grpo_world import END, make_model, make_tokenizer, word_sae

LOOP = [5, 6, 7, 8] * 10


def call(reward, *ids, texts=None, prompt="say"):
    texts = texts or [" ".join(map(str, row)) for row in ids]
    ids = ids or [[3]] * len(texts)
    return reward(prompts=[prompt] * len(ids), completions=texts, completion_ids=list(ids), trainer_state=None)


def test_repetition():
    reward = parse("repetition", [END])
    assert call(reward, LOOP, [*LOOP, END], [5, 6, 7], []) == [-1, 0, 0, 0]
    assert reward.name == reward.__name__ == "repetition" and reward.weight == 1
    assert call(parse("ngrams:2", [END]), [1 + 4, 6, 5, 6, END]) == [pytest.approx(-1 / 3)]


def test_overlong_is_equation_13_of_dapo():
    assert [soft_overlong(n, 20, 8) for n in (0, 12, 16, 20, 25)] == [0, 0, -0.5, -1, -1]
    for n in range(30):
        want = 0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1
        assert soft_overlong(n, 20, 8) == pytest.approx(want, abs=1e-15)
    assert call(parse("overlong:20:8", [END]), [4] * 15 + [END], [4] * 20) == [-0.5, -1]  # the end token is a token


def test_detectors_and_messages():
    reward = parse("-2*detector:keywords:king", [END])
    assert reward.weight == -2
    assert call(reward, texts=["The king", "kings"]) == [1, 0]
    messages = [[{"role": "assistant", "content": "A king."}]]
    assert call(reward, texts=messages, prompt=[{"role": "user", "content": "Who?"}]) == [1]


def of_text(text):
    return len(text)


def of_both(text, prompt):
    return None if text == "none" else text.count(prompt)


def as_trl_does(completions, completion_ids, **_):
    return [len(ids) for ids in completion_ids]


def gives_nan(text):
    return math.nan if text == "bad" else 0


def test_a_function_by_name():
    here = f"python:{__name__}:"
    assert call(parse(here + "of_text", [END]), texts=["ab", ""]) == [2, 0]
    assert call(parse("0.5*" + here + "of_both", [END]), texts=["say say", "none"]) == [2, None]
    assert call(parse(here + "as_trl_does", [END]), [1, 2, 3], [4]) == [3, 1]


def test_nan_is_refused_by_name_and_none_is_not():
    with pytest.raises(InputError, match=r"gives_nan gave nan for 1 of 2 completions, first for 'bad'"):
        call(parse(f"python:{__name__}:gives_nan", [END]), texts=["good", "bad"])
    with pytest.raises(InputError, match="inf"):
        call(checked(lambda completions, **_: [math.inf]), texts=["a"])
    assert call(checked(lambda completions, **_: [None]), texts=["a"]) == [None]
    module = torch.nn.Linear(1, 1)
    assert checked(module) is module and checked("a/model") == "a/model"


@pytest.mark.parametrize(
    "wrong",
    ["", "nothing", "repetition:3", "ngrams:0", "overlong:20", "overlong:8:20", "overlong:a:b", "nan*repetition",
     "python:no_such_module:f", "python:math:nothing", "detector:nothing"],
)  # fmt: skip
def test_names_that_mean_nothing_are_refused(wrong):
    with pytest.raises(InputError, match=r"Accepted|accepted|expected|longer than"):
        parse(wrong, [END])


def test_feature_reward_is_its_definition():
    model, tokenizer = make_model().eval(), make_tokenizer()
    saes = word_sae(model)
    reward = feature_reward(model, tokenizer, saes, {1: (7, 9)}, weight=-0.5)
    prompt, ids = "w3 w4", [11, 12, 7]
    block = []

    def keep(_module, _inputs, output):
        block.append(output[0] if isinstance(output, tuple) else output)

    handle = model.model.layers[1].register_forward_hook(keep)
    with torch.no_grad():
        model(torch.tensor([[3, 4, *ids]]))
    handle.remove()
    x = block[0][0, 2:]
    want = (x @ saes[1].W_enc[[7, 9]].T).relu().mean().item()
    assert want > 0
    assert call(reward, ids, [], prompt=prompt) == [pytest.approx(want, rel=1e-5), None]
    assert reward.weight == -0.5 and reward.name == "features"
