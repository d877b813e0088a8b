#!/bin/sh
# Runs the core's tests in a fresh environment without the service: torch, torchvision, timm, numpy, safetensors,
# and what the tests themselves need. Of the project only cim_core, its tests and the bundled tiles are copied there.
# Usage: core_alone.sh [arguments of pytest]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
uv="$root/.venv/bin/uv"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$uv" venv --quiet --python "$root/.venv/bin/python" "$folder/.venv"
"$uv" pip install --quiet --python "$folder/.venv/bin/python" --constraints "$root/constraints.txt" \
    numpy pillow safetensors timm torch torchvision \
    hypothesis pytest pytest-randomly pytest-timeout pytest-xdist scikit-image scikit-learn
mkdir -p "$folder/tests/unit" "$folder/examples"
cp -R "$root/cim_core" "$folder/cim_core"
cp -R "$root/examples/photos" "$folder/examples/photos"
cp "$root/tests/__init__.py" "$folder/tests/__init__.py"
cp -R "$root/tests/unit/__init__.py" "$root/tests/unit/cim_core" "$folder/tests/unit/"
cat >"$folder/pytest.ini" <<INI
[pytest]
addopts = --strict-markers -ra
timeout = 300
markers =
    slow: takes more than a few seconds on two cores
    gpu: needs an NVIDIA GPU
INI
cd "$folder"
.venv/bin/python - <<'CHECK'
import importlib.util
import sys

absent = ("ray", "mlflow", "fastapi", "sqlalchemy", "pydantic", "httpx", "boto3", "service", "workers")
found = [name for name in absent if importlib.util.find_spec(name)]
sys.exit(f"not alone: {', '.join(found)}" if found else 0)
CHECK
OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/unit/cim_core -m "not gpu" "$@"
