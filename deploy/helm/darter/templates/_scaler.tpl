{{/* What the scaler is called, and scaler.toml: what the chart's own values say, and over it whatever is below
`scaler.config`. */}}

{{- define "darter.scaler.name" -}}
{{- printf "%s-scaler" (include "darter.fullname" .) -}}
{{- end -}}

{{- define "darter.scaler.selector" -}}
app.kubernetes.io/name: darter
app.kubernetes.io/instance: {{ .Release.Name }}
darter.dev/part: scaler
{{- end -}}

{{- define "darter.scaler.labels" -}}
{{ include "darter.scaler.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "darter.scaler.serviceAccount" -}}
{{- if .Values.scaler.serviceAccount.create -}}
{{- .Values.scaler.serviceAccount.name | default (include "darter.scaler.name" .) -}}
{{- else -}}
{{- required "scaler.serviceAccount.name: needed where scaler.serviceAccount.create is false" .Values.scaler.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "darter.scaler.tlsSecret" -}}
{{- .Values.scaler.tls.existingSecret | default (printf "%s-tls" (include "darter.scaler.name" .)) -}}
{{- end -}}

{{/* Keys that are a value of the chart, because more hangs on them than a line of scaler.toml. */}}
{{- define "darter.scaler.reserved" -}}
grpc: {listen: scaler.address and scaler.ports.grpc, cert: scaler.tls, key: scaler.tls, keda_ca: scaler.keda.caSecret, keda_names: scaler.keda.names, insecure: scaler.tls}
http: {listen: scaler.address and scaler.ports.http}
access: {mode: nothing}
actuators: {keda: scaler.actuators.keda, protect: scaler.actuators.protect, copy: scaler.actuators.copy, deletion_cost: scaler.actuators.deletionCost, buffer: scaler.actuators.buffer, remove: scaler.actuators.remove}
record: {dir: scaler.record.size}
kubernetes: {enabled: nothing, kubeconfig: nothing, service: nothing, audience: report.audience, agents: serviceAccount.name, startup_taint: config.kubernetes.startup_taint, static_pools: scaler.staticPools}
{{- end -}}

{{- define "darter.scaler.ownConfig" -}}
{{- $s := .Values.scaler -}}
grpc:
  listen: {{ printf "%s:%d" $s.address (int $s.ports.grpc) | quote }}
  cert: /etc/darter-tls/tls.crt
  key: /etc/darter-tls/tls.key
  {{- if $s.keda.caSecret }}
  keda_ca: /etc/darter-keda/ca.crt
  keda_names: {{ toJson $s.keda.names }}
  {{- else if $s.keda.names }}
  {{- fail "scaler.keda.names: of no use without scaler.keda.caSecret, which says whose certificates are looked at" }}
  {{- end }}
http:
  listen: {{ printf "%s:%d" $s.address (int $s.ports.http) | quote }}
access:
  mode: kubernetes
actuators:
  keda: {{ $s.actuators.keda | quote }}
  protect: {{ $s.actuators.protect | quote }}
  copy: {{ $s.actuators.copy | quote }}
  deletion_cost: {{ $s.actuators.deletionCost | quote }}
  buffer: {{ $s.actuators.buffer | quote }}
  remove: {{ $s.actuators.remove | quote }}
record:
  dir: /var/lib/darter-scaler
kubernetes:
  enabled: true
  service: {{ include "darter.scaler.name" . | quote }}
  audience: {{ required "report.audience: needed where scaler.enabled: the scaler believes no agent without a token for it" .Values.report.audience | quote }}
  agents: [{{ printf "%s/%s" .Release.Namespace (include "darter.serviceAccount" .) | quote }}]
  startup_taint: {{ dig "kubernetes" "startup_taint" "darter.dev/not-ready" .Values.config | quote }}
  static_pools: {{ $s.staticPools }}
{{- end -}}

{{- define "darter.scaler.toml" -}}
{{- $own := include "darter.scaler.ownConfig" . | fromYaml -}}
{{- range $section, $keys := include "darter.scaler.reserved" . | fromYaml -}}
{{- range $key, $value := $keys -}}
{{- if hasKey (index $.Values.scaler.config $section | default dict) $key -}}
{{- if eq $value "nothing" -}}
{{- fail (printf "scaler.config.%s.%s: not to be set here: in a cluster it is what it is" $section $key) -}}
{{- else -}}
{{- fail (printf "scaler.config.%s.%s: not to be set here: set %s, on which more of the pod hangs" $section $key $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
# Made by the chart `darter`: change its values, and the pods follow.
{{- range $section, $keys := mergeOverwrite $own (deepCopy .Values.scaler.config) }}
{{- if kindIs "slice" $keys }}
{{- range $keys }}

[[{{ $section }}]]
{{- range $key, $value := . }}
{{ $key }} = {{ include "darter.scaler.inline" $value }}
{{- end }}
{{- end }}
{{- else if kindIs "map" $keys }}

[{{ $section }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ include "darter.scaler.inline" $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{ end -}}

{{/* A value as TOML has it on one line: tables in braces. */}}
{{- define "darter.scaler.inline" -}}
{{- if kindIs "map" . -}}
{ {{ range $index, $key := keys . | sortAlpha }}{{ if $index }}, {{ end }}{{ $key }} = {{ include "darter.scaler.inline" (get $ $key) }}{{ end }} }
{{- else if kindIs "slice" . -}}
[{{ range $index, $one := . }}{{ if $index }}, {{ end }}{{ include "darter.scaler.inline" $one }}{{ end }}]
{{- else -}}
{{ toRawJson . }}
{{- end -}}
{{- end -}}
