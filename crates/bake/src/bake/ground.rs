//! What a bake stands on: the base, and the keys that follow from it.

use std::sync::Arc;

use kiln_model::base::{Base, BaseDisk};
use kiln_model::block::ImageSink;
use kiln_model::event::Phase;
use kiln_model::image::{CloudImage, DiskRecord};
use kiln_model::machine::Context;
use kiln_model::{Code, Digest, Error, Result};

use super::{Options, Stores};
use crate::plan::Plan;
use crate::template::Template;

/// What a machine is made of: the base, and every step with its key.
pub(super) struct Ground {
    pub(super) base: Base,
    /// Its disk digest, or what stands for it where it is at a cloud.
    pub(super) digest: Digest,
    /// The base's blocks in the store; none where they are at a cloud.
    pub(super) record: Option<DiskRecord>,
    pub(super) disk_size: u64,
    pub(super) plan: Plan,
}

impl Ground {
    pub(super) async fn get(template: &Template, options: &Options<'_>, stores: &Stores<'_>, context: &Context) -> Result<Self> {
        let (base, digest, record) = get_base(template, options.resume.fresh, stores.sink, context).await?;
        let disk_size = disk_size(template, &base)?;
        let plan = Plan::new(template, Some(digest))?;
        Ok(Self { base, digest, record, disk_size, plan })
    }
}

/// The base, what stands for it in keys, and its blocks in the store.
async fn get_base(
    template: &Template,
    fresh: bool,
    sink: &Arc<dyn ImageSink>,
    context: &Context,
) -> Result<(Base, Digest, Option<DiskRecord>)> {
    let label = template.base.label();
    let span = context.reports.begin(Phase::Base, &label);
    let base = template.base.fetch(fresh, context).await?;
    if let BaseDisk::Cloud(images) = &base.disk {
        if !template.builder.at_cloud() {
            // Says what to do instead.
            base.file()?;
        }
        let identity = images.first().map(CloudImage::identity);
        let identity = identity.ok_or_else(|| Error::new(Code::Failed, format!("the base {label} is at no region of its cloud")))?;
        let _ = span.end(false);
        return Ok((base, identity, None));
    }
    let stored = match template.base.known()? {
        Some(digest) => sink.base(&digest)?,
        None => None,
    };
    let cached = stored.is_some();
    let record = match stored {
        Some(record) => record,
        None => {
            let (sink, adopted, label, reports) = (sink.clone(), base.clone(), label.clone(), context.reports.clone());
            let record = crate::blocking("store the base", move || {
                sink.adopt(&adopted, &label, &mut |done, total| reports.progress(&label, done, Some(total)))
            })
            .await?;
            template.base.remember(&base, &record.digest)?;
            record
        }
    };
    let _ = span.end(cached);
    Ok((base, record.digest, Some(record)))
}

/// The size of the disk to bake on: what the template says, never less than
/// the base.
fn disk_size(template: &Template, base: &Base) -> Result<u64> {
    match template.disk_size {
        None => Ok(base.size()),
        Some(size) if size >= base.size() => Ok(size),
        Some(size) => Err(Error::new(
            Code::Usage,
            format!(
                "`[disk] size` is {size} bytes, but the base {} has {} bytes, and a disk cannot be made smaller",
                base.label,
                base.size()
            ),
        )
        .next(format!("set `[disk] size` to at least \"{}MiB\"", base.size().div_ceil(1 << 20)))),
    }
}
