"""What a worker asks of an inference engine: the protocols between `WorkerNode` and the code that generates.

The worker's runtime owns everything that travels: registration, heartbeats, the queue, deadlines,
cancellation, the order and the indexes of tokens. An engine owns a model and one thread. It learns nothing
about NATS, controllers or retries, and the runtime learns nothing about models.

An engine is any object with `models` and `run`; it need not inherit from anything here::

    class Echo:
        models = ("echo",)

        def run(self, jobs: JobQueue) -> None:
            jobs.report("ready", loaded_models=self.models)
            while (job := jobs.get()) is not None:
                words = (job.request.prompt or "").split()
                for number, word in enumerate(words):
                    if job.cancelled:
                        break
                    job.token(word + " ", [number])
                else:
                    job.done("stop", prompt_tokens=len(words))

`MlxEngine` in `mlx_serving_router.mlx` is the engine that comes with the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Engine", "EnginePhase", "EngineRequest", "Job", "JobQueue"]

EnginePhase: TypeAlias = Literal["loading", "ready", "draining"]
"""What an engine is doing, as heartbeats carry it. A worker that loads a model is busy, not dead."""


class Engine(Protocol):
    """Generates answers for one or more models.

    An engine may have attributes more, which `WorkerNode` looks for: `max_concurrent`, how many jobs it works on at a
    time (1 where it is missing); `features`, what it can do beyond answering: `"batch"`, several jobs at a time, and
    `"resume"`, it heeds `EngineRequest.resume`; and of the files of its models, for people who look at the fleet,
    `model_paths` (a mapping of names to places), `total_model_size` (bytes) and `last_scanned` (milliseconds since the
    epoch).
    """

    @property
    def models(self) -> Sequence[str]:
        """The names that requests ask for. Constant, and known before anything is loaded."""
        ...

    def run(self, jobs: JobQueue) -> None:
        """Load, serve until the queue is closed, free everything, return.

        Called once, on a thread of its own that does nothing else, so state that belongs to a thread (as mlx's
        streams do) may be made here and nowhere else. The runtime joins that thread before the interpreter exits, as
        the operating system understands it and with the interpreter released: mlx takes the interpreter once more
        while the thread's storage is destroyed. `threading.Thread.join` of Python 3.11 and 3.12 returns before that,
        and an interpreter that exits in between aborts.

        The engine calls `jobs.report("ready", ...)` when it can take work; one that waits for a job without having
        reported anything is taken to be ready. An exception before that makes
        `WorkerNode.start()` raise it. An exception after it ends the worker: what concerns a single request
        belongs into that job's `error` instead.
        """
        ...


class JobQueue(Protocol):
    """The work of one engine, in the order in which it is to be done. Implemented by the worker's runtime."""

    @property
    def closed(self) -> bool:
        """Whether the worker is stopping and no further job will come."""
        ...

    def get(self, timeout: float | None = None) -> Job | None:
        """The next job; waits for it with the interpreter released.

        Args:
            timeout: Seconds to wait; `0` looks without waiting, `None` waits until there is a job or the
                queue is closed.

        Returns:
            The job, or `None` when the time has passed or the queue is closed.
        """
        ...

    def deliver(self, pieces: Sequence[tuple[Any, str, Sequence[int], Mapping[str, Any] | None]]) -> None:
        """Deliver pieces of several jobs at a time, as an engine has them after a step.

        As `token` of each job, but handed over together, which costs a fraction, and without waiting: an answer that
        grows too far beyond what its reader takes off ends with an error, and nobody else is held up.

        Args:
            pieces: Of each the job, the text, the tokens and their log probabilities.
        """
        ...

    def report(
        self,
        phase: EnginePhase,
        *,
        loaded_models: Sequence[str] = (),
        loading_models: Sequence[str] = (),
        cached_prefixes: Sequence[str] | None = None,
    ) -> None:
        """Tell the runtime what heartbeats are to say from now on.

        Args:
            phase: The first `"ready"` lets the worker register and take requests.
            loaded_models: Names from `Engine.models` that can answer at once.
            loading_models: Names being loaded: controllers allow requests for them more time, and jobs for them are
                not handed out until the name is no longer among them. Meanwhile they have
                `requestRouting.modelLoadTimeoutMs`, and afterwards all of their own time.
            cached_prefixes: Which prompts the engine could continue from its caches, as the hashes of
                docs/prefix-hashes.md, at most 256. The next heartbeat has them: there is none for their sake alone.
                `None` leaves them as they are.
        """
        ...

    @property
    def waiting_models(self) -> Sequence[str]:
        """The models that jobs wait for which were not handed out yet, each once."""
        ...

    def refuse(
        self,
        up_to: Literal["low", "normal", "high"] | None,
        message: str = "",
        *,
        retry_after_ms: int | None = None,
    ) -> None:
        """Refuse requests as WORKER_OVERLOADED from now on, those that wait included.

        Args:
            up_to: The highest priority that is refused, with all below it; `None` refuses nobody any more.
            message: Why. For people.
            retry_after_ms: Milliseconds after which the worker may be asked again; `None` takes what recent jobs took.
        """
        ...


