"""Commands that ask a running sidecar: ``pgsidecar why`` and ``pgsidecar top``.

They see what ``/api/v1`` answers and nothing else, so they run anywhere.
"""
