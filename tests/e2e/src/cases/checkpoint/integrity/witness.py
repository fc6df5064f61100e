"""A container's first process: keeps one state in memory and on the disk of its root file system, changes both step by
step, compares them all the time, and tells when it is asked. What follows this text is the load of one case: a class Load
with begin(), step(count), check(crash) and facts().

Asked by a file that holds a word, it checks everything, tells what it has (memory and disk apart, with the word that it
was asked before this one), and keeps the word in memory and on disk. What was wrong once stays told.
"""

import hashlib
import json
import mmap
import os
import random
import time
import traceback

HOME = "/var/lib/postgresql/witness"
ASK = HOME + "/ask"
BLOCK = 4096
BLOCKS = 64
# How much there is; a bounded number of turns is to be quick on an emulated machine.
SCALE = int(os.environ["SCALE"])
# So many times as long as a step took others may run.
REST = 2


class Wrong(Exception):
    pass


def same(what, found, expected):
    if found != expected:
        raise Wrong(f"{what}: found {found!r}, expected {expected!r}")


def forget(path):
    """Has the kernel read the file from the disk the next time."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def direct(path):
    """A file's content past the kernel's cache; its size is in whole blocks."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    size = os.fstat(file).st_size
    with mmap.mmap(-1, size) as content:
        same(f"bytes read of {path}", os.preadv(file, [content], 0), size)
        os.close(file)
        return bytes(content)


class Counter:
    """Numbers in memory and in blocks of a file that is read and written past the kernel's cache: a disk that is older or
    newer than the memory shows at the next step."""

    def __init__(self):
        flags = os.O_RDWR | os.O_CREAT | os.O_DIRECT
        self.file = os.open(HOME + "/counter", flags, 0o600)
        self.block = mmap.mmap(-1, BLOCK)
        self.count = 0
        self.word = ""
        self.blocks = [None] * BLOCKS
        for at in range(BLOCKS):
            self.write(at)
        os.fsync(self.file)

    def write(self, at):
        line = f"{at} {self.count} {self.word}"
        self.block[:] = line.encode().ljust(BLOCK, b".")
        same(f"bytes written of block {at}", os.pwritev(self.file, [self.block], at * BLOCK), BLOCK)
        self.blocks[at] = line

    def read(self, at):
        same(f"bytes read of block {at}", os.preadv(self.file, [self.block], at * BLOCK), BLOCK)
        return self.block[:].rstrip(b".").decode()

    def compare(self, at):
        same(f"block {at} on disk, after step {self.count} in memory", self.read(at), self.blocks[at])

    def step(self):
        self.compare(self.count % BLOCKS)
        self.compare(random.randrange(BLOCKS))
        self.count += 1
        self.write(self.count % BLOCKS)

    def latest(self):
        """Of all blocks on disk the one that was written last: its count and its word."""
        lines = [self.read(at) for at in range(BLOCKS)]
        at, count, word = max((line.split(" ") for line in lines), key=lambda parts: int(parts[1]))
        return [int(count), word]


def answer(counter, load, word, wrong):
    crash = word.endswith(".crash")
    told = {"wrong": wrong, "memory": [counter.count, counter.word], "disk": None, "facts": {}}
    if wrong is None:
        try:
            told["disk"] = counter.latest()
            for at in range(BLOCKS):
                counter.compare(at)
            load.check(counter.count, crash)
            told["facts"] = load.facts()
            counter.word = word
            # The count as well, for one step has one word.
            counter.step()
            load.step(counter.count)
        except BaseException:
            told["wrong"] = traceback.format_exc()
    return told


def main():
    wrong = None
    try:
        os.makedirs(HOME, exist_ok=True)
        counter, load = Counter(), Load()
        load.begin()
    except BaseException:
        wrong = traceback.format_exc()
        counter = load = None
    while True:
        if wrong is None:
            try:
                begin = time.monotonic()
                counter.step()
                load.step(counter.count)
                time.sleep(min(REST * (time.monotonic() - begin), 0.1))
            except BaseException:
                wrong = traceback.format_exc()
        else:
            time.sleep(0.01)
        if os.path.exists(ASK):
            with open(ASK) as ask:
                word = ask.read().strip()
            os.remove(ASK)
            if counter is None:
                told = {"wrong": wrong}
            else:
                told = answer(counter, load, word, wrong)
            wrong = told["wrong"]
            path = f"{HOME}/told-{word}"
            with open(path + ".new", "w") as file:
                json.dump(told, file)
            os.rename(path + ".new", path)