class Job(Protocol):
    """One attempt at one request. Implemented by the worker's runtime.

    Exactly one of `done` and `error` ends it. After that, after a cancellation and after `put_back`, every method is
    without effect, so an engine never has to guard a call. A job that is dropped without an end is answered as an
    error by the runtime.
    """

    @property
    def request(self) -> EngineRequest:
        """What is asked for."""
        ...

    @property
    def attempt(self) -> int:
        """1 for the first worker that was asked, 2 for the second, and so on."""
        ...

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more: cancelled, past its deadline, or the worker is stopping.

        Cheap. An engine looks between tokens, and between the pieces of a long prompt, and simply lets go of
        the job.
        """
        ...

    def token(
        self,
        text: str,
        token_ids: Sequence[int] = (),
        *,
        logprobs: Mapping[str, Any] | None = None,
    ) -> None:
        """Deliver a piece of the answer.

        One that nobody takes off holds up the engine, for a second at most.

        Args:
            text: May be empty, where tokens have no text yet (half a character) or none at all.
            token_ids: The tokens of this piece. Each generated token is given exactly once, in order: the
                runtime counts the indexes of the stream by them.
            logprobs: Of the tokens of this piece, in the shape of the OpenAI API's chat completions.
        """
        ...

    def done(
        self,
        finish_reason: str = "stop",
        *,
        prompt_tokens: int = 0,
        completion_tokens: int | None = None,
        cached_tokens: int = 0,
        tool_calls: list[dict[str, Any]] | None = None,
    ) -> None:
        """End the job with success.

        Args:
            finish_reason: `"stop"`, `"length"` or `"tool_calls"`.
            prompt_tokens: Tokens of the prompt, the chat template's included.
            completion_tokens: Tokens generated; `None` takes the number of ids that went through `token`.
            cached_tokens: How many of the prompt's tokens did not have to be computed.
            tool_calls: In the OpenAI API's shape.
        """
        ...

    def put_back(self) -> None:
        """Give the job back to the queue, where it waits as before, and is handed out again as another `Job`.

        For a job whose model has to be loaded first: `JobQueue.report` says beforehand that it is, else the job comes
        again at once. A job that a piece was delivered of is not given back.
        """
        ...

    def error(self, code: str, message: str, *, retry_after_ms: int | None = None) -> None:
        """End the job with a failure.

        Args:
            code: A `ControllerErrorCode`. `REQUEST_VALIDATION_FAILED` blames the request, which is then not
                tried elsewhere; `WORKER_UNAVAILABLE`, `WORKER_OVERLOADED` and `MODEL_LOAD_FAILED` blame this
                worker.
            message: For people. Never holds a part of the prompt or of the answer.
            retry_after_ms: Milliseconds for which this worker wants no further request; `-1`: do not retry
                anywhere.
        """
        ...


class EngineRequest(Protocol):
    """What is asked for: the frozen `InferenceRequest` as the worker received it.

    What the caller left open is `None`; either `messages` or `prompt` is set. Values are what a stranger
    sent: the runtime has checked their types, their meaning is the engine's to check.
    """

    @property
    def request_id(self) -> str:
        """The caller's name for the request, the same in every attempt."""
        ...

    @property
    def model_id(self) -> str:
        """Which of `Engine.models` is to answer."""
        ...

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """A conversation in the OpenAI API's shape."""
        ...

    @property
    def prompt(self) -> str | None:
        """A text to be continued as it stands, without a chat template."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """At most so many tokens are generated."""
        ...

    @property
    def temperature(self) -> float | None:
        """0: always the most likely token."""
        ...

    @property
    def top_p(self) -> float | None:
        """Sample from the most likely tokens that together have this probability; 1 switches it off."""
        ...

    @property
    def top_k(self) -> int | None:
        """Sample from so many most likely tokens; 0 switches it off."""
        ...

    @property
    def min_p(self) -> float | None:
        """Sample from tokens at least this likely, relative to the most likely one; 0 switches it off."""
        ...

    @property
    def seed(self) -> int | None:
        """The same seed, request and worker give the same answer."""
        ...

    @property
    def stop(self) -> list[str] | None:
        """Strings before which the answer ends; they are no part of it."""
        ...

    @property
    def repetition_penalty(self) -> float | None:
        """Divides the logits of tokens that have occurred (arXiv:1909.05858); 1 switches it off."""
        ...

    @property
    def presence_penalty(self) -> float | None:
        """Subtracted from the logits of tokens that have occurred; 0 switches it off."""
        ...

    @property
    def frequency_penalty(self) -> float | None:
        """Subtracted from the logits of tokens for every time they have occurred; 0 switches it off."""
        ...

    @property
    def logit_bias(self) -> Mapping[str, float] | None:
        """Added to the logits of the tokens with these ids."""
        ...

    @property
    def logprobs(self) -> int | None:
        """How many alternatives to report for each token, beside the log probability of the token itself.

        0: the token's own alone. `None`: nothing is asked for.
        """
        ...

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Functions that the model may call, in the OpenAI API's shape."""
        ...

    @property
    def tool_choice(self) -> str | dict[str, Any] | None:
        """`"auto"`, `"none"`, `"required"`, or the function that is to be called."""
        ...

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The form of the answer, in the OpenAI API's shape."""
        ...

    @property
    def session_id(self) -> str | None:
        """Requests of one session come to the same worker: a hint for caches."""
        ...

    @property
    def stream(self) -> bool | None:
        """Whether the caller reads tokens as they come. Either way the engine delivers them so."""
        ...

    @property
    def priority(self) -> str | None:
        """`"high"`, `"normal"` or `"low"`. The queue is already in this order."""
        ...

    @property
    def resume(self) -> Mapping[str, Any] | None:
        """`tokenIds` and `text` that another worker delivered before it failed, to be continued."""
        ...
