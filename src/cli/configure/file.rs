//! The file to edit: read, written in one step, kept beside itself as it was.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};

use super::Backup;
use crate::report::Unusable;

/// An engine's configuration file and our backup of it.
pub(super) struct Target {
    /// Where it really is, links resolved.
    pub path: PathBuf,
    /// `None`: there is no file.
    pub text: Option<String>,
    pub backup: PathBuf,
    pub backup_text: Option<String>,
}

impl Target {
    pub fn open(path: &Path) -> Result<Target> {
        let path = match path.canonicalize() {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {
                std::path::absolute(path).with_context(|| format!("cannot tell where {} is", path.display()))?
            }
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let backup = backup_of(&path);
        Ok(Target { text: read(&path)?, backup_text: read(&backup)?, path, backup })
    }

    /// Writes the file, or deletes it; the backup first where one is made, last where it is dropped.
    pub fn carry_out(&self, text: Option<&str>, backup: &Backup) -> Result<()> {
        if read(&self.path)? != self.text {
            return Err(anyhow!(Unusable(format!("{} has changed meanwhile; run this again", self.path.display()))));
        }
        if let (Backup::Make, Some(before)) = (backup, &self.text) {
            replace(&self.backup, before, &self.path)?;
        }
        match text {
            Some(text) => {
                let dir = self.path.parent().unwrap_or(Path::new("/"));
                if let Err(error) = std::fs::create_dir(dir)
                    && error.kind() != io::ErrorKind::AlreadyExists
                {
                    return Err(error)
                        .with_context(|| format!("cannot make {}; is the engine installed?", dir.display()));
                }
                replace(&self.path, text, &self.path)?;
            }
            None => delete(&self.path)?,
        }
        match (backup, &self.backup_text) {
            (Backup::Drop, Some(_)) => delete(&self.backup),
            _ => Ok(()),
        }
    }

    /// What is read before this file, in order: `first` (files, and directories of `*.conf`), and where it lies in a
    /// directory NAME.d, the file NAME beside that and the neighbours that sort before it. `conf`: only `*.conf` there.
    pub fn earlier(&self, first: &[&str], conf: bool) -> Result<Vec<(PathBuf, String)>> {
        let mut paths = Vec::new();
        for path in first.iter().map(Path::new) {
            if path.is_dir() { paths.extend(neighbours(path, true)?) } else { paths.push(path.to_owned()) }
        }
        if let Some(dir) = drop_ins(&self.path) {
            paths.push(dir.with_extension(""));
            paths.extend(neighbours(dir, conf)?);
        }
        let before = |path: &PathBuf| path.parent() != self.path.parent() || *path < self.path;
        let mut seen = std::collections::BTreeSet::new();
        paths.retain(|path| before(path) && *path != self.path && seen.insert(path.clone()));
        texts(paths)
    }

    /// The neighbours in its directory NAME.d that are read after it.
    pub fn later(&self) -> Result<Vec<(PathBuf, String)>> {
        let all = drop_ins(&self.path).map_or(Ok(vec![]), |dir| neighbours(dir, true))?;
        texts(all.into_iter().filter(|path| *path > self.path).collect())
    }
}

/// Beside the file; one up from a drop-in: CRI-O reads every file of its directory, whatever its name (`UpdateFromPath` in
/// its pkg/config).
fn backup_of(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".mig-hook.bak");
    drop_ins(path).unwrap_or(path).with_file_name(name)
}

/// The directory NAME.d that the file is in.
fn drop_ins(path: &Path) -> Option<&Path> {
    path.parent().filter(|dir| dir.extension().is_some_and(|e| e == "d"))
}

fn neighbours(dir: &Path, conf: bool) -> Result<Vec<PathBuf>> {
    let entries = match dir.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        Err(error) => return Err(error).with_context(|| format!("cannot list {}", dir.display())),
    };
    let wanted = |path: &PathBuf| path.is_file() && (!conf || path.extension().is_some_and(|e| e == "conf"));
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(wanted).collect();
    paths.sort();
    Ok(paths)
}

fn texts(paths: Vec<PathBuf>) -> Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for path in paths {
        if let Some(text) = read(&path)? {
            found.push((path, text));
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Result<Option<String>> {
    match std::fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(anyhow!(Unusable(format!("{} is no UTF-8 text; nothing was changed", path.display())))),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// A temporary file beside it, with the mode and owner of `like` if that exists, then a rename.
fn replace(path: &Path, text: &str, like: &Path) -> Result<()> {
    let temporary = path.with_file_name(format!(".mig-hook.{}.tmp", std::process::id()));
    let result = write_like(&temporary, text, like).and_then(|()| std::fs::rename(&temporary, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    let denied = result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    let hint = if denied { "; run this as root" } else { "" };
    result.with_context(|| format!("cannot write {}, it is as it was{hint}", path.display()))
}

fn write_like(temporary: &Path, text: &str, like: &Path) -> io::Result<()> {
    let _ = std::fs::remove_file(temporary); // of an earlier process with our pid
    let mut options = OpenOptions::new();
    let mut file: File =
        options.write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(temporary)?;
    let mode = match like.metadata() {
        Ok(meta) => {
            std::os::unix::fs::fchown(&file, Some(meta.uid()), Some(meta.gid()))?;
            meta.mode() & 0o7777
        }
        Err(_) => 0o644,
    };
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

fn delete(path: &Path) -> Result<()> {
    std::fs::remove_file(path).with_context(|| format!("cannot delete {}", path.display()))
}
