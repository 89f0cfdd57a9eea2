# The image of pgsidecar.
#
#   docker build -t pgsidecar .
#   docker run -e DATABASE_URL=postgresql://app:secret@db:5432/app -p 9632:9632 pgsidecar
#
# A sidecar shares the network of its pod, so PostgreSQL clients reach it on loopback, and 6432 is
# open to nobody else. Where the application is not in the same pod, as in a compose file, add
# -e PGSIDECAR__LISTEN__HOST=0.0.0.0; clients log in with a password there as everywhere.
#
# The base is pinned by tag, to be read, and by the digest of its multi-platform index, which decides.
# A newer patch of Python 3.11 (the version the tests run on) changes both, in both stages.

FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b AS builder

WORKDIR /build
COPY pyproject.toml setup.py README.md LICENSE ./
COPY sidecar ./sidecar
# The builder's pip works on the environment from outside, so that the image has none.
RUN python -m venv --without-pip /opt/pgsidecar \
    && pip --python /opt/pgsidecar/bin/python install --no-cache-dir .


FROM python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

ARG REVISION=unknown
LABEL org.opencontainers.image.title="pgsidecar" \
      org.opencontainers.image.description="A PostgreSQL connection pool next to your application that says who holds it, who waits and why" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"

# Metrics and health are asked for from outside of the pod. The port stands here, and not in the
# file, because the health check below has to know it: variables override the file.
ENV PATH=/opt/pgsidecar/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PGSIDECAR__HTTP__HOST=0.0.0.0 \
    PGSIDECAR__HTTP__PORT=9632

COPY --from=builder /opt/pgsidecar /opt/pgsidecar
COPY config.yaml /etc/pgsidecar/config.yaml

# By number: Kubernetes cannot tell of a name that it is not root (runAsNonRoot).
USER 65532:65532

# PostgreSQL clients; HTTP
EXPOSE 6432 9632

# Live, not ready: a restart does not bring back a PostgreSQL that is down.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['PGSIDECAR__HTTP__PORT'] + '/livez', timeout=2)"]

# Stop accepting, let transactions finish for drain_timeout (30 s), close. docker stop waits for 10 s
# only, so give it more: docker stop -t 40.
STOPSIGNAL SIGTERM
ENTRYPOINT ["pgsidecar"]
CMD ["run", "--config", "/etc/pgsidecar/config.yaml"]
