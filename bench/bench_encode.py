"""python bench/bench_encode.py: `qscope encode` end to end on the embedded model, and where the time goes."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 50_000


def main() -> None:
    """One warm-up run (compiles, caches), then one of 50,000 tokens of held-out text from an empty folder."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # spares an install; the imports below need it
    from bench._facts import common_facts, device_name, slug
    from qscope import embedded
    from qscope.errors import QscopeError
    from qscope.workflows.encode import EncodeConfig, run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    try:
        embedded.default_model_path()
    except QscopeError as error:
        print(f"not measured: {error}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        text = str(embedded.demo_text(Path(scratch) / "text.jsonl"))
        for name, tokens in (("warm-up", 2_000), ("measured", TOKENS)):
            out = Path(scratch) / name
            result = run(EncodeConfig(text=(text,), out=out, max_tokens=tokens, device=options.device))
        stored = sum(p.stat().st_size for p in out.glob("shard-*"))
    facts = result.layers[str(embedded.DEFAULT_LAYER)]
    row = (
        dict(op="encode workflow", model=embedded.DEFAULT_MODEL_NAME, tokens=result.run_tokens)
        | dict(tokens_per_second=result.tokens_per_second, seconds=result.seconds)
        | dict(bytes_per_token=round(stored / result.run_tokens, 1), fvu=round(facts["fvu"], 4))
        | common_facts(options.device)
    )
    path = ROOT / "bench" / "results" / f"encode-{slug(device_name(options.device))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row], indent=1) + "\n")
    print(json.dumps(row))
    print(path)


if __name__ == "__main__":
    main()
