"""The answers that one model generates at a time: mlx-lm's `BatchGenerator`, and who waits for what comes out of it.

Promises that an answer which fails or is cancelled leaves the others' tokens as they are; that what is cancelled is
gone before the next step, wherever it was; that a step computes no more tokens of prompts than the prefill step size,
of all of them together; and that a batch which breaks ends its own answers and is built anew. What was computed for a
prompt is kept, of answers that were cut short too.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from mlx_serving_router.mlx._answer import fail
from mlx_serving_router.mlx._sampling import make_processors, make_sampler

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving_router.mlx._answer import Answer
    from mlx_serving_router.mlx._cache import PromptCaches
    from mlx_serving_router.mlx._models import LoadedModel
    from mlx_serving_router.mlx._outgoing import Outgoing

logger = logging.getLogger("mlx_serving_router.mlx")

_PROMPTS: Final = 8  # prompts that are computed side by side


class Batch:
    """The answers of one model. The engine's thread alone uses it.

    Args:
        model: The model.
        caches: What was computed before, and where it is kept.
        outgoing: Takes what the answers have to say.
        size: Answers that are generated at a time.
        prefill_step_size: Tokens of prompts that are computed in one step.
    """

    def __init__(
        self,
        model: LoadedModel,
        caches: PromptCaches,
        outgoing: Outgoing,
        *,
        size: int,
        prefill_step_size: int,
    ) -> None:
        self._model = model
        self._caches = caches
        self._outgoing = outgoing
        self._size = size
        self._prefill_step_size = prefill_step_size
        self._generator: Any = None
        self._answers: dict[int, Answer] = {}
        self._prompts: set[int] = set()  # of those, the ones whose prompt is not computed yet

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, answer: Answer) -> None:
        """Take an answer in: its prompt is next. Whatever goes wrong ends this one alone."""
        try:
            generator = self._built()
            cache, held = self._caches.take(self._model.name, answer.tokens)
            (uid,) = generator.insert(
                [answer.tokens[held:]],
                max_tokens=[answer.left],
                caches=[cache],
                all_tokens=[answer.tokens[:held]],
                samplers=[make_sampler(answer.parameters, len(answer.parameters.resumed))],
                logits_processors=[make_processors(answer.parameters)],
            )
        except Exception as error:  # noqa: BLE001 mlx raises many kinds, memory among them
            answer.fail(error)
            return
        answer.cached = held
        self._answers[uid] = answer
        self._prompts.add(uid)

    def drop_cancelled(self) -> None:
        """Let go of the answers that nobody waits for."""
        self._leave([uid for uid, answer in self._answers.items() if answer.job.cancelled])

    def step(self) -> None:
        """A token of every answer that is being written, and a piece of the prompts of those that are not."""
        if not self._answers:
            return
        side_by_side = max(1, min(len(self._prompts), _PROMPTS))
        self._generator.prefill_step_size = max(1, self._prefill_step_size // side_by_side)
        try:
            prompts, tokens = self._generator.next()
        except Exception as error:  # noqa: BLE001 mlx raises many kinds, memory among them
            self._break(error)
            return
        self._prompts.difference_update(each.uid for each in prompts if each.end_of_prompt)
        over = [each.uid for each in tokens if self._receive(each)]
        self._outgoing.flush()  # before anything that takes time
        for each in tokens:
            if each.finish_reason is not None:
                self._keep(self._answers.pop(each.uid), each.all_tokens, each.prompt_cache)
        self._leave(over)

    def close(self) -> None:
        """Let go of everything. The answers are over already."""
        self._answers.clear()
        self._prompts.clear()
        if self._generator is not None:
            self._generator.close()  # puts back the wired limit that it found
            self._generator = None

    def _built(self) -> Any:
        if self._generator is None:
            from mlx_lm.generate import BatchGenerator

            self._generator = BatchGenerator(
                self._model.model,
                stop_tokens=[[token] for token in sorted(self._model.end_tokens)],
                completion_batch_size=self._size,
                prefill_batch_size=min(_PROMPTS, self._size),
                prefill_step_size=self._prefill_step_size,
            )
        return self._generator

    def _receive(self, response: Any) -> bool:
        """Hand a token on. True: the answer is over, and the generator does not know it."""
        answer = self._answers[response.uid]
        over = False
        try:
            if not answer.is_end(response.token):
                over = answer.push(response.token, response.logprobs)
            if over or response.finish_reason is not None:
                answer.finish(response.finish_reason or "stop")
        except Exception as error:  # noqa: BLE001 a tokenizer may raise anything
            fail(answer.job, error, type(error).__name__)  # its words may quote the answer
            over = True
        return over and response.finish_reason is None

    def _leave(self, uids: Iterable[int]) -> None:
        """Take answers out that the generator would go on with."""
        leaving = {uid: self._answers.pop(uid) for uid in uids}
        if not leaving:
            return
        self._prompts.difference_update(leaving)
        try:
            kept = self._generator.remove(list(leaving), return_prompt_caches=True)
        except Exception as error:  # noqa: BLE001 mlx raises many kinds, memory among them
            self._break(error)
            return
        for uid, answer in leaving.items():
            cache, tokens = kept[uid]
            self._keep(answer, tokens, cache)

    def _keep(self, answer: Answer, tokens: list[int], cache: list[Any]) -> None:
        import mlx.core as mx

        if len(tokens) <= answer.cached or not self._caches.limit:  # nothing was computed, or nothing is kept
            return
        try:
            with mx.stream(self._generator.stream):
                mx.eval([each.state for each in cache])  # else it holds on to the whole batch
            self._caches.put(self._model.name, tokens, cache, answer.prefixes())
        except Exception as error:  # noqa: BLE001 a cache is a help, and its loss nobody's failure
            logger.warning(
                "what was computed for request %s is not kept: %s",
                answer.job.request.request_id,
                type(error).__name__,
            )

    def _break(self, error: Exception) -> None:
        """End all answers: nobody knows which tokens the step had made."""
        answers = list(self._answers.values())
        self.close()
        for answer in answers:
            answer.fail(error)
