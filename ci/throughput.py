"""Measures how fast disks go into and out of a registry; ci/throughput starts this.

In: `kiln import` and `kiln push`, from a raw disk that no store knows, against
`zstd -3 -T2 | sha256sum` over the same bytes. Out: `kiln pull --to` on a machine
that knows nothing, against `zstd -d` to a file. The disk has no holes, so that
what is allocated is what there is, and compresses about 3:1. The registry is
Debian's docker-registry on the same machine: what it costs is in kiln's time.

With --store, `kiln import` and `kiln export` are measured, without a registry.

Rounds alternate, each in turn beginning with the other. What is read is in the
page cache for both, as far as it fits; what was written before is on the disk."""

from __future__ import annotations

import argparse, contextlib, json, os, platform, shutil, signal, socket, statistics, subprocess, sys, tempfile, time, urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

MEMORY_MIB = 256
REFERENCE = "throughput:1"


@dataclass
class Run:
    seconds: float
    processor: float  # seconds of user and system time, of all processes started
    memory_mib: float  # the largest of them


@dataclass
class Way:
    """One direction: the times of the peer, and those of kiln's commands together."""

    name: str
    limit: float  # the least that kiln's speed may be of the peer's
    size_gib: int
    peer: list[Run] = field(default_factory=list)
    kiln: list[list[Run]] = field(default_factory=list)
    server: list[float] = field(default_factory=list)  # the registry's processor time

    def ratio(self) -> float:
        return statistics.median(run.seconds for run in self.peer) / statistics.median(sum(r.seconds for r in runs) for runs in self.kiln)

    def memory(self) -> float:
        return max(run.memory_mib for runs in self.kiln for run in runs)

    def good(self) -> bool:
        return self.ratio() >= self.limit and self.memory() < MEMORY_MIB


def say(text: str) -> None:
    print(text, flush=True)


def give_up(text: str) -> NoReturn:
    print(f"throughput: {text}", file=sys.stderr)
    sys.exit(2)


