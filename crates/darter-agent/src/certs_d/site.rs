//! The directory of one registry under certs.d: what to do there for each thing found there.
//!
//! What is found decides, never what we remember: the agent may have been killed between any two
//! steps. The order of steps makes each state on the way one that the next round understands: a
//! backup before the file it backs, the base before the file made from it.

use std::path::{Path, PathBuf};

use darter_core::Registry;
use darter_core::hosts_toml::{self, Certificates, Foreign, ForeignOrigin, HostsTomlError, LeftOut, Merged, Wanted};
use tracing::warn;

use super::CertsDError;
use super::files::{self, BACKUP, BASE, CREATED, Content, HOSTS, UNREADABLE};

/// Another writer may win a race; then it is looked at again, so often.
const ATTEMPTS: usize = 3;

/// One registry's place.
#[derive(Debug, Clone)]
pub(super) struct Site {
    /// The certs.d that is written.
    pub(super) root: PathBuf,
    /// containerd's other roots after it: what they say, a directory of ours hides.
    pub(super) later_roots: Vec<PathBuf>,
    pub(super) wanted: Wanted,
}

/// How an attempt to put our table in ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Installed {
    /// It was there already.
    Held,
    /// It was put there.
    Written,
    /// The file was changed under our hands each time.
    Contended,
    /// Someone else has our address.
    Foreign(Foreign),
}

/// What was undone in a directory.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Undone {
    /// The registry's directory.
    pub dir: PathBuf,
    /// How it is now.
    pub how: How,
    /// Files of the user's that are left beside, to look at.
    pub kept: Vec<PathBuf>,
}

/// How a directory is after darter left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// The file that was there before is back.
    Restored,
    /// There was no file, and there is none.
    Removed,
    /// Someone edited the file meanwhile: only our table was taken out.
    EditsKept,
    /// hosts.toml was not ours; only leftovers of ours were cleared.
    Cleared,
}

/// The hosts of others in a file.
#[derive(Debug, Default)]
pub(super) struct OtherHosts {
    /// Those that want to be asked for this registry.
    pub(super) origins: Vec<ForeignOrigin>,
    /// Those that containerd alone can ask.
    pub(super) left_out: Vec<LeftOut>,
    /// Which of the programs that darter takes the place of have one.
    pub(super) left_by: Vec<Foreign>,
}

/// What our file is made from.
struct Base {
    text: Option<String>,
    record: Record,
}

/// What stands in [`BASE`] beside a file made from this.
enum Record {
    /// What stands there now.
    Stays,
    /// This; `None` where the backup says it, or there is nothing to say.
    Is(Option<String>),
}

/// All that is in the directory.
struct Found {
    now: Option<Content>,
    backup: Option<Content>,
    base: Option<Content>,
}

impl Site {
    /// The directory that containerd takes for this registry in our root, or would if it existed.
    pub(super) fn dir(&self) -> PathBuf {
        let mut paths = host_paths(&self.root, &self.wanted.registry);
        let last = paths.pop().unwrap_or_else(|| self.root.join(self.wanted.registry.as_str()));
        paths.into_iter().find(|path| path.exists()).unwrap_or(last)
    }

    /// Puts our table in, or makes sure that it is.
    pub(super) fn install(&self) -> Result<Installed, CertsDError> {
        for _ in 0..ATTEMPTS {
            if let Some(done) = self.try_install()? {
                return Ok(done);
            }
        }
        Ok(Installed::Contended)
    }

    fn try_install(&self) -> Result<Option<Installed>, CertsDError> {
        let dir = self.dir();
        self.leave_other_names(&dir)?;
        if dir.is_symlink() {
            // What it points to may be `_default`, or another registry's.
            return Err(CertsDError::Link { path: dir });
        }
        if !dir.exists() {
            return self.create(&dir);
        }
        let found = Found::read(&dir)?;
        let base = self.base(&dir, &found)?;
        let merged = match hosts_toml::merge(base.text.as_deref(), &self.wanted) {
            Ok(merged) => merged,
            Err(HostsTomlError::AddressTaken { by, .. }) => return Ok(Some(Installed::Foreign(by))),
        };
        if found.now.as_ref().is_some_and(|now| now.text == merged.text) {
            return Ok(Some(Installed::Held));
        }
        self.keep_what_is_there(&dir, &found)?;
        match base.record {
            Record::Stays => (),
            Record::Is(Some(text)) => files::put(&dir.join(BASE), &text)?,
            Record::Is(None) => files::remove(&dir.join(BASE))?,
        }
        let done = files::replace(&dir.join(HOSTS), found.now.as_ref(), &merged.text)?;
        Ok(done.then_some(Installed::Written))
    }

