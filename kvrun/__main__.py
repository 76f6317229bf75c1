"""Entry of the command, also as python -m kvrun."""

import gc
import signal
import sys


def main() -> int:
    """Runs the command. Until kvrun.cli.main is loaded and in charge, Ctrl-C ends the process without a trace."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(100_000)  # modules and vocabularies are no garbage: looking for some while they load costs 35 ms
    from kvrun.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
