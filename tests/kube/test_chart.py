"""The chart as text: what its templates make of values, and what they refuse. No cluster is needed."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from kube_tools import CHART, CI_VALUES, ROOT, ToolFailed, call

from pdserve.config import KvstoreConfig, RouterConfig, WorkerConfig, from_mapping, load, parse_override, to_mapping

pytestmark = pytest.mark.kube

CONFIGS = {"router": RouterConfig, "prefill": WorkerConfig, "decode": WorkerConfig, "kvstore": KvstoreConfig}
PLAIN = ("--set", "allowPlaintext=true")
WORKLOADS = ("Deployment", "DaemonSet")
POD = {"POD_NAME": "pd-pdserve-x-abc", "POD_IP": "10.244.0.7", "HOST_IP": "192.168.0.3", "NODE_NAME": "1"}


@pytest.fixture(params=CI_VALUES, ids=lambda path: path.stem)
def values(request):
    return request.param


def workloads(objects):
    return {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in objects if each["kind"] in WORKLOADS
    }


def container(workload):
    return workload["spec"]["template"]["spec"]["containers"][0]


def test_every_values_file_is_linted_and_valid_for_kubernetes(tools, values, tmp_path):
    tools.helm("lint", "--strict", CHART, "-f", values)
    rendered = tmp_path / "rendered.yaml"
    rendered.write_text(tools.helm("template", "pd", CHART, "--namespace", "ns", "-f", values))
    broken = tmp_path / "broken.yaml"
    broken.write_text(rendered.read_text().replace("containers:", "contaners:"))
    for version in ("1.30", "1.36"):
        call(tools.validate, "-k", version, "--strict", rendered)
        with pytest.raises(ToolFailed, match="did not validate for resource"):
            call(tools.validate, "-k", version, "--strict", broken)


def test_a_release_must_choose_between_tls_and_plaintext(tools):
    with pytest.raises(ToolFailed, match=r"set tls\.secretName"):
        tools.template()
    with pytest.raises(ToolFailed, match=r"kvstore\.enabled needs tls"):
        tools.template(*PLAIN, "--set", "kvstore.enabled=true")


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("prefill.config.num_blcks", "num_blcks"),
        ("router.replicas", "replicas"),
        ("kvstor.enabled", "kvstor"),
        ("router.config.kubernetes.ns", "ns"),
    ],
)
def test_a_misspelt_key_is_refused_by_name(tools, path, wrong):
    with pytest.raises(ToolFailed, match=f"additional properties '{wrong}' not allowed"):
        tools.template(*PLAIN, "--set", f"{path}=1")


def test_gpus_have_one_spelling(tools):
    with pytest.raises(ToolFailed, match="gpu"):
        tools.template(*PLAIN, "--set", r"prefill.resources.limits.nvidia\.com/gpu=1")
    objects = workloads(tools.template(*PLAIN, "--set", "prefill.gpus=4", "--set", "gpuResource=amd.com/gpu"))
    assert container(objects["prefill"])["resources"]["limits"]["amd.com/gpu"] == 4
    assert set(container(objects["decode"])["resources"]["limits"]) == {"memory"}


def test_the_published_schema_is_the_code_s():
    made = call(sys.executable, ROOT / "deploy" / "helm" / "schema.py")
    assert json.loads(made) == json.loads((CHART / "values.schema.json").read_text()), "run `make docs`"


def test_values_and_schema_have_the_same_keys():
    default = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())["properties"]
    assert set(schema) - {"global"} == set(default)
    for name in CONFIGS:
        unset = {"podDisruptionBudget", "sharedMemory", "minReadySeconds"} if name == "kvstore" else set()
        assert set(schema[name]["properties"]) - unset == set(default[name]), name


def test_every_key_of_values_is_explained():
    lines = (CHART / "values.yaml").read_text().splitlines()
    comments = "\n".join(line for line in lines if line.lstrip().startswith("#"))
    default = yaml.safe_load("\n".join(lines))
    explained = set(re.findall(r"[A-Za-z]+", comments))
    keys = {*default, *(key for name in CONFIGS for key in default[name])}
    assert keys - {"enabled"} <= explained, keys - explained


def config_text(objects, name):
    """The content of a component's ConfigMap."""
    maps = {each["metadata"]["name"]: each for each in objects if each["kind"] == "ConfigMap"}
    return maps[f"pd-pdserve-{name}"]["data"][f"{name}.yaml"]


