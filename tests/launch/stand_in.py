"""Stands in for gcloud, kubectl, xpk and cocoa on PATH: writes down how it was called and answers as it was told.

CALLS names a file that gets one JSON list a call. ANSWERS names a file {pattern: [[status, text], ...]}: the first
pattern found in the command line gives its answers in turn, the last of them for ever; without one it answers nothing
and succeeds.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    calls = Path(os.environ["CALLS"])
    with calls.open("a") as file:
        file.write(json.dumps(words) + "\n")
    before = [" ".join(json.loads(line)) for line in calls.read_text().splitlines()[:-1]]
    for pattern, answers in json.loads(Path(os.environ["ANSWERS"]).read_text()).items():
        if re.search(pattern, " ".join(words)):
            asked = sum(1 for line in before if re.search(pattern, line))
            status, text = answers[min(asked, len(answers) - 1)]
            if text == "stop the caller":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.kill(os.getppid(), signal.SIGTERM)
            elif text.startswith("sleep"):
                time.sleep(float(text.split()[1]))
            elif text:
                sys.stdout.write(text + "\n")
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
