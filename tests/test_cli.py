"""The command line: what is listed, what fails how, what --json prints."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from qscope import cli
from qscope._version import __version__
from qscope.errors import InputError

ROOT = Path(__file__).parents[1]


def status(*argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(argv))
    return stop.value.code or 0


def test_help_lists_every_command(capsys):
    assert status("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert status() == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_resolves_and_describes_its_options(name, capsys):
    command = cli.COMMANDS[name]
    for reference in filter(None, (command.config, command.render, command.page)):
        assert callable(cli._resolve(reference))
    assert status(name, "--help") == 0
    assert f"usage: qscope {name}" in capsys.readouterr().out


def test_version(capsys):
    assert status("--version") == 0
    assert capsys.readouterr().out == f"qscope {__version__}\n"


def test_unknown_command_is_refused_with_the_list(capsys):
    assert status("encoed") == 2
    err = capsys.readouterr().err
    assert "no command 'encoed'" in err and "encode" in err


def test_unknown_option_has_status_2(capsys):
    assert status("encode", "x.txt", "--no-such-option") == 2


def test_an_option_given_twice_is_refused(capsys):
    """The parser would keep the last value and drop the first without a word."""
    assert status("encode", "x.txt", "--sae", "a", "--sae=b") == 2
    assert "--sae was given twice" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_output_that_nobody_reads_or_that_lacks_characters_is_no_fault(encoding):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONIOENCODING": encoding}
    env.pop("PYTHONUNBUFFERED", None)
    store = ROOT / "tests" / "golden" / "store-v1"
    command = f"{sys.executable} -m qscope store verify {store} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_json_is_one_object_on_standard_output(capsys):
    assert status("doctor", "--json") == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


@pytest.mark.parametrize(("error", "code"), [(InputError("mend this"), 2), (KeyboardInterrupt(), 130)])
def test_errors_become_a_line_and_a_status(monkeypatch, capsys, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert status("encode", "x") == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_results_become_plain_data():
    class Pair(NamedTuple):
        a: int
        b: Path

    @dataclasses.dataclass
    class Result:
        pair: Pair
        table: dict[int, tuple[float, ...]]

    assert cli.to_json(Result(Pair(1, Path("x")), {3: (0.5,)})) == {"pair": {"a": 1, "b": "x"}, "table": {"3": [0.5]}}
