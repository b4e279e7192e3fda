"""What the pages share: the template with its style's hash, and writing a file whole or not at all."""

import base64
import contextlib
import hashlib
import os
import re
from importlib import resources
from pathlib import Path

from qscope.errors import StorageError


def fill(template: str, body: str, title: str | None = None) -> str:
    """The page `template` of this package with its body; its policy allows the style by its hash, and no script.

    title: plain text in place of the template's own, for pages that look alike.
    """
    text = resources.files("qscope.report").joinpath(template).read_text(encoding="utf-8")
    if title is not None:
        text = re.sub("<title>.*?</title>", lambda _: f"<title>{title}</title>", text, count=1)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return text.replace("@@STYLE_HASH@@", f"sha256-{digest}").replace("@@BODY@@", body)


def write_whole(path: Path, text: str, advice: str) -> Path:
    """Write the file, or leave what was there. Raises StorageError, which ends with the advice."""
    scratch = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise StorageError(f"{path} could not be written: {error}. {advice}") from error
    return path
