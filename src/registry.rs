//! The one place that maps a kind to its builder, base or provisioner. A new
//! one is one more line here.

use kiln_bake::template::Kinds;
use kiln_model::base::BaseSource;
use kiln_model::home::Home;
use kiln_model::kind::Kind;
use kiln_model::machine::Builder;
use kiln_model::provision::Provisioner;

use crate::image_base::ImageKind;

/// Everything that a template may name.
pub(crate) struct Registry {
    provisioners: Vec<Box<dyn Kind<dyn Provisioner>>>,
    tests: Vec<Box<dyn Kind<dyn Provisioner>>>,
    builders: Vec<Box<dyn Kind<dyn Builder>>>,
    bases: Vec<Box<dyn Kind<dyn BaseSource>>>,
}

impl Registry {
    pub(crate) fn new(home: &Home, site: &kiln_qemu::base::Site) -> Self {
        let (provisioners, tests) = (kiln_provisioners::all(), kiln_provisioners::tests());
        let http = kiln_http::Settings { proxy: site.proxy.clone(), ca_certificates: site.ca_certificates.clone() };
        let ec2 = crate::ec2_bake::around(home, http);
        let builders: Vec<Box<dyn Kind<dyn Builder>>> =
            vec![Box::new(kiln_qemu::QemuKind::new(home)), Box::new(kiln_ec2::bake::Ec2Kind::new(ec2.clone()))];
        let mut bases = kiln_qemu::base::kinds(home.cache(), site.clone());
        bases.push(Box::new(kiln_ec2::bake::AmiKind::new(ec2)));
        bases.push(Box::new(ImageKind::new(home.clone())));
        Self { provisioners, tests, builders, bases }
    }

    pub(crate) fn kinds(&self) -> Kinds<'_> {
        Kinds { provisioners: &self.provisioners, tests: &self.tests, builders: &self.builders, bases: &self.bases }
    }
}
