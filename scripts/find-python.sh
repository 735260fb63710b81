#!/bin/sh
# Prints the CPython that the project's environment is built on: $PYTHON when it is given, else the first on the PATH
# that is new enough. Exit status 1, with what to do on standard error, when there is none.

usable() {
    # A pyenv shim of a version that is not active is found on the PATH but does not run, so ask the interpreter itself.
    # A free-threaded build cannot load an abi3 module.
    "$1" -c '
import platform, sys, sysconfig, venv
sys.exit(not (sys.version_info >= (3, 11) and platform.python_implementation() == "CPython"
              and not sysconfig.get_config_var("Py_GIL_DISABLED")))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if usable "$PYTHON"; then
        "$PYTHON" -c 'import sys; print(sys.executable)'
        exit 0
    fi
    echo "error: PYTHON=$PYTHON is not a CPython 3.11 or newer with the venv module" >&2
    exit 1
fi

for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if usable "$candidate"; then
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done

echo "error: no CPython 3.11 or newer (with pip and venv) was found on the PATH" >&2
echo "  macOS: brew install python@3.13    Debian, Ubuntu: apt install python3 python3-venv" >&2
echo "  or name one: make PYTHON=/path/to/python3.12 ..." >&2
exit 1
