"""Stands in for gcloud, kubectl, xpk and cocoa on PATH: writes down how it was called and answers as it was told.

CALLS names a file that gets one JSON list a call. ANSWERS names a file {pattern: [[status, text], ...]}: the first
pattern found in the command line gives its answers in turn, the last of them for ever; without one it answers nothing
and succeeds. Text goes to stderr where the status is not 0. The pattern "taken" stands for a `describe` of a queued
resource that no call has created, or that one has deleted since; calls that fail do neither. A state of one that was
created gets the label of that call, unless it has a tab. Where hosts are asked how many they are, each line of text is
one host, and an empty text none.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path


def say(words: list[str], text: str, status: int = 0) -> int:
    lines = text.splitlines()
    if "cocoa:done" in words[-1] and not status and "cocoa:done" not in text:
        lines += [f"cocoa:done {len(lines)}" for _ in lines]
    for line in lines:
        print(line, file=sys.stderr if status else sys.stdout)
    return status


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as gcloud hears Ctrl-C even where it is to be ignored
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    calls = Path(os.environ["CALLS"])
    with calls.open("a") as file:
        file.write(json.dumps(words) + "\n")
    told = json.loads(Path(os.environ["ANSWERS"]).read_text())
    there, seen = calls.with_name("there"), calls.with_name("seen")
    now, verb = " ".join(words), words[4] if "queued-resources" in words else ""
    if verb == "describe" and "taken" in told and not there.exists():
        now = "taken"
    before = seen.read_text().splitlines()
    with seen.open("a") as file:
        file.write(now.replace("\n", " ") + "\n")
    label = there.read_text() if verb == "describe" and there.exists() else ""
    status = answer(words, now, before, told, label)
    if verb == "create" and not status:
        there.write_text("".join(word.partition("--labels=cocoa-owner=")[2] for word in words))
    if verb == "delete" and not status:
        there.unlink(missing_ok=True)
    return status


def answer(words: list[str], now: str, before: list[str], told: dict[str, list], label: str) -> int:
    for pattern, answers in told.items():
        if re.search(pattern, now):
            asked = sum(1 for line in before if re.search(pattern, line))
            status, text = answers[min(asked, len(answers) - 1)]
            if text == "stop the caller":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(0.5)  # bash loses the status of what ends at the very moment
            elif text.startswith("sleep"):
                time.sleep(float(text.split()[1]))
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # kubectl dies where nobody reads it
                print("[stand-in] done\n[stand-in] done", flush=True)
                print("[stand-in] done", file=sys.stderr)
            else:
                say(words, f"{text}\t{label}" if label and text.isupper() and "\t" not in text else text, status)
            return status
    return say(words, "one host") if " ssh " in now else 0


if __name__ == "__main__":
    sys.exit(main())
