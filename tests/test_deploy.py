"""The deployment files, as far as they can be tried without Docker and without a cluster.

What they are made of is compared with its source, each format is held against its own schema or read by the
program it is for, and what refers to something else (files, ports, secrets, users, pools) finds it there.
Every check of that kind is shown to fail, on a copy with a mistake in it.
"""

import copy
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

import sidecar
from deploy.kubernetes import build
from deploy.observe.processes import alertmanager, stop
from sidecar import config_file
from sidecar.api.server import HttpServer
from sidecar.config import Config, HttpConfig
from tests import test_dockerfile as dockerfile
from tests.metrics_page import IDLE, Nobody, Page, fill
from tests.sidecar_process import eventually
from tests.test_docs import anchors, links

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
ANNOTATION = 256 * 1024
"""Bytes of an object's annotations: kubectl apply keeps the object there. A ConfigMap could have 1 MiB."""

GOODBYES = 3  # s from the end of drain_timeout to the end of the process: docs/operations.md
NATIVE, SECOND = "application", "second-container"

Tree = dict[str, Any]


def read(path: Path) -> Tree:
    tree: Tree = yaml.safe_load(path.read_text())
    return tree


def program(name: str) -> str:
    """Where it is: beside this interpreter, where pip puts it, or on the path."""
    found = shutil.which(
        name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    assert found is not None, f"{name} is not installed"
    return found


def run(*command: str | Path, within: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=within)


def output(*command: str | Path) -> str:
    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def changed(tree: Tree, path: str, value: object) -> Tree:
    """A copy with another value at ``path``, as in ``spec.groups.0.name``."""
    result = copy.deepcopy(tree)
    *parents, last = path.split(".")
    place: Any = result
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    place[last] = value
    return result


# -- generated files -------------------------------------------------------------------------------


def test_generated_files_are_what_their_sources_make():
    """If not: python -m deploy.kubernetes.build"""
    assert build.stale() == []


def test_rule_object_has_the_groups_of_the_rule_file():
    """Read as YAML: they were taken over as text, with another indentation."""
    (rule,) = objects("monitoring", "PrometheusRule")
    assert rule["spec"] == read(ROOT / "alerts/pgsidecar.rules.yml")


def test_config_maps_have_the_dashboards():
    """Each by the label that Grafana's sidecar looks for, and in a size that ``kubectl apply`` can take."""
    sources = sorted((ROOT / "dashboards").glob("*.json"))
    maps = objects("monitoring", "ConfigMap")
    assert sources
    assert [list(each["data"]) for each in maps] == [[path.name] for path in sources]
    for each, path in zip(maps, sources, strict=True):
        text = each["data"][path.name]
        assert json.loads(text) == json.loads(path.read_text())
        assert len(json.dumps(each)) < ANNOTATION
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_generated_files_say_so():
    for path, text in build.generated().items():
        assert re.match(r"# Generated from (alerts|dashboards)/\S+ by .*: do not edit\.", text), (
            path
        )


def test_check_names_what_differs_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.read_text() for path in build.generated()}
    (tmp_path / "new.json").write_text('{"uid": "new"}')
    monkeypatch.setattr(build, "DASHBOARDS", tmp_path)
    assert build.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert told == "deploy/kubernetes/monitoring/dashboards.yaml: differs\n"
    assert {path: path.read_text() for path in before} == before


def test_build_writes_what_differs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """And the same again from the same sources."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "MONITORING", tmp_path)
    assert build.main(["--check"]) == 1
    capsys.readouterr()
    assert build.main([]) == 0
    assert capsys.readouterr().out == "prometheusrule.yaml: written\ndashboards.yaml: written\n"
    assert build.main(["--check"]) == 0
    assert build.main([]) == 0
    assert capsys.readouterr().out == ""


# -- Kubernetes: what kubectl makes of the files ---------------------------------------------------


@cache
def kustomized(folder: str) -> str:
    return output(program("kubectl"), "kustomize", KUBERNETES / folder)


def objects(folder: str, kind: str | None = None) -> list[Tree]:
    """What ``kubectl apply -k`` would send; of one kind only, if one is given."""
    found: list[Tree] = list(yaml.safe_load_all(kustomized(folder)))
    return [each for each in found if kind is None or each["kind"] == kind]


def pod(folder: str = NATIVE) -> Tree:
    """The specification of the example's pods."""
    (deployment,) = objects(folder, "Deployment")
    spec: Tree = deployment["spec"]["template"]["spec"]
    return spec


