//! QEMU's command line: the shape of the machine.
//!
//! A q35 without anything that a bake does not use: every device of the guest
//! is virtio, but for a VGA card (what a screenshot is taken of), a serial
//! port, and two ports that only tell of failures (pvpanic, debugcon). Files
//! are named in JSON, so that no path needs escaping.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use kiln_model::machine::Port;
use kiln_model::{Code, Error, Result, ResultExt as _};
use serde_json::{Value, json};

use crate::layers::Layers;
use crate::settings::{Boot, Settings};

/// Where distributions keep OVMF: code, and an empty variable store.
const OVMF: [(&str, &str); 5] = [
    ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
    ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ("/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"),
    ("/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"),
    ("/usr/share/qemu/edk2-x86_64-code.fd", "/usr/share/qemu/edk2-i386-vars.fd"),
];

/// OVMF's two files for one machine.
#[derive(Debug, Clone)]
pub(crate) struct Ovmf {
    /// Its code, read-only.
    pub(crate) code: PathBuf,
    /// This machine's own variables.
    pub(crate) variables: PathBuf,
}

impl Ovmf {
    /// As [`Ovmf::install`], with the variables of another machine.
    ///
    /// # Errors
    /// [`Code::Missing`] when it is not installed.
    pub(crate) fn with(kept: &Path, variables: PathBuf) -> Result<Self> {
        let ovmf = Self::install(variables)?;
        let copy = || crate::private::write(&ovmf.variables, &std::fs::read(kept)?);
        copy().trying(|| format!("copy {}", kept.display()))?;
        Ok(ovmf)
    }

    /// Finds OVMF and copies its variables to `variables`.
    ///
    /// # Errors
    /// [`Code::Missing`] when it is not installed.
    pub(crate) fn install(variables: PathBuf) -> Result<Self> {
        let found = OVMF.iter().find(|(code, vars)| Path::new(code).is_file() && Path::new(vars).is_file());
        let (code, empty) = found.ok_or_else(|| {
            Error::new(Code::Missing, "UEFI firmware for QEMU (OVMF) is missing on this machine")
                .next("install it with `apt-get install ovmf`")
        })?;
        std::fs::read(empty).and_then(|bytes| crate::private::write(&variables, &bytes)).trying(|| format!("copy {empty}"))?;
        Ok(Self { code: code.into(), variables })
    }
}

/// The descriptors that QEMU inherits, by number.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Descriptors {
    pub(crate) qmp: RawFd,
    pub(crate) serial: RawFd,
    pub(crate) firmware: RawFd,
    /// The agent's port.
    pub(crate) agent: RawFd,
}

/// The processor that is emulated: all that TCG can, but for what only costs
/// time under it (a fifth level of page tables).
pub(crate) const TCG_CPU: &str = "max,la57=off";

/// Everything that a machine's command line depends on.
pub(crate) struct Shape<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) kvm: bool,
    pub(crate) ovmf: Option<&'a Ovmf>,
    pub(crate) disk: &'a Layers,
    pub(crate) credential: Option<&'a Path>,
    pub(crate) seed: Option<&'a Path>,
    /// Whether it is to go on from a checkpoint; else it boots.
    pub(crate) resumed: bool,
    pub(crate) ports: &'a [Port],
    pub(crate) sandbox: bool,
    pub(crate) descriptors: Descriptors,
}

/// The firmware for a base, by what the settings and the base say.
///
/// # Errors
/// [`Code::Base`] when they contradict each other.
pub(crate) fn boot(settings: &Settings, base: kiln_model::image::Firmware) -> Result<Boot> {
    use kiln_model::image::Firmware;
    let contradiction = |only: &str, said: &str| {
        Error::new(Code::Base, format!("the base starts under {only} only, and firmware = \"{said}\" was asked for"))
            .next("remove `firmware` from [builder.qemu]")
    };
    match (settings.boot, base) {
        (Some(Boot::Bios), Firmware::Uefi) => Err(contradiction("UEFI", "bios")),
        (Some(Boot::Uefi), Firmware::Bios) => Err(contradiction("BIOS", "uefi")),
        (Some(boot), _) => Ok(boot),
        (None, Firmware::Uefi) => Ok(Boot::Uefi),
        (None, Firmware::Bios | Firmware::BiosUefi) => Ok(Boot::Bios),
    }
}

