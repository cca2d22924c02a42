# A server with the bundled base and the shipped adapters.
#
#     docker build -t loraserve .
#     docker run -p 8000:8000 loraserve
#     docker run -p 8000:8000 -v ./my-adapters:/data/adapters loraserve serve --host 0.0.0.0 --base owner/name
#
# NOTE: unbuilt. No machine of this project has a Docker daemon, so this file was reviewed and never run.

FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/loraserve
COPY pyproject.toml constraints.txt README.md ./
COPY loraserve loraserve
RUN /opt/loraserve/bin/pip install --no-cache-dir -c constraints.txt .

FROM python:3.11-slim
# The compiler makes the CPU's kernels at the first start, for the processor it then runs on.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 loraserve
COPY --from=build /opt/loraserve /opt/loraserve
COPY --chown=loraserve adapters /data/adapters
ENV PATH=/opt/loraserve/bin:$PATH PYTHONUNBUFFERED=1 LORASERVE_ADAPTERS=/data/adapters
USER loraserve
WORKDIR /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD \
  ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["loraserve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
