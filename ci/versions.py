"""Measures a store with many versions of one image; ci/versions starts this.

Each version is the one before with 1 % of the disk overwritten, in one piece at
a random place (a multiple of 4 KiB, as files lie). The store may grow by 1.3
times what `zstd -3` makes of the pieces; its index and everything else in it
counts. Then `images`, `promote`, `rollback` and `history` have half a second
each: the medians of several, with a record in the channel for every version."""

from __future__ import annotations

import argparse, os, random, statistics, subprocess, sys, tempfile, time
from pathlib import Path
from typing import NoReturn

GROWTH = 1.3
SECONDS = 0.5
TIMES = 5


def say(text: str) -> None:
    print(text, flush=True)


def give_up(text: str) -> NoReturn:
    print(f"versions: {text}", file=sys.stderr)
    sys.exit(2)


class Kiln:
    def __init__(self, program: str, home: Path) -> None:
        self.program, self.environment = program, {**os.environ, "KILN_HOME": str(home)}

    def __call__(self, *arguments: str) -> float:
        began = time.monotonic()
        done = subprocess.run([self.program, *arguments], env=self.environment, capture_output=True)
        seconds = time.monotonic() - began
        if done.returncode != 0:
            give_up(f"kiln {' '.join(arguments)}: {done.stderr.decode(errors='replace')[-2000:]}")
        return seconds


def size_of(folder: Path) -> int:
    """Bytes that the files below a folder take, allocated blocks counted."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def compressed(piece: bytes) -> int:
    return len(subprocess.run(["zstd", "-q", "-3", "-c"], input=piece, stdout=subprocess.PIPE, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="versions")
    parser.add_argument("--mib", type=int, default=512, help="size of the disk")
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless said")
    parser.add_argument("--kiln", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--maker", required=True, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    numbers = random.Random(arguments.seed)
    size = arguments.mib << 20
    length = size // 100 // 4096 * 4096
    with tempfile.TemporaryDirectory(prefix="kiln-versions-", dir=arguments.folder or "/var/tmp") as name:
        folder = Path(name)
        disk, other, home = folder / "disk.raw", folder / "other.raw", folder / "home"
        kiln = Kiln(arguments.kiln, home)
        # Two disks of the same kind: pieces of the second go over the first.
        subprocess.run([arguments.maker, "make", disk, str(arguments.mib)], check=True, stdout=subprocess.DEVNULL)
        subprocess.run([arguments.maker, "make", other, str(arguments.mib * 4)], check=True, stdout=subprocess.DEVNULL)
        kiln("import", str(disk), "web:0")
        kiln("promote", "web:0", "--to", "production")
        before = size_of(home / "store")
        changed = 0
        took: list[float] = []
        promoted: list[float] = []
        for version in range(1, arguments.count + 1):
            with open(other, "rb") as source:
                source.seek(numbers.randrange(size * 4 - length))
                piece = source.read(length)
            with open(disk, "r+b") as target:
                target.seek(numbers.randrange((size - length) // 4096) * 4096)
                target.write(piece)
            changed += compressed(piece)
            took.append(kiln("import", str(disk), f"web:{version}"))
            promoted.append(kiln("promote", f"web:{version}", "--to", "production"))
            if version % 100 == 0:
                grown = size_of(home / "store") - before
                say(f"{version} versions: grown by {grown >> 20} MiB, {grown / changed:.3f} of what changed; import {statistics.median(took[-100:]):.2f} s")
        good = (size_of(home / "store") - before) / changed
        say(f"\n{arguments.count} versions of {arguments.mib} MiB: the store grew by {good:.3f} times what changed (at most {GROWTH})")
        ok = good <= GROWTH
        answers = {"promote": promoted[-TIMES:]}
        for what in [["images"], ["images", "--json"], ["history", "web@production"], ["history", "web@production", "--json"]]:
            answers[" ".join(what)] = [kiln(*what) for _ in range(TIMES)]
        answers["rollback"] = [kiln("rollback", "web@production") for _ in range(TIMES)]
        for what, seconds in answers.items():
            median = statistics.median(seconds)
            ok = ok and median <= SECONDS
            say(f"{what}: {median * 1000:.0f} ms (at most {SECONDS * 1000:.0f})")
        kiln("verify", "-q")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
