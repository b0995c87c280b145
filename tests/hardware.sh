#!/usr/bin/env bash
# All that only an NVIDIA GPU can show of this tree: `tests/hardware.sh [LOGS]`, some four minutes on an H200.
# The tests marked gpu, in four processes; memcheck and racecheck of the CUDA toolkit over the demo; 10,000 generations
# in a row. racecheck reports the pairs that docs/performance.md explains, and follows no barrier of ours: read its logs.
set -euo pipefail
cd "$(dirname "$0")/.."
logs=${1:-build/hardware}
python=${PYTHON:-python3}
mkdir -p "$logs"
export NV_COMPUTE_SANITIZER_MAX_RACECHECK_HAZARDS=2000000000 # it stops silently at ten million

# check NAME "TOOL OPTIONS" CACHE OPTIONS...: a run of the demo under a sanitizer, and the last line of its report.
check() {
  local log=$logs/$1.log tool=$2 artifact=$logs/demo-$3 sampling="--top-k 40 --temperature 0.8" failed=0
  # shellcheck disable=SC2086 # words
  compute-sanitizer --tool $tool --log-file "$log" \
    "$python" -m kogc run "$artifact" -t 5,17,40,8,99,3 $sampling "${@:4}" >"$log.out" 2>&1 || failed=$?
  echo "$1: $(tail -1 "$log")"
  [ $failed = 0 ] || { cat "$log.out"; exit 1; }
}

"$python" -m pytest -q -n 4 -m gpu tests/test_gpu.py | tee "$logs/tests.log"
for cache in bf16 fp8; do
  "$python" -m kogc build examples/demo/checkpoint --gpu auto --kv-dtype $cache -o "$logs/demo-$cache"
done
check memcheck "memcheck --error-exitcode 1" bf16 -n 8
check memcheck-fp8 "memcheck --error-exitcode 1" fp8 -n 8
check memcheck-samples "memcheck --error-exitcode 1" bf16 -n 6 --samples 3
check racecheck "racecheck --racecheck-report analysis" bf16 -n 2
check racecheck-samples "racecheck --racecheck-report analysis" bf16 -n 2 --samples 2
"$python" tests/soak.py "$logs/demo-bf16"
