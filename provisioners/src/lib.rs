//! What each provisioner does to a guest, through the trait alone.
//!
//! A new one is a file here and a line in [`all`], or in [`tests()`]: a test is a
//! step that is run on the finished image.

mod assert;
mod configuration;
mod file;
mod powershell;
mod reboot;
mod settings;
mod shell;
mod testinfra;
mod trace;

use kiln_model::kind::Kind;
use kiln_model::provision::Provisioner;

/// Every kind of step.
pub fn all() -> Vec<Box<dyn Kind<dyn Provisioner>>> {
    vec![
        Box::new(shell::ShellKind),
        Box::new(file::FileKind),
        Box::new(reboot::RebootKind),
        Box::new(configuration::AnsibleKind),
        Box::new(configuration::PuppetKind),
        Box::new(configuration::CfengineKind),
        Box::new(configuration::ChefKind),
        Box::new(configuration::SaltKind),
        Box::new(powershell::PowershellKind),
    ]
}

/// Every kind of test.
pub fn tests() -> Vec<Box<dyn Kind<dyn Provisioner>>> {
    vec![Box::new(shell::ShellKind), Box::new(assert::AssertKind), Box::new(testinfra::TestinfraKind)]
}
