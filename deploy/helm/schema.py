"""Prints values.schema.json: the shape of values.yaml, and each component's `config` as its process would read it.

So `helm install` refuses a misspelt key of either kind before anything runs. `make docs` writes it anew.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec

from pdserve.config import Config, KvstoreConfig, RouterConfig, WorkerConfig

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANYTHING: Schema = {"type": "object"}
"""In Kubernetes' own words: the API server checks it."""
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
QUANTITY: Schema = {"type": ["string", "integer"]}


def shape(**properties: Schema) -> Schema:
    """An object with these keys and no other."""
    return {"type": "object", "additionalProperties": False, "properties": properties}


def component(config: type[Config], **more: Schema) -> Schema:
    return shape(
        enabled=FLAG,
        image=shape(repository=TEXT, tag=TEXT, pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]}),
        gpus=COUNT,
        resources=shape(requests={"$ref": "#/$defs/resources"}, limits={"$ref": "#/$defs/resources"}),
        strategy=ANYTHING,
        preStopSeconds={"type": "integer", "minimum": 1},
        env={"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}},
        volumes={"type": "object", "additionalProperties": {"type": "object", "required": ["mountPath"]}},
        secretConfig={
            "type": "object",
            "additionalProperties": {**shape(secretName=TEXT, key=TEXT), "required": ["secretName", "key"]},
        },
        podAnnotations=TEXTS,
        podLabels=TEXTS,
        podSpec=ANYTHING,
        config={"allOf": [{"$ref": f"#/$defs/{config.__name__}"}, {"required": _needed(config)}]},
        **more,
    )


def _needed(config: type[Config]) -> list[str]:
    """Keys that templates read: ports, and the drain that grace must exceed."""
    listen = "grpc_listen" if config is RouterConfig else "listen"
    return [listen, "http_listen", "drain_timeout_s"]


def schema() -> Schema:
    _, definitions = msgspec.json.schema_components(
        [RouterConfig, WorkerConfig, KvstoreConfig], ref_template="#/$defs/{name}"
    )
    budget = {"podDisruptionBudget": shape(minAvailable=QUANTITY, maxUnavailable=QUANTITY), "minReadySeconds": COUNT}
    worker = component(WorkerConfig, replicaCount=COUNT, sharedMemory=TEXT, **budget)
    service = shape(type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]}, annotations=TEXTS)
    gpus_elsewhere = {"not": {"pattern": "/gpu$"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pdserve values",
        **shape(
            nameOverride=TEXT,
            fullnameOverride=TEXT,
            fleet={"type": "string", "pattern": "^([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?$"},
            image=shape(repository=TEXT, tag=TEXT, pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]}),
            tls=shape(secretName=TEXT, serverName=TEXT),
            allowPlaintext=FLAG,
            user={"type": "integer", "minimum": 1},
            gpuResource=TEXT,
            podSpec=ANYTHING,
            networkPolicy=shape(enabled=FLAG),
            router=component(RouterConfig, replicaCount=COUNT, service=service, **budget),
            prefill=worker,
            decode=worker,
            kvstore=component(KvstoreConfig, hostPath={"type": "string", "pattern": "^/"}),
            **{"global": ANYTHING},
        ),
        "$defs": {
            "resources": {"type": "object", "propertyNames": gpus_elsewhere, "additionalProperties": QUANTITY},
            **definitions,
        },
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
