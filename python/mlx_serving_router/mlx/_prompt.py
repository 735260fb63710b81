"""From a request to the tokens that a model is to continue.

Promises that what comes out fits the model: there is at least one token, room for another, and none beyond the
vocabulary. Refuses with `InvalidRequestError` what cannot become such a prompt, and never repeats a word of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_serving_router.mlx._request import InvalidRequestError, chat_messages

if TYPE_CHECKING:
    from mlx_serving_router.engine import EngineRequest
    from mlx_serving_router.mlx._models import LoadedModel


def prompt_tokens(model: LoadedModel, request: EngineRequest) -> list[int]:
    """The tokens that the model is to continue.

    Raises:
        InvalidRequestError: There is nothing to continue, or it does not fit.
    """
    messages, prompt = request.messages, request.prompt
    if (messages is None) == (prompt is None):
        raise InvalidRequestError("exactly one of messages and prompt must be set")
    tokenizer = model.tokenizer
    if prompt is None:
        text = _rendered(model, messages or (), offered_tools(request))
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        bos = tokenizer.bos_token
        ids = tokenizer.encode(prompt, add_special_tokens=bos is None or not prompt.startswith(bos))
    if not ids:
        raise InvalidRequestError("the prompt must not be empty")
    if len(ids) >= model.context:
        raise InvalidRequestError(
            f"the prompt has {len(ids)} tokens; with the answer it must fit the model's {model.context}"
        )
    if max(ids) >= model.vocabulary:
        raise InvalidRequestError(f"the prompt has a token that the model does not know: {max(ids)}")
    return list(ids)


def offered_tools(request: EngineRequest) -> list[dict[str, Any]]:
    """The tools that the model is to know of: all of them, none, or the one that `tool_choice` names.

    Raises:
        InvalidRequestError: `tool_choice` is none of those.
    """
    tools = list(request.tools or ())
    choice = request.tool_choice
    if choice == "none":
        return []
    if isinstance(choice, Mapping):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, Mapping) else None
        named = [tool for tool in tools if _name(tool) == wanted]
        if wanted is None or not named:
            raise InvalidRequestError("tool_choice must name a function that is among the tools")
        return named
    if choice not in (None, "auto", "required"):
        raise InvalidRequestError("tool_choice must be auto, none, required, or a function of the tools")
    if choice == "required" and not tools:
        raise InvalidRequestError("tool_choice is required, and there are no tools")
    return tools


def _rendered(model: LoadedModel, messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]]) -> str:
    from jinja2 import TemplateError

    ready = chat_messages(messages)
    if not model.tokenizer.has_chat_template:
        raise InvalidRequestError("this model has no chat template: send prompt instead of messages")
    try:
        text: str = model.tokenizer.apply_chat_template(
            ready, tools=tools or None, add_generation_prompt=True, tokenize=False
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # Templates raise for what they do not support; their words are the template's author's.
        raise InvalidRequestError(
            "the model's chat template does not accept these messages or tools"
        ) from error
    return text


def _name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None
