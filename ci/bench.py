"""Measures kiln against Packer and virt-customize; ci/bench starts this.

All three start from the very same disk, which nothing has booted: kiln built it
(`[base] debian`) and has it in its cache; the others get it as a qcow2 file, and
getting it is in nobody's time. Packer reaches the guest through a NoCloud seed.
Its machine has the processors, the memory and the accelerator of kiln's, and
beyond that Packer's own defaults, but it waits one second for the boot instead
of ten. What is measured is the wall time of one whole process."""

from __future__ import annotations

import argparse, contextlib, functools, json, os, platform, shutil
import signal, statistics, subprocess, sys, tempfile, time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

# kiln's defaults for [builder.qemu].
CPUS = min(2, len(os.sched_getaffinity(0)))
MEMORY_MIB = 1024

NGINX_DISK_MIB = 4096
INSTALL = "apt-get update\napt-get install -y --no-install-recommends nginx-light"
PAGE = "/var/www/html/index.html"

# Components in the order in which a bake comes to them; any other that its
# events tell of comes after.
ORDER = ["base", "boot", "resume", "first command", "steps", "seal", "stop", "capture"]


@dataclass
class Work:
    name: str
    title: str
    limit: float  # the most that kiln may take, as a share of Packer's time
    kiln: list[float] = field(default_factory=list)
    packer: list[float] = field(default_factory=list)
    virt_customize: list[float] = field(default_factory=list)
    components: list[dict[str, float]] = field(default_factory=list)  # seconds, for each of kiln's runs

    def ratio(self) -> float:
        return statistics.median(self.kiln) / statistics.median(self.packer)

    def good(self) -> bool:
        """Whether it keeps its limit, and beats virt-customize where that was measured."""
        beaten = not self.virt_customize or statistics.median(self.kiln) < statistics.median(self.virt_customize)
        return beaten and self.ratio() <= self.limit


WORKS = [
    Work("cold", "echo, base never booted", 0.60),
    Work("warm", "echo, base booted before", 0.10),
    Work("edit", "nginx, last step changed", 0.08),
    Work("again", "nginx, nothing changed", 0.01),
]

INTERRUPTS = [signal.SIGINT, signal.SIGTERM]
say = functools.partial(print, flush=True)


def give_up(text: str) -> NoReturn:
    print(f"bench: {text}", file=sys.stderr)
    sys.exit(2)


@dataclass
class Runner:
    """Runs programs with their output in files, and takes the time."""

    folder: Path
    count: int = 0

    def run(self, name: str, command: list[str], **environment: str) -> tuple[float, str]:
        """Gives the seconds, and what was written to standard output."""
        self.folder.mkdir(exist_ok=True)
        self.count += 1
        out, err = (self.folder / f"{self.count:03}-{name.replace(' ', '-')}.{stream}" for stream in ["out", "err"])
        # What the run before left to be written is not this one's work.
        os.sync()
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            began = time.monotonic()
            # A session of its own, so that an interrupt reaches it once.
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env={**os.environ, **environment}, start_new_session=True
            )
            try:
                status = child.wait()
            except BaseException:
                # As a terminal would; it cleans up, and what it leaves is ended.
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(child.pid, signal.SIGINT)
                    child.wait(60)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                raise
            seconds = time.monotonic() - began
        if status != 0:
            last = [f"  {line}" for file in [out, err] for line in file.read_text(errors="replace").splitlines()[-20:]]
            give_up("\n".join([f"{name} failed with status {status}: {' '.join(command)}", *last]))
        return seconds, out.read_text()


