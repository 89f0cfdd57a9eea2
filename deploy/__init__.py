"""Files to run pgsidecar with: a compose stack and Kubernetes manifests. See README.md."""
