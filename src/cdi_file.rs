//! Files of CDI specs, in directories that engines watch: ours is replaced in one step, and only when it changes; others' are
//! read.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Directories of specs, those that go before others first (SPEC.md, "Conflict resolution").
pub const DIRS: [&str; 2] = ["/var/run/cdi", "/etc/cdi"];
/// Largest spec that is read, in bytes. One of NVIDIA's has 20 KB.
const LIMIT: u64 = 4 << 20;

/// The text of each spec in some directories, in order; what can't be read is left out.
pub fn texts<'a>(dirs: &'a [&'a Path]) -> impl Iterator<Item = (PathBuf, String)> + 'a {
    let in_dir = |dir: &&Path| {
        let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut paths: Vec<PathBuf> = entries
            .filter(|path| path.extension().is_some_and(|e| ["json", "yaml", "yml"].iter().any(|known| e == *known)))
            .collect();
        paths.sort();
        paths
    };
    dirs.iter().flat_map(in_dir).filter_map(|path| Some((path.clone(), text(&path).ok()?)))
}

/// The text of a spec.
pub fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    fs::File::open(path)?.take(LIMIT).read_to_string(&mut text)?;
    Ok(text)
}

/// Makes `text` the content of `path`; `None` removes it. A file that `is_ours` does not know is left alone: an error. True
/// when something changed.
pub fn publish(path: &Path, text: Option<&str>, is_ours: fn(&str) -> bool) -> io::Result<bool> {
    let there = match fs::read(path) {
        Ok(bytes) => Some(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    if there.as_deref() == text {
        return Ok(false);
    }
    if there.is_some_and(|there| !is_ours(&there)) {
        return Err(io::Error::other("what is there is not a CDI spec of mig-hook; name another file"));
    }
    match text {
        Some(text) => {
            let dir = path.parent().unwrap_or(Path::new("/"));
            fs::DirBuilder::new().recursive(true).mode(0o755).create(dir)?; // /etc/cdi is not there before the first one
            replace(path, text)?;
        }
        None => fs::remove_file(path)?,
    }
    Ok(true)
}

/// Makes `text` the content of a file that others read (0644), in one step.
pub fn replace(path: &Path, text: &str) -> io::Result<()> {
    // No .json or .prom at the end: engines and node_exporter would read it.
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let _ = fs::remove_file(&temporary); // of an earlier process with our pid
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o644).custom_flags(libc::O_NOFOLLOW);
    let written = options.open(&temporary).and_then(|mut file| {
        file.set_permissions(Permissions::from_mode(0o644))?; // whatever the umask: users' engines read it too
        file.write_all(text.as_bytes())
    });
    let done = written.and_then(|()| fs::rename(&temporary, path));
    done.inspect_err(|_| drop(fs::remove_file(&temporary)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn ours(text: &str) -> bool {
        text.starts_with("ours")
    }

    #[test]
    fn written_kept_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cdi/x.json");
        assert!(!publish(&path, None, ours).unwrap());
        assert!(publish(&path, Some("ours 1"), ours).unwrap());
        let inode = path.metadata().unwrap().ino();
        assert!(!publish(&path, Some("ours 1"), ours).unwrap());
        assert_eq!(path.metadata().unwrap().ino(), inode, "the same text touches nothing");
        assert!(publish(&path, Some("ours 2"), ours).unwrap());
        assert_eq!(fs::read_to_string(&path).unwrap(), "ours 2");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o644);
        assert!(publish(&path, None, ours).unwrap());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_not_ours_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nvidia.json");
        fs::write(&path, "theirs").unwrap();
        for text in [Some("ours"), None] {
            assert!(publish(&path, text, ours).unwrap_err().to_string().contains("not a CDI spec of mig-hook"));
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "theirs");
    }
}
