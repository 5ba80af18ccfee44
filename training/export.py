"""The former name of `python -m interop.export`, which this runs."""

import runpy

if __name__ == "__main__":
    runpy.run_module("interop.export", run_name="__main__", alter_sys=True)
