{{/* Names, labels, and what is decided in one place and used in several. */}}

{{- define "darter.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains "darter" .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-darter" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Of objects that are in no namespace: two releases may be in one cluster. */}}
{{- define "darter.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "darter.fullname" .) -}}
{{- end -}}

{{/* What all pods of this release have, and no others. A DaemonSet's selector never changes. */}}
{{- define "darter.selector" -}}
app.kubernetes.io/name: darter
app.kubernetes.io/instance: {{ .Release.Name }}
darter.dev/part: agent
{{- end -}}

{{- define "darter.labels" -}}
{{ include "darter.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "darter.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "darter.fullname" .) -}}
{{- else -}}
{{- required "serviceAccount.name: needed where serviceAccount.create is false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "darter.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "darter.swarmSecret" -}}
{{- .Values.swarm.existingSecret | default (printf "%s-swarm" (include "darter.fullname" .)) -}}
{{- end -}}

{{/*
Whether the container has to be privileged: a device that no runtime hands in is closed to every other
container by the device cgroup, whatever its capabilities.
*/}}
{{- define "darter.privileged" -}}
{{- if or .Values.gpu.kmsg .Values.gpu.driverRoot }}true{{ end -}}
{{- end -}}

{{/* Where agents report: where they are told to, else to the scaler of this chart, if there is one. */}}
{{- define "darter.reportScaler" -}}
{{- if .Values.report.scaler -}}
{{- .Values.report.scaler -}}
{{- else if .Values.scaler.enabled -}}
{{- printf "https://%s.%s.svc:%d" (include "darter.scaler.name" .) .Release.Namespace (int .Values.scaler.ports.grpc) -}}
{{- end -}}
{{- end -}}

{{/* The Secret or ConfigMap with the certificates by which the scaler is known, and the key in it. */}}
{{- define "darter.reportCaName" -}}
{{- if include "darter.reportOwn" . -}}
{{- include "darter.scaler.tlsSecret" . -}}
{{- else -}}
{{- .Values.report.caSecret | default .Values.report.caConfigMap -}}
{{- end -}}
{{- end -}}

{{/* Whether agents know the scaler of this chart by the Secret that it has its own certificate from. */}}
{{- define "darter.reportOwn" -}}
{{- $report := .Values.report -}}
{{- if and .Values.scaler.enabled (not (or $report.scaler $report.caSecret $report.caConfigMap)) }}true{{ end -}}
{{- end -}}

{{/* Where the certificates are by which the scaler is known: secret or configMap, or nothing. */}}
{{- define "darter.reportCa" -}}
{{- $report := set (deepCopy .Values.report) "scaler" (include "darter.reportScaler" .) -}}
{{- if and $report.caSecret $report.caConfigMap -}}
{{- fail "report.caSecret, report.caConfigMap: only one of the two has the scaler's certificates" -}}
{{- else if and (or $report.caSecret $report.caConfigMap) (not (hasPrefix "https://" $report.scaler)) -}}
{{- fail "report.caSecret, report.caConfigMap: without a meaning where report.scaler is no https://<host>:<port>" -}}
{{- else if or $report.caSecret (include "darter.reportOwn" .) -}}
secret
{{- else if $report.caConfigMap -}}
configMap
{{- else if hasPrefix "https://" $report.scaler -}}
{{- fail (printf "report.caSecret or report.caConfigMap: one has to have the certificates by which %s is known" $report.scaler) -}}
{{- end -}}
{{- end -}}

{{/* Whether pods have a volume with what they show the scaler, and know it by. */}}
{{- define "darter.reportVolume" -}}
{{- if or (include "darter.reportCa" .) (and (include "darter.reportScaler" .) .Values.report.audience) }}true{{ end -}}
{{- end -}}

{{/* The kubelet kills what has not ended by then: 10 s more than the hand-over, and than the drain before it. */}}
{{- define "darter.gracePeriod" -}}
{{- max (add (int .Values.swarm.handoverSeconds) 10) (add (int .Values.drainSeconds) 20) -}}
{{- end -}}

{{/* Whether only the node itself can ask the admin endpoint. */}}
{{- define "darter.closed" -}}
{{- if or (hasPrefix "127." .Values.admin.address) (eq .Values.admin.address "[::1]") }}true{{ end -}}
{{- end -}}
