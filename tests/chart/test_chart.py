"""The chart: what it renders from the values in ci/, what it refuses, and the files that are made from other files."""

from __future__ import annotations

import importlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

import gateway
from gateway.config import load
from gateway.config.render import json_schema
from gateway.plugins import configurable
from helm.generate import generated
from helm.package import package
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


@pytest.mark.parametrize("name", ["Chart.yaml", "README.md", "values.schema.json"])
def test_is_what_dev_chart_would_write(name: str) -> None:
    assert (CHART / name).read_text("utf-8") == generated()[name]


def test_the_schema_of_config_is_the_gateways_own() -> None:
    definitions = json.loads((CHART / "values.schema.json").read_text())["$defs"]
    own = json_schema(configurable()[0])
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


def test_pods_may_load_a_new_configuration_themselves() -> None:
    objects = render("minimal", 'onConfigChange="reload"')
    annotations = one(objects, "Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert "checksum/config" not in annotations
    assert configuration(objects)["server"]["reload_on_change"] is True
    assert "reload_on_change" not in configuration(render("minimal"))["server"]
    # a file below a subPath never changes
    assert not [each for each in container(objects)["volumeMounts"] if "subPath" in each]


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
    assert admin["ports"] == [{"port": 9464}]
    monitoring, test = admin["from"]
    assert "namespaceSelector" in monitoring
    labels = one(render("redis"), "Pod", "mail-mxgate-test")["metadata"]["labels"]
    assert test["podSelector"]["matchLabels"].items() <= labels.items()


def test_the_network_policy_opens_the_ports_that_the_url_of_the_state_names() -> None:
    urls = {
        "redis://:${REDIS_PASSWORD}@redis.example.org:6380/0": {6379, 26379, 6380},
        "redis+sentinel://:${REDIS_PASSWORD}@a:26380,b:26381/mx/0": {6379, 26379, 26380, 26381},
        "rediss://[2001:db8::1]/0": {6379, 26379},
    }
    for url, ports in urls.items():
        egress = one(render("redis", f'config.state.url="{url}"'), "NetworkPolicy")["spec"]["egress"]
        assert [each["port"] for each in egress[2]["ports"]] == sorted(ports, key=str)


def test_the_network_policy_opens_the_port_of_submissions_back_end() -> None:
    def ports(*settings: str) -> list[list[object]]:
        egress = one(render("submission", *settings), "NetworkPolicy")["spec"]["egress"]
        return [[each["port"] for each in rule["ports"]] for rule in egress[1:]]

    assert ports() == [[10587, 25], [12345]]
    assert ports('config.submission.auth.address="mta.example.org:587"') == [[10587, 25], [587]]
    assert ports('config.submission.auth.address="unix:/run/dovecot/auth-client"') == [[10587, 25]]
    egress = one(
        render("submission", 'networkPolicy.downstreamTo=[{"ipBlock": {"cidr": "10.0.0.0/24"}}]'),
        "NetworkPolicy",
    )
    assert [len(rule.get("to", [])) for rule in egress["spec"]["egress"]] == [0, 1, 1]


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
    assert not {"Deployment", "PodDisruptionBudget"} & kinds(objects)
    smtp = container(objects)["ports"][0]
    assert (smtp["containerPort"], smtp["hostPort"]) == (2525, 25)
    assert "externalTrafficPolicy" not in one(objects, "Service")["spec"]


def test_a_port_of_the_node_is_free_before_the_next_pod_wants_it() -> None:
    spec = one(render("minimal", "hostPort.enabled=true"), "Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_keda_scales_by_the_gateways_own_metric() -> None:
    objects = render("keda", "keda.triggers=[]")
    (trigger,) = one(objects, "ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus.monitoring.svc:9090",
        "query": 'sum(mxgate_open_connections{namespace="default", pod=~"mail-mxgate-.*"})',
        "threshold": "400",
    }


def test_pods_spread_anew_at_each_update() -> None:
    for each in pod(render("minimal"))["topologySpreadConstraints"]:
        assert (each["whenUnsatisfiable"], each["matchLabelKeys"]) == (
            "ScheduleAnyway",
            ["pod-template-hash"],
        )


def test_a_pod_that_serves_nobody_does_not_keep_its_node() -> None:
    spec = one(render("minimal"), "PodDisruptionBudget")["spec"]
    assert (spec["maxUnavailable"], spec["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")


def test_names_that_look_like_numbers_stay_names() -> None:
    settings = ('admin.existingSecret="1234"', 'tls.existingSecret="0x10"', 'priorityClassName="1e3"')
    spec = pod(render("minimal", *settings))
    names = {each["secret"]["secretName"] for each in spec["volumes"] if "secret" in each}
    assert (names, spec["priorityClassName"]) == ({"1234", "0x10"}, "1e3")


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
    copy, _, source, target = init["command"]
    assert (init["image"], copy, source) == ("registry.example.org/mxgate-policies:7", "cp", "/policies/.")
    # the volume must not hide what is to be copied
    (mount,) = init["volumeMounts"]
    assert (mount["name"], mount["mountPath"]) == ("installed-policies", target)
    assert not Path(source).is_relative_to(target)
    path = {each["name"]: each.get("value") for each in container(objects)["env"]}["PYTHONPATH"]
    assert path == mounts["installed-policies"]


def test_the_rules_are_the_projects_and_ones_own() -> None:
    groups = one(render("extended"), "PrometheusRule")["spec"]["groups"]
    own = yaml.safe_load((ROOT / "grafana" / "rules" / "mxgate.yaml").read_text())["groups"]
    assert groups[: len(own)] == own
    assert groups[-1]["name"] == "local"


def test_tests_of_rules_are_no_rules(tmp_path: Path) -> None:
    chart = tmp_path / "mxgate"
    shutil.copytree(CHART, chart)
    (chart / "grafana" / "rules" / "zz_test.yaml").write_text("rule_files: [mxgate.yaml]\ntests: []\n")
    groups = one(render("extended", chart=chart), "PrometheusRule")["spec"]["groups"]
    assert groups == one(render("extended"), "PrometheusRule")["spec"]["groups"]


def test_a_dashboard_becomes_a_configmap_for_the_sidecar(tmp_path: Path) -> None:
    chart = tmp_path / "mxgate"
    shutil.copytree(CHART, chart)
    (chart / "grafana" / "mxgate-A_panel.json").write_text('{"title": "{{ $x }}"}')
    found = one(render("extended", chart=chart), "ConfigMap", "mail-mxgate-dashboard-a-panel")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    # Grafana's own braces are not Helm's
    assert json.loads(found["data"]["mxgate-A_panel.json"]) == {"title": "{{ $x }}"}


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
        (["replicaCount=2", 'config.state.url="memory:"'], "is each pod's own"),
        (["replicaCount=2", 'config.state.url="sqlite:///var/lib/mxgate/state.db"'], "state that they share"),
        (["config.relay.routes=[]"], "'/config/relay/routes': minItems"),
        (["config.server.max_recipient=5"], "additional properties 'max_recipient' not allowed"),
        (['config.server.max_recipients="many"'], "'/config/server/max_recipients': got string"),
        (['config.policy={"spf": {"mode": "of"}}'], "'/config/policy/spf/mode': value must be one of"),
        (['config.server.listen=["0.0.0.0:25"]'], "config.server.listen is set by the chart"),
        (['config.admin={"listen": "0.0.0.0:80"}'], "config.admin is set by the chart"),
        (["image=null"], "missing property 'image'"),
        (["config=null"], "missing property 'config'"),
        (["tls.certManager=null"], "'/tls': missing property 'certManager'"),
        (
            ['config.relay.routes=[{"downstream": ["mta.example.org"]}]'],
            "'mta.example.org' does not match pattern",
        ),
        (['config.relay.domains=["user@example.org"]'], "'user@example.org' does not match pattern"),
        (['config.relay.trusted_networks=["localhost"]'], "'localhost' does not match pattern"),
        (
            ['config.server.hostname="https://mx.example.org"'],
            "'https://mx.example.org' does not match pattern",
        ),
        (['config.state.url="postgres://db"'], "'postgres://db' does not match pattern"),
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
        (["keda.enabled=true"], "'/keda/prometheusAddress': minLength"),
        (['onConfigChange="restart"'], "'/onConfigChange': value must be one of 'roll', 'reload'"),
        (["config.server.reload_on_change=true"], "set by the chart: use the value onConfigChange"),
        (
            ['config.server.tls={"cert_file": "/x"}'],
            "config.server.tls is set by the chart: use the value tls",
        ),
        (['config.state.url="redis://:secret@redis:6379"'], "has a password, which everybody may read"),
        (['config.state.url="rediss://ann:secret@redis"'], "has a password, which everybody may read"),
        (['state.existingSecret="redis"'], "state.existingSecret needs state.urlKey or state.passwordKey"),
        (['state.urlKey="url"'], "are keys of state.existingSecret, which is empty"),
        (
            [
                'config.state.url="redis://r"',
                'autoscaling={"enabled": true, "minReplicas": 5, "maxReplicas": 2}',
            ],
            "autoscaling.minReplicas is above autoscaling.maxReplicas",
        ),
        (
            [
                'config.state.url="redis://r"',
                'autoscaling={"enabled": true, "targetCPUUtilizationPercentage": 0}',
            ],
            "autoscaling.enabled needs a target",
        ),
        (['service.type="Loadbalancer"'], "'/service/type': value must be one of"),
        (['service.externalTrafficPolicy="local"'], "'/service/externalTrafficPolicy': value must be one of"),
        (["service.port=0"], "'/service/port': minimum"),
        (['image.digest="sha256:abc"'], "'/image/digest': 'sha256:abc' does not match pattern"),
        (['workload="StatefulSet"'], "'/workload': value must be one of 'Deployment', 'DaemonSet'"),
        (['proxyProtocol.trustedRanges=["10.0.0.1"]'], "'/proxyProtocol/trustedRanges/0'"),
        (['config.server.drain_timeout_s="5m"'], "'/config/server/drain_timeout_s': got string, want number"),
        (
            ['config.relay.routes=[{"downstreams": ["a:25"]}]'],
            "additional properties 'downstreams' not allowed",
        ),
        (['config.state.on_outage="fail"'], "'/config/state/on_outage': value must be one of"),
        (['podDisruptionBudget.maxUnavailable="one"'], "'/podDisruptionBudget/maxUnavailable'"),
        (["replicaCount=-1"], "'/replicaCount': minimum"),
        (['monitoring.dashboards.labels="yes"'], "'/monitoring/dashboards/labels': got string, want object"),
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


def test_what_only_the_environment_knows_is_taken() -> None:
    url = 'config.state.url="${REDIS_URL}"'
    objects = render("minimal", url, 'config.relay.routes=[{"downstream": ["${MTA}"]}]', "replicaCount=2")
    assert configuration(objects)["state"]["url"] == "${REDIS_URL}"
    assert len(one(objects, "NetworkPolicy")["spec"]["egress"]) == 3


def test_pods_that_remember_nothing_need_no_redis() -> None:
    settings = ("replicaCount=2", 'config.state.url="memory:"', 'config.policy={"greylist": {"mode": "off"}}')
    assert one(render("minimal", *settings), "Deployment")["spec"]["replicas"] == 2


def test_refuses_to_scale_twice() -> None:
    with pytest.raises(RefusedError, match="exclude each other"):
        render("keda", "autoscaling.enabled=true")


def test_refuses_to_scale_a_daemonset() -> None:
    with pytest.raises(RefusedError, match="a DaemonSet is not scaled"):
        render("autoscaling", 'workload="DaemonSet"')


def test_refuses_an_older_kubernetes() -> None:
    with pytest.raises(RefusedError, match="kubeVersion"):
        helm("template", "--values", str(CI["minimal"]), "--kube-version", "1.28.0")


def test_every_dashboard_of_the_project_is_in_the_chart() -> None:
    objects = render("extended")
    shown = [
        name
        for each in objects
        if each["kind"] == "ConfigMap"
        for name in each["data"]
        if name.endswith(".json")
    ]
    own = {path.name for path in (ROOT / "grafana").glob("*.json")}
    assert sorted(name for name in shown if name != "mxgate.json") == sorted(own)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(names) == len(set(names))


def test_the_package_has_what_is_made_and_not_what_makes_it(tmp_path: Path) -> None:
    chart = tmp_path / "chart" / "mxgate"
    shutil.copytree(CHART, chart, ignore=shutil.ignore_patterns("__pycache__"))
    kept = ("grafana/mxgate-some.json", "grafana/rules/more.yaml")
    for name in (
        *kept,
        "grafana/document.py",
        "grafana/cost.md",
        "grafana/pages/dns.py",
        "grafana/pages/__pycache__/dns.pyc",
        "grafana/__pycache__/document.pyc",
        "grafana/rules/tests/mxgate.yaml",
    ):
        (chart / name).parent.mkdir(parents=True, exist_ok=True)
        (chart / name).write_text("{}\n")
    helm("package", "--destination", str(tmp_path), chart=chart)
    (package,) = tmp_path.glob("mxgate-*.tgz")
    with tarfile.open(package) as archive:
        names = {name.removeprefix("mxgate/") for name in archive.getnames()}
    assert {*kept, "grafana/rules/mxgate.yaml", "files/smtp_test.py", "README.md"} <= names
    assert not [name for name in names if name.startswith("ci/")]
    made = {name for name in names if name.startswith("grafana/")}
    assert {Path(name).parent.as_posix() for name in made} == {"grafana", "grafana/rules"}
    assert {Path(name).suffix for name in made} == {".json", ".yaml"}


def test_a_release_knows_its_image(tmp_path: Path) -> None:
    package(tmp_path, image="registry.example.com/mail/mxgate", home="https://example.com/mxgate")
    (archive,) = tmp_path.glob("mxgate-*.tgz")
    needed = CI["minimal"].read_text().replace("image:\n  repository: registry.example.org/mxgate\n", "")
    (tmp_path / "values.yaml").write_text(needed)
    assert "repository" not in needed
    text = helm("template", "--values", str(tmp_path / "values.yaml"), chart=archive)
    image = container([each for each in yaml.safe_load_all(text) if each])["image"]
    assert image == f"registry.example.com/mail/mxgate:{gateway.__version__}"
    about = yaml.safe_load(helm("show", "chart", chart=archive))
    images = yaml.safe_load(about["annotations"]["artifacthub.io/images"])
    assert [each["image"] for each in images] == [image]
    assert about["home"] == "https://example.com/mxgate"


def test_installs_and_says_what_to_do_next(tmp_path: Path) -> None:
    helm("package", "--destination", str(tmp_path))
    (package,) = tmp_path.glob("mxgate-*.tgz")
    text = helm(
        "template", "--values", str(CI["minimal"]), "--show-only", "templates/workload.yaml", chart=package
    )
    assert "kind: Deployment" in text
