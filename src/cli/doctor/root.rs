//! The file system that configuration and programs are looked for in: this machine's, or one that is mounted somewhere.

use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

/// Longest text that is read of a file, in bytes.
const LIMIT: u64 = 1 << 20;

/// A directory that stands for `/`. Links below it lead where they would lead there.
#[derive(Debug)]
pub(super) struct Root {
    path: PathBuf,
    dir: File,
}

impl Root {
    pub fn at(path: &Path) -> io::Result<Root> {
        let dir = open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(|errno| io::Error::new(io::Error::from(errno).kind(), format!("{}: {errno}", path.display())))?;
        Ok(Root { path: path.to_owned(), dir: dir.into() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is this machine's own, so that its programs may be started.
    pub fn is_here(&self) -> bool {
        self.path == Path::new("/")
    }

    /// How a path of this root is called from outside.
    pub fn shown(&self, path: impl AsRef<Path>) -> String {
        self.path.join(below(path.as_ref())).display().to_string()
    }

    fn open(&self, path: &Path, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_CLOEXEC;
        if self.is_here() {
            return Ok(open(path, flags, Mode::empty())?.into()); // openat2(2) came with Linux 5.6
        }
        let how =
            OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        Ok(openat2(&self.dir, below(path), how)?.into())
    }

    /// The text of a file, as far as it is text and not longer than 1 MiB.
    pub fn read(&self, path: impl AsRef<Path>) -> io::Result<String> {
        // A pipe in the place of a file would block.
        let file = self.open(path.as_ref(), OFlag::O_RDONLY | OFlag::O_NONBLOCK)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(LIMIT).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// What is in a directory, by path and in order; nothing where there is none.
    pub fn list(&self, dir: impl AsRef<Path>) -> Vec<PathBuf> {
        let Ok(opened) = self.open(dir.as_ref(), OFlag::O_RDONLY | OFlag::O_DIRECTORY) else { return vec![] };
        let entries = std::fs::read_dir(format!("/proc/self/fd/{}", opened.as_raw_fd())).into_iter().flatten();
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| dir.as_ref().join(entry.file_name())).collect();
        paths.sort();
        paths
    }

    pub fn metadata(&self, path: impl AsRef<Path>) -> io::Result<Metadata> {
        self.open(path.as_ref(), OFlag::O_PATH)?.metadata()
    }

    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.metadata(path).is_ok()
    }

    /// Whether a path is a file that may be executed.
    pub fn is_program(&self, path: impl AsRef<Path>) -> bool {
        self.metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    }

    /// The first of these directories that has a program of that name.
    pub fn program(&self, name: &str, dirs: &[&str]) -> Option<PathBuf> {
        dirs.iter().map(|dir| Path::new(dir).join(name)).find(|path| self.is_program(path))
    }
}

/// A path without its leading slash.
fn below(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_of_another_root_lead_within_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("etc/x.d")).unwrap();
        std::fs::write(dir.path().join("etc/real"), "there").unwrap();
        symlink("/etc/real", dir.path().join("etc/x.d/link")).unwrap();
        symlink("../../../../../../etc/passwd", dir.path().join("etc/x.d/up")).unwrap();
        let root = Root::at(dir.path()).unwrap();
        assert_eq!(root.read("/etc/x.d/link").unwrap(), "there");
        assert_eq!(root.read("/etc/x.d/up").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(root.list("/etc/x.d"), [Path::new("/etc/x.d/link"), Path::new("/etc/x.d/up")]);
        assert!(root.list("/nowhere").is_empty() && !root.exists("/nowhere") && !root.is_program("/etc/real"));
        assert_eq!(root.shown("/etc/real"), dir.path().join("etc/real").display().to_string());
    }

    #[test]
    fn this_machine_is_looked_at_as_it_is() {
        let root = Root::at(Path::new("/")).unwrap();
        assert!(root.is_here() && root.is_program("/bin/sh") && root.read("/proc/version").is_ok());
        assert_eq!(root.shown("/bin/sh"), "/bin/sh");
        assert!(root.read("/etc").is_err());
        assert!(Root::at(Path::new("/nowhere")).unwrap_err().to_string().starts_with("/nowhere: "));
    }
}
