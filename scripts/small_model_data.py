"""Texts that scripts/train_small_model.py learns from: streams of one kind and one language each.

debian:XX     Debian documentation (qscope.corpus_debian), twelve languages
sentences:XX  everyday sentences, aligned in en, de, fr, it, ja (machine translations)
chat:XX       one question and its answer, made of these sentences and of Debian fortunes (es, pl, ru, zh): the user
              asks to continue or to repeat a text, or to translate a sentence; XX is the language of the answer
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from qscope import corpus_debian
from qscope.corpus import HELD_OUT
from qscope.corpus_labelled import sentences
from qscope.finding.builtin import LANGUAGES as ALIGNED
from qscope.packages import fetch

FORTUNES = ("es", "pl", "ru", "zh")  # further languages with conversations

CONTINUE = {
    "en": ("Continue:", "Please continue this text:", "How does this go on?"),
    "de": ("Fahre fort:", "Bitte setze diesen Text fort:", "Wie geht das weiter?"),
    "fr": ("Continue :", "Continue ce texte, s'il te plaît :", "Quelle est la suite ?"),
    "it": ("Continua:", "Per favore, continua questo testo:", "Come va avanti?"),
    "ja": ("続けてください:", "この文章の続きを書いてください:", "続きはどうなりますか?"),
    "es": ("Continúa:", "Por favor, continúa este texto:", "¿Cómo sigue esto?"),
    "pl": ("Kontynuuj:", "Proszę, dokończ ten tekst:", "Jak to idzie dalej?"),
    "ru": ("Продолжи:", "Пожалуйста, продолжи этот текст:", "Как это продолжается?"),
    "zh": ("请继续:", "请把这段文字写下去:", "接下来怎么说?"),
}
REPEAT = {
    "en": ("Repeat:", "Say this once more:"),
    "de": ("Wiederhole:", "Sag das noch einmal:"),
    "fr": ("Répète :", "Dis-le encore une fois :"),
    "it": ("Ripeti:", "Dillo ancora una volta:"),
    "ja": ("繰り返してください:", "もう一度言ってください:"),
    "es": ("Repite:", "Dilo otra vez:"),
    "pl": ("Powtórz:", "Powiedz to jeszcze raz:"),
    "ru": ("Повтори:", "Скажи это ещё раз:"),
    "zh": ("请重复:", "请再说一遍:"),
}
_TRANSLATE = {
    "en": ("Translate into {}:", "English German French Italian Japanese"),
    "de": ("Übersetze ins {}:", "Englische Deutsche Französische Italienische Japanische"),
    "fr": ("Traduis en {} :", "anglais allemand français italien japonais"),
    "it": ("Traduci in {}:", "inglese tedesco francese italiano giapponese"),
    "ja": ("{}に訳してください:", "英語 ドイツ語 フランス語 イタリア語 日本語"),
}
TRANSLATE = {
    language: dict(zip(_TRANSLATE, map(request.format, names.split()), strict=True))
    for language, (request, names) in _TRANSLATE.items()
}


class Text(NamedTuple):
    """One text of a stream; `held_out` as in qscope.corpus: by the hash of a key that translations share."""

    stream: str
    text: str
    held_out: bool


def texts() -> Iterator[Text]:
    """All texts, in a fixed order. The packages are fetched when they are not in the cache (75 MB)."""
    for language in corpus_debian.LANGUAGES:
        for document in corpus_debian.documents(language):
            yield Text(f"debian:{language}", document.text, document.held_out)
            if language in FORTUNES and document.source == "fortunes":
                yield from _chats(language, document.key, {language: document.text})
    aligned = {language: sentences(fetch(package), language == "en") for language, package in ALIGNED.items()}
    for key in sorted(set.union(*(set(part) for part in aligned.values()))):
        versions = {language: part[key].strip() for language, part in aligned.items() if key in part}
        for language, text in versions.items():
            yield Text(f"sentences:{language}", text, digest(key)[0] < HELD_OUT)
            yield from _chats(language, key, versions)


def chat(question: str, answer: str) -> str:
    """One conversation as the model's chat template writes it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def _chats(language: str, key: str, versions: dict[str, str]) -> Iterator[Text]:
    """One conversation about `versions[language]`; what is asked follows from the hash of the key."""
    dice = digest(f"{language} {key}")
    text, held_out = versions[language], digest(key)[0] < HELD_OUT
    if not 12 <= len(text) <= 400:
        return
    targets = [other for other in versions if other != language and versions[other] != text]
    if targets and dice[0] < 90:
        target = targets[dice[1] % len(targets)]
        asked = f"{TRANSLATE[language][target]} {text}"
        yield Text(f"chat:{target}", chat(asked, versions[target]), held_out)
    elif dice[0] < 140:
        asked = REPEAT[language][dice[1] % len(REPEAT[language])]
        yield Text(f"chat:{language}", chat(f"{asked} {text}", text), held_out)
    else:
        begin, end = _halves(text, language)
        asked = CONTINUE[language][dice[1] % len(CONTINUE[language])]
        if begin and end:
            yield Text(f"chat:{language}", chat(f"{asked} {begin}", end), held_out)


def _halves(text: str, language: str) -> tuple[str, str]:
    """The text cut between two words near its middle; in Chinese and Japanese behind a comma, or anywhere."""
    middle = len(text) // 2
    marks = "、，。！？；\n " if language in ("ja", "zh") else " \n"
    places = [place for place, character in enumerate(text[:-1], 1) if character in marks]
    cut = min(places, key=lambda place: abs(place - middle), default=0)
    if language in ("ja", "zh") and abs(cut - middle) > len(text) // 4:
        cut = middle
    return text[:cut].strip(), text[cut:].strip()


def digest(text: str) -> bytes:
    """What splits and orders follow from."""
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()
