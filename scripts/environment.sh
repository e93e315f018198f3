# Sourced by the scripts beside it: makes .venv once, and again when pyproject.toml has changed.
# Needs nothing but Python 3.11+; uses uv where it is there. $1: the extra to install ("" or "dev").

find_python() {
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "tokenworks needs Python 3.11 or newer, and found none: install it first." >&2
    exit 1
}

make_environment() {
    extra=${1:+[$1]}
    stamp=.venv/.installed${1:+-$1}
    if [ -f "$stamp" ] && cmp -s pyproject.toml "$stamp"; then
        return
    fi
    python=$(find_python) || exit 1
    echo "Installing tokenworks$extra into .venv …" >&2
    if command -v uv >/dev/null 2>&1; then
        [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
        uv pip install --quiet --python .venv/bin/python -e ".$extra"
    else
        if ! [ -x .venv/bin/python ] && ! "$python" -m venv .venv; then
            echo "Python's venv module does not work here (on Debian: apt install python3-venv)." >&2
            exit 1
        fi
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$extra"
    fi
    cp pyproject.toml "$stamp"
}
