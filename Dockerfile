# Two images from one file:
#   docker build --target control -t trainyard-control .     the API, the scheduler and the command, without torch
#   docker build --target worker  -t trainyard .             the same with torch: what a GPU node runs
FROM python:3.11-slim AS control
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /opt/trainyard
RUN useradd --uid 10001 --create-home --home-dir /var/lib/trainyard trainyard
COPY pyproject.toml constraints.txt README.md ./
COPY src src
COPY contract contract
COPY model model
COPY worker worker
COPY service service
COPY client client
COPY migrations migrations
RUN pip install -c constraints.txt -e .
USER trainyard
ENV TRAINYARD_HOME=/var/lib/trainyard/home TRAINYARD_HOST=0.0.0.0 TRAINYARD_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# Binding to all addresses is refused at start-up unless TRAINYARD_TOKEN is set.
CMD ["python", "-m", "trainyard.service"]

FROM control AS worker
USER root
RUN pip install -c constraints.txt -e '.[worker,corpora]'
USER trainyard
