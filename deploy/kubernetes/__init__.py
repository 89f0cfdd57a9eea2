"""Kubernetes manifests, some of them generated: see ``build``."""
