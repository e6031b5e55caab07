{{/* darter.toml: what the chart's own values say, and over it whatever is below `config`. */}}

{{/* Keys that are a value of the chart, because more hangs on them than a line of darter.toml. */}}
{{- define "darter.reserved" -}}
agent: {data_dir: host.dataDir, drain: drainSeconds}
mirror: {listen: ports.mirror}
certs_d: {path: host.certsDir}
containerd: {config: host.containerdConfig, socket: host.containerdSocket}
admin: {listen: admin.address and ports.admin, socket: host.runDir}
swarm: {key_file: swarm.existingSecret, listen: swarm.address and ports.control, exchange_listen: swarm.address and ports.exchange, zone: swarm.zone, handover: swarm.handoverSeconds}
kubernetes: {node: nothing, pod: nothing, kubeconfig: nothing}
report: {scaler: report.scaler, token_file: report.audience, ca: report.caSecret or report.caConfigMap}
gpu: {mode: gpu.mode, dcgm_names: gpu.dcgmNames, processes: gpu.processes, kmsg: gpu.kmsg, driver_root: gpu.driverRoot, pod_resources: host.podResources}
{{- end -}}

{{- define "darter.ownConfig" -}}
{{- $v := .Values -}}
agent:
  data_dir: {{ $v.host.dataDir | quote }}
  drain: {{ printf "%ds" (int $v.drainSeconds) }}
mirror:
  listen: {{ printf "127.0.0.1:%d" (int $v.ports.mirror) | quote }}
certs_d:
  path: {{ $v.host.certsDir | quote }}
containerd:
  config: {{ $v.host.containerdConfig | quote }}
  socket: {{ $v.host.containerdSocket | quote }}
  content_store: {{ ternary "auto" "off" (ne $v.host.containerdContent "") | quote }}
admin:
  listen: {{ printf "%s:%d" $v.admin.address (int $v.ports.admin) | quote }}
  socket: {{ printf "%s/admin.sock" $v.host.runDir | quote }}
{{- if $v.swarm.enabled }}
swarm:
  key_file: /etc/darter/swarm.key
  listen: {{ printf "%s:%d" $v.swarm.address (int $v.ports.control) | quote }}
  exchange_listen: {{ printf "%s:%d" $v.swarm.address (int $v.ports.exchange) | quote }}
  service: {{ include "darter.fullname" . | quote }}
  endpoint_port: control
  handover: {{ printf "%ds" (int $v.swarm.handoverSeconds) }}
{{- end }}
gpu:
  mode: {{ $v.gpu.mode | quote }}
  dcgm_names: {{ $v.gpu.dcgmNames | quote }}
  processes: {{ $v.gpu.processes }}
  kmsg: {{ $v.gpu.kmsg }}
  driver_root: {{ $v.gpu.driverRoot | quote }}
  pod_resources: {{ printf "%s/kubelet.sock" $v.host.podResources | quote }}
  driver_grace: 1m
{{- with include "darter.reportScaler" . }}
report:
  scaler: {{ . | quote }}
  token_file: {{ ternary "/etc/darter-report/token" "" (ne $v.report.audience "") | quote }}
  ca: {{ ternary "/etc/darter-report/ca.pem" "" (ne (include "darter.reportCa" $) "") | quote }}
{{- end }}
{{- end -}}

{{- define "darter.toml" -}}
{{- $own := include "darter.ownConfig" . | fromYaml -}}
{{- range $section, $keys := include "darter.reserved" . | fromYaml -}}
{{- range $key, $value := $keys -}}
{{- if hasKey (index $.Values.config $section | default dict) $key -}}
{{- if eq $value "nothing" -}}
{{- fail (printf "config.%s.%s: not to be set here: the pod is told by Kubernetes" $section $key) -}}
{{- else -}}
{{- fail (printf "config.%s.%s: not to be set here: set %s, on which more of the pod hangs" $section $key $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
# Made by the chart `darter`: change its values, and the pods follow.
{{- range $section, $keys := mergeOverwrite $own (deepCopy .Values.config) }}
{{- if eq $section "registry" }}
{{- range $keys }}

[[registry]]
{{- range $key, $value := . }}
{{ $key }} = {{ toRawJson $value }}
{{- end }}
{{- end }}
{{- else if kindIs "map" $keys }}

[{{ $section }}]
{{- range $key, $value := $keys }}
{{- if not (kindIs "invalid" $value) }}
{{ $key }} = {{ toRawJson $value }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{ end -}}
