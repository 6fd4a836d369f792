# prepare run|test: the environment .venv, made or completed by setup.py where it is not what the clone asks for now.

prepare() {
    # An environment has its own path in it: that of a clone that was moved or copied is another's.
    stamp="$1 $(cat "$root/pyproject.toml" "$root/scripts/setup.py" | cksum) $root"
    # What the tests need is more than running needs.
    for made in "$stamp" "test ${stamp#* }"; do
        if grep -qxF "$made" "$root/.venv/grok-local.stamp" 2>/dev/null && works; then
            return 0
        fi
    done
    python=$(find_python) || {
        echo "error: no Python 3.10 or newer: $(advice python3)" >&2
        exit 1
    }
    "$python" "$root/scripts/setup.py" "$1" "$stamp"
}

# Whether the environment's Python is there, and of the version that its packages were installed for.
works() {
    version=$("$root/.venv/bin/python" -ISc 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) &&
        [ -d "$root/.venv/lib/python$version/site-packages" ]
}

find_python() {
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

# advice DEBIAN-PACKAGE: the command that installs it here.
advice() {
    if [ "$(uname)" = Darwin ]; then
        echo "brew install ${1%3}"
    elif command -v dnf >/dev/null; then
        echo "sudo dnf install $1"
    elif command -v pacman >/dev/null; then
        echo "sudo pacman -S ${1%3}"
    else
        echo "sudo apt install $1"
    fi
}
