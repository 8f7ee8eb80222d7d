"""Measures how fast an image becomes an AMI; ci/bench-ec2 starts this.

First: `kiln publish` of an image that no cloud knows, registered, against
`coldsnap upload --omit-zero-blocks` of the same raw disk, which makes a snapshot
and no image. Incremental: `kiln publish` of the next version, of whose blocks a
few are others and a few became zero, against coldsnap again, which knows of no
version before.

Both speak to kiln's own strict server on loopback, which digests every block and
keeps it in a file; each run gets one of its own, so that none finds its blocks
there already. What the server costs is in both times. Rounds alternate, each in
turn beginning with the other. The disks are in the page cache, as far as they
fit; half of each is holes. What was published is read back and compared."""

from __future__ import annotations

import argparse, contextlib, json, os, platform, random, shutil, signal, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

BLOCK = 512 << 10
REGION = "us-east-1"


@dataclass
class Way:
    name: str
    limit: float  # the most that kiln's time may be of coldsnap's
    size_gib: int
    coldsnap: list[float] = field(default_factory=list)
    kiln: list[float] = field(default_factory=list)
    puts: list[int] = field(default_factory=list)  # blocks that kiln sent

    def ratio(self) -> float:
        return statistics.median(self.kiln) / statistics.median(self.coldsnap)

    def good(self) -> bool:
        return self.ratio() <= self.limit


def say(text: str) -> None:
    print(text, flush=True)


def give_up(text: str) -> NoReturn:
    print(f"bench-ec2: {text}", file=sys.stderr)
    sys.exit(2)


def run(command: list[str], environment: dict[str, str]) -> float:
    """Runs a command to its end, and takes the time."""
    # What the run before left to be written is not this one's work.
    os.sync()
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            status = child.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        seconds = time.monotonic() - began
        if status != 0:
            output.seek(0)
            give_up(f"failed with status {status}: {' '.join(command)}\n{output.read().decode(errors='replace')[-2000:]}")
    return seconds


class Server:
    """The front: one for each run."""

    def __init__(self, program: str, alone: bool) -> None:
        command = [program, "--settling", "0"] + (["--alone"] if alone else [])
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = self.read()
        self.environment = {**said["environment"], "AWS_REGION": REGION, "AWS_DEFAULT_REGION": REGION}
        self.address = said["address"]

    def read(self) -> Any:
        assert self.child.stdout
        line = self.child.stdout.readline()
        if not line:
            give_up("the server has ended")
        return json.loads(line)

    def ask(self, line: str) -> Any:
        assert self.child.stdin
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        return self.read()

    def puts(self) -> int:
        count = self.ask("calls").get("PutSnapshotBlock", 0)
        self.ask("forget")
        return count

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        try:
            self.child.wait(30)
        except subprocess.TimeoutExpired:
            self.child.kill()


class Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path, size_gib: int) -> None:
        self.tools, self.folder, self.size_gib = arguments, folder, size_gib
        self.disks = [folder / f"{version}.raw" for version in (1, 2)]
        self.first = Way("first publish", 1.0, size_gib)
        self.next = Way("incremental publish", 0.15, size_gib)

    def make(self) -> None:
        """A disk of which half is in use, and the next version of it."""
        one, two = self.disks
        subprocess.run([self.tools.maker, "make", one, str(self.size_gib * 512)], check=True, stdout=subprocess.DEVNULL)
        os.truncate(one, self.size_gib << 30)
        subprocess.run(["cp", "--sparse=always", one, two], check=True)
        used = self.size_gib * 1024
        chosen = random.Random(1).sample(range(used), max(8, used // 50))
        with two.open("r+b") as disk:
            for number, block in enumerate(chosen):
                disk.seek(block * BLOCK)
                disk.write(bytes(BLOCK) if number % 8 == 0 else random.Random(block).randbytes(BLOCK))

    def warm(self) -> None:
        for disk in self.disks:
            subprocess.run(["dd", f"if={disk}", "of=/dev/null", "bs=1M", "status=none"], check=True)

    def coldsnap(self) -> None:
        for way, disk in zip([self.first, self.next], self.disks):
            self.warm()
            with Server(self.tools.aws, alone=True) as server:
                command = [self.tools.coldsnap, "--endpoint", f"http://{server.address}", "--region", REGION]
                command += ["upload", "--no-progress", "--omit-zero-blocks", str(disk)]
                way.coldsnap.append(run(command, server.environment))
                self.check(server, server.ask("snapshots"), disk)

    def kiln(self) -> None:
        home = {"KILN_HOME": str(self.folder / "home")}
        try:
            for version, disk in enumerate(self.disks, 1):
                run([self.tools.kiln, "import", str(disk), f"bench:{version}"], home)
            with Server(self.tools.aws, alone=False) as server:
                known: list[str] = []
                for version, (way, disk) in enumerate(zip([self.first, self.next], self.disks), 1):
                    server.ask("forget")
                    way.kiln.append(run([self.tools.kiln, "publish", f"bench:{version}", "--to", f"ec2:{REGION}"], {**home, **server.environment}))
                    way.puts.append(server.puts())
                    new = [snapshot for snapshot in server.ask("snapshots") if snapshot not in known]
                    known += new
                    self.check(server, new, disk)
        finally:
            shutil.rmtree(self.folder / "home", ignore_errors=True)

    def check(self, server: Server, snapshots: list[str], disk: Path) -> None:
        """The one new snapshot holds the disk."""
        back = self.folder / "back.raw"
        if len(snapshots) != 1:
            give_up(f"one snapshot was to be made, and there are {snapshots}")
        server.ask(f"raw {snapshots[0]} {back}")
        if subprocess.run(["cmp", disk, back]).returncode != 0:
            give_up("what was read back is not what was published")
        back.unlink()

    def measure(self, rounds: int) -> list[Way]:
        self.make()
        say(f"\n== {self.size_gib} GiB, of which half is in use")
        for number in range(rounds):
            for part in [self.coldsnap, self.kiln] if number % 2 == 0 else [self.kiln, self.coldsnap]:
                part()
            for way in [self.first, self.next]:
                say(f"round {number + 1}: {way.name}: coldsnap {way.coldsnap[-1]:.2f} s, kiln {way.kiln[-1]:.2f} s, {way.puts[-1]} blocks sent")
        for disk in self.disks:
            disk.unlink()
        return [self.first, self.next]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", metavar="GIB", help="size of the disk; 4 unless said")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless said")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    for hidden in ("--kiln", "--coldsnap", "--aws", "--maker"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.kiln:
        return
    sizes = arguments.size or [4]
    if arguments.load > 0.5:
        say("warning: something else was running when this began: take these numbers with care")
    ways: list[Way] = []
    # Not /tmp by itself, which may be memory.
    with tempfile.TemporaryDirectory(prefix="kiln-bench-ec2-", dir=arguments.folder or "/var/tmp") as name:
        # The server keeps its blocks there as well.
        os.environ["TMPDIR"] = name
        needed = max(sizes) * 3.5
        if shutil.disk_usage(name).free < needed * (1 << 30):
            give_up(f"{name} needs {needed:.0f} GiB of room")
        for size in sizes:
            ways += Bench(arguments, Path(name), size).measure(arguments.rounds)
    say("\nMedians of the wall time:\n")
    for way in ways:
        coldsnap, kiln = statistics.median(way.coldsnap), statistics.median(way.kiln)
        verdict = "ok" if way.good() else "MISSED"
        say(f"{way.size_gib} GiB {way.name}: coldsnap {coldsnap:.2f} s, kiln {kiln:.2f} s, ratio {way.ratio():.3f} (at most {way.limit}): {verdict}")
    if arguments.json:
        facts = {"processors": os.cpu_count(), "kernel": platform.release(), "load": arguments.load}
        numbers = [{**vars(way), "ratio": way.ratio(), "good": way.good()} for way in ways]
        arguments.json.write_text(json.dumps({"machine": facts, "ways": numbers}, indent=2) + "\n")
    sys.exit(0 if all(way.good() for way in ways) else 1)


if __name__ == "__main__":
    main()
