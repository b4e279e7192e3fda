"""The `qscope` command: one subcommand per workflow, its options derived from the workflow's config dataclass."""

import dataclasses
import importlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qscope._version import __version__
from qscope.errors import QscopeError


class Command(NamedTuple):
    help: str
    config: str
    """`module:ConfigClass`; the module's `run(config)` does the work."""
    render: str
    """`module:function` that turns the result into what a person reads, and writes the page if one was asked for."""
    page: str | None = None
    """`module:function` that only writes the page, for --json."""
    live: str | None = None
    """`module:function` that runs the config and prints as it goes, in place of run and render."""


COMMANDS = {
    "encode": Command(
        "text to SAE features, kept in a feature store",
        "qscope.workflows.encode:EncodeConfig",
        "qscope.report.encode_text:render",
    ),
    "train": Command(
        "train SAEs: any layers and sweeps at once from one stream, resumable to the bit",
        "qscope.workflows.train:TrainConfig",
        "qscope.report.train_text:render",
        page="qscope.report.train_page:write",
    ),
    "inspect": Command(
        "features of a store: most frequent, strongest contexts, one text; terminal and HTML page",
        "qscope.workflows.inspect:InspectConfig",
        "qscope.report.inspect_text:render",
        page="qscope.report.inspect_page:finish",
    ),
    "store": Command(
        "export or verify a feature store (store export codes --to parquet; store verify codes)",
        "qscope.workflows.store:StoreConfig",
        "qscope.report.store_text:render",
    ),
    "demo": Command(
        "encode 200,000 tokens of real text with the embedded model and SAE, write a page",
        "qscope.workflows.demo:DemoConfig",
        "qscope.report.demo_text:render",
        page="qscope.report.demo_text:finish",
    ),
    "evaluate": Command(
        "how good SAEs are on held-out text: FVU, loss recovered, dead features, exactness, stability",
        "qscope.workflows.evaluate:EvaluateConfig",
        "qscope.report.evaluate_text:render",
        page="qscope.report.evaluate_page:write_files",
    ),
    "steer find": Command(
        "features that tell two sets of texts apart, scored and bootstrapped; writes a steering spec",
        "qscope.workflows.steer_find:SteerFindConfig",
        "qscope.report.steer_find_text:render",
        page="qscope.report.steer_find_page:write",
    ),
    "steer eval": Command(
        "what a steering spec reaches and costs, beside difference of means, probes, random directions and a prompt",
        "qscope.workflows.steer_eval:SteerEvalConfig",
        "qscope.report.steer_eval_text:render",
        page="qscope.report.steer_eval_page:write",
    ),
    "steer generate": Command(
        "one prompt, unsteered and steered side by side, with the activations of features",
        "qscope.workflows.steer_generate:SteerGenerateConfig",
        "qscope.report.steer_generate_text:render",
        live="qscope.report.steer_generate_text:show",
    ),
    "coverage": Command(
        "benchmarks seen through features: redundancy, overlap, what each adds to a suite",
        "qscope.workflows.coverage:CoverageConfig",
        "qscope.report.coverage_text:render",
        page="qscope.report.coverage_page:write",
    ),
    "classify fit": Command(
        "labelled texts to a rule of a few features, with thresholds, evidence and what else was tried",
        "qscope.workflows.classify_fit:ClassifyFitConfig",
        "qscope.report.classify_fit_text:render",
        page="qscope.report.classify_fit_page:write",
    ),
    "classify predict": Command(
        "texts of a file judged by a rule, each with its evidence; resumable",
        "qscope.workflows.classify_predict:ClassifyPredictConfig",
        "qscope.report.classify_predict_text:render",
    ),
    "classify stream": Command(
        "lines of standard input judged as they come",
        "qscope.workflows.classify_stream:ClassifyStreamConfig",
        "qscope.report.classify_predict_text:render",
        live="qscope.report.classify_predict_text:stream",
    ),
    "classify evaluate": Command(
        "a rule beside linear probes, TF-IDF and other baselines on the same texts",
        "qscope.workflows.classify_evaluate:ClassifyEvaluateConfig",
        "qscope.report.classify_evaluate_text:render",
        page="qscope.report.classify_evaluate_page:write",
    ),
    "classify serve-check": Command(
        "throughput of an exported rule beside the model's own forward pass",
        "qscope.workflows.classify_serve_check:ClassifyServeCheckConfig",
        "qscope.report.classify_predict_text:render_check",
    ),
    "explain": Command(
        "features in words: contexts, tokens, a model's explanation, and how well it tells where they fire",
        "qscope.workflows.explain:ExplainConfig",
        "qscope.report.explain_text:render",
        page="qscope.report.explain_page:write",
    ),
    "synthesize": Command(
        "examples for features that a data set misses, each verified by encoding it again",
        "qscope.workflows.synthesize:SynthesizeConfig",
        "qscope.report.synthesize_text:render",
        page="qscope.report.synthesize_page:write",
    ),
    "sft": Command(
        "fine-tuning that keeps features of another language quiet, beside its controls",
        "qscope.workflows.sft:SFTConfig",
        "qscope.report.sft_text:render",
        page="qscope.report.sft_page:write",
    ),
    "rl": Command(
        "GRPO against endless repetition with steered rare negatives, beside its controls",
        "qscope.workflows.rl:RLConfig",
        "qscope.report.rl_text:render",
        page="qscope.report.rl_page:write",
    ),
    "bench": Command(
        "time the operators beside their peers on this machine, each result checked first",
        "qscope.workflows.bench:BenchConfig",
        "qscope.report.bench_text:render",
        page="qscope.report.bench_text:finish",
    ),
    "doctor": Command(
        "what was found on this machine, and which backend each operator uses",
        "qscope.workflows.doctor:DoctorConfig",
        "qscope.report.doctor_text:render",
    ),
}