def container(folder: str = NATIVE, name: str = "pgsidecar") -> Tree:
    spec = pod(folder)
    (found,) = (
        each for each in spec["containers"] + spec.get("initContainers", []) if each["name"] == name
    )
    result: Tree = found
    return result


def kubernetes_problem(thing: Tree, version: str) -> str | None:
    """What the schema of this version of Kubernetes has against an object; unknown keys included."""
    kubernetes_validate = importlib.import_module("kubernetes_validate")
    try:
        kubernetes_validate.validate(thing, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


@pytest.mark.parametrize(
    ("folder", "version"),
    [(NATIVE, "1.29"), (NATIVE, "1.37"), (SECOND, "1.25"), (SECOND, "1.28"), (SECOND, "1.37")],
)
def test_kubernetes_takes_the_application(folder: str, version: str):
    for each in objects(folder):
        assert kubernetes_problem(each, version) is None


def test_kubernetes_takes_the_dashboards():
    for each in objects("monitoring", "ConfigMap"):
        assert kubernetes_problem(each, "1.29") is None


CONTAINER = "spec.template.spec.initContainers.0"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.replica", 2),
        ("spec.template.spec.terminationGracePeriodSeconds", "60s"),
        (f"{CONTAINER}.startupProbe.httpGet.pth", "/livez"),
        (f"{CONTAINER}.ports.0.containerPort", "6432"),
        (f"{CONTAINER}.securityContext.readonlyRootFilesystem", True),
    ],
)
def test_kubernetes_refuses_mistakes(path: str, value: object):
    (deployment,) = objects(NATIVE, "Deployment")
    assert kubernetes_problem(changed(deployment, path, value), "1.29") is not None


def test_native_sidecar_needs_a_kubernetes_that_knows_it():
    """The reason for the other variant: 1.27 does not know the restart policy of a container."""
    (deployment,) = objects(NATIVE, "Deployment")
    assert "restartPolicy" in str(kubernetes_problem(deployment, "1.27"))


def operator_problem(thing: Tree) -> str | None:
    """What the operator's resource definition has against an object; unknown keys included."""
    models = importlib.import_module("cloudcoil.models.prometheus_operator.v1")
    try:
        taken = getattr(models, thing["kind"]).model_validate(thing)
    except ValueError as error:
        return str(error)
    # What it does not know is left out without a word.
    known = taken.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return None if known == thing else f"{known} is left of {thing}"


@pytest.mark.parametrize("kind", ["PodMonitor", "PrometheusRule"])
def test_operator_takes_monitor_and_rules(kind: str):
    (thing,) = objects("monitoring", kind)
    assert operator_problem(thing) is None


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("PodMonitor", "spec.podMetricsEndpoints.0.interval", "15 s"),
        ("PodMonitor", "spec.podMetricsEndpoints.0.intervall", "15s"),
        ("PodMonitor", "spec.podMetricsEndpoints.0.relabelings.0.action", "rename"),
        ("PrometheusRule", "spec.groups.0.rules.0.expr", None),
        ("PrometheusRule", "spec.groups.0.rules.0.label", {}),
    ],
)
def test_operator_refuses_mistakes(kind: str, path: str, value: object):
    (thing,) = objects("monitoring", kind)
    assert operator_problem(changed(thing, path, value)) is not None


def test_no_manifest_is_left_out():
    """Every file is one of a kustomization's, or a kustomization."""
    listed = set()
    for path in KUBERNETES.rglob("kustomization.yaml"):
        tree = read(path)
        names = tree["resources"] + [each["path"] for each in tree.get("patches", [])]
        names += [file for each in tree.get("configMapGenerator", []) for file in each["files"]]
        listed |= {path, *((path.parent / name).resolve() for name in names)}
    assert set(KUBERNETES.rglob("*.y*ml")) <= listed


def test_top_folder_has_all_of_it():
    """But for the other variant of the same application."""
    parts = objects(NATIVE) + objects("monitoring")
    assert len(objects(".")) == len(parts)
    assert all(each in parts for each in objects("."))


