"""Runs one compiler command and keeps what ptxas says of registers and spills beside the object file, OBJECT.registers, out of the
build's output. The build calls it for every source of the CUDA half; tests read what it keeps."""

import subprocess
import sys


def main(command: list[str]) -> int:
    """The compiler's exit status."""
    done = subprocess.run(command, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines(keepends=True)
    # The line with the spills names no kernel and follows the one that does.
    report = [line for line in said if line.startswith("ptxas info") or "bytes stack frame" in line]
    sys.stderr.writelines(line for line in said if line not in report)
    if report and "-o" in command:
        with open(command[command.index("-o") + 1] + ".registers", "w", encoding="utf-8") as file:
            file.writelines(report)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
