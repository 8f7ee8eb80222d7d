//! What is attached to a manifest: the referrers API, and the tag that stands
//! in for it.
//!
//! A registry that knows the API answers a manifest with a `subject` with
//! `OCI-Subject`, and lists it. For one that does not, clients keep an index of
//! the attached at the tag `sha256-<hex>` themselves (distribution
//! specification, "Referrers Tag Schema").
//!
//! There is no compare-and-swap: of two clients that merge at the same moment,
//! one overwrites the other. So each reads the index again after it wrote it,
//! at once and after a moment that is longer than another's reading and
//! writing takes, and begins anew when its own entry is gone. Within one
//! process merges take turns.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kiln_model::{Code, Digest, Error, Result};
use reqwest::{Method, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::host::random;
use crate::repository::{Pages, Repository};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// A page of referrers.
const PAGE: u64 = 16 << 20;
/// How often an index is merged anew when others overwrite it.
const MERGES: u32 = 20;
/// How long another's reading and writing takes at least.
const MOMENT: Duration = Duration::from_millis(50);

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Value>,
}

impl Repository {
    /// Descriptors of what is attached to `subject`, of one kind or of all:
    /// from the referrers API, or where there is none from the fallback tag
    /// (`sha256-<hex>`).
    ///
    /// # Errors
    /// As [`Repository::manifest`].
    pub async fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Value>> {
        let mut found = match self.by_api(subject).await? {
            Some(found) => found,
            None => self.at_tag(subject).await?,
        };
        if let Some(wanted) = artifact_type {
            found.retain(|descriptor| descriptor["artifactType"].as_str() == Some(wanted));
        }
        Ok(found)
    }

    async fn by_api(&self, subject: &Digest) -> Result<Option<Vec<Value>>> {
        if self.host.without_referrers.load(Ordering::Relaxed) {
            return Ok(None);
        }
        // Not asked for one kind alone: a registry may ignore that, and the
        // list is short.
        let what = format!("list what is attached to {}@{subject}", self.shown());
        let ask = self.request(what, Method::GET, &format!("referrers/{subject}"), "pull").header(header::ACCEPT, INDEX).limit(PAGE);
        let mut found = Vec::new();
        let mut index = true;
        let pages = self
            .pages(ask, |answer| {
                // Some answer 200 with a page of HTML to whatever they do not know.
                match serde_json::from_slice::<Index>(&answer.bytes) {
                    Ok(page) => found.extend(page.manifests),
                    Err(_) => index = false,
                }
                Ok(())
            })
            .await?;
        match pages {
            Pages::All if index => return Ok(Some(found)),
            Pages::All => {}
            Pages::Refused(refused) => {
                let (ask, answer) = *refused;
                let unknown = [StatusCode::NOT_FOUND, StatusCode::METHOD_NOT_ALLOWED, StatusCode::BAD_REQUEST, StatusCode::NOT_IMPLEMENTED];
                if !unknown.contains(&answer.status) {
                    return Err(self.host.refused(&ask, &answer).await);
                }
            }
        }
        self.host.without_referrers.store(true, Ordering::Relaxed);
        Ok(None)
    }

    async fn at_tag(&self, subject: &Digest) -> Result<Vec<Value>> {
        let Some(fetched) = self.manifest(&fallback(subject)).await? else { return Ok(Vec::new()) };
        let index: Index = serde_json::from_slice(&fetched.bytes).map_err(|error| {
            Error::new(Code::Corrupt, format!("{}:{} is not the index of what is attached", self.shown(), fallback(subject)))
                .because(error)
                .next("remove that tag, then attach anew")
        })?;
        Ok(index.manifests)
    }

    /// Stores the manifest `bytes`, whose `subject` is `subject`, by its
    /// digest, and sees to it that [`Repository::referrers`] finds it: where
    /// the registry does not do that, by merging it into the index at the
    /// fallback tag, re-reading until it is in it. What the manifest names
    /// must be there already.
    ///
    /// # Errors
    /// [`Code::Refused`] when the registry does not let the fallback tag be
    /// moved. [`Code::Infrastructure`] when others overwrite it again and
    /// again. Else as [`Repository::put_manifest`].
    pub async fn attach(
        &self,
        subject: &Digest,
        media_type: &str,
        artifact_type: &str,
        bytes: &[u8],
        annotations: &BTreeMap<String, String>,
    ) -> Result<Digest> {
        let digest = Digest::of(bytes);
        let pushed = self.put_manifest(&digest.to_string(), media_type, bytes).await?;
        if pushed.subject_known {
            return Ok(digest);
        }
        let mut entry = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len(), "artifactType": artifact_type });
        if !annotations.is_empty() {
            entry["annotations"] = json!(annotations);
        }
        self.merge(subject, &entry).await?;
        Ok(digest)
    }

    async fn merge(&self, subject: &Digest, entry: &Value) -> Result<()> {
        let tag = fallback(subject);
        let own = |entries: &[Value]| entries.iter().any(|other| other["digest"] == entry["digest"]);
        let _turn = self.merging.lock().await;
        for attempt in 1..=MERGES {
            let begun = Instant::now();
            let mut entries = self.at_tag(subject).await?;
            if !own(&entries) {
                entries.push(entry.clone());
                let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
                let bytes = serde_json::to_vec(&index).map_err(|error| Error::new(Code::Failed, "cannot write an index").because(error))?;
                self.put_manifest(&tag, INDEX, &bytes).await.map_err(|error| {
                    if error.kind() != Code::Refused {
                        return error;
                    }
                    Error::new(Code::Refused, format!("cannot attach to {}@{subject}: the registry does not let {tag} be moved", self.shown()))
                        .because(error)
                        .next("take tags that begin with `sha256-` out of the registry's rule of immutable tags: without the referrers API, what is attached is listed there")
                })?;
                if !own(&self.at_tag(subject).await?) {
                    self.overwritten(&tag, attempt).await;
                    continue;
                }
            }
            // Whoever read before we wrote has written by then.
            tokio::time::sleep((begun.elapsed() * 2).clamp(MOMENT, Duration::from_secs(5))).await;
            if own(&self.at_tag(subject).await?) {
                return Ok(());
            }
            self.overwritten(&tag, attempt).await;
        }
        Err(Error::new(
            Code::Infrastructure,
            format!("cannot attach to {}@{subject}: others overwrote {tag} {MERGES} times in a row", self.shown()),
        )
        .next("run the same command again when nobody else attaches to this image"))
    }

    async fn overwritten(&self, tag: &str, attempt: u32) {
        self.host.note(format!("{}:{tag} was overwritten by another client; merging it anew", self.shown()));
        tokio::time::sleep(MOMENT.mul_f64(random() * f64::from(attempt.min(10)) * 2.0)).await;
    }
}

/// The tag at which clients list what is attached to `subject`.
fn fallback(subject: &Digest) -> String {
    format!("sha256-{}", subject.hex())
}
