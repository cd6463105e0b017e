# Sourced by the scripts beside it. Leaves the shell in the repository's root with its virtual environment active.
#
# use_venv EXTRA: make .venv if it is missing, install reft-edge[EXTRA] from this repository into it unless that was done
# already for the present pyproject.toml and constraints.txt, and activate it. Versions come from constraints.txt.
# REFT_EDGE_VENV names another environment's folder; PYTHON another interpreter.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1

use_venv() {
  local extra=$1 folder=${REFT_EDGE_VENV:-.venv} python=${PYTHON:-python3} stamp wanted
  if [[ ! -x $folder/bin/python ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "reft-edge needs Python 3.11 or later; $python is $("$python" --version 2>&1). Set PYTHON to a newer one." >&2
      exit 2
    }
    echo "Making the virtual environment $folder ..." >&2
    "$python" -m venv "$folder" || exit 2
  fi
  stamp=$folder/.installed-$extra
  wanted=$(cat pyproject.toml constraints.txt | sha256sum)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing reft-edge[$extra] into $folder (the first time takes a few minutes) ..." >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint constraints.txt --editable ".[$extra]" >&2 || exit 2
    echo "$wanted" >"$stamp"
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
}