# -- Kubernetes: the pod ---------------------------------------------------------------------------


def sidecar_config(folder: str = NATIVE) -> Config:
    """As the container reads it: the mounted file, the image's environment and the container's."""
    (each,) = objects(folder, "ConfigMap")
    given = {entry["name"]: "postgresql://app:x@db/shop" for entry in container(folder)["env"]}
    return config_file.parse(each["data"]["config.yaml"], {**dockerfile.environment(), **given}, "")


def test_sidecar_is_native():
    """It starts before the application and stops after it; in the other variant it is a second container."""
    (native,) = pod(NATIVE)["initContainers"]
    assert native["restartPolicy"] == "Always"
    assert [each["name"] for each in pod(NATIVE)["containers"]] == ["shop"]
    assert "initContainers" not in pod(SECOND)
    assert [each["name"] for each in pod(SECOND)["containers"]] == ["shop", "pgsidecar"]


def test_variants_differ_in_the_kind_of_container_only():
    native, second = dict(container(NATIVE)), dict(container(SECOND))
    del native["restartPolicy"]
    assert list(second.pop("lifecycle")) == ["preStop"]
    assert native == second


def test_ports_are_those_of_the_configuration():
    """PostgreSQL's for the pod alone, HTTP for probes and Prometheus."""
    config = sidecar_config()
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert ports == {"pg": config.listen.port, "http-metrics": config.http.port}
    assert (config.listen.host, config.http.host) == ("127.0.0.1", "0.0.0.0")


async def test_probes_ask_what_the_sidecar_answers():
    """Only readiness knows of PostgreSQL: a restart would not bring it back."""
    page = Page()
    down = ["PostgreSQL is down"]
    server = HttpServer(HttpConfig(port=0), page.metrics, lambda: down, page.recorder, Nobody())
    await server.start()
    codes = {}
    try:
        async with aiohttp.ClientSession() as session:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                get = container()[probe]["httpGet"]
                assert get["port"] == "http-metrics"
                url = f"http://127.0.0.1:{server.address[1]}{get['path']}"
                async with session.get(url) as response:
                    codes[probe] = response.status
    finally:
        await server.stop()
    assert codes == {"startupProbe": 200, "livenessProbe": 200, "readinessProbe": 503}


def test_configuration_is_mounted_where_the_image_looks_for_it():
    (mount,) = container()["volumeMounts"]
    (volume,) = pod()["volumes"]
    (each,) = objects(NATIVE, "ConfigMap")
    assert mount["name"] == volume["name"]
    assert volume["configMap"]["name"] == each["metadata"]["name"]
    (file,) = each["data"]
    assert json.loads(dockerfile.one("CMD"))[-1] == f"{mount['mountPath']}/{file}"
    assert "command" not in container()
    assert "args" not in container()


