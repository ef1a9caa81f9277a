"""One request's account: what it cost, told once to the metrics and once to the log.

Never sees the prompt or the text.
"""

import logging
import time

from moestro.engine import FinishReason, Timings, TokenEvent

from .families import ServerMetrics

log = logging.getLogger("moestro.server")


class Track:
    """From submission to the end. `close` is idempotent and belongs into a `finally`."""

    def __init__(
        self, metrics: ServerMetrics, endpoint: str, request_id: str, began_s: float
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self._metrics = metrics
        self._endpoint = endpoint
        self._began_s = began_s  # time.perf_counter() at arrival
        self._last_token_s: dict[tuple[int, int], float] = {}  # by (prompt, answer)
        self._first_token_s: float | None = None
        self._reason = FinishReason.ABORT  # until an event says otherwise
        self._timings: Timings | None = None
        self._closed = False

    def saw(self, event: TokenEvent, prompt: int = 0) -> None:
        """`prompt`: the number of the one that it answers."""
        now_s = time.perf_counter()
        answer = prompt, event.index
        if event.token_ids:
            if self._first_token_s is None:
                self._first_token_s = now_s - self._began_s
                self._metrics.first_token(self._first_token_s)
            elif answer in self._last_token_s:
                self._metrics.next_token(now_s - self._last_token_s[answer])
            self._last_token_s[answer] = now_s
        self.generated_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            self._reason = event.finish_reason
            self._timings = event.timings

    def failed(self) -> None:
        self._reason = FinishReason.ERROR

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        total_s = time.perf_counter() - self._began_s
        self._metrics.ended(self._endpoint, self._reason)
        if self._reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._metrics.finished(
                total_s, self.prompt_tokens, self.generated_tokens, self._timings
            )
        log.info(
            "request %s: %s, finish=%s prompt_tokens=%d generated_tokens=%d %s total_s=%.3f",
            self.request_id,
            self._endpoint,
            self._reason.value,
            self.prompt_tokens,
            self.generated_tokens,
            self._timings_in_words(),
            total_s,
        )

    def _timings_in_words(self) -> str:
        ttft = "-" if self._first_token_s is None else f"{self._first_token_s:.3f}"
        if self._timings is None:
            return f"ttft_s={ttft}"
        parts = self._timings
        return (
            f"ttft_s={ttft} queue_s={parts.queue_s:.3f} prefill_s={parts.prefill_s:.3f} "
            f"decode_s={parts.decode_s:.3f}"
        )
