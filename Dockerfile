# The gateway alone, for `tidegate serve`. The demo's engine and model are not in it.
#
# Not built in this project's own CI, which has no container engine; tests/test_packaging.py checks what can be
# checked without one. Build: docker build -t tidegate .   Run: see README.md.
# For Kubernetes, with its client and PostgreSQL's: docker build --build-arg LOCK=cluster -t tidegate .

# On less CPU, with the routing compiled to C (docs/adr/0014): docker build --build-arg COMPILED=1 -t tidegate .

FROM python:3.13-slim AS builder
WORKDIR /src
ARG LOCK=app
ARG COMPILED=0
COPY requirements/${LOCK}.txt requirements/build.txt requirements/compile.txt requirements/
# Into a virtual environment, which the second stage takes over as a whole; its path must be the same there.
# pip compiles the bytecode here, because the final file system may be read-only.
RUN python -m venv /opt/tidegate && \
    /opt/tidegate/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/${LOCK}.txt && \
    python -m venv /opt/build && \
    /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY backends backends
COPY routing routing
COPY scripts/compiled.py scripts/
RUN /opt/build/bin/python -m hatchling build --target wheel --directory /wheel && \
    /opt/tidegate/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
# mypyc reads the types of what the gateway imports, so it gets an environment with all of that.
RUN if [ "$COMPILED" = 1 ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && \
        python -m venv /opt/compile && \
        /opt/compile/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/${LOCK}.txt && \
        /opt/compile/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/compile.txt && \
        /opt/compile/bin/python scripts/compiled.py --install /opt/tidegate/lib/python3.*/site-packages; \
    fi
RUN /opt/tidegate/bin/pip uninstall --yes pip

FROM python:3.13-slim
COPY --from=builder /opt/tidegate /opt/tidegate
ENV PATH="/opt/tidegate/bin:$PATH" \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# A number, so that Kubernetes' runAsNonRoot can be sure of it. The user needs no home and no shell.
USER 10001:10001
WORKDIR /var/lib/tidegate
EXPOSE 7400 7401
# Exec forms throughout: nothing needs a shell, and SIGTERM reaches the gateway itself.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s --retries=3 CMD ["tidegate", "health", "--config", "/etc/tidegate/tidegate.yaml"]
ENTRYPOINT ["tidegate"]
CMD ["serve", "--config", "/etc/tidegate/tidegate.yaml", "--log-format", "auto"]