def run(command: list[str], home: Path | None = None) -> Run:
    """Runs a command to its end, and takes time and memory."""
    # What the run before left to be written is not this one's work.
    os.sync()
    environment = {**os.environ, **({"KILN_HOME": str(home)} if home else {})}
    with tempfile.TemporaryFile() as output:
        began = time.monotonic()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            raise
        seconds = time.monotonic() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            output.seek(0)
            give_up(f"failed with status {child.returncode}: {' '.join(command)}\n{output.read().decode(errors='replace')[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def warm(*paths: Path) -> None:
    """Reads files, or all below folders, so that they are in the page cache."""
    for path in paths:
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            subprocess.run(["dd", f"if={file}", "of=/dev/null", "bs=1M", "status=none"], check=True)


def remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class Registry:
    """docker-registry, with its blobs in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        config = folder / "config.yml"
        config.write_text(
            f"version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nhttp:\n  addr: {self.address}\n"
            f"storage:\n  filesystem:\n    rootdirectory: {folder / 'blobs'}\n  delete:\n    enabled: true\n"
        )
        self.child = subprocess.Popen(["docker-registry", "serve", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
                return
            except OSError as error:
                if self.child.poll() is not None or time.monotonic() > until:
                    self.end()
                    give_up(f"docker-registry does not answer: {error}")
                time.sleep(0.05)

    def processor(self) -> float:
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.child.kill()
        self.child.wait()


@dataclass
class Bench:
    kiln: str
    folder: Path
    size_gib: int
    store_only: bool

    def __post_init__(self) -> None:
        self.disk, self.packed, self.out = (self.folder / name for name in ["disk.raw", "disk.zst", "out.raw"])
        self.home, self.other, self.blobs = (self.folder / name for name in ["home", "other", "registry"])
        self.into = Way("snapshot" if self.store_only else "snapshot and push", 0.8, self.size_gib)
        self.back = Way("export to a raw file" if self.store_only else "pull to a raw file", 0.7, self.size_gib)

    def peer_in(self) -> None:
        warm(self.disk)
        self.into.peer.append(run(["bash", "-o", "pipefail", "-c", 'zstd -q -3 -T2 -c "$0" | sha256sum', str(self.disk)]))

    def peer_out(self) -> None:
        warm(self.packed)
        self.back.peer.append(run(["zstd", "-q", "-d", "-f", str(self.packed), "-o", str(self.out)]))
        self.check()

    def kiln_both(self) -> None:
        """In, and, since it needs what is there then, out."""
        registry = None if self.store_only else Registry(self.blobs)
        try:
            warm(self.disk)
            snapshot = run([self.kiln, "import", str(self.disk), REFERENCE], self.home)
            if registry is None:
                self.into.kiln.append([snapshot])
                self.back.kiln.append([run([self.kiln, "export", REFERENCE, "--format", "raw", "-o", str(self.out)], self.home)])
                self.check()
                return
            there, before = f"{registry.address}/{REFERENCE}", registry.processor()
            self.into.kiln.append([snapshot, run([self.kiln, "push", REFERENCE, there], self.home)])
            self.into.server.append(registry.processor() - before)
            remove(self.home)
            warm(self.blobs)
            before = registry.processor()
            self.back.kiln.append([run([self.kiln, "pull", there, "--to", str(self.out)], self.other)])
            self.back.server.append(registry.processor() - before)
            self.check()
        finally:
            if registry:
                registry.end()
            remove(self.home, self.other, self.blobs)

    def check(self) -> None:
        if subprocess.run(["cmp", self.disk, self.out]).returncode != 0:
            give_up("what came out is not what went in")
        remove(self.out)

    def measure(self, rounds: int) -> list[Way]:
        subprocess.run(["zstd", "-q", "-3", "-T2", "-f", self.disk, "-o", self.packed], check=True)
        ratio = self.disk.stat().st_size / self.packed.stat().st_size
        say(f"\n== {self.size_gib} GiB, which zstd -3 compresses {ratio:.2f}:1")
        for number in range(rounds):
            peer = [self.peer_in, self.peer_out]
            for part in [*peer, self.kiln_both] if number % 2 == 0 else [self.kiln_both, *peer]:
                part()
            for way in [self.into, self.back]:
                own = way.kiln[-1]
                parts = " + ".join(f"{run.seconds:.2f}" for run in own)
                say(f"round {number + 1}: {way.name}: peer {way.peer[-1].seconds:.2f} s, kiln {parts} s")
        remove(self.disk, self.packed)
        return [self.into, self.back]


def report(ways: list[Way]) -> bool:
    """Prints the table; tells whether every limit was kept."""
    say("\nMedians of the wall time; processor time of one GiB; peak memory of kiln:\n")
    for way in ways:
        def cost(runs: list[float]) -> str:
            return f"{statistics.median(runs) / way.size_gib:.2f}"

        peer, kiln = statistics.median(r.seconds for r in way.peer), statistics.median(sum(r.seconds for r in runs) for runs in way.kiln)
        server = f" (registry {cost(way.server)})" if way.server else ""
        say(
            f"{way.size_gib} GiB {way.name}: peer {peer:.2f} s, kiln {kiln:.2f} s, ratio {way.ratio():.3f} (at least {way.limit}); "
            f"processor s/GiB: peer {cost([r.processor for r in way.peer])}, "
            f"kiln {cost([sum(r.processor for r in runs) for runs in way.kiln])}{server}; "
            f"memory {way.memory():.0f} MiB (below {MEMORY_MIB}): {'ok' if way.good() else 'MISSED'}"
        )
    return all(way.good() for way in ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", metavar="GIB", help="size of the disk; 1 and 8 unless said")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", action="store_true", help="without a registry")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder unless said")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--kiln", help=argparse.SUPPRESS)
    parser.add_argument("--maker", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.kiln:
        return
    sizes = arguments.size or [1, 8]
    if arguments.load > 0.5:
        say("warning: something else was running when this began: take these numbers with care")
    ways: list[Way] = []
    # Not /tmp by itself, which may be memory.
    with tempfile.TemporaryDirectory(prefix="kiln-throughput-", dir=arguments.folder or "/var/tmp") as name:
        folder = Path(name)
        # The disk, what comes out, and the same compressed three times.
        needed = max(sizes) * 3.3
        if shutil.disk_usage(folder).free < needed * (1 << 30):
            give_up(f"{folder} needs {needed:.0f} GiB of room")
        for size in sizes:
            bench = Bench(arguments.kiln, folder, size, arguments.store)
            subprocess.run([arguments.maker, "make", bench.disk, str(size * 1024)], check=True, stdout=subprocess.DEVNULL)
            ways += bench.measure(arguments.rounds)
    good = report(ways)
    if arguments.json:
        facts = {"processors": os.cpu_count(), "kernel": platform.release(), "load": arguments.load}
        numbers = [{**{k: v for k, v in vars(w).items()}, "ratio": w.ratio(), "memory_mib": w.memory(), "good": w.good()} for w in ways]
        arguments.json.write_text(json.dumps({"machine": facts, "ways": numbers}, indent=2, default=vars) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
