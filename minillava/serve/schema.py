"""What the routes take, as an OpenAPI document made of the types by which requests are read."""

from typing import Any

import msgspec

from minillava import __version__
from minillava.serve.protocol import ChatRequest, TokenizeRequest
from minillava.serve.responses import ResponsesRequest

TAKEN = {
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
}
TOLD = ("/v1/models", "/health", "/livez")


def openapi() -> dict[str, Any]:
    schemas, parts = msgspec.json.schema_components(
        [*TAKEN.values()], ref_template="#/components/schemas/{name}"
    )
    answers = {"default": {"description": "any", "content": {"application/json": {"schema": {}}}}}
    paths: dict[str, Any] = {path: {"get": {"responses": answers}} for path in TOLD}
    for path, schema in zip(TAKEN, schemas, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths[path] = {"post": {"requestBody": body, "responses": answers}}
    info = {"title": "minillava", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": parts}}
