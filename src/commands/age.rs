//! `kiln age`: which images are out of date: how old they and their bases are,
//! whether there is a newer base, and which of their packages the distribution
//! has newer versions of.
//!
//! Everything is read from disks and from the archives that the image's own apt
//! would ask. As with `kiln diff`, the status is 0 when that worked, and 3 with
//! `--exit-code` when something is out of date, or with `--max` too old.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use kiln_bake::explain::span;
use kiln_contents::archive::{Available, Outdated, Sources, outdated};
use kiln_contents::packages::Kind;
use kiln_disk::files::Pool;
use kiln_evidence::{Subject, What};
use kiln_model::machine::{FileKind, Files};
use kiln_model::reference::Reference;
use kiln_model::{Code, Digest, Error, Result, ResultExt as _};
use kiln_store::{Image, Listing, Store};
use serde::Serialize;
use serde_json::json;

use super::App;
use super::sbom::{files, in_store};
use crate::archive::Archives;
use crate::cli::Age;
use crate::output::{show_error, table};
use crate::{evidence, network};

/// Seconds of a day.
const DAY: u64 = 86_400;

pub(super) async fn run(app: &App, arguments: &Age) -> Result<u8> {
    let store = app.store()?;
    let listing = store.images(true)?;
    let mut images = Vec::new();
    for text in &arguments.references {
        images.push((text.clone(), in_store(app, &store, &text.parse::<Reference>()?).await?));
    }
    if arguments.references.is_empty() {
        let named = listing.images.iter().filter(|image| !image.base && !image.names.is_empty());
        images.extend(named.map(|image| (name(image), image.clone())));
    }
    let reports = app.output.reports();
    let mut archives = Archives::new(&app.home, crate::site::load()?.bases, arguments.offline, reports.clone())?;
    let mut rows = Vec::new();
    for (name, image) in &images {
        let mut asker = Asker { app, store: &store, listing: &listing, archives: &mut archives, offline: arguments.offline };
        rows.push(asker.row(name, image).await.trying(|| format!("tell how old {name} is"))?);
    }
    archives.tidy();
    rows.sort_by(|a, b| b.need().cmp(&a.need()).then_with(|| a.image.cmp(&b.image)));

    let too_old = |row: &Row| arguments.max.is_some_and(|days| row.older_than(u64::from(days)));
    let late = rows.iter().any(|row| too_old(row) || (arguments.exit_code && row.is_behind()));
    let value = json!({ "images": rows, "max_days": arguments.max, "too_old": rows.iter().filter(|row| too_old(row)).map(|row| &row.image).collect::<Vec<_>>() });
    app.output.result(&value, || draw(&rows, arguments));
    // What is known is shown first; that not all could be asked is no success.
    if let Some(why) = rows.iter().find_map(|row| row.unreachable.as_ref()) {
        let error = Error::new(Code::Infrastructure, format!("not every archive could be asked: {why}"))
            .next("check the network and the site's [proxy]; --offline makes do with what was fetched before");
        show_error(&error);
        return Ok(Code::Infrastructure.exit_status());
    }
    Ok(if late { Code::Test.exit_status() } else { 0 })
}

/// What is known of an image.
#[derive(Debug, Clone, Serialize)]
struct Row {
    image: String,
    digest: Digest,
    created: Option<String>,
    age_days: Option<u64>,
    base: BaseRow,
    packages: Option<Packages>,
    /// What could not be told, and why.
    notes: Vec<String>,
    /// The archive that could not be reached.
    #[serde(skip)]
    unreachable: Option<String>,
}

/// What is known of its base.
#[derive(Debug, Clone, Default, Serialize)]
struct BaseRow {
    name: Option<String>,
    digest: Option<Digest>,
    created: Option<String>,
    age_days: Option<u64>,
    /// Whether there is a newer one; `null`: that cannot be told.
    newer: Option<bool>,
    /// What is newer, or why it cannot be told.
    why: Option<String>,
}

/// What is known of its packages.
#[derive(Debug, Clone, Serialize)]
struct Packages {
    installed: usize,
    outdated: Vec<Outdated>,
    security: usize,
}

impl Row {
    /// What needs most to be baked again comes first.
    fn need(&self) -> (usize, bool, usize, u64) {
        let (security, outdated) = self.packages.as_ref().map_or((0, 0), |packages| (packages.security, packages.outdated.len()));
        (security, self.base.newer == Some(true), outdated, self.age_days.unwrap_or_default())
    }

    fn is_behind(&self) -> bool {
        self.base.newer == Some(true) || self.packages.as_ref().is_some_and(|packages| !packages.outdated.is_empty())
    }

