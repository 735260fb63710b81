"""What the answers of one step have to say, handed to the runtime together.

Promises that an answer's pieces go out before its end, and that a step costs one handing over however many answers it
has. Waits for nobody: a slow reader is the runtime's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlx_serving_router.engine import Job, JobQueue


class Outgoing:
    """Pieces and ends of several jobs, until `flush`.

    Args:
        jobs: Takes them.
    """

    def __init__(self, jobs: JobQueue) -> None:
        self._jobs = jobs
        self._pieces: list[tuple[Job, str, list[int], Mapping[str, Any] | None]] = []
        self._ends: list[tuple[Job, str, dict[str, Any]]] = []

    def piece(
        self, job: Job, text: str, token_ids: list[int], logprobs: Mapping[str, Any] | None = None
    ) -> None:
        """A piece of a job's answer."""
        self._pieces.append((job, text, token_ids, logprobs))

    def done(self, job: Job, finish_reason: str, **usage: Any) -> None:
        """A job's good end, with what `Job.done` takes."""
        self._ends.append((job, finish_reason, usage))

    def flush(self) -> None:
        """Hand it all over."""
        if self._pieces:
            pieces, self._pieces = self._pieces, []
            self._jobs.deliver(pieces)
        if self._ends:
            ends, self._ends = self._ends, []
            for job, finish_reason, usage in ends:
                job.done(finish_reason, **usage)
