//! How a tool comes into a guest, and leaves it.

use kiln_model::guest::{Command, GuestExt as _, quote};
use kiln_model::key::KeyHasher;
use kiln_model::provision::Step;
use kiln_model::{Code, Error, Result};

use crate::shell::Shell;

/// Where what bootstrap has to remember is kept while a step runs (tmpfs).
const MEMORY: &str = "/run/kiln/bootstrap";

/// What has to be in the guest for a tool to run.
#[derive(Debug, Clone)]
pub(crate) struct Presence {
    /// Programs of which the first one found is the tool's.
    pub(crate) programs: Vec<String>,
    /// Debian packages that bring it.
    pub(crate) packages: Vec<String>,
    /// Script (bash, strict) that does the rest once the packages are there;
    /// may be empty.
    pub(crate) install: String,
    /// What the tool, once it has run, leaves outside of its packages: files
    /// and folders that are removed with it, unless they were there before.
    pub(crate) remains: Vec<String>,
}

impl Presence {
    pub(crate) fn program(&self) -> &str {
        self.programs.first().map_or("", String::as_str)
    }

    pub(crate) fn key(&self, hasher: &mut KeyHasher) {
        for package in &self.packages {
            hasher.hidden("package", package);
        }
        hasher.hidden("install", &self.install);
    }

    pub(crate) async fn is_there(&self, step: &Step<'_>) -> Result<bool> {
        let names: Vec<String> = self.programs.iter().map(|program| quote(program)).collect();
        let line = format!("for p in {}; do command -v \"$p\" > /dev/null && exit 0; done; exit 1", names.join(" "));
        Ok(step.guest.output(&Command::new(line)).await?.exit.success())
    }

    /// Installs it, unless it is there; remembers what that added.
    pub(crate) async fn bring(&self, step: &Step<'_>) -> Result<()> {
        if self.is_there(step).await? {
            return Ok(());
        }
        Shell::own(self.bring_script()).watched(&Self::as_root(step, &mut step.common.clone()), &mut |_, _| {}).await.map_err(|error| {
            let next = "the guest must reach a mirror of its distribution";
            Error::new(Code::Step, "the tool could not be installed in the guest").because(error).step(&step.common.name).next(next)
        })
    }

    /// Removes what [`Presence::bring`] added, but for what something else has
    /// come to need since.
    pub(crate) async fn take_away(&self, step: &Step<'_>) -> Result<()> {
        Shell::own(self.take_away_script())
            .watched(&Self::as_root(step, &mut step.common.clone()), &mut |_, _| {})
            .await
            .map_err(|error| Error::new(Code::Step, "the tool could not be removed from the guest").because(error).step(&step.common.name))
    }

    /// Leaves all in the guest: a later step that finds the tool there must not
    /// take away what this one was told to keep.
    pub(crate) async fn leave(&self, step: &Step<'_>) -> Result<()> {
        step.guest.output(&Command::new(format!("rm -rf {MEMORY}"))).await.map(drop)
    }

    /// The same step, as root: its user need not be able to install anything.
    fn as_root<'a>(step: &'a Step<'a>, common: &'a mut kiln_model::provision::Common) -> Step<'a> {
        common.user = None;
        Step { guest: step.guest.clone(), common, reports: step.reports, secrets: step.secrets, work: step.work }
    }

    fn bring_script(&self) -> String {
        let packages: Vec<String> = self.packages.iter().map(|package| quote(package)).collect();
        let remains: Vec<String> = self.remains.iter().map(|path| quote(path)).collect();
        // What a package would start must not run while the machine is made.
        format!(
            "m={MEMORY}; mkdir -p -m 700 $m
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ] || grep -q kiln $policy; then
  printf '#!/bin/sh\n# kiln: nothing is started while a tool is installed.\nexit 101\n' > $policy
  chmod 755 $policy
fi
accounts() {{ cut -d : -f 1 \"$1\" | LC_ALL=C sort; }}
installed() {{ dpkg-query -W -f '${{db:Status-Abbrev}} ${{binary:Package}}\\n' | sed -n 's/^ii *//p' | LC_ALL=C sort; }}
# Another attempt must not take what the one before brought for what was there.
if [ ! -e $m/before ]; then
  accounts /etc/passwd > $m/users
  accounts /etc/group > $m/groups
  for path in {}; do [ -e \"$path\" ] || printf '%s\\n' \"$path\"; done > $m/remains
  installed > $m/before.new
  mv $m/before.new $m/before
fi
[ -n \"$(find /var/lib/apt/lists -name '*_Packages*' -print -quit)\" ] || {{ touch $m/lists; apt-get -q update; }}
apt-get -q install -y --no-install-recommends {packages}
! grep -qs kiln $policy || rm -f $policy
installed > $m/after
LC_ALL=C comm -13 $m/before $m/after > $m/added
accounts /etc/passwd | LC_ALL=C comm -13 $m/users - > $m/new-users
accounts /etc/group | LC_ALL=C comm -13 $m/groups - > $m/new-groups
{install}\n",
            remains.join(" "),
            packages = packages.join(" "),
            install = self.install,
        )
    }

    /// Packages that were added are marked as needed by nobody; those among
    /// them that apt then finds superfluous go. What was superfluous before is
    /// none of kiln's business.
    fn take_away_script(&self) -> String {
        format!(
            "m={MEMORY}; [ -e $m/added ] || exit 0
mapfile -t added < $m/added
if [ ${{#added[@]}} -gt 0 ]; then
  sed 's/:.*//' $m/added | LC_ALL=C sort > $m/names
  mapfile -t own < <(printf '%s\\n' {packages} | LC_ALL=C sort | LC_ALL=C comm -12 - $m/names)
  [ ${{#own[@]}} = 0 ] || apt-mark auto \"${{own[@]}}\" > /dev/null
  lean='-o APT::AutoRemove::RecommendsImportant=false -o APT::AutoRemove::SuggestsImportant=false'
  apt-get -s $lean autoremove | sed -n 's/^Remv \\([^ ]*\\).*/\\1/p' | LC_ALL=C sort > $m/superfluous
  LC_ALL=C comm -12 <(sed 's/:.*//' $m/superfluous | LC_ALL=C sort) $m/names > $m/going
  if [ -s $m/going ]; then
    apt-get -q purge -y $(cat $m/going)
    # No package that stays makes use of these.
    unused() {{ ! grep -qsw -e \"$1\" /var/lib/dpkg/info/*.postinst /var/lib/dpkg/info/*.config; }}
    while read -r name; do
      unused \"$name\" || continue
      dpkg-statoverride --list | while read -r user group _ path; do
        if [ \"$user\" = \"$name\" ] || [ \"$group\" = \"$name\" ]; then dpkg-statoverride --quiet --remove \"$path\"; fi
      done
      userdel \"$name\" 2> /dev/null
    done < $m/new-users
    while read -r name; do
      if unused \"$name\" && getent group \"$name\" > /dev/null; then groupdel \"$name\"; fi
    done < $m/new-groups
  fi
fi
while read -r path; do rm -rf -- \"$path\"; done < $m/remains
if [ -e $m/lists ]; then rm -rf /var/lib/apt/lists/*; fi
apt-get clean
rm -rf $m\n",
            packages = self.packages.iter().map(|package| quote(package)).collect::<Vec<_>>().join(" "),
        )
    }
}
