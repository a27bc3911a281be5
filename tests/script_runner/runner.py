"""Runs scripts in fresh forks of one process that has imported torch: plain, as Python does, or under ``duoka run``.

It reads one line of JSON per pair of jobs from standard input, runs both at once, and writes their exit statuses.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback

import sklearn.datasets  # noqa: F401 - scripts use it, and it takes a second to import

import duoka.cli.main
import duoka.cli.run
import duoka.script_runner


def run_plain(words: list[str]) -> int:
    is_module = words[0] == "-m"
    sys.argv = words[1:] if is_module else words
    sys.path[0] = os.getcwd() if is_module else os.path.dirname(os.path.abspath(words[0]))
    try:
        if is_module:
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_job(job: dict) -> int:
    os.chdir(job["cwd"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        target = os.open(os.path.join(job["cwd"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, number)
        os.close(target)
    if job["device"]:
        return duoka.cli.main.main(["run", "--device", job["device"], *job["words"]])
    return run_plain(job["words"])


def main() -> int:
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            child = os.fork()
            if child == 0:
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                return run_job(job)
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        os.write(1, f"{json.dumps(statuses)}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