    fn base(&self, dir: &Path, found: &Found) -> Result<Base, CertsDError> {
        match (&found.now, &found.backup) {
            (Some(now), _) if !found.is_ours(self) => self.made_from(dir, now),
            // Edits of a file of ours are the user's word from then on.
            (Some(now), backup) if usable(now) && (backup.is_some() || found.is_edited(self)) => {
                Ok(Base { text: Some(now.text.clone()), record: Record::Stays })
            }
            (_, Some(backup)) => self.made_from(dir, backup),
            (_, None) => {
                let text = self.inherited(dir)?;
                Ok(Base { record: Record::Is(text.clone()), text })
            }
        }
    }

    fn made_from(&self, dir: &Path, file: &Content) -> Result<Base, CertsDError> {
        let text = self.theirs(dir, &file.text)?;
        let record = text.clone().filter(|text| *text != file.text);
        Ok(Base { text, record: Record::Is(record) })
    }

    /// What a file of the user's says to containerd.
    fn theirs(&self, dir: &Path, text: &str) -> Result<Option<String>, CertsDError> {
        if self.wanted.adopt
            && let Some(before) = self.before_spegel(text)?
        {
            return Ok(Some(before));
        }
        let certificates = Certificates::among(&files::names(dir)?.unwrap_or_default());
        Ok(hosts_toml::inherit(Some(text), &certificates, None))
    }

    /// Spegel moves all of certs.d to `_backup` and writes its own; an adopted registry goes on from
    /// what it had before.
    fn before_spegel(&self, text: &str) -> Result<Option<String>, CertsDError> {
        let is_spegels =
            merged_anyway(Some(text), &self.wanted).is_some_and(|merged| merged.found == [Foreign::Spegel]);
        if !is_spegels {
            return Ok(None);
        }
        let kept = self.root.join("_backup");
        match host_paths(&kept, &self.wanted.registry).into_iter().find(|path| path.is_dir()) {
            Some(dir) => says(&dir),
            None => Ok(None),
        }
    }

    /// What containerd would use for this registry if we had written nothing.
    fn inherited(&self, dir: &Path) -> Result<Option<String>, CertsDError> {
        if let Some(names) = files::names(dir)? {
            let beside = hosts_toml::inherit(None, &Certificates::among(&names), None);
            // A directory of the user's hides everything else, with or without certificates in it.
            if beside.is_some() || !names.iter().any(|name| name == CREATED) {
                return Ok(beside);
            }
        }
        match self.hidden_dir() {
            Some(hidden) => says(&hidden),
            None => Ok(None),
        }
    }

    /// The directory that containerd would take if the registry had none in our root.
    pub(super) fn hidden_dir(&self) -> Option<PathBuf> {
        let registry = &self.wanted.registry;
        let named = |root: &PathBuf| host_paths(root, registry).into_iter().chain([root.join("_default")]);
        let later = self.later_roots.iter().flat_map(named);
        [self.root.join("_default")].into_iter().chain(later).find(|path| path.is_dir())
    }

    fn create(&self, dir: &Path) -> Result<Option<Installed>, CertsDError> {
        let base = self.inherited(dir)?;
        let merged = match hosts_toml::merge(base.as_deref(), &self.wanted) {
            Ok(merged) => merged,
            Err(HostsTomlError::AddressTaken { by, .. }) => return Ok(Some(Installed::Foreign(by))),
        };
        let mut files = vec![(CREATED, ""), (HOSTS, merged.text.as_str())];
        files.extend(base.as_deref().map(|base| (BASE, base)));
        Ok(files::make_dir(dir, &files)?.then_some(Installed::Written))
    }

    /// Backs up a file that is not ours, and one of ours that nobody can read any more.
    fn keep_what_is_there(&self, dir: &Path, found: &Found) -> Result<(), CertsDError> {
        let Some(now) = &found.now else { return Ok(()) };
        let path = dir.join(HOSTS);
        match (found.is_ours(self), hosts_toml::usable(&now.text)) {
            (true, Ok(())) => Ok(()),
            (true, Err(reason)) => {
                warn!(path = %path.display(), %reason, "hosts.toml was made unreadable; it is kept beside");
                files::keep_as(&path, &dir.join(UNREADABLE))
            }
            (false, verdict) => {
                if let Err(reason) = verdict {
                    warn!(path = %path.display(), %reason, "starting afresh; the old file is the backup");
                }
                files::keep_as(&path, &dir.join(BACKUP))
            }
        }
    }

