# Sourced by the other scripts: a virtual environment in .venv with the given requirements, made once.
# PYTHON chooses the interpreter, VENV another place. With RANKS unset a machine's accelerators are all used. A script may
# name a function in `step` that runs what takes long.

requirements=${requirements:-requirements.txt} # a script that needs more sets it
venv=$(realpath -m "${VENV:-.venv}")
stamp=$venv/$requirements.installed

if ! { cat requirements*.txt | cmp -s - "$stamp"; }; then
    echo "setting up $venv from $requirements (once; a few minutes)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' ||
        { echo "error: Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11" >&2; exit 2; }
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    ${step:-} "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
    cat requirements*.txt >"$stamp"
fi
export PATH=$venv/bin:$PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
