"""The chart on a real node: real pods of the project's image, mutual TLS, closed ports, a store in the node's memory.

One release serves all tests here, in the order in which they stand: it takes longest to start.
"""

import datetime

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kube_tools import ToolFailed, wait_for
from openai import OpenAI

pytestmark = [pytest.mark.kube, pytest.mark.timeout(400)]

IMAGE = "pdserve:test"
MODEL = "smollm2-135m"
SMALL = {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "3Gi"}}
WORKER = {
    "resources": SMALL,
    "preStopSeconds": 2,
    "config": {"kv_memory_bytes": 128 << 20, "drain_timeout_s": 10, "store_fetch": "always"},
}
VALUES = {
    "image": {"repository": "pdserve", "tag": "test", "pullPolicy": "Never"},
    "tls": {"secretName": "pdserve-tls"},
    "networkPolicy": {"enabled": True},
    "router": {"resources": SMALL, "preStopSeconds": 1, "config": {"disaggregate": "always", "drain_timeout_s": 5}},
    "prefill": WORKER,
    "decode": WORKER,
    "kvstore": {"enabled": True, "resources": SMALL, "config": {"memory_bytes": 128 << 20}},
}
LONG = "The lighthouse keeper wrote in his book every evening, whatever the weather was. " * 12
"""More than 200 tokens: a dozen blocks to store and to find again."""


def certificates():
    """tls.crt, tls.key and ca.crt as a Secret wants them: an authority, and one certificate for "pdserve"."""
    now = datetime.datetime.now(datetime.UTC)

    def build(name, key, issuer, signer, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {
        "ca.crt": build("ca", authority, "ca", authority, x509.BasicConstraints(ca=True, path_length=None)),
        "tls.crt": build("pdserve", own, "ca", authority, x509.SubjectAlternativeName([x509.DNSName("pdserve")])),
        "tls.key": own.private_bytes(*plain).decode(),
    }


@pytest.fixture(scope="module")
def release(any_cluster, tmp_path_factory):
    import yaml

    values = tmp_path_factory.mktemp("values") / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    with any_cluster.fresh_namespace() as cluster:
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "pdserve-tls"}}
        cluster.apply({**secret, "stringData": certificates()})
        try:
            cluster.install("pd", "-f", values)
        except ToolFailed as error:
            raise AssertionError(f"{error}\n{story(cluster)}") from error
        yield cluster
        cluster.helm("uninstall", "pd", "--wait", "--timeout=2m")


def story(cluster):
    """What the pods say, for a test that failed."""
    said = [cluster.kubectl("get", "pods", "-o", "wide"), cluster.kubectl("get", "events")]
    for component in ("router", "prefill", "decode", "kvstore"):
        try:
            said.append(cluster.kubectl("logs", "-l", f"app.kubernetes.io/component={component}", "--tail=15"))
        except ToolFailed as error:
            said.append(str(error))
    return "\n".join(said)


@pytest.fixture(scope="module")
def address(release):
    """Of the router's Service."""
    return f"http://{release.one('service', 'pd-pdserve-router')['spec']['clusterIP']}:8000"


@pytest.fixture(scope="module")
def client(address):
    http = httpx.Client(trust_env=False, timeout=90)
    return OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0)


def ask(client, text, **options):
    """(answer, response headers)"""
    messages = [{"role": "user", "content": text}]
    given = {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 12, **options}
    raw = client.chat.completions.with_raw_response.create(**given)
    return raw.parse(), raw.headers


def record(address, headers):
    return httpx.get(f"{address}/v1/requests/{headers['x-request-id']}", trust_env=False).json()


def names(cluster, component):
    return {pod["metadata"]["name"] for pod in cluster.pods(component)}


def ready(pod):
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", ()))


def metric(cluster, component, port, name):
    (pod,) = cluster.pods(component)
    text = httpx.get(f"http://{pod['status']['podIP']}:{port}/metrics", trust_env=False).text
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))


