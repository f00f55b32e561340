"""What has happened in a model, counted: numbers of tokens and answers, and how long they took."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from gguf_run.runtime.engine.sequence import Job

_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Numbers of values up to each bound, in seconds."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(_BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self.counts[bisect_left(_BOUNDS, seconds)] += 1
        self.sum += seconds

    def lines(self, label: str) -> list[str]:
        """Return the samples, without the name that stands before each."""
        bounds = [*map(str, _BOUNDS), "+Inf"]
        sums = dict(zip(bounds, accumulate(self.counts), strict=True))
        ends = f"sum{{{label}}} {self.sum}", f"count{{{label}}} {sums['+Inf']}"
        return [*(f'bucket{{{label},le="{bound}"}} {n}' for bound, n in sums.items()), *ends]


class Counts:
    """What has happened in a model. It outlives the model, which may be unloaded and loaded again."""

    def __init__(self) -> None:
        self.n_prompt = self.n_cached = self.n_decoded = self.n_preempted = 0  # tokens; times
        self.prompt_s = self.decode_s = 0.0  # seconds of steps
        self.finished: Counter[str] = Counter()  # answers by the reason of their end
        self.first, self.gaps, self.whole = Histogram(), Histogram(), Histogram()

    def ended(self, jobs: Sequence[Job], now: float) -> None:
        """Count answers that are at their ends. now: by the engine's clock."""
        for job in jobs:
            self.n_prompt += job.n_prompt
            self.n_cached += max(0, min(job.n_reused, job.n_prompt))
            self.n_decoded += len(job.reply.tokens)
            self.n_preempted += job.n_preempted
            self.prompt_s += job.prefill_s
            self.decode_s += job.decode_s
            self.finished[{"context": "length", "": "abort"}.get(job.finish, job.finish)] += 1
            self.whole.add(now - job.arrived)
            if job.n_chosen:
                self.first.add(job.first_at - job.arrived)
