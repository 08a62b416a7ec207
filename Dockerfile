# GPU image for H100 and A800 nodes, with everything a recipe uses. Two targets, for the driver a site has:
#   docker build --tag megatron-entropy .                             CUDA 13.0, driver 580 or newer
#   docker build --tag megatron-entropy:cuda12 --build-arg CUDA=12 .  CUDA 12.9, driver 525 or newer
#   docker build --build-arg APEX=1 ...                               with Apex too, which nothing here needs
# NVIDIA may move the tags of its images. What you have looked at stays what it is by its digest, which
# "docker buildx imagetools inspect nvcr.io/nvidia/cuda-dl-base:TAG" tells:
#   docker build --build-arg CUDA13_IMAGE=nvcr.io/nvidia/cuda-dl-base@sha256:... .
# The versions of training are pyproject.toml's; tests/test_dockerfile.py holds those named here against them.
ARG CUDA=13
ARG CUDA13_IMAGE=nvcr.io/nvidia/cuda-dl-base:25.10-cuda13.0-devel-ubuntu24.04
ARG CUDA12_IMAGE=nvcr.io/nvidia/cuda-dl-base:25.06-cuda12.9-devel-ubuntu24.04

# hadolint ignore=DL3006
FROM ${CUDA13_IMAGE} AS cuda13
ENV TORCH_INDEX=https://download.pytorch.org/whl/cu130 TE_CORE=core_cu13 VLLM=vllm==0.32.0

# hadolint ignore=DL3006
FROM ${CUDA12_IMAGE} AS cuda12
# vLLM's wheel on PyPI is the one for CUDA 13.
ARG VLLM_RELEASE=https://github.com/vllm-project/vllm/releases/download/v0.32.0
ENV TORCH_INDEX=https://download.pytorch.org/whl/cu129 TE_CORE=core_cu12 \
    VLLM=${VLLM_RELEASE}/vllm-0.32.0+cu129-cp38-abi3-manylinux_2_28_x86_64.whl

# One of the two stages above, whose images are tagged.
# hadolint ignore=DL3006
FROM cuda${CUDA} AS image
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu's archive keeps only its newest builds: a pinned one would soon be gone.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:${PATH} VIRTUAL_ENV=/opt/venv PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# What is compiled against torch comes first: it changes rarely and takes long. sm_80 is A800, sm_90 H100 and H800.
ENV TORCH_CUDA_ARCH_LIST="8.0;9.0" NVTE_CUDA_ARCHS="80;90"
ARG TORCH=2.13.0
RUN pip install "setuptools>=78.1.1,<81" "wheel>=0.45" "packaging>=25" "cmake>=3.31,<5" "ninja>=1.13" "pybind11>=3.0" \
    && pip install "torch==${TORCH}" --extra-index-url "${TORCH_INDEX}"
ARG TRANSFORMER_ENGINE=2.11.0
RUN pip install --no-build-isolation "transformer-engine[${TE_CORE},pytorch]==${TRANSFORMER_ENGINE}"
# Packed sequences on sm_80: Transformer Engine's cuDNN path for them starts at sm_90, and without flash-attn attention
# takes O(S^2) memory. Transformer Engine 2.11 takes 2.1.1 to 2.8.3 and refuses 2.8.3.post1 and later. There is no wheel
# for this torch: 72 sources are compiled, by flash-attn's README in 3 to 5 minutes on 64 cores, in 2 hours on one.
ARG FLASH_ATTN=2.8.3
RUN pip install "psutil>=7" "einops>=0.8" \
    && FLASH_ATTN_CUDA_ARCHS="80;90" FLASH_ATTENTION_FORCE_BUILD=TRUE \
        pip install --no-build-isolation --no-binary flash-attn "flash-attn==${FLASH_ATTN}"
# Not used: the optimizer, the norms and the fused gradient accumulation are Transformer Engine's. For comparisons. Half
# an hour to build; PyPI's "apex" is another project.
ARG APEX=0
ARG APEX_REVISION=26.09
RUN if [ "${APEX}" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=8 pip install --no-build-isolation \
            "apex @ git+https://github.com/NVIDIA/apex@${APEX_REVISION}"; \
    fi

# The packages of training and vLLM, resolved together, pinned by pyproject.toml; the code follows in a layer of its own.
WORKDIR /workspace/megatron-entropy
COPY pyproject.toml README.md LICENSE ./
# hadolint ignore=DL3013
RUN pip install ".[train]" "${VLLM}" --extra-index-url "${TORCH_INDEX}" && pip check

# tools/launch.py has an environment of its own: NeMo-Run wants an older antlr4 than math-verify is tested with.
COPY requirements/launch.txt requirements/
RUN python3.12 -m venv /opt/launch \
    && /opt/launch/bin/pip install --only-binary :all: --require-hashes --no-deps --requirement requirements/launch.txt

COPY setup.py ./
COPY megatron_ext megatron_ext
COPY tools tools
COPY recipes recipes
COPY slurm slurm
RUN pip install --no-deps --editable .
CMD ["megatron-entropy", "--help"]
