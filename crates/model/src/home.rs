//! Where kiln keeps its state: `$KILN_HOME`.

use std::path::{Path, PathBuf};

use crate::error::{Code, Error, Result, ResultExt};

/// The folder that holds `store/`, `cache/`, `history/`, `ledger/` and `work/`.
#[derive(Debug, Clone)]
pub struct Home(PathBuf);

impl Home {
    /// `explicit` (`$KILN_HOME`), or `kiln` in the platform's data directory.
    /// The folder is made, readable by its owner alone.
    ///
    /// # Errors
    /// When no home directory is known or the folder cannot be made.
    pub fn open(explicit: Option<PathBuf>) -> Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let env = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let root = explicit
            .filter(|path| !path.as_os_str().is_empty())
            .or_else(|| env("XDG_DATA_HOME").map(|p| p.join("kiln")))
            .or_else(|| env("HOME").map(|p| p.join(".local/share/kiln")))
            .ok_or_else(|| Error::new(Code::Usage, "no home directory is known").next("set KILN_HOME to a folder with room for images"))?;
        let root = std::path::absolute(&root).trying(|| format!("use {} as KILN_HOME", root.display()))?;
        for folder in [root.clone(), root.join("cache"), root.join("history"), root.join("ledger"), root.join("work")] {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(|error| {
                Error::new(Code::Failed, format!("cannot make the folder {}", folder.display()))
                    .because(error)
                    .next("set KILN_HOME to a folder that you may write to")
            })?;
        }
        Ok(Self(root))
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The OCI image layout.
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }

    /// What can be made again: bases, downloads, checkpoints.
    pub fn cache(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// What earlier bakes were made of.
    pub fn history(&self) -> PathBuf {
        self.0.join("history")
    }

    /// The records of what bakes have created.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger")
    }

    /// Folders of running bakes.
    pub fn work(&self) -> PathBuf {
        self.0.join("work")
    }
}