def test_sidecar_is_the_images_user_and_may_nothing_else():
    context = dict(container()["securityContext"])
    user, group = map(int, dockerfile.one("USER").split(":"))
    assert (context.pop("runAsUser"), context.pop("runAsGroup")) == (user, group)
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert context == container(name="shop")["securityContext"] == restricted
    assert pod()["securityContext"] == {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert pod()["automountServiceAccountToken"] is False


@pytest.mark.parametrize("folder", [NATIVE, SECOND])
def test_pod_has_time_to_drain(folder: str):
    """Beside what comes first: the application's own end, or the wait for it."""
    before = container(folder).get("lifecycle", {"preStop": {"exec": {"command": ["", "20"]}}})
    first = int(before["preStop"]["exec"]["command"][1])
    need = first + sidecar_config(folder).drain_timeout + GOODBYES
    assert pod(folder)["terminationGracePeriodSeconds"] >= need


def test_image_is_of_this_version():
    assert container()["image"] == f"pgsidecar:{sidecar.__version__}"


def test_objects_of_the_application_are_in_its_namespace():
    (namespace,) = objects(NATIVE, "Namespace")
    name = namespace["metadata"]["name"]
    others = [each for each in objects(NATIVE) if each is not namespace]
    assert {each["metadata"].get("namespace", name) for each in others} == {name}
    (deployment,) = objects(NATIVE, "Deployment")
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


def test_readme_makes_the_secret_that_the_pod_reads():
    """Name, namespace, keys; and the application's URL leads to a pool of the sidecar, by its user."""
    text = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    namespace, name, values = re.findall(
        r"kubectl -n (\S+) create secret generic (\S+)((?: +--from-literal=\S+)+)", text
    )[0]
    given = dict(re.findall(r"--from-literal=([\w-]+)=(\S+)", values))
    (deployment,) = objects(NATIVE, "Deployment")
    assert deployment["metadata"]["namespace"] == namespace
    read_by = {}
    for each in (container(), container(name="shop")):
        (entry,) = each["env"]
        reference = entry["valueFrom"]["secretKeyRef"]
        assert (entry["name"], reference["name"]) == ("DATABASE_URL", name)
        read_by[each["name"]] = conninfo_to_dict(given.pop(reference["key"]))
    assert given == {}
    client, server, config = read_by["shop"], read_by["pgsidecar"], sidecar_config()
    assert (client["user"], client["password"]) == (server["user"], server["password"])
    assert (client["host"], client["port"]) == (config.listen.host, str(config.listen.port))
    assert client["dbname"] in config.pools


# -- Kubernetes: monitoring ------------------------------------------------------------------------


def monitor() -> tuple[Tree, Tree]:
    """The PodMonitor's specification, and its only endpoint."""
    (thing,) = objects("monitoring", "PodMonitor")
    (endpoint,) = thing["spec"]["podMetricsEndpoints"]
    return thing["spec"], endpoint


def test_monitor_finds_the_pods():
    """In any namespace: it is not in the application's."""
    spec, endpoint = monitor()
    (deployment,) = objects(NATIVE, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert spec["namespaceSelector"] == {"any": True}
    assert endpoint["port"] in [each["name"] for each in container()["ports"]]
    assert (endpoint["path"], endpoint["interval"]) == ("/metrics", "15s")


def test_monitor_names_the_job_that_the_alerts_name():
    _, endpoint = monitor()
    (job,) = (each for each in endpoint["relabelings"] if each["targetLabel"] == "job")
    jobs = set(re.findall(r'job="(\w+)"', (ROOT / "alerts/pgsidecar.rules.yml").read_text()))
    assert {job["replacement"]} == jobs


def test_sample_limit_leaves_room():
    """A scrape beyond it is lost as a whole. Here: six pools, each with all the statements it exports."""
    names = ["main", *"abcde"]
    page = Page(*(replace(IDLE, name=name) for name in names))
    fill(page)
    for name in names:
        pool = page.recorder.pool(name)
        for number in range(60):
            pool.query_done(pool.statement(f"{number}", f"SELECT {number}", 0), 0.001)
    samples = sum(map(len, page.samples().values()))
    spec, _ = monitor()
    assert 4000 < samples < spec["sampleLimit"]


def test_what_is_picked_up_by_label_has_the_label():
    for each in objects("monitoring"):
        assert each["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        assert each["metadata"]["namespace"] == "monitoring"


# -- compose ---------------------------------------------------------------------------------------

COMPOSE = read(DEPLOY / "compose.yaml")
SERVICES: dict[str, Tree] = COMPOSE["services"]


def compose_problem(tree: Tree, folder: Path) -> str | None:
    """What the schema of the Compose specification has against a file."""
    file = folder / "compose.yaml"
    file.write_text(yaml.safe_dump(tree))
    done = run(
        *(sys.executable, "-m", "check_jsonschema"),
        *("--builtin-schema", "vendor.compose-spec", file),
    )
    return None if done.returncode == 0 else done.stdout + done.stderr


def test_compose_file_follows_the_specification(tmp_path: Path):
    assert compose_problem(COMPOSE, tmp_path) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services.grafana.volume", []),
        ("services.load.depends_on.pgsidecar.condition", "healthy"),
        ("services.postgres.environment.POSTGRES_DB", ["shop"]),
    ],
)
def test_compose_file_with_a_mistake_does_not(tmp_path: Path, path: str, value: object):
    assert compose_problem(changed(COMPOSE, path, value), tmp_path) is not None


def mounts(service: str) -> Iterator[tuple[str, str]]:
    """Source and target of each volume and file."""
    for each in SERVICES[service].get("volumes", []):
        source, target = each.removesuffix(":ro").split(":")
        yield source, target


def mounted(service: str, folder: Path) -> Path:
    """A folder with the service's files where the container has them."""
    for source, target in mounts(service):
        if source.startswith("."):
            place = folder / target.lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            path = DEPLOY / source
            shutil.copytree(path, place) if path.is_dir() else shutil.copy(path, place)
    return folder


def address(url: str) -> str:
    """The service that a URL or host:port of the stack leads to; the port is one it listens on."""
    host, port = map(str, re.findall(r"([a-z]+):(\d+)\b", url)[-1])
    listens = {
        "postgres": {"5432"},
        "pgsidecar": {str(compose_config().listen.port), str(compose_config().http.port)},
        "pages": {*map(str, SERVICES["pages"]["command"])},
        "prometheus": {"9090"},
        "alertmanager": {"9093"},
    }
    assert port in listens[host], url
    return host


def compose_config() -> Config:
    """The sidecar's configuration, as it is read in its container."""
    environ = {**dockerfile.environment(), "DATABASE_URL": with_defaults(DATABASE_URL)}
    return config_file.load(DEPLOY / "compose/sidecar.yaml", environ)


def with_defaults(text: Any) -> str:
    """Compose's interpolation, where no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


DATABASE_URL: str = SERVICES["pgsidecar"]["environment"]["DATABASE_URL"]


def test_every_file_that_is_mounted_is_there():
    """Else Docker makes an empty folder in its place."""
    for service in SERVICES:
        for source, _ in mounts(service):
            is_there = (DEPLOY / source).exists() if source.startswith(".") else source
            assert is_there, source


def test_every_file_is_mounted():
    used = {
        path
        for service in SERVICES
        for source, _ in mounts(service)
        for path in [(DEPLOY / source).resolve(), *(DEPLOY / source).resolve().rglob("*")]
    }
    files = {
        path for path in (DEPLOY / "compose").rglob("*") if path.suffix in (".py", ".yml", ".yaml")
    }
    assert files <= used


def test_volumes_are_declared_and_used():
    used = {source for name in SERVICES for source, _ in mounts(name) if source[0] != "."}
    assert used == COMPOSE["volumes"].keys()


def test_every_variable_has_a_default():
    """``up`` has to be all: no file of variables, no exports."""
    text = "\n".join(
        line
        for line in (DEPLOY / "compose.yaml").read_text().splitlines()
        if not line.strip().startswith("#")
    )
    assert "${" in text
    assert text.count("$") == len(re.findall(r"\$\{[A-Z_]+:-[^}]+\}", text))


def test_images_are_ours_or_pinned():
    for name, service in SERVICES.items():
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert (context / "Dockerfile").exists()
            assert service["pull_policy"] == "build", "no other image of this name will do"
        else:
            assert re.search(r":v?\d+\.\d+(\.\d+)?$", service["image"]), name


def test_ports_are_open_on_loopback_only():
    opened = [port for each in SERVICES.values() for port in each.get("ports", [])]
    assert len(opened) == 5
    assert all(port.startswith("127.0.0.1:") for port in opened)


def test_no_service_may_get_more_rights():
    for service in SERVICES.values():
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "privileged" not in service
        if "build" in service:
            assert service["read_only"] is True
            assert service["cap_drop"] == ["ALL"]


def test_services_wait_for_what_can_be_healthy():
    """A service without a health check would never be; the sidecar's is the image's."""
    for name, service in SERVICES.items():
        for other, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            check = SERVICES[other].get("healthcheck")
            has_one = "test" in check if check else "build" in SERVICES[other]
            assert has_one, f"{name} waits for {other}"


def test_what_is_not_the_sidecar_is_not_checked_as_one():
    """The image's health check asks /livez, which only the sidecar answers."""
    for name, service in SERVICES.items():
        if "build" in service:
            assert ("healthcheck" in service) is (name != "pgsidecar")


def test_sidecar_of_compose_answers_other_containers():
    config = compose_config()
    assert (config.listen.host, config.http.host) == ("0.0.0.0", "0.0.0.0")
    published = [each.rsplit(":", 1)[1] for each in SERVICES["pgsidecar"]["ports"]]
    assert published == [str(config.listen.port), str(config.http.port)]
    (mount,) = mounts("pgsidecar")
    assert mount[1] == json.loads(dockerfile.one("CMD"))[-1]
    assert int(SERVICES["pgsidecar"]["stop_grace_period"].removesuffix("s")) >= (
        config.drain_timeout + GOODBYES
    )


def test_sidecar_and_load_log_in_as_the_user_that_postgres_has():
    given = {key: with_defaults(each) for key, each in SERVICES["postgres"]["environment"].items()}
    server = conninfo_to_dict(with_defaults(DATABASE_URL))
    assert (server["user"], server["dbname"]) == (given["POSTGRES_USER"], given["POSTGRES_DB"])
    assert server["password"] == given["POSTGRES_PASSWORD"]
    assert address(with_defaults(DATABASE_URL)) == "postgres"
    password = with_defaults(SERVICES["load"]["environment"]["PGPASSWORD"])
    assert password == given["POSTGRES_PASSWORD"]
    urls = dict(each.removeprefix("--").split("=", 1) for each in SERVICES["load"]["command"])
    pooled, direct = conninfo_to_dict(urls["dsn"]), conninfo_to_dict(urls["schema-dsn"])
    assert (address(urls["dsn"]), address(urls["schema-dsn"])) == ("pgsidecar", "postgres")
    assert pooled["dbname"] in compose_config().pools
    assert (direct["user"], direct["dbname"]) == (server["user"], server["dbname"])
    assert pooled["user"] == server["user"]


def test_load_is_a_program_that_takes_these_arguments():
    """Run until it wants the schema, which it looks for where nobody listens."""
    python, *module = SERVICES["load"]["entrypoint"]
    assert python == "python"
    arguments = [re.sub(r"@\w+:\d+", "@127.0.0.1:1", each) for each in SERVICES["load"]["command"]]
    done = run(sys.executable, *module, *arguments)
    assert "Connection refused" in done.stderr
    assert done.returncode == 1


# -- compose: Prometheus, Alertmanager, Grafana ----------------------------------------------------


def test_prometheus_takes_its_configuration(tmp_path: Path):
    """With the rules, in the places where the container has both."""
    config = mounted("prometheus", tmp_path) / "etc/prometheus/prometheus.yml"
    told = output("promtool", "check", "config", config)
    assert re.search(r"SUCCESS: .*1 rule files? found", told), told
    assert "rules found" in told


def test_prometheus_refuses_mistakes(tmp_path: Path):
    config = mounted("prometheus", tmp_path) / "etc/prometheus/prometheus.yml"
    text = config.read_text()
    config.write_text(text.replace("scrape_interval", "scrape_intervall", 1))
    assert run("promtool", "check", "config", config).returncode != 0
    config.write_text(text)
    rules = config.parent / "pgsidecar.rules.yml"
    rules.write_text(rules.read_text().replace("expr:", "exprs:", 1))
    assert run("promtool", "check", "config", config).returncode != 0


def test_prometheus_scrapes_the_job_that_the_alerts_name():
    config = read(DEPLOY / "compose/prometheus.yml")
    jobs = {
        each["job_name"]: address(each["static_configs"][0]["targets"][0])
        for each in config["scrape_configs"]
        if each["job_name"] != "prometheus"
    }
    assert jobs == {"pgsidecar": "pgsidecar", "alertmanager": "alertmanager"}
    (target,) = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    assert address(target) == "alertmanager"
    assert config["global"]["scrape_interval"] == "15s"


def test_prometheus_keeps_exemplars_and_its_data():
    command = SERVICES["prometheus"]["command"]
    assert "--enable-feature=exemplar-storage" in command
    files = dict(each.removeprefix("--").split("=", 1) for each in command)
    targets = [target for _, target in mounts("prometheus")]
    assert files["config.file"] in targets
    assert files["storage.tsdb.path"] in targets


def test_alertmanager_routes_as_the_example():
    """Only whom it tells is different, by the same names."""
    ours = read(DEPLOY / "compose/alertmanager.yml")
    example = read(ROOT / "alerts/alertmanager.example.yml")
    assert [each["name"] for each in ours.pop("receivers")] == [
        each["name"] for each in example.pop("receivers")
    ]
    assert ours == example


def test_alertmanager_takes_its_configuration(tmp_path: Path):
    config = mounted("alertmanager", tmp_path) / "etc/alertmanager/alertmanager.yml"
    output("amtool", "check-config", config)
    for severity, receiver in (("critical", "pager"), ("warning", "chat")):
        told = output(
            *("amtool", "config", "routes", "test", f"--config.file={config}"),
            *("alertname=PgSidecarDown", f"severity={severity}"),
        )
        assert told.strip() == receiver
    config.write_text(config.read_text().replace("receiver: chat", "receiver: nobody"))
    assert run("amtool", "check-config", config).returncode != 0


def test_alertmanager_tells_the_service_that_prints():
    for each in read(DEPLOY / "compose/alertmanager.yml")["receivers"]:
        (hook,) = each["webhook_configs"]
        assert address(hook["url"]) == "pages"
        assert urlsplit(hook["url"]).path == f"/{each['name']}"


def test_grafana_has_the_data_source():
    (source,) = read(DEPLOY / "compose/grafana/provisioning/datasources/prometheus.yml")[
        "datasources"
    ]
    assert (source["uid"], source["type"]) == ("prometheus", "prometheus")
    assert address(source["url"]) == "prometheus"
    options = source["jsonData"]
    assert (options["httpMethod"], options["timeInterval"]) == ("POST", "15s")
    assert [each["name"] for each in options["exemplarTraceIdDestinations"]] == ["trace_id"]


def test_grafana_has_every_dashboard():
    """In the folder that its provider reads, and nothing but JSON."""
    (provider,) = read(DEPLOY / "compose/grafana/provisioning/dashboards/pgsidecar.yml")[
        "providers"
    ]
    folder = provider["options"]["path"]
    given = {
        Path(target).name
        for source, target in mounts("grafana")
        if target.startswith(f"{folder}/") and Path(source).name == Path(target).name
    }
    assert given == {path.name for path in (ROOT / "dashboards").glob("*.json")}
    environment = SERVICES["grafana"]["environment"]
    home = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (str(home.parent), home.name in given) == (folder, True)
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


# -- compose: pages --------------------------------------------------------------------------------

ALERT = {
    "status": "firing",
    "labels": {
        "alertname": "PgSidecarPoolNearExhaustion",
        "severity": "critical",
        "job": "pgsidecar",
        "instance": "pgsidecar:9632",
        "pool": "main",
    },
    "annotations": {
        "summary": "A pool is nearly used up.",
        "description": "Pool main on pgsidecar:9632 is 88% used (22 of 25).",
        "dashboard_url": "https://grafana.example.com/d/pgsidecar-pool?var-pool=main",
    },
}

Pages = Callable[[], str]


@contextmanager
def pages(port: int, folder: Path) -> Iterator[Pages]:
    """The receiver, as its service runs it but for the port; yields a function for what it has printed."""
    python, script = SERVICES["pages"]["entrypoint"]
    source = next(source for source, target in mounts("pages") if target == script)
    environ = {**os.environ, **SERVICES["pages"]["environment"]}
    printed = folder / "pages.log"
    with printed.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, DEPLOY / source, str(port)], env=environ, stdout=log, stderr=log
        )
    assert python == "python"
    try:
        eventually(lambda: is_healthy(port) or None, "the receiver answers")
        yield printed.read_text
    finally:
        stop(process)


