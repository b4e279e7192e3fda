"""Where the plug-in holds on to vLLM 0.32: a few methods are wrapped, each in the process that runs it.

    front end    InputProcessor.process_inputs        a request is checked, names become specs
    engine       EngineCore._initialize_kv_caches     layers are exchanged before the first trace; canary behind it
                 EngineCore.preprocess_add_request    the prefix cache is salted; places are counted
                 Scheduler._free_request              places are given back
    worker       WorkerBase.qscope_*                  what the engine calls by name
                 GPUModelRunner._update_states        requests come and go
                 GPUModelRunner._prepare_inputs       bits of the step's tokens
                 GPUModelRunner._model_forward        what was read is kept

Without `qscope` in additional_config every wrapper hands over to vLLM at once.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from qscope.errors import InputError, SteeringNotApplied
from qscope.vllm_plugin import batch, layers
from qscope.vllm_plugin.options import KEY, Options, load_sae, options_of
from qscope.vllm_plugin.request import Request, RequestRefused, check, directions_of, needs_ids, received

_STATE = "qscope_steering"


class Admitted:
    """What unfinished requests of an engine use, so that no request is let in whose directions would not fit."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._lock = threading.Lock()  # requests are prepared in another thread than the scheduler's
        self._of: dict[str, list[tuple[int, str, Hashable]]] = {}
        self._users: Counter[tuple[int, str, Hashable]] = Counter()

    def enter(self, request_id: str, request: Request) -> None:
        used: list[tuple[int, str, Hashable]] = [(at, "edits", key) for at, key in directions_of(request.edits)]
        used += [(at, "read features", feature) for at, feature in request.reads]
        with self._lock:
            for layer, what, _ in used:
                most = self.options.max_directions if what == "edits" else self.options.max_reads
                keys = {u for u in (*self._users, *used) if u[:2] == (layer, what)}
                if len(keys) > most:
                    raise RequestRefused(
                        f"{len(keys)} different {what} of layer {layer} would be in use by unfinished requests, and "
                        f"{most} fit. Send it when others have finished; requests with equal edits share a place."
                    )
            self._of[request_id] = used
            self._users.update(used)

    def leave(self, request_id: str) -> None:
        with self._lock:
            self._users.subtract(self._of.pop(request_id, ()))
            self._users += Counter()  # drops zeros


def wire(sampling_params: Any) -> Request | None:
    """The checked request in sampling parameters that come from the front end."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return received(extra[KEY]) if extra.get(KEY) else None


# --- front end -----------------------------------------------------------------------------------------------


def _process_inputs(
    original: Callable[..., Any], self: Any, request_id: str, prompt: Any, params: Any, *a: Any, **k: Any
) -> Any:
    extra = getattr(params, "extra_args", None) or {}
    if extra.get(KEY) is None:
        return original(self, request_id, prompt, params, *a, **k)
    options = options_of(self.vllm_config)
    if options is None:
        raise SteeringNotApplied(
            f"A request asks for steering (extra_args['{KEY}']), and the engine was started without "
            f"additional_config={{'{KEY}': ...}} (docs/vllm.md)."
        )
    model, scheduler = self.vllm_config.model_config, self.vllm_config.scheduler_config
    tokenizer = self.renderer.tokenizer
    request = check(extra[KEY], options, model.get_hidden_size(), tokenizer, bool(scheduler.async_scheduling))
    if request.reads and (params.n or 1) > 1:
        raise RequestRefused("Activations are read out for requests with n=1; send the prompt several times.")
    params = params.clone()
    params.extra_args = {**extra, KEY: request.to_text()}
    if request.reads:
        params.skip_reading_prefix_cache = True  # what comes out of the cache has no activations
    return original(self, request_id, prompt, params, *a, **k)


# --- engine --------------------------------------------------------------------------------------------------


def _initialize_kv_caches(original: Callable[..., Any], self: Any, vllm_config: Any) -> Any:
    options = options_of(vllm_config)
    if options is None:
        return original(self, vllm_config)
    refuse(vllm_config)
    self.qscope_admitted = Admitted(options)
    self.model_executor.collective_rpc("qscope_install")
    made = original(self, vllm_config)
    self.model_executor.collective_rpc("qscope_canary")
    return made


def refuse(vllm_config: Any) -> None:
    """SteeringNotApplied for ways to run a model in which a step's tokens are not the rows of the residual."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    refused = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        "sequence parallelism": bool(getattr(compilation.pass_config, "enable_sp", False)),
        "speculative decoding": vllm_config.speculative_config is not None,
        "model runner V2": vllm_config.use_v2_model_runner,
    }
    found = [name for name, on in refused.items() if on]
    if found:
        raise SteeringNotApplied(
            f"The qscope plug-in cannot steer with {', '.join(found)}. Start vLLM without, or without qscope in "
            "additional_config."
        )


def _preprocess_add_request(original: Callable[..., Any], self: Any, request: Any) -> Any:
    wanted = wire(request.sampling_params)
    admitted: Admitted | None = getattr(self, "qscope_admitted", None)
    if wanted is None:
        return original(self, request)
    if admitted is None:
        raise SteeringNotApplied("A request asks for steering, and the plug-in is not installed in this engine.")
    if request.prompt_token_ids is None and any(needs_ids(edit) for edit in wanted.edits):
        raise RequestRefused("An edit chooses tokens by their ids, and the prompt was given as embeddings.")
    if wanted.salt is not None:
        given = request.cache_salt
        request.cache_salt = wanted.salt if given is None else f"{given}|{wanted.salt}"
    admitted.enter(request.request_id, wanted)
    try:
        return original(self, request)
    except BaseException:
        admitted.leave(request.request_id)
        raise