USAGE = f"""qscope {__version__}: hidden states of a language model to sparse features, features to tools

usage: qscope COMMAND [options]     (qscope COMMAND --help lists them)

{{commands}}

Every command takes --json: the result as one JSON object on standard output, progress on standard error.
Exit status: 0 complete success, 1 a fault of qscope, 2 something to mend (one paragraph says what), 130 interrupted.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script and of `python -m qscope`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows a mark instead
    warnings.formatwarning = lambda message, *_: f"qscope: {message}\n"  # without the place in the source
    status = dispatch(list(sys.argv[1:] if argv is None else argv))
    many = sys.modules.get("qscope.distributed")  # not imported for commands that run in one process
    (sys.exit if many is None else many.leave)(status)


def dispatch(argv: list[str]) -> int:
    """Run one command and return the exit status."""
    try:
        status = _dispatch(argv)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # `qscope inspect ... | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except QscopeError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("\nqscope: interrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS)) + 2
        print(USAGE.format(commands="\n".join(f"  {n:{width}}{c.help}" for n, c in COMMANDS.items())))
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"qscope {__version__}")
        return 0
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in COMMANDS:
        parts = [command for command in COMMANDS if command.startswith(f"{name} ")]
        raise QscopeError(f"There is no command {name!r}. The commands: {', '.join(parts or COMMANDS)}.")
    options = [a.partition("=")[0] for a in rest if a.startswith("--")]
    twice = sorted({option for option in options if options.count(option) > 1})
    if twice:
        raise QscopeError(f"{', '.join(twice)} was given twice. Give every option once; several values go behind it.")
    return _run(name, [a for a in rest if a != "--json"], as_json="--json" in rest)


def _run(name: str, args: list[str], as_json: bool) -> int:
    command = COMMANDS[name]
    try:
        import tqdm  # noqa: F401  (the commands that work long show progress with it)
        import tyro
    except ImportError as error:
        raise QscopeError("The command line needs a few small packages: pip install 'qscope[cli]'.") from error
    module_name, _, class_name = command.config.partition(":")
    module = importlib.import_module(module_name)
    config = tyro.cli(
        getattr(module, class_name),
        args=args,
        prog=f"qscope {name}",
        config=(tyro.conf.PositionalRequiredArgs,),
    )
    if command.live is not None and not as_json:
        return int(getattr(_resolve(command.live)(config), "exit_status", 0))
    result = module.run(config)
    if as_json:
        if command.page is not None:
            _resolve(command.page)(result)
        print(json.dumps(to_json(result), allow_nan=False))
    else:
        print(_resolve(command.render)(result))
    return int(getattr(result, "exit_status", 0))


def _resolve(reference: str) -> Callable[[Any], Any]:
    module, _, name = reference.partition(":")
    function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return function


def to_json(value: Any) -> Any:
    """Plain data of a result: dataclasses and named tuples by field name, paths as text."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {name: to_json(item) for name, item in zip(value._fields, value, strict=True)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _fail(message: str) -> int:
    print(f"qscope: error: {message}", file=sys.stderr)
    return 2
