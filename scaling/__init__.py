"""The lab: `python -m scaling` lists its commands."""

import signal
import sys

if sys.argv[0] == "-m":  # a command starts; Ctrl-C while torch is imported ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
