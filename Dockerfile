# GPU image. Built for H100 and A800 nodes: the base brings CUDA 13, torch, Transformer Engine and NCCL.
#   docker build --tag megatron-entropy .
#   docker build --tag megatron-entropy --build-arg APEX=0 .      without Apex
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

# PyPI's "apex" is another project: NVIDIA's is built from source.
ARG APEX=1
ARG APEX_REVISION=25.09
RUN if [ "${APEX}" = 1 ]; then \
        pip install --no-cache-dir --no-build-isolation \
            --config-settings "--build-option=--cpp_ext" --config-settings "--build-option=--cuda_ext" \
            "git+https://github.com/NVIDIA/apex@${APEX_REVISION}"; \
    fi

WORKDIR /workspace/megatron-entropy
COPY pyproject.toml README.md LICENSE ./
COPY megatron_ext megatron_ext
COPY tools tools
COPY recipes recipes
COPY slurm slurm
# The base image's torch and Transformer Engine stay: only what is missing is added.
RUN pip install --no-cache-dir --no-deps --editable . \
    && pip install --no-cache-dir megatron-core==0.16.1 transformers==5.19.0 "tokenizers>=0.22,<0.24" \
        "safetensors>=0.8,<0.9" math-verify==0.9.0 latex2sympy2_extended==1.11.0 sympy==1.14.0 \
        "pydantic>=2.12,<3" "rich>=14,<16" "tensorboard>=2.20" "psutil>=7" "einops>=0.8" "jinja2>=3.1"
CMD ["python", "-m", "tools.train", "--help"]