    fn older_than(&self, days: u64) -> bool {
        [self.age_days, self.base.age_days].into_iter().flatten().any(|age| age > days)
    }
}

/// Finds out what is known.
struct Asker<'a> {
    app: &'a App,
    store: &'a Store,
    listing: &'a Listing,
    archives: &'a mut Archives,
    offline: bool,
}

impl Asker<'_> {
    async fn row(&mut self, name: &str, image: &Image) -> Result<Row> {
        let created = image.created().map(ToOwned::to_owned);
        let mut row = Row {
            image: name.to_owned(),
            digest: image.digest,
            age_days: created.as_deref().and_then(days),
            created,
            base: BaseRow::default(),
            packages: None,
            notes: Vec::new(),
            unreachable: None,
        };
        let disk = match image.disk_digest() {
            Some(_) => files(self.store, &image.digest, &Pool::default())?,
            None => None,
        };
        match &disk {
            Some(disk) => self.packages(disk, image, &mut row).await?,
            None => row.notes.push("its file system cannot be read from here, so nothing is known of its packages".to_owned()),
        }
        self.base(image, disk.as_ref().map(|disk| disk as &dyn Files), &mut row).await?;
        row.notes.dedup();
        Ok(row)
    }

    /// Compares its packages with what its own sources have.
    async fn packages(&mut self, disk: &dyn Files, image: &Image, row: &mut Row) -> Result<()> {
        let inventory = kiln_contents::packages::read(disk)?;
        row.notes.extend(inventory.notes.iter().cloned());
        let installed = inventory.packages.iter().filter(|package| package.kind == Kind::Deb).count();
        if installed < inventory.packages.len() {
            row.notes.push(format!("{} packages are not of dpkg, and are not compared", inventory.packages.len() - installed));
        }
        if installed == 0 {
            return Ok(());
        }
        let sources = Sources::read(disk)?;
        row.notes.extend(sources.notes);
        let mut indexes = Vec::new();
        for source in &sources.all {
            let asked = self.archives.index(source, dpkg_arch(&image.config.architecture)).await;
            match (asked, self.archives.release(&source.uri, &source.suite).await) {
                (Ok(index), Ok(release)) => indexes.push((index, release.is_security())),
                (Err(error), _) | (_, Err(error)) => {
                    if error.kind() == Code::Infrastructure {
                        row.unreachable.get_or_insert_with(|| error.chain());
                    }
                    row.notes.push(format!("{} {}: {}", source.suite, source.component, error.chain()));
                }
            }
        }
        if indexes.is_empty() {
            row.notes.push("no archive was asked, so nothing is known of newer packages".to_owned());
            return Ok(());
        }
        let available: Vec<Available<'_>> = indexes.iter().map(|(index, security)| Available { index, security: *security }).collect();
        let outdated = outdated(&inventory, &available);
        let security = outdated.iter().filter(|package| package.security).count();
        row.packages = Some(Packages { installed, outdated, security });
        Ok(())
    }

    /// Finds out what its base is, and whether there is a newer one.
    async fn base(&mut self, image: &Image, disk: Option<&dyn Files>, row: &mut Row) -> Result<()> {
        let Some(digest) = image.config.base else { return Ok(()) };
        let stored = self.listing.images.iter().filter(|other| other.config.as_base() == Some(digest)).min_by_key(|other| !other.base);
        let said = evidence::find(self.store, &Subject::new(image.digest), &[]).await?.into_iter().rev().find_map(|examined| {
            let sound = examined.is_sound() || examined.signed;
            match examined.what {
                What::Provenance(provenance) if sound && !provenance.recipe.base.is_empty() => Some(provenance.recipe.base),
                _ => None,
            }
        });
        let label = said.or_else(|| stored.map(|base| base.config.labels.get("label").cloned().unwrap_or_else(|| name(base))));
        let created = stored.and_then(|base| base.created()).map(ToOwned::to_owned);
        row.base = BaseRow {
            name: label.clone(),
            digest: Some(digest),
            age_days: created.as_deref().and_then(days),
            created: created.clone(),
            newer: None,
            why: None,
        };
        let Some(label) = label else {
            row.base.why = Some("nothing here says what it is called".to_owned());
            return Ok(());
        };
        let judged = if let Some(suite) = label.strip_prefix("debian ") {
            let base_disk = match stored {
                Some(base) if base.disk_digest().is_some() => files(self.store, &base.digest, &Pool::default())?,
                _ => None,
            };
            let disk = base_disk.as_ref().map(|disk| disk as &dyn Files).or(disk);
            self.debian(suite, disk, created.as_deref(), row).await?
        } else if label.starts_with("url ") {
            Err("what the address holds by now is known when it is fetched: `kiln bake --fresh`".to_owned())
        } else if label.starts_with("file ") {
            Err("it is a file, of which there is one at a time".to_owned())
        } else {
            self.image(&label, digest, row).await?
        };
        match judged {
            Ok(newer) => {
                row.base.newer = Some(newer.is_some());
                row.base.why = newer;
            }
            Err(why) => row.base.why = Some(why),
        }
        Ok(())
    }

    /// A base of Debian is behind when its suite has had another point release.
    async fn debian(
        &mut self,
        suite: &str,
        disk: Option<&dyn Files>,
        created: Option<&str>,
        row: &mut Row,
    ) -> Result<std::result::Result<Option<String>, String>> {
        let Some(disk) = disk else { return Ok(Err("its disk is not here".to_owned())) };
        let sources = Sources::read(disk)?;
        let Some(source) = sources.all.iter().find(|source| source.suite == suite) else {
            return Ok(Err(format!("its apt has no source of {suite}")));
        };
        let release = match self.archives.release(&source.uri, suite).await {
            Ok(release) => release,
            Err(error) => {
                if error.kind() == Code::Infrastructure {
                    row.unreachable.get_or_insert_with(|| error.chain());
                }
                return Ok(Err(error.chain()));
            }
        };
        let path = "/etc/debian_version";
        let version = match disk.kind(path)? {
            Some(FileKind::File(size)) if size < 4096 => String::from_utf8_lossy(&disk.read(path)?).trim().to_owned(),
            _ => String::new(),
        };
        let numbered = |text: &str| text.starts_with(|c: char| c.is_ascii_digit());
        if numbered(&version) && numbered(&release.version) {
            let newer = Kind::Deb.compare(&release.version, &version).is_gt();
            return Ok(Ok(newer.then(|| format!("{version} → {}", release.version))));
        }
        // A suite without numbers (testing, sid) changes from day to day.
        let created: Option<Timestamp> = created.and_then(|created| created.parse().ok());
        Ok(match (created, release.date) {
            (Some(created), Some(date)) => Ok((date > created).then(|| format!("{suite} of {}", date.strftime("%Y-%m-%d")))),
            _ => Err(format!("neither it nor {suite} says of when it is")),
        })
    }

    /// A base that is an image is behind when its name leads elsewhere by now.
    async fn image(&mut self, label: &str, was: Digest, row: &mut Row) -> Result<std::result::Result<Option<String>, String>> {
        let Ok(reference) = label.parse::<Reference>() else { return Ok(Err(format!("`{label}` is no name that can be asked"))) };
        let now = if reference.registry.is_none() {
            match self.store.resolve(&reference) {
                Ok(digest) => self.store.image(&digest)?.config.as_base(),
                Err(error) if error.kind() == Code::NotFound => return Ok(Err("its name leads nowhere any more".to_owned())),
                Err(error) => return Err(error),
            }
        } else if self.offline {
            return Ok(Err("it is at a registry, and --offline asks nobody".to_owned()));
        } else {
            let client = self.app.registry()?;
            match network::open(&client, &reference).await {
                Ok(image) => image.config().as_base(),
                Err(error) => {
                    if error.kind() == Code::Infrastructure {
                        row.unreachable.get_or_insert_with(|| error.chain());
                    }
                    return Ok(Err(error.chain()));
                }
            }
        };
        Ok(match now {
            Some(now) if now == was => Ok(None),
            Some(now) => Ok(Some(format!("now sha256:{}…", now.short()))),
            None => Err("what it leads to has no disk".to_owned()),
        })
    }
}

