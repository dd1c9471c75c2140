"""The counters for Prometheus. Labels come from our own routes, never from a request."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minillava.generate.engine import Engine
from minillava.serve.service import Chat

ROWS = (1, 2, 4, 8, 16, 32)
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    def __init__(self, engine: Engine):
        registry = self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Answered requests", "route", "status")
        self.seconds = Histogram(
            "minillava_request_seconds", "From request to answer", ["route"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.first = Histogram(
            "minillava_time_to_first_token_seconds", "From request to first token",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.rows = Histogram(
            "minillava_rows_per_step", "Rows that took a token together", buckets=ROWS,
            registry=registry,
        )  # fmt: skip
        self.step = Histogram(
            "minillava_token_seconds", "A step, in which every running answer gets a token or more",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        engine.on_step = self.stepped
        self.pictures = self._counter("pictures", "Pictures in prompts", "cached")
        self.prompt = self._counter("prompt_tokens", "Positions of prompts", "cached")
        self.generated = self._counter("generated_tokens", "New tokens")
        self.drafted = self._counter("drafted_tokens", "Guesses that were checked")
        self.accepted = self._counter("accepted_tokens", "Guesses that were right")
        self.cancelled = self._counter("cancelled", "Requests whose client went away")
        for name, text, value in (
            ("minillava_running", "Answers that are made", lambda: len(engine.answers)),
            ("minillava_waiting", "Requests that wait", lambda: len(engine.waiting)),
            ("minillava_slots", "Answers at once", lambda: len(engine.slots)),
            ("minillava_engine_up", "Whether the model's thread runs", engine.is_alive),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"minillava_{name}_total", text, labels, registry=self.registry)

    def stepped(self, rows: int, seconds: float) -> None:
        self.rows.observe(rows)
        self.step.observe(seconds)

    def note(self, chat: Chat) -> None:
        """Count a request that has ended."""
        cached = chat.request.cached
        self.prompt.labels("true").inc(cached)
        self.prompt.labels("false").inc(chat.positions - cached)
        self.generated.inc(chat.generated)
        self.drafted.inc(chat.request.drafted)
        self.accepted.inc(chat.request.accepted)
        shown = len(chat.request.pictures)
        shown += sum(len(pictures) for _, pictures in chat.request.second_rows)
        self.pictures.labels("true").inc(shown - chat.request.encoded)
        self.pictures.labels("false").inc(chat.request.encoded)
        if chat.first is not None:
            self.first.observe(chat.first - chat.request.times["taken"])

    def text(self) -> bytes:
        return generate_latest(self.registry)
