#!/usr/bin/env bash
# What only a GPU can tell, in parts for eight minutes or so (runs: ten), each of which starts from a bare machine:
#   tools/gpu_check.sh kernels [OUT]    # tests against float64 on the GPU, times beside the plain and the compiled forms
#   tools/gpu_check.sh runs [OUT]       # real runs side by side: every ZeRO stage, precisions, gradient cache, compile,
#                                       # kill and resume, fusion, fine-tuning, evaluation; ends with a table of them
#   tools/gpu_check.sh speed [OUT]      # steps of ViT-B/32, ViT-B/16 and RN50 beside open_clip's, alone on the machine
#   tools/gpu_check.sh sanitize [OUT]   # the kernels under compute-sanitizer, if it works here
# Tables on the screen, logs in OUT (default: runs/gpu_check), eight files at most. Every part needs the checkout, nvcc,
# g++, torch, pybind11 and setuptools; all but speed pytest and hypothesis, kernels matplotlib and tqdm besides;
# runs and speed what pyproject.toml lists (of which a CUDA image of torch lacks about 30 MB: deepspeed, open_clip,
# webdataset, jsonargparse, pydantic and faiss-cpu with what they need). The exit status is that of the worst step.
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:?kernels, runs, speed or sanitize}
out=${2:-runs/gpu_check}
mkdir -p "$out"
out=$(realpath "$out")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
gpu_tests=(python3 -m pytest -q -p no:cacheprovider -n 4 tests/pairwise/test_cuda_kernels_emulated.py)
status=0

build() {
  echo "== build"
  MODSTRUCT_CUDA=1 timeout 200 python3 setup.py -q build_ext --inplace >"$out/build.log" 2>&1 || { cat "$out/build.log"; exit 1; }
  python3 -c "
import torch
from modstruct.pairwise.operators import load_extension
print(torch.cuda.get_device_name(), 'torch', torch.__version__, load_extension().features())"
}

kernels() {
  echo "== tests on the GPU"
  # Where they fail the kernels are not timed.
  timeout 150 "${gpu_tests[@]}" -k gpu >"$out/tests.log" 2>&1 || { tail -60 "$out/tests.log"; exit 1; }
  tail -3 "$out/tests.log"
  echo "== times"
  timeout 240 python3 tools/benchmarks/pairwise.py --device cuda --rounds 5 --out "$out" >"$out/pairwise.log" 2>&1 || status=1
  cat "$out/pairwise.log"
  echo "== share of a step"
  for precision in tf32 bf16; do
    timeout 60 python3 tools/benchmarks/loss_share.py --device cuda --precision $precision --tower_batch 256 || status=1
  done
}

# begin NAME COMMAND…: the command in the background, with --output; its end is noted. One that hangs shows where.
begin() {
  local name=$1
  shift
  (
    begun=$SECONDS
    PYTHONFAULTHANDLER=1 timeout -s ABRT -k 5 "$limit" "$@" --output "$work/$name" >"$work/$name.log" 2>&1 && code=0 || code=$?
    echo "$name: exit $code after $((SECONDS - begun)) s" >>"$work/ends"
  ) &
}

