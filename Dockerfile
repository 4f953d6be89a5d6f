# hadolint global ignore=DL3042
# cdclean with everything it needs, for a CPU or an NVIDIA GPU.
#
#   docker build -t cdclean .                                       a GPU image, which also runs on a CPU (large)
#   docker build -t cdclean --build-arg TORCH_INDEX=ADDRESS .       torch and torchvision of another kind
#   docker build -t cdclean --build-arg EXTRAS=s3,ray .             storage and engines beside those of this machine
#   docker run --rm --gpus all -v "$PWD:/data" --user "$(id -u):$(id -g)" cdclean scan dataset --model resnet50.pt
#
# ADDRESS is a package index of PyTorch's own, as its installation page prints after --index-url: the one that ends in
# "cpu" gives a small image without CUDA, the others are for other CUDA versions. torch and torchvision hold compiled
# code that must come from one build, so both are taken from there, in the versions of requirements.lock.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=""
ARG EXTRAS="s3"
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/cdclean
ENV PATH="/opt/cdclean/bin:$PATH"
WORKDIR /src

# The layers that change least, and weigh most, come first: a changed source file rebuilds only the last one.
# The cache of pip is a mount: no layer holds it.
COPY requirements.lock ./
RUN --mount=type=cache,target=/var/cache/pip \
    if [ -n "$TORCH_INDEX" ]; then \
      pip install --no-deps --index-url "$TORCH_INDEX" --constraint requirements.lock torch torchvision; \
    fi
COPY pyproject.toml ./
RUN --mount=type=cache,target=/var/cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && pip install --constraint requirements.lock --requirement requirements.txt
COPY LICENSE README.md ./
COPY cdclean cdclean
RUN --mount=type=cache,target=/var/cache/pip \
    pip install --constraint requirements.lock ".[$EXTRAS]" && cdclean --version

# The slim image has no compiler, and none is needed: every dependency comes as a wheel.
FROM python:${PYTHON}-slim
COPY --from=build /opt/cdclean /opt/cdclean
ENV PATH="/opt/cdclean/bin:$PATH"
RUN useradd --create-home --uid 1000 cdclean && install --directory --owner=cdclean /data
USER 1000
WORKDIR /data
ENTRYPOINT ["cdclean"]
CMD ["--help"]
