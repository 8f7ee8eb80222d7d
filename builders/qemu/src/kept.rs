//! `--on-failure keep`: a disk that stays, and how to look at it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_disk::qemu_img::{self, Target};
use kiln_model::base::DiskFile;
use kiln_model::guest::quote;
use kiln_model::machine::Context;
use kiln_model::{Result, ResultExt as _};
use kiln_ssh::Keys;

use crate::private;
use crate::settings::Settings;

/// The port that the printed command uses.
const PORT: u16 = 2222;

/// What it takes to boot a machine's disk without kiln.
pub(crate) struct Shown {
    pub(crate) settings: Settings,
    pub(crate) kvm: bool,
    pub(crate) uefi: bool,
    /// Where the disk is to be kept.
    pub(crate) folder: PathBuf,
    pub(crate) keys: Arc<Keys>,
    pub(crate) credential: Option<PathBuf>,
    pub(crate) seed: Option<PathBuf>,
}

impl Shown {
    /// Writes the disk as one file that needs no base, with the keys that open
    /// it, and says what to type.
    pub(crate) async fn keep(&self, disk: &DiskFile, context: &Context) -> Result<String> {
        let folder = &self.folder;
        private::folder(folder).trying(|| format!("make {}", folder.display()))?;
        // Half a disk is of no use: only a whole one stays.
        let ticket = context.scope.before_path(folder)?;
        let kept = folder.join("disk.qcow2");
        private::write(&kept, &[]).trying(|| format!("make {}", kept.display()))?;
        let mut progress = |percent: f64| context.reports.progress("keep", (percent * 100.0) as u64, Some(10_000));
        qemu_img::convert(&context.scope, disk, Target::Qcow2, &kept, &mut progress).await?;
        let copies = || -> std::io::Result<()> {
            for (from, to) in [(&self.credential, "credential"), (&self.seed, "seed.img")] {
                if let Some(from) = from {
                    private::write(&folder.join(to), &std::fs::read(from)?)?;
                }
            }
            private::write(&folder.join("id_ed25519"), self.keys.client_private_openssh().as_bytes())?;
            let known = format!("[127.0.0.1]:{PORT} {}\n", self.keys.host_public());
            private::write(&folder.join("known_hosts"), known.as_bytes())
        };
        copies().trying(|| format!("write to {}", folder.display()))?;
        context.scope.forget(ticket)?;
        Ok(self.say(&kept))
    }

    fn say(&self, disk: &Path) -> String {
        let folder = &self.folder;
        let path = |name: &str| folder.join(name).display().to_string();
        let comma = |text: String| text.replace(',', ",,");
        let mut words = vec![self.settings.binary.clone()];
        let mut add = |option: &str, value: String| words.push(format!("{option} {}", quote(&value)));
        add("-machine", "q35".into());
        add("-accel", if self.kvm { "kvm".into() } else { "tcg,thread=multi".into() });
        add("-cpu", if self.kvm { "host".into() } else { "max".into() });
        add("-smp", self.settings.cpus.to_string());
        add("-m", format!("{}M", self.settings.memory >> 20));
        if self.uefi {
            add("-bios", "/usr/share/ovmf/OVMF.fd".into());
        }
        add("-drive", format!("if=virtio,format=qcow2,file={}", comma(disk.display().to_string())));
        if self.seed.is_some() {
            add("-drive", format!("if=virtio,format=raw,readonly=on,file={}", comma(path("seed.img"))));
        }
        if self.credential.is_some() {
            add("-smbios", format!("type=11,path={}", comma(path("credential"))));
        }
        add("-nic", format!("user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{PORT}-:22"));
        words.push("-nographic".into());
        format!(
            "the disk as it was: {}\nboot it:  {}\nlog in:   ssh -p {PORT} -i {} -o IdentitiesOnly=yes -o {} root@127.0.0.1\nremove it: rm -r {}",
            disk.display(),
            words.join(" "),
            quote(&path("id_ed25519")),
            // ssh splits the value at blanks unless it is in quotes of its own.
            quote(&format!("UserKnownHostsFile=\"{}\"", path("known_hosts"))),
            quote(&folder.display().to_string()),
        )
    }
}