/// dpkg's word for an architecture.
fn dpkg_arch(architecture: &str) -> &str {
    match architecture {
        "386" => "i386",
        "arm" => "armhf",
        "ppc64le" => "ppc64el",
        other => other,
    }
}

fn name(image: &Image) -> String {
    let named = image.names.iter().find(|name| name.contains(':')).or(image.names.first()).cloned();
    named.unwrap_or_else(|| format!("{}@sha256:{}", image.config.name, image.digest.short()))
}

/// Whole days since a time.
fn days(created: &str) -> Option<u64> {
    let time: Timestamp = created.parse().ok()?;
    Some(SystemTime::now().duration_since(time.into()).unwrap_or_default().as_secs() / DAY)
}

fn draw(rows: &[Row], arguments: &Age) -> String {
    if rows.is_empty() {
        return "no images yet; `kiln bake` bakes one".to_owned();
    }
    let age = |created: &Option<String>| {
        let time: Option<Timestamp> = created.as_deref().and_then(|text| text.parse().ok());
        let age = time.and_then(|time| SystemTime::now().duration_since(time.into()).ok());
        age.map_or_else(|| "-".to_owned(), |age| span(Duration::from_secs(age.as_secs().max(1))))
    };
    let mut all = vec![["IMAGE", "AGE", "BASE", "BASE'S AGE", "NEWER BASE", "PACKAGES OUT OF DATE"].map(String::from).to_vec()];
    all.extend(rows.iter().map(|row| {
        let newer = match (row.base.newer, &row.base.why) {
            (Some(true), Some(why)) => why.clone(),
            (Some(true), None) => "yes".to_owned(),
            (Some(false), _) => "no".to_owned(),
            (None, _) if row.base.digest.is_none() => "-".to_owned(),
            (None, _) => "?".to_owned(),
        };
        let packages = match &row.packages {
            None => "?".to_owned(),
            Some(packages) if packages.outdated.is_empty() => format!("none of {}", packages.installed),
            Some(packages) if packages.security == 0 => format!("{} of {}", packages.outdated.len(), packages.installed),
            Some(packages) => format!("{} of {}, {} for security", packages.outdated.len(), packages.installed, packages.security),
        };
        vec![
            row.image.clone(),
            age(&row.created),
            row.base.name.clone().unwrap_or_else(|| "-".to_owned()),
            age(&row.base.created),
            newer,
            packages,
        ]
    }));
    let mut text = table(&all);
    for row in rows {
        if let (None, Some(why)) = (row.base.newer, &row.base.why) {
            text.push_str(&format!("\n{}: whether there is a newer base cannot be told: {why}", row.image));
        }
        row.notes.iter().for_each(|note| text.push_str(&format!("\n{}: {note}", row.image)));
    }
    if arguments.packages {
        for row in rows {
            let Some(packages) = row.packages.as_ref().filter(|packages| !packages.outdated.is_empty()) else { continue };
            let mut list = vec![["PACKAGE", "INSTALLED", "AVAILABLE", ""].map(String::from).to_vec()];
            list.extend(packages.outdated.iter().map(|package| {
                let security = if package.security { "security" } else { "" };
                vec![package.name.clone(), package.installed.clone(), package.available.clone(), security.to_owned()]
            }));
            text.push_str(&format!("\n\n{}\n{}", row.image, table(&list).trim_end()));
        }
    }
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(image: &str, age: u64, newer: Option<bool>, packages: &[bool]) -> Row {
        let outdated = |security: &bool| Outdated {
            name: "p".into(),
            arch: "amd64".into(),
            installed: "1".into(),
            available: "2".into(),
            security: *security,
        };
        Row {
            image: image.into(),
            digest: Digest::of(image),
            created: Some("2024-01-01T00:00:00Z".into()),
            age_days: Some(age),
            base: BaseRow { newer, why: newer.map(|_| "12.1 → 12.2".into()), digest: Some(Digest::of("b")), ..BaseRow::default() },
            packages: Some(Packages {
                installed: 9,
                outdated: packages.iter().map(outdated).collect(),
                security: packages.iter().filter(|security| **security).count(),
            }),
            notes: Vec::new(),
            unreachable: None,
        }
    }

    #[test]
    fn what_needs_most_comes_first() {
        let mut rows = [
            row("current", 1, Some(false), &[]),
            row("old", 400, Some(false), &[]),
            row("behind", 2, Some(false), &[false, false]),
            row("base", 2, Some(true), &[]),
            row("security", 1, Some(false), &[true]),
        ];
        rows.sort_by_key(|row| std::cmp::Reverse(row.need()));
        assert_eq!(rows.iter().map(|row| row.image.as_str()).collect::<Vec<_>>(), ["security", "base", "behind", "old", "current"]);
        let behind: Vec<bool> = rows.iter().map(Row::is_behind).collect();
        assert_eq!(behind, [true, true, true, false, false]);
        assert!(rows[3].older_than(399) && !rows[3].older_than(400));
    }

    #[test]
    fn it_is_drawn() {
        let arguments = Age { references: Vec::new(), max: None, exit_code: false, offline: false, packages: true };
        let text = draw(&[row("web:1", 3, Some(true), &[true, false]), row("db:1", 3, None, &[])], &arguments);
        assert!(text.contains("2 of 9, 1 for security") && text.contains("none of 9") && text.contains("12.1 → 12.2"), "{text}");
        assert!(text.contains("PACKAGE") && text.contains("security"), "{text}");
    }
}