def is_healthy(port: int) -> bool:
    """What the service's own health check says."""
    word, python, flag, code = SERVICES["pages"]["healthcheck"]["test"]
    assert (word, python, flag) == ("CMD", "python", "-c")
    (listens,) = SERVICES["pages"]["command"]
    assert f":{listens}/" in code
    return run(sys.executable, "-c", code.replace(listens, str(port))).returncode == 0


def post(port: int, path: str, body: bytes) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            code: int = response.status
            return code
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_page_is_printed(tmp_path: Path, unused_tcp_port: int):
    """Who is told, what has happened where, and where to look: in this stack's own Grafana."""
    over = {**ALERT, "status": "resolved"}
    with pages(unused_tcp_port, tmp_path) as printed:
        body = json.dumps({"version": "4", "status": "firing", "alerts": [ALERT, over]})
        assert post(unused_tcp_port, "/pager", body.encode()) == 200
        lines = printed().splitlines()
    place = "critical PgSidecarPoolNearExhaustion pool=main instance=pgsidecar:9632"
    assert lines == [
        f"pager: FIRING {place}",
        "    Pool main on pgsidecar:9632 is 88% used (22 of 25).",
        "    http://127.0.0.1:3000/d/pgsidecar-pool?var-pool=main",
        f"pager: RESOLVED {place}",
    ]