    /// A file of ours under another name of this registry, which containerd does not take any more.
    fn leave_other_names(&self, dir: &Path) -> Result<(), CertsDError> {
        for other in host_paths(&self.root, &self.wanted.registry).iter().filter(|path| *path != dir) {
            if other.is_dir() && !other.is_symlink() {
                self.leave(other)?;
            }
        }
        Ok(())
    }

    /// Takes our table out of the registry's directory.
    pub(super) fn withdraw(&self) -> Result<Option<Undone>, CertsDError> {
        let dir = self.dir();
        self.leave_other_names(&dir)?;
        if dir.is_symlink() { Ok(None) } else { self.leave(&dir) }
    }

    pub(super) fn leave(&self, dir: &Path) -> Result<Option<Undone>, CertsDError> {
        files::clear_leftovers(dir)?;
        for _ in 0..ATTEMPTS {
            let found = Found::read(dir)?;
            let created = dir.join(CREATED);
            if !found.has_ours(self) && !created.exists() {
                return Ok(None);
            }
            if let Some(how) = self.try_leave(dir, &found)? {
                files::remove(&dir.join(BASE))?;
                if created.exists() {
                    files::remove(&created)?;
                    files::remove_dir_if_empty(dir)?;
                }
                let kept = [BACKUP, UNREADABLE].map(|name| dir.join(name)).into_iter().filter(|path| path.exists());
                return Ok(Some(Undone { dir: dir.to_owned(), how, kept: kept.collect() }));
            }
        }
        Err(CertsDError::Contended { path: dir.join(HOSTS) })
    }

    fn try_leave(&self, dir: &Path, found: &Found) -> Result<Option<How>, CertsDError> {
        let (hosts, backup) = (dir.join(HOSTS), dir.join(BACKUP));
        let Some(now) = found.now.as_ref().filter(|_| found.is_ours(self)) else {
            return self.leave_theirs(dir, found);
        };
        if !usable(now) {
            files::keep_as(&hosts, &dir.join(UNREADABLE))?;
        }
        if usable(now) && found.is_edited(self) {
            let done = match hosts_toml::without(&now.text, &self.wanted) {
                Some(rest) => files::replace(&hosts, Some(now), &rest)?,
                None => files::take_away(&hosts, now)?,
            };
            if done && found.backup.as_ref().is_some_and(|backup| !self.holds_p2p(&backup.text)) {
                files::remove(&backup)?;
            }
            return Ok(done.then_some(How::EditsKept));
        }
        let (done, how) = match &found.backup {
            Some(_) => (files::put_back(&backup, &hosts, Some(now))?, How::Restored),
            None => (remove_ours(dir, Some(now))?, How::Removed),
        };
        Ok(done.then_some(how))
    }

    /// hosts.toml is not ours: at most leftovers beside it are.
    fn leave_theirs(&self, dir: &Path, found: &Found) -> Result<Option<How>, CertsDError> {
        let backup = dir.join(BACKUP);
        match (&found.now, &found.backup) {
            (None, Some(_)) => Ok(files::put_back(&backup, &dir.join(HOSTS), None)?.then_some(How::Restored)),
            (None, None) => Ok(remove_ours(dir, None)?.then_some(How::Removed)),
            (Some(now), kept) => {
                // A file of ours under the backup's name was put there by an exchange that a kill cut short.
                let is_spare = |kept: &Content| kept == now || hosts_toml::marked_url(&kept.text).is_some();
                if kept.as_ref().is_some_and(is_spare) {
                    files::remove(&backup)?;
                }
                Ok(Some(How::Cleared))
            }
        }
    }

    fn holds_p2p(&self, text: &str) -> bool {
        let p2p = |found: &Foreign| *found != Foreign::Other;
        merged_anyway(Some(text), &self.wanted).is_some_and(|merged| merged.found.iter().any(p2p))
    }