@dataclass
class Kiln:
    """kiln, and homes for it that have the base and nothing else."""

    program: str
    folder: Path
    runner: Runner
    accelerator: str = ""

    def template(self, name: str, rest: str) -> Path:
        folder = self.folder / f"template-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kiln.toml").write_text(f'[image]\nname = "{name}"\nversion = "1.0.0"\n\n[base]\ndebian = "bookworm"\n\n{rest}')
        return folder

    def echo(self, name: str, text: str) -> Path:
        return self.template(name, f"[[provision]]\nshell = 'echo {text} > /etc/{name}'\n")

    def nginx(self, page: str) -> Path:
        folder = self.template(
            "nginx",
            f'[disk]\nsize = "{NGINX_DISK_MIB}MiB"\n\n'
            f"[[provision]]\nname = \"packages\"\nshell = '''\n{INSTALL}\n'''\n\n"
            f'[[provision]]\nname = "page"\nfile = {{ source = "index.html", destination = "{PAGE}" }}\n',
        )
        (folder / "index.html").write_text(page)
        return folder

    def bake(self, name: str, home: Path, template: Path) -> tuple[float, dict[str, float]]:
        """Gives the seconds, and those of each component."""
        seconds, out = self.runner.run(f"kiln {name}", [self.program, "bake", "--json", str(template)], KILN_HOME=str(home))
        parts: dict[str, float] = {}
        for event in map(json.loads, out.splitlines()):
            if event["event"] == "note" and event["message"].startswith("accelerator "):
                self.accelerator = event["message"].removeprefix("accelerator ")
            if event["event"] == "end":
                # A boot and a resume are of one phase, and told apart by name.
                part = {"step": "steps", "snapshot": "capture", "base": "base"}.get(event["phase"], event["name"])
                parts[part] = parts.get(part, 0.0) + event["seconds"]
        parts["other"] = seconds - sum(parts.values())
        return seconds, parts

    def build_base(self) -> Path:
        """Builds the base, by baking an image without steps; gives its disk."""
        first, pristine = self.folder / "first", self.folder / "pristine"
        self.bake("base", first, self.template("base", ""))
        if not self.accelerator:
            give_up("kiln did not say which accelerator it takes")
        # What there is as soon as a base was built: its disk, and its blocks in
        # the store. No image, no checkpoint, no record of a bake.
        for part in ["cache/bases", "store"]:
            (pristine / part).parent.mkdir(parents=True, exist_ok=True)
            (first / part).rename(pristine / part)
        shutil.rmtree(first)
        for arguments in [["untag", "base:1.0.0"], ["prune"]]:
            self.runner.run(f"kiln {arguments[0]}", [self.program, *arguments], KILN_HOME=str(pristine))
        return next(pristine.glob("cache/bases/*/*/disk"))

    def new_home(self, name: str) -> Path:
        home = self.folder / name
        subprocess.run(["cp", "-a", "--reflink=auto", "--sparse=always", self.folder / "pristine", home], check=True)
        return home


@dataclass
class Packer:
    """Packer's QEMU builder, with the base as a disk image."""

    base: Path
    size_mib: int
    kvm: bool
    folder: Path
    runner: Runner

    def __post_init__(self) -> None:
        self.key, self.seed = self.folder / "key", self.folder / "seed.iso"
        (self.folder / "tmp").mkdir(parents=True)
        # Not RSA: Packer 1.6 signs with SHA-1, which sshd refuses.
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        # As root, so that no step needs sudo and files go right to their place.
        public = Path(f"{self.key}.pub").read_text().strip()
        files = [self.folder / "user-data", self.folder / "meta-data"]
        files[0].write_text(f"#cloud-config\ndisable_root: false\nusers:\n- name: root\n  ssh_authorized_keys: ['{public}']\n")
        files[1].write_text("instance-id: bench\n")
        subprocess.run(["genisoimage", "-quiet", "-volid", "cidata", "-joliet", "-rock", "-output", self.seed, *files], check=True)

    def build(self, name: str, size_mib: int, provisioners: list[dict[str, Any]], works: list[Work]) -> None:
        """Its time is that of each of `works`: it keeps nothing for the next."""
        out = self.folder / "out"
        # The seed through virtio: then Packer's own drive has to be told as well.
        drives = [
            ["-drive", f"file={out}/disk.qcow2,if=virtio,cache=writeback,discard=ignore,format=qcow2"],
            ["-drive", f"file={self.seed},if=virtio,format=raw,readonly=on"],
        ]
        builder = {
            "type": "qemu", "accelerator": "kvm" if self.kvm else "tcg", "cpus": CPUS, "memory": MEMORY_MIB,
            "disk_image": True, "iso_url": str(self.base), "iso_checksum": "none", "disk_size": f"{size_mib}M",
            "format": "qcow2", "disk_compression": False, "output_directory": str(out), "vm_name": "disk.qcow2",
            "headless": True, "boot_wait": "1s", "shutdown_command": "shutdown -P now",
            "ssh_username": "root", "ssh_private_key_file": str(self.key), "ssh_timeout": "20m",
            "qemuargs": drives,
        }
        template = self.folder / "packer.json"
        template.write_text(json.dumps({"builders": [builder], "provisioners": provisioners}, indent=2))
        own = str(self.folder)
        environment = {"CHECKPOINT_DISABLE": "1", "PACKER_CACHE_DIR": f"{own}/cache", "PACKER_CONFIG_DIR": own, "TMPDIR": f"{own}/tmp"}
        seconds, _ = self.runner.run(f"packer {name}", ["packer", "build", "-color=false", str(template)], **environment)
        shutil.rmtree(out)
        say(f"packer          {name:6} {seconds:8.2f} s")
        for work in works:
            work.packer.append(seconds)

    def echo(self, text: str, works: list[Work]) -> None:
        self.build("echo", self.size_mib, [{"type": "shell", "inline": [f"echo {text} > /etc/hello"]}], works)

    def nginx(self, page: str, works: list[Work]) -> None:
        file = self.folder / "index.html"
        file.write_text(page)
        install = {"type": "shell", "environment_vars": ["DEBIAN_FRONTEND=noninteractive"], "inline": INSTALL.splitlines()}
        self.build("nginx", NGINX_DISK_MIB, [install, {"type": "file", "source": str(file), "destination": PAGE}], works)


