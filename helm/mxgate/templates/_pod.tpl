{{- /* The pod's metadata and spec, the same in a Deployment and a DaemonSet. */ -}}
{{- define "mxgate.pod" -}}
{{- $hasFiles := or .Values.policies.files .Values.policies.existingConfigMap -}}
{{- $hasImage := .Values.policies.image.repository -}}
metadata:
  labels:
    {{- include "mxgate.labels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: mxgate
    {{- if eq .Values.onConfigChange "roll" }}
    checksum/config: {{ printf "%s%s" (include "mxgate.config" .) (toJson .Values.policies.files) | sha256sum }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "mxgate.serviceAccountName" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "mxgate.gracePeriod" . }}
  {{- with .Values.image.pullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.priorityClassName }}
  priorityClassName: {{ . | quote }}
  {{- end }}
  securityContext:
    {{- toYaml .Values.podSecurityContext | nindent 4 }}
  {{- with .Values.dnsPolicy }}
  dnsPolicy: {{ . }}
  {{- end }}
  {{- with .Values.dnsConfig }}
  dnsConfig:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if or .Values.initContainers $hasImage }}
  initContainers:
    {{- if $hasImage }}
    - name: policies
      image: {{ include "mxgate.imageReference" .Values.policies.image }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [cp, -r, {{ printf "%s/." .Values.policies.image.path | quote }}, /mxgate-policies]
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - name: installed-policies
          # a volume hides what the image has at its place
          mountPath: /mxgate-policies
    {{- end }}
    {{- with .Values.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: mxgate
      image: {{ include "mxgate.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve]
      env:
        - name: MXGATE_CONFIG
          value: /etc/mxgate/config/mxgate.json
        {{- if $hasImage }}
        - name: PYTHONPATH
          value: /opt/mxgate/policies
        {{- end }}
        {{- if .Values.state.existingSecret }}
        {{- with .Values.state.urlKey }}
        - name: MXGATE__STATE__URL
          valueFrom:
            secretKeyRef: {name: {{ $.Values.state.existingSecret | quote }}, key: {{ . | quote }}}
        {{- end }}
        {{- with .Values.state.passwordKey }}
        - name: REDIS_PASSWORD
          valueFrom:
            secretKeyRef: {name: {{ $.Values.state.existingSecret | quote }}, key: {{ . | quote }}}
        {{- end }}
        {{- end }}
        {{- with .Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with .Values.extraEnvFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        - name: smtp
          containerPort: 2525
          {{- if .Values.hostPort.enabled }}
          hostPort: {{ .Values.hostPort.port }}
          {{- end }}
        {{- if .Values.smtps.enabled }}
        - name: smtps
          containerPort: 4650
        {{- end }}
        {{- if .Values.submission.enabled }}
        - name: submission
          containerPort: 5870
        - name: submissions
          containerPort: 4651
        {{- end }}
        - name: admin
          containerPort: 9464
      startupProbe:
        {{- toYaml .Values.probes.startup | nindent 8 }}
      livenessProbe:
        {{- toYaml .Values.probes.liveness | nindent 8 }}
      readinessProbe:
        {{- toYaml .Values.probes.readiness | nindent 8 }}
      lifecycle:
        preStop:
          # Kubernetes takes the pod out of its Services meanwhile; then comes SIGTERM, which drains.
          exec:
            command: [sleep, {{ .Values.preStop.sleepSeconds | quote }}]
      securityContext:
        {{- toYaml .Values.securityContext | nindent 8 }}
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/mxgate/config
          readOnly: true
        - name: spool
          mountPath: /tmp
        {{- if eq (include "mxgate.stateKind" .) "sqlite" }}
        - name: state
          mountPath: /var/lib/mxgate
        {{- end }}
        {{- if include "mxgate.hasTls" . }}
        - name: tls
          mountPath: /etc/mxgate/tls
          readOnly: true
        {{- end }}
        {{- if .Values.admin.existingSecret }}
        - name: admin
          mountPath: /etc/mxgate/admin
          readOnly: true
        {{- end }}
        {{- if $hasFiles }}
        - name: policies
          mountPath: /etc/mxgate/policies
          readOnly: true
        {{- end }}
        {{- if $hasImage }}
        - name: installed-policies
          mountPath: /opt/mxgate/policies
          readOnly: true
        {{- end }}
        {{- with .Values.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with .Values.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "mxgate.fullname" . }}
    - name: spool
      emptyDir:
        sizeLimit: {{ .Values.spool.sizeLimit | quote }}
    {{- if eq (include "mxgate.stateKind" .) "sqlite" }}
    - name: state
      {{- if .Values.persistence.enabled }}
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-state" (include "mxgate.fullname" .)) .Values.persistence.existingClaim }}
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- end }}
    {{- if include "mxgate.hasTls" . }}
    - name: tls
      secret:
        secretName: {{ include "mxgate.tlsSecret" . | quote }}
        defaultMode: 0440
    {{- end }}
    {{- if .Values.admin.existingSecret }}
    - name: admin
      secret:
        secretName: {{ .Values.admin.existingSecret | quote }}
        defaultMode: 0440
        items:
          - key: {{ .Values.admin.tokenKey | quote }}
            path: token
    {{- end }}
    {{- if $hasFiles }}
    - name: policies
      configMap:
        name: {{ include "mxgate.policiesConfigMap" . }}
    {{- end }}
    {{- if $hasImage }}
    - name: installed-policies
      emptyDir: {}
    {{- end }}
    {{- with .Values.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if .Values.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml .Values.topologySpreadConstraints | nindent 4 }}
  {{- else if eq .Values.workload "Deployment" }}
  topologySpreadConstraints:
    {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
    - maxSkew: 1
      topologyKey: {{ . }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "mxgate.selectorLabels" $ | nindent 10 }}
      # the pods that an update replaces do not count
      matchLabelKeys: [pod-template-hash]
    {{- end }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