collect() {
  sort "$work/ends"
  for log in "$work"/*.log; do echo "=== $log"; without_bars "$log"; done >"$out/runs.log"
}

without_bars() { tr '\r' '\n' <"$1" | grep -Ev '(step|batch|images)/s|[0-9?]s/(step|batch)|^ *(.\[A)?$' || true; }

runs() {
  export OMP_NUM_THREADS=1
  limit=120
  trap 'collect; rm -rf "$work"' EXIT
  trap 'exit 1' TERM
  local train=(python3 launch_scripts/pretrain.py)
  local tiny=(--train.steps 30 --evaluation.every_steps 0 --checkpoints.every_steps 10 --checkpoints.keep_last 9 --logging.every_steps 10)
  local bf16=("${tiny[@]}" --train.precision bf16)
  echo "== a step waits for nothing; what towers compute in; batches arrive; views"
  timeout 90 python3 -m pytest -q -p no:cacheprovider tests/models/test_host_waits.py tests/models/test_build.py \
    tests/training/test_step.py tests/data/transforms/test_device_views.py -k gpu \
    >"$out/models.log" 2>&1 || { status=1; tail -40 "$out/models.log"; }
  tail -1 "$out/models.log"
  echo "== runs"
  # The first draws the scenes and trains the tokenizer, for which the others wait.
  begin first_line deepspeed launch_scripts/pretrain.py --ds_config ds_configs/zero2.json
  sleep 3
  begin zero2 "${train[@]}" "${bf16[@]}"
  begin zero3 "${train[@]}" "${bf16[@]}" --ds_config ds_configs/zero3.json
  begin fp16 "${train[@]}" "${tiny[@]}" --train.precision fp16
  begin cache "${train[@]}" "${bf16[@]}" --train.micro_batch 32
  begin fusion "${train[@]}" "${bf16[@]}" --recipe albef_scenes --fusion.queue_after 10
  begin killed "${train[@]}" "${bf16[@]}"
  until ls -d "$work"/killed/checkpoints/*10 || grep -q killed "$work/ends"; do sleep 0.1; done >/dev/null 2>&1
  pkill -9 -f "output $work/killed" || true
  wait
  for stage in zero0 zero1 zero2_offload zero3_offload; do
    begin "$stage" "${train[@]}" "${bf16[@]}" --ds_config "ds_configs/$stage.json"
  done
  begin twice "${train[@]}" "${bf16[@]}"
  begin fp32 "${train[@]}" "${tiny[@]}"
  begin cache3 "${train[@]}" "${bf16[@]}" --train.micro_batch 32 --ds_config ds_configs/zero3.json
  begin recomputed "${train[@]}" "${bf16[@]}" --train.activation_checkpointing true
  limit=150 begin compiled "${train[@]}" "${bf16[@]}" --train.compile true
  begin mixed "${train[@]}" "${tiny[@]}" --train.precision bf16_mixed
  begin tf32 "${train[@]}" "${tiny[@]}" --train.tf32 true
  begin ema "${train[@]}" "${bf16[@]}" --train.ema_decay 0.9
  begin siglip "${train[@]}" "${bf16[@]}" --method siglip
  begin killed "${train[@]}" "${bf16[@]}" --resume latest
  limit=150 begin vqa python3 launch_scripts/finetune.py --recipe vqa --init "$work/fusion" --train.steps 20 --train.precision bf16
  wait
  [ "$(grep -cv 'exit 0' "$work/ends")" = 1 ] || status=1 # the one that was killed
  python3 - "$work" <<'END' || status=1
import sys
from pathlib import Path

from modstruct.checkpoints import step_folder

sys.path.insert(0, "tests/distributed")
from small_runs import distance

work, moved = Path(sys.argv[1]), []
same = ["twice", "killed", "ema"]
near = "zero0 zero1 zero3 zero2_offload zero3_offload cache cache3 recomputed compiled mixed tf32 fp32 fp16".split()
for name in same + near:
    missing = [run for run in ("zero2", name) if not step_folder(work / run, 30).exists()]
    if missing:
        print(f"{name:14} no checkpoint of step 30 in {', '.join(missing)}")
        continue
    far = distance(work / "zero2", work / name)
    print(f"{name:14} weights {far:.1e} from zero2's after 30 steps, relative")
    moved += [name] * (name in same and far > 0)
sys.exit(f"not bit for bit as zero2: {', '.join(moved)}" if moved else 0)
END
  without_bars "$work/first_line.log" | tail -30
  echo "== evaluation"
  timeout 170 python3 launch_scripts/evaluate.py full --checkpoint "$work/first_line" --out "$work/full" >"$work/full.log" 2>&1 ||
    { status=1; tail -5 "$work/full.log"; }
}

speed() {
  local clip=(python3 tools/benchmarks/step.py --recipe clip_rn50_cc3m --method clip)
  for words in \
    "--model.name ViT-B-32 --train.global_batch 1024 --profile" \
    "--model.name ViT-B-16 --train.global_batch 512" \
    "--model.name RN50 --train.global_batch 512" \
    "--model.name ViT-B-32 --train.global_batch 1024 --train.precision bf16_mixed --without_plain" \
    "--model.name ViT-B-32 --train.global_batch 1024 --train.compile true --eager_plain" \
    "--model.name ViT-B-32 --train.global_batch 1024 --method all --without_plain" \
    "--model.name ViT-B-32 --train.global_batch 4096 --train.micro_batch 512 --without_plain" \
    "--model.name ViT-B-32 --train.global_batch 1024 --ds_config ds_configs/zero0.json"; do
    echo "== step.py $words"
    # shellcheck disable=SC2086
    timeout 120 "${clip[@]}" $words 2>"$work/error" | cut -c1-170 | tee -a "$out/speed.log" || { status=1; tail -15 "$work/error"; }
  done
  local run=(--recipe clip_rn50_cc3m --method clip --model.name ViT-B-32 --train.epochs null --data.workers $(($(nproc --all) - 1)))
  for on in loader device; do
    echo "== a real run, photographs of 500 x 375, views.on $on"
    timeout 90 python3 tools/benchmarks/loader.py --photographs --rounds 0 --train_steps 40 --train_batch 1024 \
      "${run[@]}" --views.on $on 2>"$work/error" | tail -6 | tee -a "$out/speed.log" || { status=1; tail -15 "$work/error"; }
  done
}

sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; exit 1; }
  for tool in memcheck racecheck; do
    echo "== compute-sanitizer $tool"
    # Sizes that fill no tile: where an access out of bounds, or a missing barrier, would show.
    # Without torch's cache of memory, in which an access beyond one array falls into another unseen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --tool $tool --error-exitcode 9 \
      --target-processes application-only "${gpu_tests[@]}" -n 0 -k "gpu and 129-300" >"$out/$tool.log" 2>&1 ||
      { status=9; echo "$tool: failed or ran out of time, see $out/$tool.log"; }
    tail -3 "$out/$tool.log"
  done
}

build
"$part"
exit $status
