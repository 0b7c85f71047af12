"""`/openapi.json`, built from the very types that decode requests and encode answers, so that it can't go stale."""

from __future__ import annotations

from typing import Any

import msgspec

from router.http.responses import ChatChunk, ChatCompletion, ErrorBody, ModelCard, ModelList, TextCompletion
from router.http.schema import ChatBody, CompletionBody

_TYPES = (ChatBody, CompletionBody, ChatCompletion, ChatChunk, TextCompletion, ModelCard, ModelList, ErrorBody)

_Json = dict[str, Any]


def openapi_document(version: str) -> bytes:
    """OpenAPI 3.1, as JSON."""
    _, schemas = msgspec.json.schema_components(_TYPES, ref_template="#/components/schemas/{name}")
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "pdserve",
            "description": "OpenAI's HTTP API over separate prefill and decode pools.",
            "version": version or "0",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": _paths(),
        "components": {"schemas": schemas},
    }
    return msgspec.json.encode(document)


def _paths() -> _Json:
    return {
        "/v1/chat/completions": _generation("createChatCompletion", ChatBody, ChatCompletion, ChatChunk),
        "/v1/completions": _generation("createCompletion", CompletionBody, TextCompletion, TextCompletion),
        "/v1/embeddings": {"post": _operation("createEmbedding", "Refused: text generation only", {})},
        "/v1/models": {"get": _operation("listModels", "Models served now", {"200": _json("The models", ModelList)})},
        "/v1/models/{model}": {"get": _model_operation()},
        "/v1/requests/{request_id}": {"get": _record_operation()},
        "/healthz": {"get": _operation("healthz", "The process lives", {"200": _any("Alive")})},
        "/readyz": {
            "get": _operation("readyz", "Requests can be served", {"200": _any("Ready"), "503": _any("Not ready")})
        },
        "/metrics": {"get": _operation("metrics", "Prometheus metrics", {"200": _text("Text exposition format")})},
        "/version": {"get": _operation("version", "The server's release", {"200": _any("Version")})},
        "/openapi.json": {"get": _operation("openapi", "This document", {"200": _any("OpenAPI 3.1")})},
    }


def _record_operation() -> _Json:
    operation = _operation("retrieveRecord", "What shaped an answer", {"200": _any("The record")})
    operation["parameters"] = [{"name": "request_id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _generation(name: str, body: type, whole: type, chunk: type) -> _Json:
    answer = {
        "description": "The answer; with `stream`, server-sent events of chunks, ended by `data: [DONE]`",
        "content": {
            "application/json": {"schema": _ref(whole)},
            "text/event-stream": {"schema": _ref(chunk)},
        },
    }
    operation = _operation(name, (body.__doc__ or "").strip(), {"200": answer})
    operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
    return {"post": operation}


def _model_operation() -> _Json:
    operation = _operation("retrieveModel", "One model", {"200": _json("The model", ModelCard)})
    operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _operation(name: str, summary: str, responses: _Json) -> _Json:
    return {
        "operationId": name,
        "summary": summary,
        "responses": responses | {"default": _json("An error, as OpenAI sends it", ErrorBody)},
    }


def _ref(of: type) -> _Json:
    return {"$ref": f"#/components/schemas/{of.__name__}"}


def _json(description: str, of: type) -> _Json:
    return {"description": description, "content": {"application/json": {"schema": _ref(of)}}}


def _any(description: str) -> _Json:
    return {"description": description, "content": {"application/json": {"schema": {"type": "object"}}}}


def _text(description: str) -> _Json:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}
