# The hub image of Zero to JupyterHub, with cull_idle. TAG is the version of your chart.
ARG TAG
FROM quay.io/jupyterhub/k8s-hub:${TAG}
USER root
COPY cull_idle.py pyproject.toml README.md LICENSE /src/
RUN pip install --no-cache-dir /src
USER 1000
