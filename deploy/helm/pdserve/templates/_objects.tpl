{{/* Objects that several components have: (dict "root" $ "name" COMPONENT). */}}

{{- define "pdserve.configMap" -}}
{{- include "pdserve.check" .root -}}
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "pdserve.metadata" . | nindent 2 }}
data:
  {{ .name }}.yaml: |
    {{- toYaml (index .root.Values .name).config | nindent 4 }}
{{- end }}

{{- define "pdserve.deployment" -}}
{{- $values := index .root.Values .name -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "pdserve.metadata" . | nindent 2 }}
spec:
  {{- if not (kindIs "invalid" $values.replicaCount) }}
  replicas: {{ $values.replicaCount }}
  {{- end }}
  minReadySeconds: {{ $values.minReadySeconds }}
  strategy:
    {{- toYaml $values.strategy | nindent 4 }}
  selector:
    matchLabels:
      {{- include "pdserve.selectorLabels" . | nindent 6 }}
  template:
    {{- include "pdserve.podTemplate" . | nindent 4 }}
{{- end }}

{{- define "pdserve.podDisruptionBudget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "pdserve.metadata" . | nindent 2 }}
spec:
  {{- toYaml (index .root.Values .name).podDisruptionBudget | nindent 2 }}
  selector:
    matchLabels:
      {{- include "pdserve.selectorLabels" . | nindent 6 }}
{{- end }}

{{/* Headless: routers talk to pods, and read who they are from its EndpointSlices, which get its labels. */}}
{{- define "pdserve.workerService" -}}
apiVersion: v1
kind: Service
metadata:
  {{- include "pdserve.metadata" . | nindent 2 }}
    pdserve.io/workers: "true"
spec:
  clusterIP: None
  selector:
    {{- include "pdserve.selectorLabels" . | nindent 4 }}
  ports:
    {{- include "pdserve.servicePorts" . | nindent 4 }}
{{- end }}

{{- define "pdserve.servicePorts" -}}
{{- range $name, $port := include "pdserve.ports" . | fromYaml }}
- name: {{ $name }}
  port: {{ $port }}
  targetPort: {{ $name }}
  protocol: TCP
  appProtocol: {{ ternary "kubernetes.io/h2c" "http" (eq $name "grpc") }}
{{- end }}
{{- end }}

{{- define "pdserve.serviceAccount" -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "pdserve.metadata" . | nindent 2 }}
automountServiceAccountToken: false
{{- end }}