def test_the_openai_client_is_answered_through_the_service_by_pods_of_both_pools(release, client, address):
    assert [model.id for model in client.models.list()] == [MODEL]
    answer, headers = ask(client, "What is the capital of France?", max_tokens=24)
    assert "Paris" in answer.choices[0].message.content, story(release)
    assert answer.usage.completion_tokens > 1
    shaped = record(address, headers)
    assert {shaped["prefill_worker"]} == names(release, "prefill")
    assert {shaped["decode_worker"]} == names(release, "decode")


def test_a_stream_arrives_in_pieces(client):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Count to five."}], stream=True, max_tokens=16
        )
    )
    assert sum(bool(chunk.choices and chunk.choices[0].delta.content) for chunk in chunks) > 4
    assert chunks[-1].choices[0].finish_reason


@pytest.mark.parametrize("component", ["prefill", "decode"])
def test_a_deleted_worker_pod_is_replaced_and_serves_what_the_store_has_kept(release, client, address, component):
    first, _ = ask(client, LONG)
    wait_for(lambda: metric(release, "kvstore", 7301, "pdserve_kvstore_blocks") > 0, "blocks in the store")
    before = names(release, component)
    (pod,) = before
    release.kubectl("delete", "pod", pod, "--timeout=90s")
    (new,) = wait_for(lambda: [p for p in release.pods(component) if ready(p)], "a new pod is ready", 120)
    assert new["metadata"]["name"] not in before

    def answered():
        """Not before the router has seen it; a request that comes too early is told so, and to come again."""
        answer = httpx.get(f"{address}/readyz", trust_env=False)
        return answer.status_code == 200

    wait_for(answered, "the router has a whole pair again", 60)
    again, headers = ask(client, LONG)
    assert again.choices[0].message.content == first.choices[0].message.content
    assert record(address, headers)[f"{component}_worker"] == new["metadata"]["name"]
    if component == "prefill":
        cached = again.usage.prompt_tokens_details.cached_tokens
        assert cached > 100, f"the new pod computed what its node's store has: {cached} tokens were cached"


def test_processes_are_confined_as_the_chart_says(release):
    (pod,) = names(release, "prefill")
    look = "import os; print(os.getuid(), os.access('/opt', os.W_OK), open('/proc/self/status').read())"
    said = release.kubectl("exec", pod, "--", "python", "-c", look)
    assert said.startswith("10001 False")
    assert "CapEff:\t0000000000000000" in said
    assert "NoNewPrivs:\t1" in said
    assert "Seccomp:\t2" in said
    with pytest.raises(ToolFailed):
        release.kubectl("exec", pod, "--", "touch", "/opt/pdserve/x")
    with pytest.raises(ToolFailed):
        release.kubectl("exec", pod, "--", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/token")


def test_kv_ports_are_closed_to_pods_that_are_not_of_the_fleet(release):
    (prefill,) = release.pods("prefill")
    ip = prefill["status"]["podIP"]
    knock = (
        "import socket, sys\n"
        "for port in map(int, sys.argv[2:]):\n"
        "    try: socket.create_connection((sys.argv[1], port), 5); print(port, 'open')\n"
        "    except OSError: print(port, 'closed')\n"
    )
    confined = {"allowPrivilegeEscalation": False, "runAsNonRoot": True, "runAsUser": 10001}
    container = {"name": "stranger", "image": IMAGE, "imagePullPolicy": "Never", "securityContext": confined}
    container["command"] = ["python", "-c", knock, ip, "7000", "7100"]
    release.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "stranger"},
            "spec": {"containers": [container], "restartPolicy": "Never", "automountServiceAccountToken": False},
        }
    )
    wait_for(lambda: release.one("pod", "stranger")["status"]["phase"] == "Succeeded", "the stranger has knocked", 90)
    assert release.kubectl("logs", "stranger").splitlines() == ["7000 closed", "7100 open"]
