# docker build -t medsoft .   (docs/sharing.md says how to run it, and the line for Apptainer)
FROM python:3.11-slim
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /medsoft
COPY requirements.lock ./
RUN pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE *.py ./
COPY ldm ./ldm
COPY tool ./tool
COPY models ./models
COPY configs ./configs
RUN pip install --no-deps --no-build-isolation -e .
ENTRYPOINT ["medsoft"]
