"""What `qscope demo` prints: the features, then where everything is."""

from pathlib import Path

from qscope.report import encode_text, inspect_page, inspect_text
from qscope.workflows.demo import DemoResult


def render(result: DemoResult) -> str:
    """The table of features, the summary of the encode, and the page's address."""
    summary = encode_text.render(result.encoded).rsplit("\n", 1)[0]
    return "\n".join(
        [
            inspect_text.render(result.inspected),
            "",
            summary,
            f"done in {result.seconds:.0f} s; open file://{result.page}",
        ]
    )


def finish(result: DemoResult) -> Path | None:
    """Write the page, for `qscope demo --json`."""
    return inspect_page.finish(result.inspected)
