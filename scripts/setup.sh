#!/bin/sh
# Makes .venv with everything at the versions of constraints.txt. Usage: setup.sh PYTHON
set -eu
python=${1:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed; $python is $("$python" --version). Try: make setup PYTHON=python3.12" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
.venv/bin/uv pip install --quiet --python .venv/bin/python --constraints constraints.txt --group dev -e '.[all]'