@dataclass
class VirtCustomize:
    """virt-customize, on an overlay of the base. Making that is not measured."""

    base: Path
    kvm: bool
    folder: Path
    runner: Runner

    def echo(self, text: str) -> float:
        self.folder.mkdir(exist_ok=True)
        disk = self.folder / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.base, disk], check=True)
        environment = {"LIBGUESTFS_BACKEND": "direct", "LIBGUESTFS_CACHEDIR": str(self.folder), "TMPDIR": str(self.folder)}
        if not self.kvm:
            environment["LIBGUESTFS_BACKEND_SETTINGS"] = "force_tcg"
        command = ["virt-customize", "-a", str(disk), "--run-command", f"echo {text} > /etc/hello"]
        seconds, _ = self.runner.run("virt-customize echo", command, **environment)
        disk.unlink()
        say(f"virt-customize  echo   {seconds:8.2f} s")
        return seconds


def machine(accelerator: str, load: float) -> dict[str, str]:
    def first_line(*command: str) -> str:
        return (subprocess.run(command, capture_output=True, text=True).stdout.splitlines() or [""])[0].strip()

    def proc(file: str, key: str) -> str:
        return next(line.split(":", 1)[1].strip() for line in Path(file).read_text().splitlines() if line.startswith(key))

    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    changed = first_line(*git, "status", "--porcelain", "--untracked-files=no")
    return {
        "processor": f"{proc('/proc/cpuinfo', 'model name')}, {os.cpu_count()} cores",
        "memory": f"{int(proc('/proc/meminfo', 'MemTotal').split()[0]) >> 10} MiB",
        "kernel": platform.release(),
        "qemu": first_line("qemu-system-x86_64", "--version"),
        "packer": first_line("packer", "version"),
        "virt-customize": first_line("virt-customize", "--version"),
        "kiln": first_line(*git, "rev-parse", "--short", "HEAD") + (", changed" if changed else ""),
        "accelerator": accelerator,
        "guests": f"{CPUS} cpus, {MEMORY_MIB} MiB",
        "load average": f"{load:.2f} at the start",
    }


def table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]
        say("  ".join(cells).rstrip())


def report(done: list[Work]) -> bool:
    """Prints the tables; tells whether every limit was kept."""

    def median(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} s" if any(values) else ""

    rows = [["work", "kiln", "packer", "ratio", "limit", "", "virt-customize"]]
    for work in done:
        verdict = "ok" if work.good() else "OVER"
        numbers = [median(work.kiln), median(work.packer), f"{work.ratio():.4f}", f"{work.limit:.2f}"]
        rows.append([f"{work.name}: {work.title}", *numbers, verdict, median(work.virt_customize)])
    say("\nMedians of the wall time:\n")
    table(rows)

    found = {part for work in done for run in work.components for part in run}
    parts = [part for part in ORDER if part in found] + sorted(found - {*ORDER, "other"}) + ["other"]
    rows = [["of kiln's time", *(work.name for work in done)]]
    rows += [[part, *(median([run.get(part, 0.0) for run in work.components]) for work in done)] for part in parts]
    say("\nWhere kiln's goes, in medians (`other`: what no event tells of):\n")
    table(rows)
    return all(work.good() for work in done)


