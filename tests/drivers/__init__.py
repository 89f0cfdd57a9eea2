"""Drivers and programs as applications use them, through the sidecar and directly."""
