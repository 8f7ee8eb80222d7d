//! What each provisioner does to a guest, through the trait alone.
//!
//! A new one is a file here and a line in [`all`].

mod file;
mod reboot;
mod settings;
mod shell;
mod trace;

use kiln_model::kind::Kind;
use kiln_model::provision::Provisioner;

/// Every kind of provisioner.
pub fn all() -> Vec<Box<dyn Kind<dyn Provisioner>>> {
    vec![Box::new(shell::ShellKind), Box::new(file::FileKind), Box::new(reboot::RebootKind)]
}