@pytest.mark.parametrize(
    "body", [b"", b"no JSON", b"[]", b"{}", b'{"alerts": [{}]}', b'{"alerts": 1}']
)
def test_receiver_survives_nonsense(tmp_path: Path, unused_tcp_port: int, body: bytes):
    with pages(unused_tcp_port, tmp_path) as printed:
        assert post(unused_tcp_port, "/pager", body) == 400
        assert is_healthy(unused_tcp_port)
        assert printed() == ""


def test_silent_receiver_is_not_healthy(unused_tcp_port: int):
    assert not is_healthy(unused_tcp_port)


def test_alert_becomes_a_page(tmp_path: Path, unused_tcp_port_factory: Callable[[], int]):
    """The real Alertmanager with this configuration, but for the addresses and the first wait."""
    hook = unused_tcp_port_factory()
    config = mounted("alertmanager", tmp_path) / "etc/alertmanager/alertmanager.yml"
    text = re.sub(r"group_wait: \d+s", "group_wait: 0s", config.read_text())
    text = text.replace("pages:9095", f"127.0.0.1:{hook}")
    assert "--cluster.listen-address=" in SERVICES["alertmanager"]["command"]  # as here
    with pages(hook, tmp_path) as printed, alertmanager(tmp_path, text) as server:
        body = json.dumps([{key: ALERT[key] for key in ("labels", "annotations")}]).encode()
        port = urlsplit(server.url).port
        assert port is not None
        eventually(lambda: raise_alert(port, body), "Alertmanager takes the alert")
        first = eventually(lambda: printed().splitlines()[:1], "a page")
    assert first[0].startswith("pager: FIRING critical PgSidecarPoolNearExhaustion pool=main")


