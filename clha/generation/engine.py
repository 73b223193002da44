"""vLLM in the stage's own process."""

import difflib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from clha.errors import StageFailure, TransientFailure, UserError
from clha.generation.requests import Engine, Request, Result, Sample, Sampling
from clha.progress import Progress
from clha.settings import Engine as EngineSettings

# What vLLM needs on CPUs beside its arguments.
_CPU_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the stage's thread count is set by OMP_NUM_THREADS
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCH_COMPILE_DISABLE": "1",  # a 16 s compilation for one comparison in vLLM's sampler
}


class InProcessEngine:
    """Samples with a vLLM engine that lives in this process (on GPUs vLLM may start workers of its own)."""

    def __init__(self, model: Path, settings: EngineSettings, sampling: Sampling, seed: int) -> None:
        """Load the model in folder `model`.

        Raises UserError for engine arguments that vLLM does not have and for what vLLM refuses, StageFailure when the
        model cannot be loaded.
        """
        arguments = engine_arguments(model, settings, sampling, seed)
        from vllm import EngineArgs, LLMEngine, SamplingParams
        from vllm.platforms import current_platform
        from vllm.sampling_params import RequestOutputKind
        from vllm.usage.usage_lib import UsageContext

        on_cpu = current_platform.is_cpu()
        check_engine_args(settings.args, (f.name for f in fields(EngineArgs)))
        try:
            # Of the batch sizes that vLLM has for its uses, those of its offline `LLM` class.
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments), UsageContext.LLM_CLASS)
        except (ValueError, TypeError, NotImplementedError) as error:  # pydantic's ValidationError is a ValueError
            raise UserError(f"generate.engine: vLLM refuses the settings: {_last_line(error)}") from error
        except RuntimeError as error:
            raise StageFailure(f"vLLM could not load {model}: {_last_line(error)}") from error
        self._params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            stop_token_ids=list(sampling.stop_token_ids),
            logprobs=0,  # of the sampled token only
            flat_logprobs=True,
            detokenize=bool(sampling.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._pending = 0
        self._device = "cpu" if on_cpu else str(current_platform.get_device_name())
        # A GPU is kept full: requests wait beyond the running ones, so that the end of a shard leaves no gap. A CPU is
        # as fast with few sequences as with many; there each shard is drained and meets an empty prefix cache, so that
        # it comes out bit for bit the same whatever was generated before it.
        running = self._engine.vllm_config.scheduler_config.max_num_seqs
        self._capacity = 1 if on_cpu else max(2, 2 * running // sampling.n)
        self._drained = on_cpu

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def pending(self) -> int:
        return self._pending

    def submit(self, request: Request) -> None:
        from vllm.inputs import TokensPrompt

        params = self._params.clone()
        params.seed = request.seed
        if self._drained and not self._pending:
            self._engine.reset_prefix_cache()
        with _worker_watched():
            self._engine.add_request(request.id, TokensPrompt(prompt_token_ids=request.token_ids), params)
        self._pending += 1

    def poll(self) -> list[Result]:
        with _worker_watched():
            outputs = self._engine.step()
        results = []
        for output in outputs:
            if output.finished:
                self._pending -= 1
                samples: list[Any] = list(output.outputs)  # type: ignore[arg-type]  # never a pooling output here
                results.append(Result(output.request_id, [_sample(s) for s in samples if s is not None]))
        return results

    @property
    def identity(self) -> dict[str, Any]:
        from vllm import __version__

        return {"engine": {"name": "vllm", "version": __version__, "mode": "in_process"}, "device": self._device}

    def tokens_generated(self) -> int | None:
        return self._counter("vllm:generation_tokens")

    def prefix_cache_hits(self) -> int | None:
        return self._counter("vllm:prefix_cache_hits")

    def _counter(self, name: str) -> int:
        return int(sum(getattr(m, "value", 0) for m in self._engine.get_metrics() if m.name == name))

    def close(self) -> None:
        self._engine.engine_core.shutdown()


def check_engine_args(args: Mapping[str, Any], known: Any) -> None:
    """Raises UserError for a name that is no engine argument of vLLM, with the nearest one that is."""
    names = sorted(known)
    for name in args:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else "see vLLM's engine arguments"
            raise UserError(f"generate.engine.args.{name}: vLLM has no such engine argument; {hint}")


def engine_arguments(model: Path, settings: EngineSettings, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The arguments of vLLM's engine. Sets environment variables too: call it before vllm is imported."""
    import torch

    arguments: dict[str, Any] = {
        "model": str(model),
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "trust_remote_code": False,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "logprobs_mode": "raw_logprobs",
        "seed": seed % (1 << 31),
        "disable_log_stats": False,  # tokens and the prefix cache are counted in them
        "skip_tokenizer_init": not sampling.stop,  # text is needed to find stop strings only
    }
    if not torch.cuda.is_available():
        for name, value in _CPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        arguments |= {
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            # Seeded sampling fails on CPUs when a prompt is split; so none is, and each must fit into a step.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, settings.max_model_len),
            "block_size": 32,  # the samples of a prompt share whole blocks: with vLLM's 128 hardly ever
        }
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            arguments["kv_cache_memory_bytes"] = 1 << 30  # vLLM's own default takes nearly all memory
    return arguments | settings.args


def _sample(output: Any) -> Sample:
    ids = [int(i) for i in output.token_ids]
    return Sample(ids, [float(p) for p in output.logprobs.logprobs], str(output.finish_reason))


@contextmanager
def _worker_watched() -> Iterator[None]:
    """A TransientFailure where vLLM's worker process is found dead."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise TransientFailure(f"vLLM's worker process died: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("1 validation error")), type(error).__name__)


def open_engine(model: Path, settings: EngineSettings, sampling: Sampling, seed: int, progress: Progress) -> Engine:
    """The engine that `settings` ask for: vLLM in this process with the model in folder `model`, or a server of it."""
    if settings.mode == "server":
        from clha.generation.server import ServerEngine

        return ServerEngine(model, settings, sampling)
    progress.log(f"loading {model.name} in vLLM")
    started = time.monotonic()
    engine = InProcessEngine(model, settings, sampling, seed)
    progress.log(f"vLLM ready after {time.monotonic() - started:.0f} s")
    return engine
