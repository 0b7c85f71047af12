{{/* The pod of a component, the same for all four: (dict "root" $ "name" COMPONENT). */}}

{{- define "pdserve.podTemplate" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .name -}}
metadata:
  labels:
    {{- include "pdserve.labels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    kubectl.kubernetes.io/default-container: {{ .name }}
    checksum/config: {{ toYaml $values.config | sha256sum }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- $own := include "pdserve.podSpec" . | fromYaml }}
  {{- toYaml (mustMergeOverwrite $own (deepCopy $root.Values.podSpec) (deepCopy $values.podSpec)) | nindent 2 }}
{{- end }}

{{- define "pdserve.podSpec" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .name -}}
serviceAccountName: {{ include "pdserve.fullname" $root }}-{{ ternary "router" "worker" (eq .name "router") }}
automountServiceAccountToken: {{ eq .name "router" }}
terminationGracePeriodSeconds: {{ add $values.preStopSeconds (ceil $values.config.drain_timeout_s) 10 }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ $root.Values.user | int64 }}
  runAsGroup: {{ $root.Values.user | int64 }}
  fsGroup: {{ $root.Values.user | int64 }}
  seccompProfile:
    type: RuntimeDefault
containers:
  - name: {{ .name }}
    {{- $image := merge (deepCopy $values.image) $root.Values.image }}
    image: {{ printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) }}
    imagePullPolicy: {{ $image.pullPolicy }}
    command: [python, -m, {{ get (dict "prefill" "prefill_worker" "decode" "decode_worker") .name | default .name }}]
    args:
      {{- include "pdserve.args" . | nindent 6 }}
    env:
      {{- include "pdserve.env" . | nindent 6 }}
    ports:
      {{- range $name, $port := include "pdserve.ports" . | fromYaml }}
      - name: {{ $name }}
        containerPort: {{ $port }}
        {{- if and (eq $.name "kvstore") (eq $name "grpc") }}
        hostPort: {{ $port }}
        {{- end }}
        protocol: TCP
      {{- end }}
    {{- $scheme := ternary "HTTPS" "HTTP" (ne "" (dig "http_tls" "cert_file" "" $values.config)) }}
    livenessProbe:
      httpGet: {path: /healthz, port: http, scheme: {{ $scheme }}}
      periodSeconds: 10
      timeoutSeconds: 5
      failureThreshold: 6
    readinessProbe:
      httpGet: {path: /readyz, port: http, scheme: {{ $scheme }}}
      periodSeconds: 2
      timeoutSeconds: 5
      failureThreshold: 3
    lifecycle:
      preStop:
        sleep:
          seconds: {{ $values.preStopSeconds }}
    securityContext:
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: [ALL]
    resources:
      {{- include "pdserve.resources" . | nindent 6 }}
    volumeMounts:
      {{- include "pdserve.volumeMounts" . | nindent 6 }}
volumes:
  {{- include "pdserve.volumes" . | nindent 2 }}
{{- end }}

{{- define "pdserve.resources" -}}
{{- $values := index .root.Values .name -}}
{{- $gpus := $values.gpus | int -}}
{{- $limits := ternary (dict .root.Values.gpuResource $gpus) dict (gt $gpus 0) -}}
{{- toYaml (mustMerge (dict "limits" $limits) $values.resources) }}
{{- end }}

{{/* What only the pod knows, and what the chart decides for all; the config file is laid below. */}}
{{- define "pdserve.args" -}}
{{- $root := .root -}}
{{- $values := index $root.Values .name -}}
{{- $grpc := (include "pdserve.ports" . | fromYaml).grpc -}}
{{- $tls := ternary "worker_tls" "tls" (eq .name "router") -}}
- --config
- /etc/pdserve/config/{{ .name }}.yaml
{{- if eq .name "router" }}
- --set
- router_id="$(POD_NAME)"
{{- if not (dig "kubernetes" "selector" "" $values.config) }}
- --set
- kubernetes.selector=pdserve.io/workers,pdserve.io/fleet={{ include "pdserve.fleet" $root }}
{{- end }}
{{- else if eq .name "kvstore" }}
- --set
- node_id="$(NODE_NAME)"
- --set
- advertise="$(HOST_IP):{{ $grpc }}"
- --set
- transport_host="$(POD_IP)"
{{- else }}
- --set
- worker_id="$(POD_NAME)"
- --set
- advertise="$(POD_IP):{{ $grpc }}"
- --set
- labels.node="$(NODE_NAME)"
{{- if $root.Values.kvstore.enabled }}
- --set
- store="$(HOST_IP):{{ include "pdserve.port" $root.Values.kvstore.config.listen }}"
{{- end }}
{{- end }}
{{- if $root.Values.tls.secretName }}
{{- range $key, $file := dict "cert_file" "tls.crt" "key_file" "tls.key" "ca_file" "ca.crt" }}
- --set
- {{ $tls }}.{{ $key }}=/etc/pdserve/tls/{{ $file }}
{{- end }}
- --set
- {{ $tls }}.server_name={{ $root.Values.tls.serverName }}
{{- else if ne .name "router" }}
- --set
- allow_plaintext=true
{{- end }}
{{- range $key, $_ := $values.secretConfig }}
- --set
- {{ $key }}=@/etc/pdserve/secrets/{{ $key }}
{{- end }}
{{- end }}

{{- define "pdserve.env" -}}
{{- range $name, $path := dict "POD_NAME" "metadata.name" "POD_IP" "status.podIP" "HOST_IP" "status.hostIP" "NODE_NAME" "spec.nodeName" }}
- name: {{ $name }}
  valueFrom:
    fieldRef:
      fieldPath: {{ $path }}
{{- end }}
- name: HOME
  value: /tmp
{{- range $name, $value := (index .root.Values .name).env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end }}

{{- define "pdserve.volumeMounts" -}}
{{- $values := index .root.Values .name -}}
- name: config
  mountPath: /etc/pdserve/config
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if ne .name "router" }}
- name: shm
  mountPath: /dev/shm
{{- end }}
{{- if .root.Values.tls.secretName }}
- name: tls
  mountPath: /etc/pdserve/tls
  readOnly: true
{{- end }}
{{- if $values.secretConfig }}
- name: secrets
  mountPath: /etc/pdserve/secrets
  readOnly: true
{{- end }}
{{- range $name, $volume := $values.volumes }}
- name: {{ $name }}
  mountPath: {{ $volume.mountPath }}
  readOnly: {{ default false $volume.readOnly }}
{{- end }}
{{- end }}

{{- define "pdserve.volumes" -}}
{{- $values := index .root.Values .name -}}
- name: config
  configMap:
    name: {{ include "pdserve.fullname" .root }}-{{ .name }}
- name: tmp
  emptyDir: {}
{{- if ne .name "router" }}
- name: shm
  {{- if .root.Values.kvstore.enabled }}
  hostPath:
    path: {{ .root.Values.kvstore.hostPath }}
    type: Directory
  {{- else }}
  emptyDir:
    medium: Memory
    sizeLimit: {{ $values.sharedMemory }}
  {{- end }}
{{- end }}
{{- with .root.Values.tls.secretName }}
- name: tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- with $values.secretConfig }}
- name: secrets
  projected:
    sources:
      {{- range $key, $from := . }}
      - secret:
          name: {{ $from.secretName }}
          items:
            - key: {{ $from.key }}
              path: {{ $key }}
      {{- end }}
{{- end }}
{{- range $name, $volume := $values.volumes }}
- name: {{ $name }}
  {{- omit $volume "mountPath" "readOnly" | toYaml | nindent 2 }}
{{- end }}
{{- end }}
