{{- define "mxgate.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "mxgate.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "mxgate.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mxgate.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "mxgate.selectorLabels" -}}
app.kubernetes.io/name: {{ include "mxgate.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* Of the pod of `helm test`: not the selector's, lest it get mail. */ -}}
{{- define "mxgate.testLabels" -}}
app.kubernetes.io/name: {{ include "mxgate.name" . }}-test
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mxgate.testPeer" -}}
# helm test
- podSelector:
    matchLabels:
      {{- include "mxgate.testLabels" . | nindent 6 }}
{{- end -}}

{{- define "mxgate.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "mxgate.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "mxgate.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "mxgate.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- /* An image's reference; takes {repository, tag, digest}. */ -}}
{{- define "mxgate.imageReference" -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository .tag -}}
{{- end -}}
{{- end -}}

{{- define "mxgate.image" -}}
{{- with .Values.image -}}
{{- include "mxgate.imageReference" (dict "repository" .repository "tag" (default $.Chart.AppVersion .tag) "digest" .digest) -}}
{{- end -}}
{{- end -}}

{{- define "mxgate.hasTls" -}}
{{- if or .Values.tls.existingSecret .Values.tls.certManager.enabled }}true{{ end -}}
{{- end -}}

{{- define "mxgate.tlsSecret" -}}
{{- default (printf "%s-tls" (include "mxgate.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- define "mxgate.policiesConfigMap" -}}
{{- default (printf "%s-policies" (include "mxgate.fullname" .)) .Values.policies.existingConfigMap -}}
{{- end -}}

{{- /* The address, with this port, of one of podAddresses. */ -}}
{{- define "mxgate.address" -}}
{{- if contains ":" .host -}}[{{ .host }}]:{{ .port }}{{- else -}}{{ .host }}:{{ .port }}{{- end -}}
{{- end -}}

{{- /* Where the state is, as far as the chart can see: redis, memory, or sqlite. */ -}}
{{- define "mxgate.stateKind" -}}
{{- if and .Values.state.existingSecret .Values.state.urlKey -}}
redis
{{- else -}}
{{- $url := dig "state" "url" "sqlite:" .Values.config -}}
{{- /* a URL out of the environment is one with a password */ -}}
{{- if or (hasPrefix "redis" $url) (hasPrefix "${" $url) -}}redis{{- else -}}{{ (splitList ":" $url) | first }}{{- end -}}
{{- end -}}
{{- end -}}

{{- /* True when more than one pod may serve at once. */ -}}
{{- define "mxgate.isMany" -}}
{{- if or (eq .Values.workload "DaemonSet") (gt (int .Values.replicaCount) 1) .Values.autoscaling.enabled .Values.keda.enabled }}true{{ end -}}
{{- end -}}

{{- /* Refuses values that contradict each other in a way that the schema cannot say. */ -}}
{{- define "mxgate.check" -}}
{{- $server := .Values.config.server -}}
{{- range $key, $value := dict "listen" "podAddresses" "listen_tls" "smtps.enabled" "tls" "tls" "proxy_protocol_from" "proxyProtocol" "reload_on_change" "onConfigChange" "spool_dir" "spool" -}}
{{- if hasKey $server $key -}}
{{- fail (printf "config.server.%s is set by the chart: use the value %s" $key $value) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .Values.config "admin" -}}
{{- fail "config.admin is set by the chart: use the value admin" -}}
{{- end -}}
{{- if and (include "mxgate.isMany" .) (eq (include "mxgate.stateKind" .) "sqlite") -}}
{{- fail "more than one pod (replicaCount, autoscaling, keda, or a DaemonSet) needs a state that they share: set config.state.url to Redis, or state.existingSecret and state.urlKey" -}}
{{- end -}}
{{- if and (include "mxgate.isMany" .) (eq (include "mxgate.stateKind" .) "memory") (ne (dig "policy" "greylist" "mode" "enforce" .Values.config) "off") -}}
{{- fail "config.state.url memory: is each pod's own, and a sender that greylisting tells to come again comes to another pod: use Redis, or set config.policy.greylist.mode to off" -}}
{{- end -}}
{{- if and (eq (include "mxgate.stateKind" .) "redis") (regexMatch "^[^@]*:[^$@/][^@]*@" (dig "state" "url" "" .Values.config | trimPrefix "redis" | replace "://" "")) -}}
{{- fail "config.state.url has a password, which everybody may read in a ConfigMap: put it into a Secret (state.existingSecret, state.passwordKey) and write ${REDIS_PASSWORD}" -}}
{{- end -}}
{{- with .Values.state -}}
{{- if and .existingSecret (not (or .urlKey .passwordKey)) -}}
{{- fail "state.existingSecret needs state.urlKey or state.passwordKey: which of its keys is meant?" -}}
{{- end -}}
{{- if and (not .existingSecret) (or .urlKey .passwordKey) -}}
{{- fail "state.urlKey and state.passwordKey are keys of state.existingSecret, which is empty" -}}
{{- end -}}
{{- end -}}
{{- range $name := list "autoscaling" "keda" -}}
{{- with index $.Values $name -}}
{{- if and .enabled (gt (int .minReplicas) (int .maxReplicas)) -}}
{{- fail (printf "%s.minReplicas is above %s.maxReplicas" $name $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and .enabled (not (or .targetCPUUtilizationPercentage .targetOpenConnections .metrics)) -}}
{{- fail "autoscaling.enabled needs a target: targetCPUUtilizationPercentage, targetOpenConnections or metrics" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.smtps.enabled (not (include "mxgate.hasTls" .)) -}}
{{- fail "smtps.enabled needs a certificate: tls.existingSecret or tls.certManager.enabled" -}}
{{- end -}}
{{- if and .Values.submission.enabled (not (include "mxgate.hasTls" .)) -}}
{{- fail "submission.enabled needs a certificate: tls.existingSecret or tls.certManager.enabled" -}}
{{- end -}}
{{- if and .Values.submission.enabled .Values.smtps.enabled (eq (int .Values.service.smtpsPort) (int .Values.service.submissionsPort)) -}}
{{- fail "smtps.enabled and submission.enabled need different ports: service.smtpsPort and service.submissionsPort" -}}
{{- end -}}
{{- range $key := list "listen" "listen_tls" -}}
{{- if hasKey ($.Values.config.submission | default dict) $key -}}
{{- fail (printf "config.submission.%s is set by the chart: use the value submission.enabled" $key) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.autoscaling.enabled .Values.keda.enabled -}}
{{- fail "autoscaling.enabled and keda.enabled exclude each other" -}}
{{- end -}}
{{- if and (eq .Values.workload "DaemonSet") (or .Values.autoscaling.enabled .Values.keda.enabled) -}}
{{- fail "a DaemonSet is not scaled: autoscaling.enabled and keda.enabled have to be false" -}}
{{- end -}}
{{- if and .Values.persistence.enabled (ne (include "mxgate.stateKind" .) "sqlite") -}}
{{- fail "persistence.enabled is for SQLite; the state is elsewhere" -}}
{{- end -}}
{{- if and .Values.monitoring.podMonitor.enabled .Values.monitoring.serviceMonitor.enabled -}}
{{- fail "monitoring.podMonitor and monitoring.serviceMonitor would scrape each pod twice: enable one" -}}
{{- end -}}
{{- end -}}

{{- /* The gateway's configuration file, as JSON: the value config, and what follows from the other values. */ -}}
{{- define "mxgate.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $listen := list -}}
{{- $listenTls := list -}}
{{- $submission := list -}}
{{- $submissions := list -}}
{{- range .Values.podAddresses -}}
{{- $submission = append $submission (include "mxgate.address" (dict "host" . "port" 5870)) -}}
{{- $submissions = append $submissions (include "mxgate.address" (dict "host" . "port" 4651)) -}}
{{- $listen = append $listen (include "mxgate.address" (dict "host" . "port" 2525)) -}}
{{- $listenTls = append $listenTls (include "mxgate.address" (dict "host" . "port" 4650)) -}}
{{- end -}}
{{- $_ := set $config.server "listen" $listen -}}
{{- if .Values.smtps.enabled -}}
{{- $_ = set $config.server "listen_tls" $listenTls -}}
{{- end -}}
{{- if .Values.submission.enabled -}}
{{- $_ = set $config "submission" (merge (dict "listen" $submission "listen_tls" $submissions) ($config.submission | default dict)) -}}
{{- end -}}
{{- if .Values.proxyProtocol.enabled -}}
{{- $_ = set $config.server "proxy_protocol_from" .Values.proxyProtocol.trustedRanges -}}
{{- end -}}
{{- if eq .Values.onConfigChange "reload" -}}
{{- $_ = set $config.server "reload_on_change" true -}}
{{- end -}}
{{- if include "mxgate.hasTls" . -}}
{{- $_ = set $config.server "tls" (dict "cert_file" "/etc/mxgate/tls/tls.crt" "key_file" "/etc/mxgate/tls/tls.key") -}}
{{- end -}}
{{- $admin := dict "listen" (include "mxgate.address" (dict "host" (first .Values.podAddresses) "port" 9464)) -}}
{{- if .Values.admin.existingSecret -}}
{{- $_ = set $admin "token_file" "/etc/mxgate/admin/token" -}}
{{- end -}}
{{- $_ = set $config "admin" $admin -}}
{{- toPrettyJson $config -}}
{{- end -}}

{{- /* Seconds from the preStop hook to SIGKILL: its pause; the drain, whose first 30 s are for content that still
arrives; and 15 s to end. */ -}}
{{- define "mxgate.gracePeriod" -}}
{{- add (int .Values.preStop.sleepSeconds) (max 30 (ceil .Values.config.server.drain_timeout_s)) 15 -}}
{{- end -}}

{{- /* The ports of all downstreams, as a JSON list. */ -}}
{{- define "mxgate.downstreamPorts" -}}
{{- $ports := list -}}
{{- range .Values.config.relay.routes -}}
{{- range .downstream -}}
{{- range (kindIs "slice" . | ternary . (list .)) -}}
{{- with regexFind "[0-9]+$" . -}}
{{- $ports = append $ports (int .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- /* The port of submission's back-end; empty where there is none, or where it is a socket of the pod. */ -}}
{{- define "mxgate.authPort" -}}
{{- if .Values.submission.enabled -}}
{{- $address := dig "submission" "auth" "address" "" .Values.config -}}
{{- if not (hasPrefix "unix:" $address) -}}
{{- regexFind "[0-9]+$" $address -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The ports of the resolver, as a JSON list: 53, and what config.dns.nameservers name. */ -}}
{{- define "mxgate.dnsPorts" -}}
{{- $ports := list 53 -}}
{{- range dig "dns" "nameservers" list .Values.config -}}
{{- if regexMatch "^([0-9.]+|\\[.*\\]):[0-9]+$" . -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | sortAlpha | toJson -}}
{{- end -}}

{{- /* The ports of Redis, as a JSON list: those of the value, and what config.state.url names. */ -}}
{{- define "mxgate.redisPorts" -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.redisPorts }}{{ $ports = append $ports (int .) }}{{ end -}}
{{- $hosts := regexReplaceAll "^[^:]*://([^/@]*@)?([^/?]*).*$" (dig "state" "url" "" .Values.config) "${2}" -}}
{{- range splitList "," $hosts -}}
{{- if regexMatch ":[0-9]+$" . -}}
{{- $ports = append $ports (regexFind "[0-9]+$" . | int) -}}
{{- end -}}
{{- end -}}
{{- $ports | uniq | sortAlpha | toJson -}}
{{- end -}}
