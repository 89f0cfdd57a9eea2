"""The HTTP service: metrics, health, and a page for people."""
