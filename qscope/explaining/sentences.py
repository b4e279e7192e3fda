"""The explanation itself: a plain sentence made by rule, or one that a model wrote."""

from collections.abc import Sequence

from qscope.endpoint import Chat, NonsenseError, ask
from qscope.explaining import prompts
from qscope.explaining.contexts import Evidence, Passage
from qscope.explaining.prompts import Decode

_NAMED = 4  # tokens in a plain sentence
_AROUND = 6  # tokens on either side of the peak in it


def plain_sentence(evidence: Evidence, raised: Sequence[str], decode: Decode) -> str:
    """Such as: fires on "king", " King" (74 % of its activation), as in "the ⟦king⟧ of France"; raises "dom", "ship".

    Words that differ in case or surrounding spaces only are named once. raised: as in `explain_question`.
    """
    if not evidence.top_tokens:
        silent = "in these texts" if not evidence.count else "in the half of the texts that explanations are made of"
        return f"fires nowhere {silent}"
    named: dict[str, float] = {}
    for token in evidence.top_tokens:
        text = decode([token.token])
        word = text.strip().casefold() or text
        if word in named or len(named) < _NAMED:
            named[word] = named.get(word, 0.0) + token.share
    words = ", ".join(f'"{visible(word)}"' for word in named)
    example = f', as in "{_excerpt(evidence.strongest[0], decode)}"' if evidence.strongest else ""
    lens = "; raises " + ", ".join(f'"{visible(token.strip() or token)}"' for token in raised[:_NAMED])
    return f"fires on {words} ({100 * sum(named.values()):.0f} % of its activation){example}{lens if raised else ''}"


def model_sentence(model: Chat, evidence: Evidence, raised: Sequence[str], decode: Decode) -> str | None:
    """What the model says; None where it never answers as asked, which is counted. Raises EndpointError."""
    question = prompts.explain_question(evidence, raised, decode)
    try:
        return ask(model, question, prompts.read_explanation, prompts.EXPLAIN_FORM, max_tokens=120)
    except NonsenseError:  # the caller falls back on the plain sentence and says so
        return None


def visible(text: str) -> str:
    """On one line."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace("\r", "\u240d")


def _excerpt(passage: Passage, decode: Decode) -> str:
    low, high = max(0, passage.centre - _AROUND), passage.centre + _AROUND + 1
    tokens, activations = passage.tokens[low:high], passage.activations[low:high]
    part = Passage(passage.document, passage.position, passage.centre - low, tokens, activations)
    marks = [i == part.centre for i in range(len(tokens))]
    return visible(prompts.marked(part, marks, decode, "\u27e6", "\u27e7")).strip()