/// The arguments for QEMU.
pub(crate) fn arguments(shape: &Shape<'_>) -> Vec<String> {
    let mut arguments: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    let Descriptors { qmp, serial, firmware, agent } = shape.descriptors;

    let mut machine = "q35,sata=off,smbus=off,usb=off,vmport=off".to_owned();
    if shape.ovmf.is_some() {
        machine.push_str(",pflash0=code,pflash1=variables");
    }
    add("-machine", machine);
    add("-accel", if shape.kvm { "kvm".into() } else { "tcg,thread=multi".into() });
    add("-cpu", if shape.kvm { "host".into() } else { TCG_CPU.into() });
    add("-smp", shape.settings.cpus.to_string());
    add("-m", format!("{}M", shape.settings.memory >> 20));
    if shape.resumed {
        // It waits to be told where its state is, and then to go on.
        add("-incoming", "defer".into());
    }
    add("-display", "none".into());
    add("-rtc", "base=utc".into());
    // The disk is the only thing to start from.
    add("-boot", "strict=on".into());
    // A guest that ends stays where it is until kiln has seen it.
    add("-action", "reboot=reset,shutdown=pause,panic=pause".into());
    if shape.sandbox {
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".into());
    }

    for (id, fd) in [("qmp", qmp), ("serial", serial), ("firmware", firmware), ("agent", agent)] {
        add("-chardev", format!("socket,id={id},fd={fd}"));
    }
    add("-mon", "chardev=qmp,mode=control".into());
    add("-serial", "chardev:serial".into());
    add("-device", "isa-debugcon,iobase=0x402,chardev=firmware".into());
    add("-device", "pvpanic-pci".into());
    add("-device", "VGA".into());
    add("-object", "rng-random,id=random,filename=/dev/urandom".into());
    add("-device", "virtio-rng-pci,rng=random".into());

    if let Some(ovmf) = shape.ovmf {
        add("-blockdev", file_node("code", &ovmf.code, true).to_string());
        add("-blockdev", file_node("variables", &ovmf.variables, false).to_string());
    }
    add("-blockdev", root_node(shape.disk).to_string());
    add("-device", format!("virtio-blk-pci,drive={},bootindex=0", layer_name(shape.disk.count() - 1)));
    if let Some(seed) = shape.seed {
        add("-blockdev", file_node("seed", seed, true).to_string());
        add("-device", "virtio-blk-pci,drive=seed".into());
    }

    // Port 0: the kernel picks a free one, and nobody can take it in between.
    let mut network = "user,id=net,restrict=off,hostfwd=tcp:127.0.0.1:0-:22".to_owned();
    for port in shape.ports {
        network.push_str(&format!(",hostfwd=tcp:127.0.0.1:{}-:{}", port.host, port.guest));
    }
    add("-netdev", network);
    // Without its boot ROM, which would only be in the way.
    add("-device", "virtio-net-pci,netdev=net,romfile=".into());

    // After the others, so that no guest's names for them depend on it.
    add("-device", "virtio-serial-pci".into());
    add("-device", format!("virtserialport,id=agent,chardev=agent,name={}", crate::agent::PORT));

    if let Some(credential) = shape.credential {
        // The only path outside of JSON: a comma is written twice.
        add("-smbios", format!("type=11,path={}", credential.display().to_string().replace(',', ",,")));
    }
    let mut all = vec!["-nodefaults".to_owned(), "-no-user-config".to_owned()];
    if shape.resumed {
        all.push("-S".to_owned());
    }
    all.extend(arguments);
    all
}

/// The root disk, layer on layer. Nothing of it has to survive a power cut of
/// the host, so that the guest's flushes cost nothing; closing it cleanly still
/// writes it whole.
fn root_node(disk: &Layers) -> Value {
    let base = disk.base();
    let mut node = json!({
        "driver": base.format.name(), "read-only": true,
        "file": { "driver": "file", "filename": base.path, "read-only": true },
    });
    let paths = disk.paths();
    for (layer, path) in paths.iter().enumerate() {
        let top = layer + 1 == paths.len();
        let mut next = layer_node(layer, path, !top);
        next["backing"] = node;
        node = next;
    }
    node
}

