{{/*
The pod of an agent. Takes {root, gpu}: gpu is whether it runs with gpu.runtimeClass.

It runs as root, because containerd's certs.d and its configuration are root's; without one capability, so that
root of this container is only the owner of what it mounts.
*/}}
{{- define "darter.pod" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $probe := dict "port" "admin" -}}
{{- if include "darter.closed" $root }}{{ $_ := set $probe "host" (trimAll "[]" $v.admin.address) }}{{ end -}}
metadata:
  labels:
    {{- include "darter.selector" $root | nindent 4 }}
    darter.dev/set: {{ ternary "gpu" "all" .gpu }}
    {{- with $v.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # Pods follow their configuration.
    darter.dev/config: {{ include "darter.toml" $root | sha256sum }}
    {{- with $v.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "darter.serviceAccount" $root }}
  automountServiceAccountToken: true
  # containerd asks at the node's own 127.0.0.1. No NetworkPolicy holds for such a pod.
  hostNetwork: true
  dnsPolicy: {{ $v.dnsPolicy }}
  {{- if $v.gpu.processes }}
  hostPID: true
  {{- end }}
  # Services called darter would set variables that look like keys of the configuration.
  enableServiceLinks: false
  priorityClassName: {{ $v.priorityClassName | quote }}
  terminationGracePeriodSeconds: {{ include "darter.gracePeriod" $root }}
  {{- if .gpu }}
  runtimeClassName: {{ $v.gpu.runtimeClass }}
  {{- end }}
  {{- with $v.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  nodeSelector:
    kubernetes.io/os: linux
    {{- with $v.nodeSelector }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- $affinity := deepCopy $v.affinity }}
  {{- if $v.gpu.runtimeClass }}
  {{- $expression := dict "key" $v.gpu.nodeLabel "operator" (ternary "Exists" "DoesNotExist" .gpu) }}
  {{- $term := dict "matchExpressions" (list $expression) }}
  {{- $required := dict "requiredDuringSchedulingIgnoredDuringExecution" (dict "nodeSelectorTerms" (list $term)) }}
  {{- $_ := set $affinity "nodeAffinity" $required }}
  {{- end }}
  {{- with $affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $v.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    seccompProfile:
      type: RuntimeDefault
    {{- with $v.seLinuxOptions }}
    seLinuxOptions:
      {{- toYaml . | nindent 6 }}
    {{- end }}
  containers:
    - name: agent
      image: {{ include "darter.image" $root | quote }}
      imagePullPolicy: {{ $v.image.pullPolicy }}
      args: [agent]
      env:
        - name: DARTER_KUBERNETES_NODE
          valueFrom:
            fieldRef:
              fieldPath: spec.nodeName
        - name: DARTER_KUBERNETES_POD
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        {{- if and $v.swarm.enabled $v.swarm.zone }}
        - name: DARTER_SWARM_ZONE
          value: {{ $v.swarm.zone | quote }}
        {{- else if $v.swarm.enabled }}
        - name: DARTER_SWARM_ZONE
          valueFrom:
            fieldRef:
              fieldPath: metadata.labels['topology.kubernetes.io/zone']
        {{- end }}
        {{- if ne $v.gpu.mode "off" }}
        # For NVIDIA's container runtime: its library and all GPUs, of which none is taken from anybody.
        - name: NVIDIA_VISIBLE_DEVICES
          value: all
        - name: NVIDIA_DRIVER_CAPABILITIES
          value: utility
        {{- if $v.gpu.migMonitor }}
        - name: NVIDIA_MIG_MONITOR_DEVICES
          value: all
        {{- end }}
        {{- end }}
      ports:
        - name: mirror
          containerPort: {{ $v.ports.mirror }}
          hostPort: {{ $v.ports.mirror }}
          hostIP: 127.0.0.1
        {{- if $v.swarm.enabled }}
        - name: control
          containerPort: {{ $v.ports.control }}
          hostPort: {{ $v.ports.control }}
        - name: exchange
          containerPort: {{ $v.ports.exchange }}
          hostPort: {{ $v.ports.exchange }}
        {{- end }}
        - name: admin
          containerPort: {{ $v.ports.admin }}
          hostPort: {{ $v.ports.admin }}
      securityContext:
        runAsUser: 0
        runAsGroup: 0
        readOnlyRootFilesystem: true
        {{- if include "darter.privileged" $root }}
        # A device that no runtime hands in (gpu.kmsg, gpu.driverRoot) is open to no other container.
        privileged: true
        {{- else if and $v.gpu.migMonitor (ne $v.gpu.mode "off") }}
        # NVIDIA's runtime takes NVIDIA_MIG_MONITOR_DEVICES from nobody without it.
        capabilities:
          drop: [ALL]
          add: [SYS_ADMIN]
        {{- else }}
        allowPrivilegeEscalation: false
        capabilities:
          drop: [ALL]
        {{- end }}
      # For as long as a large store takes to be looked through.
      startupProbe:
        httpGet:
          path: /healthz
          {{- toYaml $probe | nindent 10 }}
        periodSeconds: 2
        failureThreshold: 150
      # Only what hangs is restarted: hosts.toml is withdrawn for everything else.
      livenessProbe:
        httpGet:
          path: /healthz
          {{- toYaml $probe | nindent 10 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet:
          path: /readyz
          {{- toYaml $probe | nindent 10 }}
        periodSeconds: 5
        timeoutSeconds: 5
      resources:
        {{- toYaml $v.resources | nindent 8 }}
      volumeMounts:
        - name: config
          mountPath: /etc/darter
          readOnly: true
        {{- if include "darter.reportVolume" $root }}
        - name: report
          mountPath: /etc/darter-report
          readOnly: true
        {{- end }}
        {{- range $v.secrets }}
        - name: {{ printf "secret-%s" . }}
          mountPath: {{ printf "/etc/darter-secrets/%s" . }}
          readOnly: true
        {{- end }}
        {{- range $mount := include "darter.hostMounts" $root | fromYamlArray }}
        - name: {{ $mount.name }}
          mountPath: {{ $mount.path | quote }}
          {{- if $mount.readOnly }}
          readOnly: true
          {{- end }}
          {{- if $mount.follow }}
          mountPropagation: HostToContainer
          {{- end }}
        {{- end }}
  volumes:
    - name: config
      projected:
        # 0400
        defaultMode: 256
        sources:
          - configMap:
              name: {{ include "darter.fullname" $root }}
          {{- if $v.swarm.enabled }}
          - secret:
              name: {{ include "darter.swarmSecret" $root }}
              items:
                - key: {{ $v.swarm.existingSecret | empty | ternary "swarm.key" $v.swarm.existingSecretKey }}
                  path: swarm.key
          {{- end }}
    {{- if include "darter.reportVolume" $root }}
    - name: report
      projected:
        # 0400
        defaultMode: 256
        sources:
          {{- with $v.report.audience }}
          # For the scaler alone: the API server does not take it, and the scaler is not sent one that it does.
          - serviceAccountToken:
              audience: {{ . | quote }}
              expirationSeconds: 3600
              path: token
          {{- end }}
          {{- with include "darter.reportCa" $root }}
          - {{ . }}:
              name: {{ include "darter.reportCaName" $root }}
              items:
                - key: {{ include "darter.reportOwn" $root | empty | ternary $v.report.caKey "ca.crt" | quote }}
                  path: ca.pem
          {{- end }}
    {{- end }}
    {{- range $v.secrets }}
    - name: {{ printf "secret-%s" . }}
      secret:
        secretName: {{ . }}
        # 0400
        defaultMode: 256
    {{- end }}
    {{- range $mount := include "darter.hostMounts" $root | fromYamlArray }}
    - name: {{ $mount.name }}
      hostPath:
        path: {{ $mount.path | quote }}
        type: {{ $mount.type | default "DirectoryOrCreate" }}
    {{- end }}
{{- end -}}

{{/*
What the container has of the host. Directories and not files, where whoever makes the file makes it anew: a mount
stays with the old one. `follow`: what is mounted and unmounted below is mounted and unmounted here too, else
containers that are gone would keep their disk.
*/}}
{{- define "darter.hostMounts" -}}
{{- $v := .Values -}}
- {name: data, path: {{ $v.host.dataDir | quote }}}
- {name: run, path: {{ $v.host.runDir | quote }}}
- {name: containerd-config, path: {{ dir $v.host.containerdConfig | quote }}, readOnly: true}
- {name: certs-d, path: {{ $v.host.certsDir | quote }}, readOnly: {{ eq (toString (dig "certs_d" "write" true $v.config)) "false" }}}
{{- range $index, $path := $v.host.laterCertsDirs }}
- {name: certs-d-{{ $index }}, path: {{ $path | quote }}, readOnly: true}
{{- end }}
{{- with $v.host.containerdSocket }}
- {name: containerd-socket, path: {{ dir . | quote }}, readOnly: true, follow: true, type: Directory}
{{- end }}
{{- with $v.host.containerdContent }}
- {name: containerd-content, path: {{ . | quote }}, readOnly: true, type: Directory}
{{- end }}
{{- if ne $v.gpu.mode "off" }}
- {name: pod-resources, path: {{ $v.host.podResources | quote }}, readOnly: true}
{{- with $v.gpu.driverRoot }}
- {name: driver, path: {{ . | quote }}, readOnly: true, follow: true}
{{- end }}
{{- end }}
{{- if $v.gpu.kmsg }}
- {name: kmsg, path: /dev/kmsg, readOnly: true, type: CharDevice}
{{- end }}
{{- end -}}
