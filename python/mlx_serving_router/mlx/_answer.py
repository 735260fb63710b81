"""One answer on its way from tokens to the job that waits for it.

Promises that the pieces which go out are the same whatever runs beside it and wherever it was taken up again, that each
token goes out once, and that the job meets at most one end. Knows text, stop strings and calls of tools; knows nothing
of batches and caches.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router._native import prefix_hashes
from mlx_serving_router.mlx._logprobs import token_logprob
from mlx_serving_router.mlx._prompt import offered_tools
from mlx_serving_router.mlx._request import InvalidRequestError
from mlx_serving_router.mlx._text import IncrementalDecoder, StopMatcher
from mlx_serving_router.mlx._tools import ToolCallReader

if TYPE_CHECKING:
    from mlx_serving_router.engine import Job
    from mlx_serving_router.mlx._models import LoadedModel
    from mlx_serving_router.mlx._outgoing import Outgoing
    from mlx_serving_router.mlx._request import Parameters

logger = logging.getLogger("mlx_serving_router.mlx")

_DECODER_CONTEXT: Final = 8  # tokens of a plain prompt that decide how the first new ones are written
_SILENT_TOKENS: Final = 16  # as many go out without a text: whoever waits wants a sign of life


class Answer:
    """The answer to one job.

    Args:
        job: Who waits for it.
        model: The model that gives it.
        prompt: The tokens of what was asked.
        parameters: Of the request.
        outgoing: Takes what the answer has to say.

    Raises:
        InvalidRequestError: What is to be resumed does not fit together, or to the model.
    """

    def __init__(
        self,
        job: Job,
        model: LoadedModel,
        prompt: list[int],
        parameters: Parameters,
        outgoing: Outgoing,
    ) -> None:
        request = job.request
        chat = request.prompt is None
        self.job = job
        self._outgoing = outgoing
        self.parameters = parameters
        self.cached = 0
        """How many of `tokens` did not have to be computed."""
        self._prompt = len(prompt)
        self.tokens = [*prompt, *parameters.resumed]
        """What the model is to continue."""
        self.left = min(parameters.max_tokens, model.context - len(prompt)) - len(parameters.resumed)
        """At most so many tokens are to come."""
        # A plain prompt is continued, leading space and all; an answer to messages is a text of its own.
        self._decoder = IncrementalDecoder(model.decode, () if chat else prompt[-_DECODER_CONTEXT:])
        self._matcher = StopMatcher(parameters.stop)
        self._calls = ToolCallReader.of(model.tokenizer, offered_tools(request)) if chat else None
        self.generated = 0
        """Tokens that have come."""
        self._undelivered: list[int] = []
        self._logprobs: list[dict[str, Any]] = []  # of the tokens that are undelivered
        self._decode = model.decode
        self._shown: list[str] = []
        self._ends = model.end_tokens
        self._owed = ""  # text of resumed tokens that was not shown yet
        self._ahead = 0  # characters that were shown before they were certain: they are not to be shown again
        self._resume(parameters.resumed, parameters.resumed_text)

    @property
    def text(self) -> str:
        """What has gone out so far, by whomever."""
        return "".join(self._shown)

    def begin(self) -> bool:
        """Whether there is something to generate; where not, the answer is over."""
        if self._matcher.stopped or not self._ends.isdisjoint(self.parameters.resumed):
            self.finish("stop")
            return False
        if self.left <= 0:
            self.finish("length")
            return False
        return True

    def prefixes(self) -> list[str]:
        """The hashes of what was asked and answered: the next turn begins with both."""
        request = self.job.request
        if request.prompt is not None:
            return prefix_hashes(request.model_id, prompt=request.prompt + self.text)
        answer = {"role": "assistant", "content": self.text}
        return prefix_hashes(request.model_id, messages=[*(request.messages or ()), answer])

    def push(self, token: int, logprobs: Any) -> bool:
        """Take a token. True: it completes a stop string, and the answer wants no other.

        Args:
            token: The token.
            logprobs: What it was drawn from.
        """
        self.generated += 1
        self._undelivered.append(token)
        if self.parameters.logprobs is not None:
            self._logprobs.append(token_logprob(self._decode, token, logprobs, self.parameters.logprobs))
        text = self._read(token)
        if text or len(self._undelivered) >= _SILENT_TOKENS:
            self._deliver(text)
        return self._matcher.stopped

    def is_end(self, token: int) -> bool:
        """Whether a token ends the answer, and is no part of it."""
        return token in self._ends

    def finish(self, reason: str) -> None:
        """Come to a good end.

        Args:
            reason: `"stop"` or `"length"`: why no further token is generated.
        """
        text = self._matcher.finish(self._decoder.finish())
        calls = None
        if self._calls is not None:
            text = self._calls.finish(text)
            calls = self._calls.calls or None
        self._deliver(text)
        if self._matcher.stopped:
            reason = "stop"
        self._outgoing.done(
            self.job,
            "tool_calls" if calls and reason == "stop" else reason,
            prompt_tokens=self._prompt,
            completion_tokens=self.generated,
            cached_tokens=min(self.cached, self._prompt),
            tool_calls=calls,
        )

    def fail(self, error: Exception) -> None:
        """End the job badly: mlx has failed."""
        fail(self.job, error, f"{type(error).__name__}: {error}")

    def _read(self, token: int) -> str:
        text = self._matcher.push(self._decoder.push(token))
        return text if self._calls is None else self._calls.push(text)

    def _deliver(self, text: str) -> None:
        if self._owed:
            text, self._owed = self._owed + text, ""
        if self._ahead:
            text, self._ahead = text[self._ahead :], max(0, self._ahead - len(text))
        if text or self._undelivered:
            self._shown.append(text)
            logprobs, self._logprobs = self._logprobs, []
            tokens, self._undelivered = self._undelivered, []
            self._outgoing.piece(self.job, text, tokens, {"content": logprobs} if logprobs else None)

    def _resume(self, tokens: tuple[int, ...], shown: str) -> None:
        """Come to where the answer was left: the same tokens read again give the same text."""
        text = ""
        for token in tokens:
            text += self._read(token)
            if self._matcher.stopped:
                break
        if text.startswith(shown):
            self._owed = text[len(shown) :]
        elif shown.startswith(text):
            self._ahead = len(shown) - len(text)
        else:
            raise InvalidRequestError("resume.text is not the text of resume.tokenIds")
        if shown:
            self._shown.append(shown)


def fail(job: Job, error: Exception, description: str) -> None:
    """End a job with the engine's failure, and log where it happened; `description` holds nothing of the prompt."""
    job.error("WORKER_UNAVAILABLE", f"the engine failed on this request: {description}")
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", job.request.request_id, description, frames)