def _scheduler_add_request(original: Callable[..., Any], self: Any, request: Any, *a: Any, **k: Any) -> Any:
    # The scheduler is made after the engine's ledger, by other code: it learns of it here.
    self.scheduler.qscope_admitted = getattr(self, "qscope_admitted", None)
    return original(self, request, *a, **k)


def _free_request(original: Callable[..., Any], self: Any, request: Any, *a: Any, **k: Any) -> Any:
    admitted: Admitted | None = getattr(self, "qscope_admitted", None)
    if admitted is not None:
        admitted.leave(request.request_id)
    return original(self, request, *a, **k)


# --- worker --------------------------------------------------------------------------------------------------


def qscope_install(self: Any) -> None:
    """Of a worker whose model is loaded and was never run."""
    options = options_of(self.vllm_config)
    assert options is not None
    runner, width = self.model_runner, self.vllm_config.model_config.get_hidden_size()
    for layer, source in options.saes.items():
        sae = load_sae(source, layer)
        if sae.d_in != width:
            raise InputError(f"The SAE of layer {layer} reads width {sae.d_in}, and the model's residual has {width}.")
    tokens = -(-self.vllm_config.scheduler_config.max_num_batched_tokens // 256) * 256
    found = layers.install(runner.get_model(), options.all_layers, tokens, options.max_directions, options.max_reads)
    setattr(runner, _STATE, batch.BatchSteering(options, found, width))


def qscope_canary(self: Any) -> None:
    """SteeringNotApplied unless a forward pass of the engine as it will run calls the operator in every layer."""
    steering: batch.BatchSteering = getattr(self.model_runner, _STATE)
    before = layers.calls(steering.layers)
    self.model_runner._dummy_run(1)
    layers.check_called(before, layers.calls(steering.layers))


def qscope_take(self: Any, request_ids: list[str]) -> Any:
    """Activations of requests (`BatchSteering.take`)."""
    steering: batch.BatchSteering | None = getattr(self.model_runner, _STATE, None)
    return None if steering is None else steering.take(list(request_ids))


def _update_states(original: Callable[..., Any], self: Any, scheduler_output: Any) -> Any:
    steering: batch.BatchSteering | None = getattr(self, _STATE, None)
    if steering is not None:
        for request_id in scheduler_output.finished_req_ids:
            steering.remove(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            wanted = wire(new.sampling_params)
            if wanted is not None:
                ids, embeds = new.prompt_token_ids, new.prompt_embeds
                steering.add(new.req_id, wanted, len(ids if ids is not None else embeds))
    return original(self, scheduler_output)


def _prepare_inputs(original: Callable[..., Any], self: Any, scheduler_output: Any, *a: Any, **k: Any) -> Any:
    made = original(self, scheduler_output, *a, **k)
    steering: batch.BatchSteering | None = getattr(self, _STATE, None)
    if steering is not None:
        states, scheduled = self.input_batch, scheduler_output.num_scheduled_tokens
        starts = states.num_computed_tokens_cpu
        rows = ((name, int(starts[i]), scheduled[name]) for i, name in enumerate(states.req_ids))

        def ids(request_id: str, count: int) -> torch.Tensor:
            row = states.token_ids_cpu[states.req_id_to_index[request_id], :count]
            return torch.from_numpy(row.astype("int64"))[None]

        steering.fill(rows, ids)
    return made


def _model_forward(original: Callable[..., Any], self: Any, *a: Any, **k: Any) -> Any:
    made = original(self, *a, **k)
    steering: batch.BatchSteering | None = getattr(self, _STATE, None)
    if steering is not None:
        steering.collect()
    return made


# --- putting them in place -----------------------------------------------------------------------------------


def _unsupported_by_v2(original: Callable[..., Any], self: Any) -> list[str]:
    """vLLM then takes its V1 model runner, whose batch the plug-in knows, and says so."""
    return [*original(self), *(["qscope steering"] if options_of(self) is not None else [])]


def wrap_all() -> None:
    """Wraps vLLM's methods; once per process. Raises AttributeError or ImportError for a vLLM that has others."""
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.worker_base import WorkerBase

    wrapped: list[tuple[type[Any], str, Callable[..., Any]]] = [
        (VllmConfig, "_get_v2_model_runner_unsupported_features", _unsupported_by_v2),
        (InputProcessor, "process_inputs", _process_inputs),
        (EngineCore, "_initialize_kv_caches", _initialize_kv_caches),
        (EngineCore, "preprocess_add_request", _preprocess_add_request),
        (EngineCore, "add_request", _scheduler_add_request),
        (Scheduler, "_free_request", _free_request),
        (GPUModelRunner, "_update_states", _update_states),
        (GPUModelRunner, "_prepare_inputs", _prepare_inputs),
        (GPUModelRunner, "_model_forward", _model_forward),
    ]
    originals = [getattr(owner, name) for owner, name, _ in wrapped]  # all of them are there, or nothing is touched
    for (owner, name, wrapper), original in zip(wrapped, originals, strict=True):
        setattr(owner, name, _bound(wrapper, original))
    for method in (qscope_install, qscope_canary, qscope_take):
        setattr(WorkerBase, method.__name__, method)


def _bound(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    return method