    /// The text that the file should be, from what is there now.
    pub(super) fn should_be(&self) -> Result<Result<Merged, HostsTomlError>, CertsDError> {
        let dir = self.dir();
        let base = self.base(&dir, &Found::read(&dir)?)?;
        Ok(hosts_toml::merge(base.text.as_deref(), &self.wanted))
    }

    /// Whether the file is in force as wanted, whoever wrote it.
    pub(super) fn is_in_force(&self) -> Result<bool, CertsDError> {
        let now = files::read(&self.dir().join(HOSTS))?;
        Ok(now.is_some_and(|now| hosts_toml::verify(&now.text, &self.wanted)))
    }

    /// The hosts in the file that are not ours.
    pub(super) fn others(&self) -> Result<OtherHosts, CertsDError> {
        let dir = self.dir();
        let base = self.base(&dir, &Found::read(&dir)?)?;
        let Some(merged) = merged_anyway(base.text.as_deref(), &self.wanted) else { return Ok(OtherHosts::default()) };
        let mut left_by = merged.found;
        left_by.retain(|by| *by != Foreign::Other);
        left_by.dedup();
        Ok(OtherHosts { origins: merged.foreign_origins, left_out: merged.left_out, left_by })
    }
}

impl Found {
    fn read(dir: &Path) -> Result<Self, CertsDError> {
        let read = |name: &str| files::read(&dir.join(name));
        Ok(Self { now: read(HOSTS)?, backup: read(BACKUP)?, base: read(BASE)? })
    }

    fn is_ours(&self, site: &Site) -> bool {
        self.now.as_ref().is_some_and(|now| hosts_toml::is_ours(&now.text, &site.wanted))
    }

    fn has_ours(&self, site: &Site) -> bool {
        self.is_ours(site) || self.backup.is_some() || self.base.is_some()
    }

    /// Whether our file says more or less than we made it say.
    fn is_edited(&self, site: &Site) -> bool {
        let Some(now) = &self.now else { return false };
        let base = self.base.as_ref().or(self.backup.as_ref()).map(|content| content.text.as_str());
        let rest = hosts_toml::without(&now.text, &site.wanted);
        // Whether the file was made with or without adoption, nobody wrote down.
        let made = [false, true]
            .into_iter()
            .filter_map(|adopt| hosts_toml::merge(base, &Wanted { adopt, ..site.wanted.clone() }).ok());
        !made.into_iter().any(|made| made.text == now.text || hosts_toml::without(&made.text, &site.wanted) == rest)
    }
}

/// The directories that containerd tries for a registry in a root, before `_default` (hostPaths).
pub(super) fn host_paths(root: &Path, registry: &Registry) -> Vec<PathBuf> {
    let name = registry.as_str();
    let portless = match name.rfind(':') {
        Some(at) if at > 0 => Some(format!("{}_{}_", &name[..at], &name[at + 1..])),
        _ => None,
    };
    portless.into_iter().map(|name| root.join(name)).chain([root.join(name)]).collect()
}

/// The registry that a directory under certs.d is for.
pub(super) fn registry_of(dir_name: &str) -> Option<Registry> {
    let with_port = dir_name.strip_suffix('_').and_then(|name| name.rsplit_once('_'));
    match with_port {
        Some((host, port)) => format!("{host}:{port}").parse().ok(),
        None => dir_name.parse().ok(),
    }
}

/// What a directory says to containerd, as a text that stands anywhere.
fn says(dir: &Path) -> Result<Option<String>, CertsDError> {
    let certificates = Certificates::among(&files::names(dir)?.unwrap_or_default());
    let hosts = files::read(&dir.join(HOSTS))?.map(|content| content.text);
    Ok(hosts_toml::inherit(hosts.as_deref(), &certificates, Some(&dir.to_string_lossy())))
}

fn remove_ours(dir: &Path, now: Option<&Content>) -> Result<bool, CertsDError> {
    match now {
        _ if dir.join(CREATED).exists() && files::is_only_ours(dir)? => files::take_away_dir(dir, now),
        Some(now) => files::take_away(&dir.join(HOSTS), now),
        None => Ok(true),
    }
}

fn usable(content: &Content) -> bool {
    hosts_toml::usable(&content.text).is_ok()
}

fn merged_anyway(text: Option<&str>, wanted: &Wanted) -> Option<Merged> {
    hosts_toml::merge(text, wanted).or_else(|_| hosts_toml::merge(text, &Wanted { adopt: true, ..wanted.clone() })).ok()
}
