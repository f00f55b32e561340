"""/metrics: counts in Prometheus' text format, with the names of vLLM and of llama-server."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gguf_run.models.pages import NO_PAGE, PAGE
from gguf_run.runtime.engine.sequence import Job
from gguf_run.runtime.serve.counts import Counts, Histogram
from gguf_run.runtime.serve.errors import HttpError
from gguf_run.runtime.serve.registry import Registry, Served


class _Now:
    """What a model does now. All is 0 for one that is not loaded."""

    def __init__(self, served: Served | None) -> None:
        self.jobs: Sequence[Job] = []
        self.n_waiting = self.n_pages = self.n_steps = self.n_used = 0
        if served is not None:
            engine = served.model.engine
            cache, self.jobs, self.n_steps = engine.decoder.cache, [*engine.jobs], engine.rows.n_steps
            self.n_waiting, self.n_pages = engine.n_waiting, len(cache.groups[0].uses)
            rows = [job.row for job in self.jobs if job.row >= 0]
            self.n_used = len({page for row in rows for page in cache.slots[row].pages[0] if page != NO_PAGE})

    def adapters(self, *, running: bool) -> str:
        """Return the names of the adapters that answers use, or wait for."""
        jobs = [job for job in self.jobs if (job.row >= 0) == running]
        return ",".join(sorted({Path(a).stem for job in jobs for a, x in (job.request.adapters or {}).items() if x}))


# Name, kind, and what makes the value, or the samples of more labels, of a model's counts and of what it does now.
_METRICS: tuple[tuple[str, str, Callable[[Counts, _Now], Any]], ...] = (
    ("vllm:num_requests_running", "gauge", lambda c, now: sum(job.row >= 0 for job in now.jobs)),
    ("vllm:num_requests_waiting", "gauge", lambda c, now: now.n_waiting),
    ("vllm:kv_cache_usage_perc", "gauge", lambda c, now: now.n_used / max(now.n_pages, 1)),
    ("vllm:prefix_cache_queries_total", "counter", lambda c, now: c.n_prompt),
    ("vllm:prefix_cache_hits_total", "counter", lambda c, now: c.n_cached),
    ("vllm:num_preemptions_total", "counter", lambda c, now: c.n_preempted),
    ("vllm:prompt_tokens_total", "counter", lambda c, now: c.n_prompt),
    ("vllm:generation_tokens_total", "counter", lambda c, now: c.n_decoded),
    ("vllm:request_success_total", "counter", lambda c, now: {
        f'finished_reason="{reason}"': c.finished[reason] for reason in ("stop", "length", "abort")
    }),
    ("vllm:time_to_first_token_seconds", "histogram", lambda c, now: c.first),
    ("vllm:inter_token_latency_seconds", "histogram", lambda c, now: c.gaps),
    ("vllm:e2e_request_latency_seconds", "histogram", lambda c, now: c.whole),
    ("vllm:cache_config_info", "gauge", lambda c, now: {f'block_size="{PAGE}",num_gpu_blocks="{now.n_pages}"': 1}),
    ("vllm:lora_requests_info", "gauge", lambda c, now: {
        f'running_lora_adapters="{_text(now.adapters(running=True))}",'
        f'waiting_lora_adapters="{_text(now.adapters(running=False))}"': time.time()
    }),
    ("llamacpp:prompt_tokens_total", "counter", lambda c, now: c.n_prompt - c.n_cached),
    ("llamacpp:prompt_seconds_total", "counter", lambda c, now: c.prompt_s),
    ("llamacpp:tokens_predicted_total", "counter", lambda c, now: c.n_decoded),
    ("llamacpp:tokens_predicted_seconds_total", "counter", lambda c, now: c.decode_s),
    ("llamacpp:n_decode_total", "counter", lambda c, now: now.n_steps),
    ("llamacpp:prompt_tokens_seconds", "gauge", lambda c, now: (c.n_prompt - c.n_cached) / (c.prompt_s or 1)),
    ("llamacpp:predicted_tokens_seconds", "gauge", lambda c, now: c.n_decoded / (c.decode_s or 1)),
    ("llamacpp:requests_processing", "gauge", lambda c, now: sum(job.row >= 0 for job in now.jobs)),
    ("llamacpp:requests_deferred", "gauge", lambda c, now: now.n_waiting),
)  # fmt: skip


def metrics_text(registry: Registry) -> str:
    """Return all metrics. Their labels are the names of models and adapters: nothing that a client sends."""
    models = [(_text(name), c, _Now(registry.loaded.get(name))) for name, c in [*registry.counts.items()]]
    lines = []
    for name, kind, value_of in _METRICS:
        lines.append(f"# TYPE {name} {kind}")
        for model, counts, now in models:
            label, value = f'model_name="{model}"', value_of(counts, now)
            if isinstance(value, Histogram):
                lines += [f"{name}_{line}" for line in value.lines(label)]
            else:
                samples = value if isinstance(value, dict) else {"": value}
                lines += [f"{name}{{{label}{',' * bool(more)}{more}}} {x}" for more, x in samples.items()]
    return "\n".join(lines) + "\n"


def _text(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def _metrics(request: Request) -> Response:
    server = request.app.state.server
    if not server.has_metrics:
        raise HttpError(404, "this server tells no metrics: start it with --metrics")
    return Response(metrics_text(server.registry), media_type="text/plain; version=0.0.4")


routes = [Route("/metrics", _metrics)]
