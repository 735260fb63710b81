"""The OpenAPI document: what it says of the addresses, and that they do as it says, under generated requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from mlx_serving_router.fastapi import controller_router, create_app
from serving import LOCAL, PATIENCE, Fleet, serve

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_bodies_are_described() -> None:
    document = create_app({**LOCAL, "controller": {"apiKeys": ["k"]}}).openapi()
    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/models/{model_id}", "/api/cluster/status", "/health"} <= set(paths)
    chat = paths["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages"} <= set(body["required"])
    assert body["properties"]["messages"]["items"]["properties"]["role"]["type"] == "string"
    answer = chat["responses"]["200"]["content"]
    assert answer["application/json"]["schema"]["$ref"].endswith("/ChatCompletion")
    assert "text/event-stream" in answer
    assert chat["responses"]["4XX"]["content"]["application/json"]["schema"]["$ref"].endswith("/OpenAIError")
    assert chat["security"] == [{"apiKey": []}]
    assert "security" not in paths["/health"]["get"]
    (limit,) = paths["/api/controller/requests"]["get"]["parameters"]
    assert (limit["name"], limit["in"], limit["schema"]["minimum"]) == ("limit", "query", 1)
    # Every part that is named is there.
    parts = document["components"]["schemas"]
    assert all(name.rpartition("/")[2] in parts for name in references(document))


def test_an_applications_own_document_has_them_too() -> None:
    app = FastAPI()
    app.include_router(controller_router(), prefix="/llm")
    document = app.openapi()
    assert "messages" in str(document["paths"]["/llm/v1/chat/completions"]["post"]["requestBody"])
    parts = document["components"]["schemas"]
    assert all(name.rpartition("/")[2] in parts for name in references(document))


def test_what_nobody_can_answer_is_not_described() -> None:
    paths = create_app(LOCAL).openapi()["paths"]
    assert not {"/v1/embeddings", "/v1/responses"} & set(paths)
    static = [{"workerId": "a", "url": "http://127.0.0.1:1", "models": ["m"]}]
    paths = create_app({**LOCAL, "workers": {"static": static}}).openapi()["paths"]
    body = paths["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "input"]
    assert "text/event-stream" in paths["/v1/responses"]["post"]["responses"]["200"]["content"]


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serve(create_app(controller=Fleet().controller)) as served:
        yield served


DOCUMENT = schemathesis.openapi.from_dict(create_app(LOCAL).openapi())
OPERATIONS = {found.ok().label: found.ok() for found in DOCUMENT.get_all_operations()}
WITH_BODIES = sorted(label for label in OPERATIONS if label.startswith("POST"))
#: The same requests in every run.
GENERATED = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("label", sorted(OPERATIONS))
def test_what_the_document_allows_is_answered_as_it_says(label: str, url: str) -> None:
    @GENERATED
    @given(case=OPERATIONS[label].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def check(case: Any) -> None:
        if isinstance(case.body, dict):
            # One that is served, by whoever: what is looked at are answers.
            case.body["model"] = "tiny"
            # What no schema says: the one needs the other.
            if case.body.get("top_logprobs") and label == "POST /v1/chat/completions":
                case.body["logprobs"] = True
            case.headers.pop("x-worker-id", None)
        case.call_and_validate(base_url=url, checks=CHECKS.get_all(), timeout=PATIENCE)

    check()


@pytest.mark.parametrize("label", WITH_BODIES)
def test_what_the_document_does_not_allow_is_refused_as_it_says(label: str, url: str) -> None:
    @GENERATED
    @given(case=OPERATIONS[label].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def check(case: Any) -> None:
        case.headers.pop("x-worker-id", None)
        case.call_and_validate(base_url=url, checks=CHECKS.get_all(), timeout=PATIENCE)

    check()
