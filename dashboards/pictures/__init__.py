"""Pictures of the dashboards: ``python -m dashboards.pictures``; for development only.

``ask`` chooses a dashboard's main panels and asks a Prometheus what they ask; ``stage`` starts a demo
and a Prometheus where there is none; ``draw.mjs`` draws the answers with Grafana's own components
(npm, ``src/``) in a Chromium. A picture shows what Grafana's components make of the panels' JSON and of
real measurements. It is not a screenshot of Grafana.
"""
