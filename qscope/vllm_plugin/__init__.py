"""Steering inside vLLM: a general plug-in, found by its entry point; nothing of vLLM is forked (docs/vllm.md).

llm = LLM(model, additional_config={"qscope": {"saes": {"15": "path/of/sae"}}})
llm.generate(prompts, SamplingParams(extra_args=extra_args(spec, read=[(15, 1234)])))
activations(llm, outputs)
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, tensor

from qscope.errors import InputError, SteeringNotApplied
from qscope.steering import SteeringSpec

_problem: str | None = None
_registered = False


def register() -> None:
    """What vLLM calls in each of its processes before a model is built. Calling it again does nothing.

    A vLLM whose parts have other names than the plug-in knows stays as it is, unless it is asked to steer.
    """
    global _registered, _problem
    if _registered:
        return
    _registered = True
    from qscope.vllm_plugin import hooks

    try:
        hooks.wrap_all()
    except (AttributeError, ImportError) as error:
        import vllm

        _problem = f"vLLM {vllm.__version__} is not one that the qscope plug-in knows ({error}); it was made for 0.32"
        _refuse_to_start(_problem)


def _refuse_to_start(problem: str) -> None:
    """Every engine with `qscope` in its additional_config then fails; others start as ever."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (self.additional_config or {}).get("qscope") is not None:
            raise SteeringNotApplied(f"{problem}. Install vllm==0.32.* or leave qscope out of additional_config.")
        return create(self, *args, **kwargs)

    EngineArgs.create_engine_config = checked


def extra_args(
    spec: SteeringSpec | str | None = None, read: Iterable[tuple[int, int]] = ()
) -> dict[str, dict[str, Any]]:
    """`SamplingParams(extra_args=...)` of a request that is steered, read out, or both.

    spec: a SteeringSpec, or the name of one that the engine was started with. read: (layer, feature) whose activation
        `activations` gives. Raises SteeringNotApplied where vLLM runs without the plug-in and would ignore it.
    """
    plugins = sys.modules.get("vllm.plugins")
    if plugins is not None and plugins.plugins_loaded and not _registered:
        raise SteeringNotApplied(
            "vLLM has loaded its plug-ins without qscope's, so a request's steering would be ignored. Install qscope "
            "into vLLM's environment (pip install -e .), and let VLLM_PLUGINS, where it is set, name qscope."
        )
    content: dict[str, Any] = {} if spec is None else {"spec": spec if isinstance(spec, str) else spec.to_json()}
    pairs = [[layer, feature] for layer, feature in read]
    return {"qscope": content | ({"read": pairs} if pairs else {})}


def activations(llm: Any, outputs: Sequence[Any]) -> list[dict[int, Tensor]]:
    """What was read of each output of `llm.generate`: layer -> Tensor [T, n] float32, n in the order of `read`.

    Row t is token t of prompt and generated text; the last generated token was never fed in and has none. The value is
    relu(<W_enc row, h> + b_enc) of the residual before the layer's own edits, but after those of earlier layers. Each
    output can be asked for once. Raises InputError for outputs of which nothing is kept.
    """
    found = llm.collective_rpc("qscope_take", args=([output.request_id for output in outputs],))[0]
    missing = [o.request_id for o, f in zip(outputs, found or [None] * len(outputs), strict=True) if f is None]
    if missing:
        raise InputError(
            f"Nothing is kept of the requests {', '.join(missing)}: they did not ask for `read`, were taken "
            "before, or 1024 others finished since."
        )
    return [{int(layer): tensor(values) for layer, values in json_like.items()} for json_like in found]


__all__ = ["SteeringNotApplied", "activations", "extra_args", "register"]
