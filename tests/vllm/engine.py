"""One vLLM engine in a process of its own: engine.py JOB.json FOUND.json

JOB: {"model": folder, "engine": arguments of LLM, "break": what to spoil before it is made,
      "steps": [[{"prompt": text, "tokens": n, "extra": extra_args}, ...], ...]}   each step is one batch
FOUND: {"error": text} if the engine did not start, else {"load": seconds, "steps": [[output, ...] or {"error": ..}]}
"""

import json
import sys
import time


def main(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    from qscope.vllm_plugin import activations, layers

    if job.get("break") == "operator":  # as if the model had been traced without it
        layers.steered = lambda kind: kind
    if job.get("break") == "piecewise":
        use_piecewise_backend()
    begin = time.perf_counter()
    sizes = {"max_model_len": 512, "max_num_batched_tokens": 512}  # the engine warms up with a step of that size
    try:
        llm = LLM(job["model"], dtype="float32", seed=0, disable_log_stats=True, **sizes, **job["engine"])
    except Exception as error:  # whatever it is, its kind and words are what a test looks at
        return {"error": f"{type(error).__name__}: {error}"}
    found = {"load": time.perf_counter() - begin, "steps": []}
    for step in job["steps"]:
        parameters = [
            SamplingParams(
                temperature=0, max_tokens=r["tokens"], logprobs=4, ignore_eos=True, extra_args=r.get("extra")
            )
            for r in step
        ]
        begin = time.perf_counter()
        try:
            outputs = llm.generate([r["prompt"] for r in step], parameters, use_tqdm=False)
        except Exception as error:
            # A refused batch leaves the requests before the refused one in the engine.
            llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states), internal=True)
            found["steps"].append({"error": f"{type(error).__name__}: {error}"})
            continue
        seconds = time.perf_counter() - begin
        read = [o for o, r in zip(outputs, step, strict=True) if "read" in str(r.get("extra"))]
        values = iter(activations(llm, read) if read else [])
        found["steps"].append([plain(o, next(values) if o in read else {}, seconds) for o in outputs])
    return found


def plain(output, values, seconds: float) -> dict:
    text = output.outputs[0]
    return {
        "prompt_ids": list(output.prompt_token_ids),
        "ids": list(text.token_ids),
        "logprobs": [{str(i): p.logprob for i, p in sorted(at.items())} for at in text.logprobs],
        "cached": output.num_cached_tokens,
        "acts": {str(layer): value.tolist() for layer, value in values.items()},
        "seconds": seconds,
    }


def use_piecewise_backend() -> None:
    """vLLM's own compiler, which splits the graph at every attention, as on GPUs; its CPU platform never takes it.

    One of its passes names operators that only CUDA builds have, and knows none that a CPU runs: it is left out.
    """
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config) -> None:
        original(cls, vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.compile_sizes = CompilationMode.VLLM_COMPILE, []
        compilation.splitting_ops = list(compilation._attention_ops)

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    FixFunctionalizationPass.__call__ = lambda self, graph: None


if __name__ == "__main__":
    with open(sys.argv[1]) as job_file:
        result = main(json.load(job_file))
    with open(sys.argv[2], "w") as found_file:
        json.dump(result, found_file)