def measure(arguments: argparse.Namespace, done: list[Work], folder: Path) -> dict[str, str]:
    cold, warm, edit, again = WORKS
    echo, nginx = [work for work in [cold, warm] if work in done], [work for work in [edit, again] if work in done]
    runner = Runner(folder / "logs")

    say("\n== preparing: the base, and what is done before")
    kiln = Kiln(arguments.kiln, folder / "kiln", runner)
    disk = kiln.build_base()
    facts = machine(kiln.accelerator, arguments.load)
    for name, value in facts.items():
        say(f"{name:15} {value}")
    if arguments.load > 0.5:
        say("warning: something else was running when this began: take these numbers with care")
    base = folder / "base.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", disk, base], check=True)
    kvm = kiln.accelerator.startswith("kvm")
    packer = Packer(base, disk.stat().st_size >> 20, kvm, folder / "packer", runner)
    virt = VirtCustomize(base, kvm, folder / "virt-customize", runner)
    if warm in done:
        virt.echo("first")  # builds its appliance
        booted = kiln.new_home("booted")
        kiln.bake("other", booted, kiln.echo("other", "another template"))
    if nginx:
        baked = kiln.new_home("baked")
        kiln.bake("nginx", baked, kiln.nginx("first\n"))

    def took(work: Work, home: Path, template: Path) -> None:
        seconds, parts = kiln.bake(work.name, home, template)
        work.kiln.append(seconds)
        work.components.append(parts)
        say(f"kiln            {work.name:6} {seconds:8.2f} s")

    for number in range(1, arguments.rounds + 1):
        say(f"\n== round {number} of {arguments.rounds}")
        if cold in done:
            home = kiln.new_home("cold")
            took(cold, home, kiln.echo("hello", "hi"))
            if "boot" not in cold.components[-1]:
                give_up("the bake that should be cold did not boot its base")
            shutil.rmtree(home)
        if echo:
            packer.echo(f"hi {number}", echo)
        if warm in done:
            took(warm, booted, kiln.echo("hello", f"hi {number}"))
            warm.virt_customize.append(virt.echo(f"hi {number}"))
        page = f"<p>Round {number}</p>\n" if edit in done else "first\n"
        if edit in done:
            took(edit, baked, kiln.nginx(page))
        if nginx:
            packer.nginx(page, nginx)
        if again in done:
            took(again, baked, kiln.nginx(page))
    return facts


def interrupted(number: int, _: object) -> NoReturn:
    for one in INTERRUPTS:
        signal.signal(one, signal.SIG_IGN)  # cleaning up goes to its end
    sys.exit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(prog="ci/bench", allow_abbrev=False, description="Measures kiln against Packer and virt-customize.")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often everything is measured (default 3)")
    parser.add_argument("--only", action="append", choices=[work.name for work in WORKS], help="this work alone; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="write the raw numbers to FILE")
    parser.add_argument("--keep", action="store_true", help="keep the work folder, with the logs")
    # For ci/bench.
    parser.add_argument("--kiln", help=argparse.SUPPRESS)
    parser.add_argument("--load", type=float, default=os.getloadavg()[0], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if not arguments.kiln:
        return 0  # ci/bench asks first whether the arguments are right

    for number in INTERRUPTS:
        signal.signal(number, interrupted)
    done = [work for work in WORKS if not arguments.only or work.name in arguments.only]
    # Not /tmp, which may be in memory: this takes a few GiB.
    folder = Path(tempfile.mkdtemp(prefix="kiln-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        facts = measure(arguments, done, folder)
    finally:
        if arguments.keep:
            say(f"\nkept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    kept = report(done)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"machine": facts, "works": [vars(work) for work in done]}, indent=2) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
