"""The chart: what it renders from the values in ci/, what it refuses, and the files that are made from other files."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

import gateway
from gateway.config import load
from gateway.config.render import json_schema
from helm.generate import generated
from tests.chart.chartkit import (
    CHART,
    CI,
    ROOT,
    RefusedError,
    configuration,
    container,
    helm,
    kinds,
    one,
    pod,
    render,
)

KUBERNETES = [f"1.{minor}" for minor in range(29, 38)]
# Who makes the kinds that are not Kubernetes' own, and where their schemas are.
CUSTOM = {
    "cert-manager.io/v1": "cloudcoil.models.cert_manager.v1",
    "keda.sh/v1alpha1": "cloudcoil.models.keda.v1alpha1",
    "monitoring.coreos.com/v1": "cloudcoil.models.prometheus_operator.v1",
}
every_ci = pytest.mark.parametrize("ci", CI)


# files that are made from others


@pytest.mark.parametrize("name", ["README.md", "values.schema.json"])
def test_is_what_dev_chart_would_write(name: str) -> None:
    assert (CHART / name).read_text("utf-8") == generated()[name]


def test_the_schema_of_config_is_the_gateways_own() -> None:
    definitions = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    own = json_schema()
    assert definitions.pop("Config") == {k: v for k, v in own.items() if k not in {"$schema", "$defs"}}
    assert definitions == own["$defs"]


def test_every_value_has_a_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def undescribed(table: dict[str, Any], path: str) -> list[str]:
        found = []
        for key, each in table.get("properties", {}).items():
            below = undescribed(each, f"{path}{key}.")
            if "description" not in each and "properties" not in each and key != "global":
                below.append(path + key)
            found += below
        return found

    assert not undescribed({k: v for k, v in schema.items() if k != "$defs"}, "")


def test_its_version_is_the_gateways() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (about["version"], about["appVersion"]) == (gateway.__version__, gateway.__version__)


def test_rules_use_only_metrics_that_exist() -> None:
    source = "".join(path.read_text() for path in (ROOT / "gateway").rglob("*.py"))
    for file in (ROOT / "grafana" / "rules").glob("*.yaml"):
        used = set(re.findall(r"\bmxgate_\w+", file.read_text()))
        assert used
        assert {name for name in used if f'"{name}"' not in source} == set()


# every ci/ file


@every_ci
def test_lints_strictly(ci: str) -> None:
    helm("lint", "--strict", "--values", str(CI[ci]))


@every_ci
@pytest.mark.parametrize("version", KUBERNETES)
def test_fits_the_schemas_of_kubernetes(ci: str, version: str) -> None:
    for each in render(ci):
        if each["apiVersion"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.full  # the models take seconds to import
@every_ci
def test_fits_the_schemas_of_other_kinds(ci: str) -> None:
    for each in render(ci):
        if each["apiVersion"] in CUSTOM:
            model = getattr(importlib.import_module(CUSTOM[each["apiVersion"]]), each["kind"])
            known = model.model_validate(each).model_dump(mode="json", by_alias=True, exclude_unset=True)
            # what the schema does not know is gone
            assert {k: known[k] for k in ("metadata", "spec")} == {k: each[k] for k in ("metadata", "spec")}


@every_ci
def test_the_gateway_takes_the_configuration(ci: str, tmp_path: Path) -> None:
    file = tmp_path / "mxgate.json"
    file.write_text(json.dumps(configuration(render(ci))))
    config = load(file, environ={"REDIS_PASSWORD": "secret"})
    assert config.server.hostname == "mx.example.org"


@every_ci
def test_the_pod_is_restricted(ci: str) -> None:
    # Kubernetes' Pod Security Standards, profile "restricted"
    objects = render(ci)
    for spec in (pod(objects), one(objects, "Pod", "mail-mxgate-test")["spec"]):
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        own = spec["containers"][0]["securityContext"]
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))


@every_ci
def test_the_grace_period_covers_pause_and_drain(ci: str) -> None:
    objects = render(ci)
    (pause,) = container(objects)["lifecycle"]["preStop"]["exec"]["command"][1:]
    drain = configuration(objects)["server"]["drain_timeout_s"]
    assert pod(objects)["terminationGracePeriodSeconds"] == int(pause) + drain + 15


@every_ci
def test_the_test_pod_gets_no_mail(ci: str) -> None:
    objects = render(ci)
    labels = one(objects, "Pod", "mail-mxgate-test")["metadata"]["labels"]
    selector = one(objects, "Service")["spec"]["selector"]
    assert not selector.items() <= labels.items()


@every_ci
def test_volumes_and_mounts_belong_together(ci: str) -> None:
    spec = pod(render(ci))
    volumes = [each["name"] for each in spec["volumes"]]
    mounts = {
        mount["name"]
        for each in (*spec["containers"], *spec.get("initContainers", ()))
        for mount in each.get("volumeMounts", ())
    }
    assert len(volumes) == len(set(volumes))
    assert mounts == set(volumes)


# what single values do


def test_by_default_the_world_reaches_smtp_only_and_keeps_its_address() -> None:
    objects = render("minimal")
    service = one(objects, "Service")["spec"]
    assert (service["type"], service["externalTrafficPolicy"]) == ("LoadBalancer", "Local")
    assert service["ports"] == [{"name": "smtp", "port": 25, "targetPort": "smtp"}]
    assert {p["name"]: p["containerPort"] for p in container(objects)["ports"]} == {
        "smtp": 2525,
        "admin": 9464,
    }
    assert one(objects, "Service", "mail-mxgate-admin")["spec"]["type"] == "ClusterIP"


def test_a_rolling_update_takes_no_pod_away_before_its_successor_is_ready() -> None:
    spec = one(render("minimal"), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert spec["minReadySeconds"] > 0


def test_a_new_configuration_makes_new_pods() -> None:
    def checksum(*settings: str) -> str:
        template = one(render("minimal", *settings), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"].get("checksum/config"))

    assert checksum() != checksum("config.server.max_recipients=100")
    assert checksum('service.type="NodePort"') == checksum()
    assert checksum("rollOnConfigChange=false") == "None"


def test_names_are_looked_up_without_search_domains() -> None:
    assert pod(render("minimal"))["dnsConfig"] == {"options": [{"name": "ndots", "value": "1"}]}


def test_the_admin_port_is_open_and_its_api_asks_for_the_token() -> None:
    config = configuration(render("redis"))
    assert config["admin"] == {"listen": "0.0.0.0:9464", "token_file": "/etc/mxgate/admin/token"}
    (volume,) = [each for each in pod(render("redis"))["volumes"] if each["name"] == "admin"]
    assert volume["secret"]["secretName"] == "mxgate-admin"
    assert volume["secret"]["items"] == [{"key": "admin-token", "path": "token"}]


def test_secrets_are_never_in_the_configuration() -> None:
    objects = render("redis")
    assert configuration(objects)["state"]["url"] == "redis://:${REDIS_PASSWORD}@redis.example.org:6379/0"
    (password,) = [each for each in container(objects)["env"] if each["name"] == "REDIS_PASSWORD"]
    assert password["valueFrom"] == {"secretKeyRef": {"name": "mxgate-redis", "key": "password"}}


def test_the_whole_url_of_the_state_may_be_secret() -> None:
    (url,) = [e for e in container(render("daemonset"))["env"] if e["name"] == "MXGATE__STATE__URL"]
    assert url["valueFrom"] == {"secretKeyRef": {"name": "mxgate-redis", "key": "url"}}


def test_the_network_policy_opens_what_the_configuration_uses() -> None:
    dns, downstream, redis = one(render("redis"), "NetworkPolicy")["spec"]["egress"]
    assert {(each["port"], each["protocol"]) for each in dns["ports"]} == {
        (port, protocol) for port in (53, 5353, 5354) for protocol in ("UDP", "TCP")
    }
    assert {each["port"] for each in downstream["ports"]} == {25, 26, 2525}
    assert downstream["to"] == [{"ipBlock": {"cidr": "10.0.0.0/24"}}]
    assert {each["port"] for each in redis["ports"]} == {6379, 26379}


def test_the_network_policy_lets_everybody_in_to_smtp_and_only_monitoring_to_the_admin_port() -> None:
    smtp, admin = one(render("redis"), "NetworkPolicy")["spec"]["ingress"]
    assert smtp == {"ports": [{"port": 2525}]}
    assert (admin["ports"], len(admin["from"])) == ([{"port": 9464}], 1)


def test_a_pod_without_redis_has_no_way_to_it() -> None:
    assert len(one(render("minimal"), "NetworkPolicy")["spec"]["egress"]) == 2


def test_proxy_headers_are_required_from_the_trusted_ranges() -> None:
    config = configuration(render("proxy-protocol"))
    assert config["server"]["proxy_protocol_from"] == ["192.0.2.0/28", "2001:db8::/64"]
    assert "proxy_protocol_from" not in configuration(render("minimal"))["server"]


def test_pods_listen_on_both_families_and_for_implicit_tls() -> None:
    server = configuration(render("proxy-protocol"))["server"]
    assert server["listen"] == ["0.0.0.0:2525", "[::]:2525"]
    assert server["listen_tls"] == ["0.0.0.0:4650", "[::]:4650"]
    assert server["tls"] == {"cert_file": "/etc/mxgate/tls/tls.crt", "key_file": "/etc/mxgate/tls/tls.key"}


def test_cert_manager_is_asked_for_the_certificate_that_is_mounted() -> None:
    objects = render("proxy-protocol")
    spec = one(objects, "Certificate")["spec"]
    assert spec["dnsNames"] == ["mx.example.org", "mx2.example.org"]
    (volume,) = [each for each in pod(objects)["volumes"] if each["name"] == "tls"]
    assert volume["secret"]["secretName"] == spec["secretName"] == "mail-mxgate-tls"


def test_a_daemonset_opens_port_25_of_its_nodes() -> None:
    objects = render("daemonset")
    assert "Deployment" not in kinds(objects)
    smtp = container(objects)["ports"][0]
    assert (smtp["containerPort"], smtp["hostPort"]) == (2525, 25)
    assert "externalTrafficPolicy" not in one(objects, "Service")["spec"]


def test_a_scaled_deployment_does_not_fix_its_replicas() -> None:
    for ci, kind in (("autoscaling", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        objects = render(ci)
        assert kind in kinds(objects)
        assert "replicas" not in one(objects, "Deployment")["spec"]


def test_scales_by_the_gateways_own_metric() -> None:
    spec = one(render("autoscaling"), "HorizontalPodAutoscaler")["spec"]
    names = [each.get("pods", {}).get("metric", {}).get("name") for each in spec["metrics"]]
    assert names == [None, "mxgate_open_connections"]


def test_a_claimed_volume_is_never_mounted_twice() -> None:
    objects = render("persistent")
    assert one(objects, "Deployment")["spec"]["strategy"] == {"type": "Recreate"}
    claim = one(objects, "PersistentVolumeClaim", "mail-mxgate-state")
    (volume,) = [each for each in pod(objects)["volumes"] if each["name"] == "state"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_nothing_that_was_not_asked_for_is_made() -> None:
    assert kinds(render("minimal")) == {
        "ConfigMap",
        "Deployment",
        "NetworkPolicy",
        "Pod",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
    }


def test_policies_come_from_files_and_from_an_image() -> None:
    objects = render("extended")
    assert one(objects, "ConfigMap", "mail-mxgate-policies")["data"].keys() == {"taste.py"}
    mounts = {each["name"]: each["mountPath"] for each in container(objects)["volumeMounts"]}
    assert mounts["policies"] == "/etc/mxgate/policies"
    init = pod(objects)["initContainers"][0]
    assert (init["image"], init["command"][2]) == ("registry.example.org/mxgate-policies:7", "/policies/.")
    path = {each["name"]: each.get("value") for each in container(objects)["env"]}["PYTHONPATH"]
    assert path == mounts["installed-policies"]


def test_the_rules_are_the_projects_and_ones_own() -> None:
    groups = one(render("extended"), "PrometheusRule")["spec"]["groups"]
    own = yaml.safe_load((ROOT / "grafana" / "rules" / "mxgate.yaml").read_text())["groups"]
    assert groups[: len(own)] == own
    assert groups[-1]["name"] == "local"


def test_a_dashboard_becomes_a_configmap_for_the_sidecar(tmp_path: Path) -> None:
    chart = tmp_path / "mxgate"
    shutil.copytree(CHART, chart)
    (chart / "grafana" / "a-panel.json").write_text('{"title": "{{ $x }}"}')
    found = one(render("extended", chart=chart), "ConfigMap", "mail-mxgate-a-panel")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    # Grafana's own braces are not Helm's
    assert json.loads(found["data"]["a-panel.json"]) == {"title": "{{ $x }}"}


def test_manifests_of_ones_own_are_templates() -> None:
    assert one(render("extended"), "ConfigMap", "mail-domains")["data"] == {"list": "example.org"}


# refusals


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["proxyProtocol.enabled=true"], "'/proxyProtocol/trustedRanges': minItems"),
        (
            ["proxyProtocol.enabled=true", 'proxyProtocol.trustedRanges=["0.0.0.0/0"]'],
            "'/proxyProtocol/trustedRanges/0': 'not' failed",
        ),
        (["replicaCount=2"], "needs a state that they share"),
        (["autoscaling.enabled=true"], "needs a state that they share"),
        (['workload="DaemonSet"'], "needs a state that they share"),
        (["replicaCount=2", 'config.state.url="sqlite:///var/lib/mxgate/state.db"'], "state that they share"),
        (["config.relay.routes=[]"], "'/config/relay/routes': minItems"),
        (["config.server.max_recipient=5"], "additional properties 'max_recipient' not allowed"),
        (['config.server.max_recipients="many"'], "'/config/server/max_recipients': got string"),
        (['config.policy={"spf": {"mode": "of"}}'], "'/config/policy/spf/mode': value must be one of"),
        (['config.server.listen=["0.0.0.0:25"]'], "config.server.listen is set by the chart"),
        (['config.admin={"listen": "0.0.0.0:80"}'], "config.admin is set by the chart"),
        (["replicas=3"], "additional properties 'replicas' not allowed"),
        (['image.repository=""'], "'/image/repository': minLength"),
        (["smtps.enabled=true"], "smtps.enabled needs a certificate"),
        (["submission.enabled=true"], "submission.enabled needs a certificate"),
        (
            ["submission.enabled=true", "smtps.enabled=true", 'tls.existingSecret="x"'],
            "submission.enabled need different ports",
        ),
        (
            ['config.submission={"listen": ["0.0.0.0:587"]}'],
            "config.submission.listen is set by the chart",
        ),
        (["tls.certManager.enabled=true"], "missing property 'name'"),
        (["keda.enabled=true"], "'/keda/triggers': minItems"),
        (["monitoring.podMonitor.enabled=true", "monitoring.serviceMonitor.enabled=true"], "enable one"),
        (["persistence.enabled=true", 'config.state.url="memory:"'], "persistence.enabled is for SQLite"),
    ],
)
def test_refuses(settings: list[str], says: str) -> None:
    with pytest.raises(RefusedError) as refused:
        render("minimal", *settings)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        # the pod's name is no name for the world, nor an authserv-id
        ([], "'/config/server': missing property 'hostname'"),
        ([], "'/config': missing property 'relay'"),
        (["config.relay.domains=[]"], "missing property 'routes'"),
        (["config.relay.routes=[]"], "missing property 'domains'"),
    ],
)
def test_refuses_values_that_lack(settings: list[str], says: str) -> None:
    words = [word for setting in settings for word in ("--set-json", setting)]
    with pytest.raises(RefusedError) as refused:
        helm("template", *words)
    assert says in str(refused.value)


def test_refuses_to_scale_twice() -> None:
    with pytest.raises(RefusedError, match="exclude each other"):
        render("keda", "autoscaling.enabled=true")


def test_refuses_to_scale_a_daemonset() -> None:
    with pytest.raises(RefusedError, match="a DaemonSet is not scaled"):
        render("autoscaling", 'workload="DaemonSet"')


def test_refuses_an_older_kubernetes() -> None:
    with pytest.raises(RefusedError, match="kubeVersion"):
        helm("template", "--values", str(CI["minimal"]), "--kube-version", "1.28.0")


def test_installs_and_says_what_to_do_next(tmp_path: Path) -> None:
    helm("package", "--destination", str(tmp_path))
    (package,) = tmp_path.glob("mxgate-*.tgz")
    text = helm(
        "template", "--values", str(CI["minimal"]), "--show-only", "templates/workload.yaml", chart=package
    )
    assert "kind: Deployment" in text