def started_with(objects, name, tmp_path):
    """The config that the component's process would read, from its ConfigMap and its command line."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(config_text(objects, name))
    args = container(workloads(objects)[name])["args"]
    assert args[:2] == ["--config", f"/etc/pdserve/config/{file.name}"]
    secret = tmp_path / "secret"
    secret.write_text("0042")
    given = [re.sub(r"\$\((\w+)\)", lambda found: POD[found[1]], arg) for arg in args[3::2]]
    overrides = dict(parse_override(re.sub(r"=@/etc/pdserve/secrets/.*", f"=@{secret}", arg)) for arg in given)
    return load(CONFIGS[name], str(file), overrides)


def test_what_is_rendered_is_a_config_that_its_process_takes(tools, values, tmp_path):
    objects = tools.template("-f", values)
    for name, workload in workloads(objects).items():
        config = started_with(objects, name, tmp_path)
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        listens = {config.http_listen, config.grpc_listen if name == "router" else config.listen}
        assert {int(each.rpartition(":")[2]) for each in listens} == set(ports.values())
        assert all(each.startswith("0.0.0.0:") for each in listens)
        if name in ("prefill", "decode"):
            assert config.advertise == f"10.244.0.7:{ports['grpc']}"
            assert config.labels == {"node": "1"}, "a node's name is text, even if it is a number"
            assert config.worker_id == POD["POD_NAME"]


def test_the_secure_release_has_certificates_everywhere_and_its_store_on_its_node(tools, tmp_path):
    objects = tools.template("-f", CHART / "ci" / "2-secure-values.yaml")
    router, prefill, store = (started_with(objects, name, tmp_path) for name in ("router", "prefill", "kvstore"))
    assert router.worker_tls.rpc() == prefill.tls.rpc() == store.tls.rpc() is not None
    assert not prefill.allow_plaintext
    assert not store.allow_plaintext
    assert router.server_secret == "0042"
    assert prefill.store == store.advertise == "192.168.0.3:7300"
    assert store.transport_host == "10.244.0.7"
    shm = {
        name: next(v for v in w["spec"]["template"]["spec"]["volumes"] if v["name"] == "shm")
        for name, w in workloads(objects).items()
        if name != "router"
    }
    assert all(volume["hostPath"]["path"] == "/dev/shm" for volume in shm.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_of_a_config_can_be_given_and_arrives_as_it_was(tools, name, tmp_path):
    given = to_mapping(CONFIGS[name]())
    for key, value in given.items():
        if key.endswith("listen"):
            given[key] = value.replace("127.0.0.1:0", "0.0.0.0:7999")
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"allowPlaintext": True, "tls": {"secretName": "s"}, "kvstore": {"enabled": True}}))
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({name: {"config": given}}))
    objects = tools.template("-f", file, "-f", own)
    config_map = next(o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] == f"pd-pdserve-{name}")
    assert from_mapping(CONFIGS[name], yaml.safe_load(config_map["data"][f"{name}.yaml"])) == from_mapping(
        CONFIGS[name], given
    )


def test_pods_are_confined_and_outlive_their_drain(tools, values):
    for name, workload in workloads(tools.template("-f", values)).items():
        pod = workload["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(workload)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is (name == "router"), "only routers ask the API server"
        sleep = container(workload)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert sleep >= 1
        drain = 120 if "gpu" in str(values) and name != "router" else 10 if name == "kvstore" else 25
        assert pod["terminationGracePeriodSeconds"] > sleep + drain
        assert container(workload)["resources"]["requests"]
        assert {container(workload)[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")} == {
            "/healthz",
            "/readyz",
        }


def test_selectors_hold_nothing_that_changes_and_match_their_pods(tools, values):
    objects = tools.template("-f", values)
    for name, workload in workloads(objects).items():
        wanted = workload["spec"]["selector"]["matchLabels"]
        assert set(wanted) == {f"app.kubernetes.io/{each}" for each in ("name", "instance", "component")}
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert wanted.items() <= labels.items()
        for each in objects:
            selector = each.get("spec", {}).get("selector") or {}
            if each["kind"] == "Service" and selector.get("app.kubernetes.io/component") == name:
                assert selector.items() <= labels.items()
                assert {port["protocol"] for port in each["spec"]["ports"]} == {"TCP"}


def test_a_router_finds_the_workers_of_every_release_of_its_fleet(tools, tmp_path):
    main = tools.template(*PLAIN, "--set", "fleet=main")
    other = tools.template("-f", CHART / "ci" / "4-second-model-values.yaml")
    selector = dict(
        part.partition("=")[::2] for part in started_with(main, "router", tmp_path).kubernetes.selector.split(",")
    )
    services = [o for o in main + other if o["kind"] == "Service" and "pdserve.io/workers" in o["metadata"]["labels"]]
    assert len(services) == 4
    for service in services:
        assert service["spec"]["clusterIP"] == "None"
        labels = service["metadata"]["labels"]
        assert all(key in labels and value in ("", labels[key]) for key, value in selector.items())
    assert {o["kind"] for o in other} >= {"Service", "Deployment", "ConfigMap", "ServiceAccount"}
    assert not [o for o in other if "router" in o["metadata"]["name"]]


def test_a_changed_config_rolls_its_own_pods_only(tools):
    def stamps(*arguments):
        return {
            name: workload["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
            for name, workload in workloads(tools.template(*PLAIN, *arguments)).items()
        }

    before, after = stamps(), stamps("--set", "decode.config.max_num_seqs=8")
    assert before["decode"] != after["decode"]
    assert {name: stamp for name, stamp in before.items() if name != "decode"}.items() <= after.items()


def test_a_number_of_replicas_that_is_not_given_is_not_written(tools):
    assert "replicas" not in workloads(tools.template(*PLAIN, "--set", "decode.replicaCount=null"))["decode"]["spec"]


def test_routers_may_read_endpoint_slices_and_nothing_else(tools):
    objects = tools.template(*PLAIN)
    (role,) = [o for o in objects if o["kind"] == "Role"]
    assert role["rules"] == [
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
    ]
    assert not [o for o in objects if o["kind"].startswith("Cluster")]


def test_the_dockerfile_copies_every_package_of_the_wheel():
    ignored = (ROOT / "deploy" / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    text = (ROOT / "pyproject.toml").read_text()
    packages = set(re.findall(r'"(\w+)"', text.partition("packages = [")[2].partition("]")[0]))
    assert packages
    assert packages <= kept


def test_scripts_are_sound_shell():
    for script in ("deploy/docker/image.sh", "deploy/kube-tools.sh", "deploy/test-kube.sh", "deploy/test-node.sh"):
        checked = subprocess.run(["bash", "-n", ROOT / script], capture_output=True, text=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, ""), script
