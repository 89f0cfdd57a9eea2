"""Prometheus and Alertmanager beside a sidecar, with this project's rules and routes.

For people, ``python -m deploy.observe`` (``make observe``): a demo in which one watches a page arrive. For
tests, the same processes.
"""