def raise_alert(port: int, body: bytes) -> bool:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/v2/alerts", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


# -- the document ----------------------------------------------------------------------------------


def test_prometheus_takes_the_scrape_job_of_the_readme(tmp_path: Path):
    """The one for a cluster without the operator; it makes the same job and instance as the PodMonitor."""
    (example,) = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "prometheus.yml"
    # Debian's is built without the discovery of Kubernetes: its two lines are not looked at.
    found = "kubernetes_sd_configs:\n      - role: pod\n"
    assert found in example
    file.write_text(example.replace(found, "static_configs: []\n"))
    output("promtool", "check", "config", file)
    (job,) = yaml.safe_load(example)["scrape_configs"]
    _, endpoint = monitor()
    by_target = {each["targetLabel"]: each for each in endpoint["relabelings"]}
    assert job["job_name"] == by_target["job"]["replacement"]
    (instance,) = (each for each in job["relabel_configs"] if "target_label" in each)
    assert instance["source_labels"] == by_target["instance"]["sourceLabels"]
    assert instance["separator"] == by_target["instance"]["separator"]


def test_links_of_the_readme_lead_somewhere():
    path = DEPLOY / "README.md"
    for link in links(path):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_commands_that_are_mentioned_are_taken():
    """Of the sidecar, run inside its container; here where nobody listens."""
    files = ["README.md", "compose/sidecar.yaml", "kubernetes/application/config.yaml"]
    text = "\n".join((DEPLOY / file).read_text() for file in files)
    commands = set(re.findall(r"(?: exec pgsidecar| --) pgsidecar (.+)", text))
    assert {each.split()[0] for each in commands} == {"why", "top"}
    for each in commands:
        done = run(sys.executable, "-m", "sidecar", *each.split(), "--url", "http://127.0.0.1:1")
        assert "usage:" not in done.stderr, done.stderr


def test_readme_knows_every_service_and_folder():
    text = (DEPLOY / "README.md").read_text()
    for name in [*SERVICES, NATIVE, SECOND, "monitoring"]:
        assert name in text, name
