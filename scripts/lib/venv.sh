# Sourced by the scripts beside it.
#
# use_venv EXTRA: make .venv in the repository if it is missing, install reft-edge[EXTRA] from the repository into it unless
# that was done already for the present pyproject.toml and constraints.txt, and activate it. The working directory stays.
# REFT_EDGE_VENV names another environment's folder; PYTHON another interpreter.

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

use_venv() {
  local extra=$1 folder=${REFT_EDGE_VENV:-$repository/.venv} python=${PYTHON:-python3} stamp wanted
  if [[ ! -x $folder/bin/python ]]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "reft-edge needs Python 3.11 or later; $python is $("$python" --version 2>&1). Set PYTHON to a newer one." >&2
      exit 2
    }
    echo "Making the virtual environment $folder ..." >&2
    "$python" -m venv "$folder" || exit 2
  fi
  stamp=$folder/.installed-$extra
  wanted=$(cd "$repository" && cat pyproject.toml constraints.txt | sha256sum)
  if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing reft-edge[$extra] into $folder (the first time takes a few minutes) ..." >&2
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
      --constraint "$repository/constraints.txt" --editable "$repository[$extra]" >&2 || exit 2
    echo "$wanted" >"$stamp"
  fi
  # shellcheck disable=SC1091
  source "$folder/bin/activate"
}
