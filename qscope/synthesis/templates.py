"""What a generator is asked, by role: plain example, rewritten example, answer, refusal."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from qscope.errors import InputError

ROLES = ("vanilla", "adversarial", "answer", "refusal", "random")
_FIELDS = {
    "vanilla": {"about", "meaning", "examples", "label"},
    "adversarial": {"about", "text", "style", "label"},
    "answer": {"text", "label"},
    "refusal": {"text", "label"},
    "random": {"about", "examples", "label"},
}
STYLES = {
    "role-play": "as the request of a person who asks the reader to play a role",
    "story": "as a part of a story that the reader is to continue",
    "indirect": "indirectly, so that the point is implied and never named",
    "authority": "as somebody who claims to have the right or the duty to ask",
    "steps": "split into several small and harmless-looking parts",
}
"""Attack styles by name"""


@dataclass(frozen=True)
class Templates:
    """Texts with fields in braces. {examples} is a list, an item a line, and empty where there is none."""

    vanilla: str = (
        "Write one new example of this kind: {about}.\nIt has to be an example of: {meaning}.\n{examples}"
        "Write one text of that kind on another subject, in one line. Answer with the text only."
    )
    adversarial: str = (
        "Rewrite the following text {style}. Keep what it is about.\n\nText: {text}\n\nAnswer with the rewritten text "
        "only, in one line."
    )
    answer: str = "{text}"
    refusal: str = (
        "Somebody wrote the following. Decline it politely in one or two sentences, say why, and offer something safe "
        "instead.\n\n{text}"
    )
    random: str = (
        "Write one new example of this kind: {about}.\n{examples}Write one text of that kind, in one line. Answer with "
        "the text only."
    )
    styles: Mapping[str, str] = field(default_factory=lambda: dict(STYLES))

    def __post_init__(self) -> None:
        for role in ROLES:
            try:
                named = {name for _, name, _, _ in string.Formatter().parse(getattr(self, role)) if name is not None}
            except ValueError as error:
                raise InputError(f"The template {role!r} cannot be read: {error}. {{{{ and }}}} are braces.") from error
            if named - _FIELDS[role]:
                raise InputError(
                    f"The template {role!r} has the field {min(named - _FIELDS[role])!r}; accepted: "
                    f"{', '.join(sorted(_FIELDS[role]))}."
                )

    def fill(self, role: str, *, examples: Sequence[str] = (), style: str = "", **values: str) -> str:
        """The prompt of a role. InputError for an unknown style."""
        if style and style not in self.styles:
            raise InputError(f"The style {style!r} is not known. Known: {', '.join(self.styles)}.")
        said = "".join(["Examples:\n", *(f"- {text}\n" for text in examples)]) if examples else ""
        known = {"about": "", "meaning": "", "text": "", "label": "", **values}
        filled: str = getattr(self, role).format_map(
            {**known, "examples": said, "style": self.styles[style] if style else ""}
        )
        return filled


def load(path: Path | None) -> Templates:
    """Of a JSON object with the roles (and `styles`) that are to differ. InputError for anything else."""
    if path is None:
        return Templates()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"The templates {path} cannot be read: {error}. Give a JSON object in UTF-8.") from error
    known = [f.name for f in fields(Templates)]
    texts = isinstance(found, dict) and all(isinstance(v, str) for k, v in found.items() if k != "styles")
    styles = found.get("styles", {}) if isinstance(found, dict) else None
    if not texts or not isinstance(styles, dict) or not all(isinstance(v, str) for v in styles.values()):
        raise InputError(f"The templates {path} are no JSON object of texts; accepted keys: {', '.join(known)}.")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise InputError(f"The templates {path} name {unknown[0]!r}; accepted: {', '.join(known)}.")
    return Templates(**{**found, **({"styles": {**STYLES, **styles}} if styles else {})})
