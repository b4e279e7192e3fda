"""python bench/bench_encode.py: `qscope encode` end to end on the embedded model, and where the time goes."""

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[1] / "kernels"),
]

from _harness import RESULTS, arguments, common_facts, slug  # noqa: E402  (the path set above spares an install)

from qscope import embedded  # noqa: E402
from qscope.errors import QscopeError  # noqa: E402
from qscope.workflows.encode import EncodeConfig, run  # noqa: E402

TOKENS = 50_000


def main() -> None:
    """One warm-up run (compiles, caches), then one of 50,000 tokens of held-out text from an empty folder."""
    options = arguments(__doc__, rounds=1)
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
    path = RESULTS / f"encode-{slug(options.device)}.json"
    path.write_text(json.dumps([row], indent=1) + "\n")
    print(json.dumps(row))
    print(path)


if __name__ == "__main__":
    main()
