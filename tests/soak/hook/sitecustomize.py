"""Python runs this at the start of every process of the tiny run: a rank then writes its stack when it is asked to.

faulthandler's handler is C: it answers at once, whatever the rank is doing, and changes nothing.
"""

import faulthandler
import os
import signal

if "RANK" in os.environ and "SOAK_STACKS" in os.environ:
    _stacks = open(f"{os.environ['SOAK_STACKS']}/{os.getpid()}", "w")  # noqa: SIM115
    faulthandler.register(signal.SIGRTMIN + 5, file=_stacks, all_threads=False)
