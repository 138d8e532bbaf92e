#!/bin/sh
# All that wants a GPU, in under ten minutes and without a network, on a machine with torch, triton, numpy, jaxtyping, scipy,
# hypothesis and pytest: the kernels' tests, a short training run where the packages for one are there, and the layer
# against its peers, whose table comes last and goes to bench/results/moe_gpu.md. Run it from anywhere.
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
TEST="$PYTHON -P -m pytest -q -p no:cacheprovider"
"$PYTHON" -c "import xdist" 2>/dev/null && TEST="$TEST -n 8 --dist worksteal" # most of the time goes into compiling
timeout 240 $TEST -m gpu tests/test_kernels_*.py tests/test_parallel_experts.py || failed=1
timeout 80 $TEST -m "not gpu and not slow and not multigpu" tests/test_kernels_*.py || failed=1
if missing=$("$PYTHON" -P -c "import moesaic.launch.cli" 2>&1); then
    run=$(mktemp -d)
    config=$PWD/configs/quickstart.yaml
    (cd "$run" && timeout 90 "$PYTHON" -P -m moesaic train "$config" train.steps=100 kernels=triton) || failed=1
    rm -rf "$run"
else
    echo "gpu.sh: no training run: $(echo "$missing" | tail -n 1)" >&2
fi
timeout 180 "$PYTHON" bench/moe_gpu.py "$@" || failed=1
exit $failed
