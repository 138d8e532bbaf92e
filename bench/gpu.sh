#!/bin/sh
# All that wants a GPU, in under ten minutes, on a machine with torch, triton, numpy, jaxtyping, scipy, hypothesis and
# pytest, and no network:
# the kernels' tests, then the layer against its peers. Run it anywhere; results go to bench/results/moe_gpu.md.
#
#     sh bench/gpu.sh [arguments of bench/moe_gpu.py]
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
PYTHONPATH=$PWD/src
export PYTHONPATH
if ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "gpu.sh: no CUDA device here, so there is nothing to test or measure" >&2
    exit 1
fi
failed=0
timeout 270 "$PYTHON" -P -m pytest -q -x -p no:cacheprovider -m gpu tests || failed=1
timeout 90 "$PYTHON" -P -m pytest -q -p no:cacheprovider -m "not gpu and not slow and not multigpu" tests/test_kernels_*.py || failed=1
timeout 240 "$PYTHON" bench/moe_gpu.py "$@" || failed=1
exit $failed