/// The name of a layer's node.
pub(crate) fn layer_name(layer: usize) -> String {
    format!("layer-{layer}")
}

/// A layer as QEMU is to open it, but for what it lies on.
pub(crate) fn layer_node(layer: usize, path: &Path, read_only: bool) -> Value {
    let cache = json!({ "direct": false, "no-flush": true });
    json!({
        "node-name": layer_name(layer), "driver": "qcow2", "read-only": read_only, "discard": "unmap",
        "detect-zeroes": "unmap", "cache": cache,
        "file": { "driver": "file", "filename": path, "discard": "unmap", "cache": cache },
    })
}

fn file_node(name: &str, path: &Path, read_only: bool) -> Value {
    json!({ "node-name": name, "driver": "raw", "read-only": read_only, "file": { "driver": "file", "filename": path, "read-only": read_only } })
}

/// The port of this machine that leads to the guest's sshd, from what the
/// monitor answers to `info usernet`. `others` are ports that were asked for.
pub(crate) fn ssh_port(usernet: &str, others: &[Port]) -> Option<u16> {
    usernet.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["TCP[HOST_FORWARD]", _, "127.0.0.1", host, _, "22", ..] = words[..] else { return None };
        host.parse().ok().filter(|host| !others.iter().any(|port| port.host == *host))
    })
}

#[cfg(test)]
mod tests {
    use kiln_model::base::{DiskFile, DiskFormat};
    use kiln_model::image::Firmware;

    use super::*;

    #[test]
    fn the_command_line() {
        let settings = Settings { memory: 2 << 30, cpus: 3, ..Settings::default() };
        let base = DiskFile { path: "/b,a\"se".into(), format: DiskFormat::Raw, size: 1 };
        let disk = Layers::existing(&base, Path::new("/w,ork"), 1);
        let shape = Shape {
            settings: &settings,
            kvm: false,
            ovmf: None,
            disk: &disk,
            credential: Some(Path::new("/w,ork/c")),
            seed: None,
            resumed: false,
            ports: &[Port { host: 8080, guest: 80 }],
            sandbox: true,
            descriptors: Descriptors { qmp: 7, serial: 8, firmware: 9, agent: 10 },
        };
        let line = arguments(&shape).join(" ");
        assert!(line.contains("-smbios type=11,path=/w,,ork/c"), "{line}");
        assert!(line.contains("hostfwd=tcp:127.0.0.1:0-:22,hostfwd=tcp:127.0.0.1:8080-:80"), "{line}");
        assert!(line.contains(r#""filename":"/b,a\"se""#), "{line}");
        for never in ["0.0.0.0", "vnc", "tcp::", "if=", "pflash"] {
            assert!(!line.contains(never), "{never} in {line}");
        }
    }

    #[test]
    fn firmware_is_what_the_base_can_do() {
        let with = |boot| Settings { boot, ..Settings::default() };
        assert_eq!(boot(&with(None), Firmware::BiosUefi).unwrap(), Boot::Bios);
        assert_eq!(boot(&with(None), Firmware::Uefi).unwrap(), Boot::Uefi);
        assert_eq!(boot(&with(Some(Boot::Uefi)), Firmware::BiosUefi).unwrap(), Boot::Uefi);
        assert_eq!(boot(&with(Some(Boot::Uefi)), Firmware::Bios).unwrap_err().kind(), Code::Base);
        assert_eq!(boot(&with(Some(Boot::Bios)), Firmware::Uefi).unwrap_err().kind(), Code::Base);
    }

    #[test]
    fn the_port_is_found_among_others() {
        let text = "Hub -1 (net):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
            TCP[HOST_FORWARD]  11       127.0.0.1  2222       10.0.2.15    22     0     0\r\n  \
            TCP[HOST_FORWARD]  10       127.0.0.1 37351       10.0.2.15    22     0     0\r\n";
        assert_eq!(ssh_port(text, &[Port { host: 2222, guest: 22 }]), Some(37351));
        assert_eq!(ssh_port("", &[]), None);
    }
}
