#!/usr/bin/env bash
# The benchmarks on a GPU machine: float32, TF32 and bf16, torch.compile, attention backends, model FLOP utilization.
#
#   OUT=out/gpu bash benchmarks/gpu.sh [more arguments of benchmarks.speed.run, such as --minutes 4]
#
# Wheels of what the machine lacks may lie in .whl/: diffusers, monai, nibabel, jsonargparse, importlib_metadata, importlib_resources and einops.
# Results lie in $OUT. bench.json is written after every measurement, so a run that is cut off keeps what it has, and
#   python -m benchmarks.speed.report $OUT/bench.json --output $OUT/performance.md
# makes the table of it later. Parts run in order of worth, within nine minutes: each has a share of the time, and what
# its share does not suffice for is recorded as cut. The same command again measures what is missing, failed or cut.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTORCH_NVML_BASED_CUDA_CHECK=1

if compgen -G ".whl/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
"$python" -m benchmarks.speed.run --device "${DEVICE:-cuda}" --output "$out" --resume --minutes 9 \
    --parts large_decoding,training,peak,sampling,attention "$@"
