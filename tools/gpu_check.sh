#!/usr/bin/env bash
# Everything about the pairwise kernels that only a GPU can tell, in one call of less than ten minutes: build, tests
# against float64, compute-sanitizer, times beside the plain forms, and the share of a step that the losses take.
#   tools/gpu_check.sh [OUT]         # tables on the screen, logs and plots in OUT (default: runs/gpu_check)
# Needs nvcc, torch, pybind11, pytest, hypothesis, matplotlib and tqdm; no DeepSpeed. Stops where the tests fail, so
# that wrong kernels are not timed; what the sanitizers find is reported at the end, by the exit status too.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-runs/gpu_check}
mkdir -p "$out"
out=$(realpath "$out")
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
gpu_tests=(python3 -m pytest -q -p no:cacheprovider tests/pairwise/test_cuda_kernels_emulated.py)

echo "== build"
MODSTRUCT_CUDA=1 timeout 100 python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
python3 -c "
import torch
from modstruct.pairwise.operators import load_extension
print(torch.cuda.get_device_name(), 'torch', torch.__version__, load_extension().features())"

echo "== tests on the GPU"
timeout 120 "${gpu_tests[@]}" -k gpu 2>&1 | tee "$out/tests.log" | tail -5

status=0
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    # Sizes that fill no tile: where an access out of bounds, or a missing barrier, would show.
    # Without torch's cache of memory, in which an access beyond one array falls into another unseen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 80 compute-sanitizer --tool $tool --error-exitcode 9 \
      --target-processes application-only "${gpu_tests[@]}" -k "gpu and 129-300" >"$out/$tool.log" 2>&1 ||
      { status=9; echo "$tool: failed or ran out of time, see $out/$tool.log"; }
    tail -3 "$out/$tool.log"
  done
else
  echo "== no compute-sanitizer here"
fi

echo "== times"
timeout 160 python3 tools/benchmarks/pairwise.py --device cuda --rounds 5 --out "$out" 2>&1 | tee "$out/bench.log"

echo "== share of a step"
for precision in tf32 bf16; do
  timeout 35 python3 tools/benchmarks/loss_share.py --device cuda --precision $precision --tower_batch 256 |
    tee -a "$out/loss_share.log"
done
exit $status
