"""An engine without a model: it says the words of a prompt again, a word of every running request in each step.

python examples/engines/echo.py
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import mlx_serving_router as msr

if TYPE_CHECKING:
    from mlx_serving_router.engine import EngineRequest, Job, JobQueue

STEP = 0.02
"""Seconds that a step takes: here goes the call of a model with the next token of all answers."""


class Echo:
    """A batch engine: several requests at a time, which join and leave between steps."""

    models = ("echo",)
    max_concurrent = 8
    features = ("batch",)

    def run(self, jobs: JobQueue) -> None:
        """Answers until the queue is closed; on a thread of its own."""
        jobs.report("ready", loaded_models=self.models)  # after whatever has to be loaded
        answers: list[Answer] = []
        while answers or not jobs.closed:
            while len(answers) < self.max_concurrent:
                job = jobs.get(0 if answers else None)  # without work it waits, with some it only looks
                if job is None:
                    break
                words = text_of(job.request).split()
                if words:
                    answers.append(Answer(job, words))
                else:
                    job.error("REQUEST_VALIDATION_FAILED", "there is no text to say again")
            time.sleep(STEP)
            jobs.deliver([answer.next_piece() for answer in answers])
            answers = [answer for answer in answers if not answer.over()]


class Answer:
    """One job on its way."""

    def __init__(self, job: Job, words: list[str]) -> None:
        self.job = job
        self.words = words
        limit = job.request.max_tokens
        self.most = len(words) if limit is None else min(limit, len(words))
        self.said = 0

    def next_piece(self) -> tuple[Job, str, list[int], None]:
        """The next word, with the number that stands for it."""
        self.said += 1
        return self.job, self.words[self.said - 1] + " ", [self.said - 1], None

    def over(self) -> bool:
        """Whether nothing more is to come; tells the job, unless nobody waits for it any more."""
        if self.job.cancelled:
            return True
        if self.said < self.most:
            return False
        reason = "stop" if self.most == len(self.words) else "length"
        self.job.done(reason, prompt_tokens=len(self.words))
        return True


def text_of(request: EngineRequest) -> str:
    """The prompt, or what the last message says."""
    if request.messages is None:
        return request.prompt or ""
    content: Any = request.messages[-1].get("content")
    return content if isinstance(content, str) else ""


if __name__ == "__main__":
    worker = msr.WorkerNode(Echo())
    print(f"{worker.worker_id} joins the fleet, with the model echo; Ctrl-C ends it", flush=True)
    try:
        worker.run()
    except msr.ControllerError as error:  # no NATS server, say
        sys.exit(f"{worker.worker_id} has stopped: {error.message}")
    print(f"{worker.worker_id} has ended")
