#!/usr/bin/env bash
# The CPU kernels' tests under the address and undefined-behaviour sanitizers, on a copy built for it.
#   tools/sanitize_kernels.sh        # in the project's environment, with its [test] extra; some minutes
# Leaks are not looked for: Python itself never returns all of its memory.
set -euo pipefail
cd "$(dirname "$0")/.."

copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$copy"
cd "$copy"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
MODSTRUCT_CUDA=0 CFLAGS="$flags" LDFLAGS="$flags" python setup.py -q build_ext --inplace

libraries=$(for name in libasan libubsan libstdc++; do gcc -print-file-name=$name.so; done | paste -sd ' ')
LD_PRELOAD=$libraries ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$copy \
  python -m pytest -p no:cacheprovider tests/pairwise/test_cpu_kernels.py "$@"
