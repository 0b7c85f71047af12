"""Paths beside generation: methods, health, metrics, version, the OpenAPI document, TLS."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from router.http import schema
from router.http.openapi import openapi_document
from router.http.schema import ChatBody, CompletionBody

GET_PATHS = ("/v1/models", "/v1/models/twin", "/healthz", "/readyz", "/metrics", "/version", "/openapi.json")
POST_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


async def test_every_get_answers_head_alike_but_without_body(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for path in GET_PATHS:
        raw.get(path)
        full = await raw.answer()
        raw.get(path, method="HEAD")
        head = await raw.answer(bodiless=True)
        assert (full.status, head.status) == (200, 200)
        assert head.headers["content-length"] == str(len(full.body))


async def test_wrong_methods_are_405_with_allow(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for path, method, allow in [(p, "DELETE", "get, head") for p in GET_PATHS] + [
        (p, "GET", "post") for p in POST_PATHS
    ]:
        raw.get(path, method=method)
        answer = await raw.answer()
        assert (answer.status, answer.headers["allow"]) == (405, allow)
        assert answer.error["code"] == "method_not_allowed"


async def test_unknown_paths_are_404(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for path in ("/", "/v1", "/v1/responses", "/v1/chat/completions/", "/%2e%2e/etc/passwd", "*"):
        raw.get(path)
        answer = await raw.answer()
        assert (answer.status, answer.error["code"]) == (404, "not_found")


async def test_queries_and_absolute_targets_are_understood(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for target in ("/healthz?verbose=1", "http://somewhere:80/healthz"):
        raw.get(target)
        assert (await raw.answer()).status == 200


async def test_ready_says_why_not(serve: Any, dial: Any, core: Any) -> None:
    raw = await dial(await serve())
    core.not_ready = "no decode worker"
    raw.get("/readyz")
    answer = await raw.answer()
    assert (answer.status, json.loads(answer.body)["reason"]) == (503, "no decode worker")
    raw.get("/healthz")
    assert (await raw.answer()).status == 200


async def test_metrics_and_version_are_what_the_server_was_given(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    raw.get("/metrics")
    metrics = await raw.answer()
    assert (metrics.body, metrics.headers["content-type"]) == (b"up 1\n", "text/plain; version=0.0.4; charset=utf-8")
    raw.get("/version")
    assert json.loads((await raw.answer()).body) == {"version": "1.2.3"}


async def test_a_failing_page_is_a_500_and_harms_nobody(serve: Any, dial: Any) -> None:
    def broken() -> bytes:
        raise RuntimeError("no metrics today")

    raw = await dial(await serve(metrics=broken))
    raw.get("/metrics")
    answer = await raw.answer()
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "today" not in str(answer.error)
    raw.get("/healthz")
    assert (await raw.answer()).status == 200


def _refs(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [ref for inner in value.values() for ref in _refs(inner)]
    return [ref for inner in value for ref in _refs(inner)] if isinstance(value, list) else []


def test_the_openapi_document_is_closed_and_complete() -> None:
    document = json.loads(openapi_document("1"))
    schemas = document["components"]["schemas"]
    refs = _refs(document)
    assert refs
    assert {ref.removeprefix("#/components/schemas/") for ref in refs} <= set(schemas)
    assert set(schemas["ChatBody"]["properties"]) == set(ChatBody.__struct_fields__)
    assert set(schemas["CompletionBody"]["properties"]) == set(CompletionBody.__struct_fields__)
    assert schemas["ChatBody"]["additionalProperties"] is False
    assert schemas["ChatBody"]["required"] == ["model", "messages"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["responses"] for operation in operations)


async def test_the_openapi_document_names_every_route(serve: Any, dial: Any) -> None:
    raw = await dial(await serve())
    for path, operations in json.loads(openapi_document("1"))["paths"].items():
        for method in operations:
            raw.get(path.replace("{model}", "twin"), method=method.upper())
            assert (await raw.answer()).status not in (404, 405)


def test_refused_fields_exist() -> None:
    for refused, body in ((schema.REFUSED_CHAT, ChatBody), (schema.REFUSED_COMPLETION, CompletionBody)):
        assert {name for name, _, _ in refused} <= set(body.__struct_fields__)


def make_certificate(folder: Path) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1; returns the files of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(cert_file), str(key_file)


async def test_tls_serves_streams_and_refusals(serve: Any, dial: Any, tmp_path: Path, core: Any) -> None:
    cert_file, key_file = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    port = await serve(tls=context)
    trust = ssl.create_default_context(cafile=cert_file)
    raw = await dial(port, ssl=trust)
    raw.post("/v1/completions", {"model": "twin", "prompt": "a", "stream": True})
    assert (await raw.answer()).body.endswith(b"[DONE]\n\n")
    raw.send(b"garbage\r\n\r\n")
    assert (await raw.answer()).status == 400
    gone = await dial(port, ssl=trust)
    gone.post("/v1/completions", {"model": "twin", "prompt": "hang"})
    handle = await core.handle(1)
    gone.writer.transport.abort()
    await asyncio.wait_for(handle.cancelled.wait(), 60)
