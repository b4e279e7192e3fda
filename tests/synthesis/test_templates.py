"""Roles as texts, and files with other ones."""

import json

import pytest

from qscope.errors import InputError
from qscope.synthesis.templates import STYLES, Templates, load


def test_roles_are_filled():
    words = Templates()
    asked = words.fill("vanilla", about="a note", meaning="insults", examples=["you {fool}", "b"])
    assert "insults" in asked and "- you {fool}\n- b\n" in asked
    assert "Examples" not in words.fill("vanilla", about="a note", meaning="insults")
    assert STYLES["story"] in words.fill("adversarial", text="a text", style="story")
    assert words.fill("answer", text="{x}") == "{x}"
    with pytest.raises(InputError, match="style 'rhyme' is not known"):
        words.fill("adversarial", text="a", style="rhyme")


def test_a_file_changes_some_roles(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"random": "About {about}.", "styles": {"rhyme": "in rhyme"}}))
    found = load(path)
    assert found.fill("random", about="x") == "About x."
    assert "in rhyme" in found.fill("adversarial", text="a", style="rhyme")
    assert "story" in found.styles and found.vanilla == Templates().vanilla
    assert load(None) == Templates()


@pytest.mark.parametrize(
    "content, message",
    [
        ("[1]", "no JSON object"),
        ("{", "cannot be read"),
        ('{"vanilla": 3}', "no JSON object"),
        ('{"styles": {"a": 1}}', "no JSON object"),
        ('{"vanila": "x"}', "name 'vanila'"),
        ('{"vanilla": "{colour}"}', "field 'colour'"),
        ('{"vanilla": "{"}', "cannot be read"),
    ],
)
def test_faulty_files(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "t.json")
