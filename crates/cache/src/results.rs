//! What tests have found on disks: a small file for each disk and test, written
//! under another name and renamed, so that it is whole or not there.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use kiln_model::home::Home;
use kiln_model::trial::{Results, Tested};
use kiln_model::{Digest, Key, Result, ResultExt as _};

/// Results below `$KILN_HOME/cache/results`.
#[derive(Debug, Clone)]
pub struct ResultFiles {
    folder: PathBuf,
}

impl ResultFiles {
    /// Those below `home`. Nothing is made before there is one to keep.
    pub fn new(home: &Home) -> Self {
        Self { folder: home.cache().join("results") }
    }

    fn folder_of(&self, disk: &Digest) -> PathBuf {
        self.folder.join(disk.hex())
    }

    fn write(&self, disk: &Digest, tested: &Tested) -> io::Result<()> {
        let folder = self.folder_of(disk);
        DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
        let part = folder.join(format!(".{}", ulid::Ulid::generate()));
        let bytes = serde_json::to_vec(tested)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part)?;
        let written = file.write_all(&bytes).and_then(|()| file.sync_data());
        let written = written.and_then(|()| std::fs::rename(&part, folder.join(format!("{}.json", tested.key.hex()))));
        if written.is_err() {
            drop(std::fs::remove_file(&part));
        }
        written
    }
}

impl Results for ResultFiles {
    fn passed(&self, disk: &Digest, test: &Key) -> Result<Option<Tested>> {
        let path = self.folder_of(disk).join(format!("{}.json", test.hex()));
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            read => read.trying(|| format!("read {}", path.display()))?,
        };
        // What another version of kiln has written, or a torn file, is none.
        let tested: Option<Tested> = serde_json::from_slice(&bytes).ok();
        Ok(tested.filter(|tested| tested.key == *test && !tested.failed()))
    }

    fn keep(&self, disk: &Digest, tested: &Tested) -> Result<()> {
        self.write(disk, &Tested { cached: false, ..tested.clone() })
            .trying(|| format!("keep what the test `{}` found in {}", tested.name, self.folder.display()))
    }
}

#[cfg(test)]
mod tests {
    use kiln_model::key::KeyHasher;
    use kiln_model::provision::{Case, Outcome};

    use super::*;

    fn tested(name: &str, outcome: Outcome) -> Tested {
        let cases = vec![Case { name: "a".into(), seconds: 0.0, outcome }];
        Tested {
            name: name.into(),
            kind: "shell".into(),
            key: KeyHasher::new(name).finish(),
            cases,
            seconds: 1.0,
            finished: 5,
            cached: true,
        }
    }

    #[test]
    fn what_passed_is_found_and_what_failed_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let results = ResultFiles::new(&Home::open(Some(folder.path().to_owned())).unwrap());
        let (disk, other) = (Digest::of("disk"), Digest::of("other"));
        let good = tested("good", Outcome::Passed);
        assert_eq!(results.passed(&disk, &good.key).unwrap(), None);
        results.keep(&disk, &good).unwrap();
        assert_eq!(results.passed(&disk, &good.key).unwrap(), Some(Tested { cached: false, ..good.clone() }));
        assert_eq!(results.passed(&other, &good.key).unwrap(), None);

        // The newest counts.
        results.keep(&disk, &Tested { cases: tested("x", Outcome::Failed("why".into())).cases, ..good.clone() }).unwrap();
        assert_eq!(results.passed(&disk, &good.key).unwrap(), None);

        std::fs::write(results.folder_of(&disk).join(format!("{}.json", good.key.hex())), "{\"na").unwrap();
        assert_eq!(results.passed(&disk, &good.key).unwrap(), None, "a torn file is none");
        results.keep(&disk, &good).unwrap();
        assert!(results.passed(&disk, &good.key).unwrap().is_some());
        assert_eq!(std::fs::read_dir(results.folder_of(&disk)).unwrap().count(), 1, "no part is left");
    }
}
