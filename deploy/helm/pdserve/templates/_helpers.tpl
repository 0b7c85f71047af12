{{/* Names and labels. Selectors hold only what never changes: no version, no chart. */}}

{{- define "pdserve.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for "-prefill" and a pod's suffixes behind it. */}}
{{- define "pdserve.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "pdserve.name" .) .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "pdserve.name" .) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "pdserve.fleet" -}}
{{- default (include "pdserve.fullname" .) .Values.fleet }}
{{- end }}

{{/* Everything below takes (dict "root" $ "name" COMPONENT). */}}

{{- define "pdserve.selectorLabels" -}}
app.kubernetes.io/name: {{ include "pdserve.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .name }}
{{- end }}

{{- define "pdserve.labels" -}}
{{ include "pdserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
pdserve.io/fleet: {{ include "pdserve.fleet" .root }}
{{- end }}

{{- define "pdserve.metadata" -}}
name: {{ include "pdserve.fullname" .root }}-{{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "pdserve.labels" . | nindent 2 }}
{{- end }}

{{/* The port of a `listen` address. */}}
{{- define "pdserve.port" -}}
{{- regexFind "[0-9]+$" . }}
{{- end }}

{{/* The name of the port that others of the fleet dial, and of the one for probes and metrics. */}}
{{- define "pdserve.ports" -}}
{{- $config := (index .root.Values .name).config -}}
{{- if eq .name "router" -}}
http: {{ include "pdserve.port" $config.http_listen }}
grpc: {{ include "pdserve.port" $config.grpc_listen }}
{{- else -}}
grpc: {{ include "pdserve.port" $config.listen }}
http: {{ include "pdserve.port" $config.http_listen }}
{{- end }}
{{- end }}

{{/* What a release must decide. */}}
{{- define "pdserve.check" -}}
{{- if not (or .Values.tls.secretName .Values.allowPlaintext) }}
{{- fail "set tls.secretName (mutual TLS between router, workers and stores), or allowPlaintext=true if everyone who reaches the pods may read prompts and KV" }}
{{- end }}
{{- if and .Values.kvstore.enabled (not .Values.tls.secretName) }}
{{- fail "kvstore.enabled needs tls.secretName: a store gives its memory to peers with a certificate only" }}
{{- end }}
{{- end }}
