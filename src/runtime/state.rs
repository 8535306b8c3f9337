//! Whose the state of a container is, before root has a runtime follow it.
//!
//! What a runtime keeps below its `--root` says which process to signal and what to remove. Where a user can write that, root
//! would do to anybody what the user writes.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, fstat};

/// What a look at a path shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// The user who can change what is there: the owner of the first directory on the way that is not root's.
    pub user: Option<u32>,
    /// Whether there is anything.
    pub found: bool,
}

/// Looks at the directory of a container's state. Each step is one from a directory that is open, through no link, so that
/// what is seen is what lies there, and up to the first directory of a user's nobody but root can put another in its place.
///
/// # Errors
/// When it can't be told whose it is: the path is not absolute or leads through a link, or everybody may write on the way.
pub fn look(path: &Path) -> io::Result<State> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {what}", path.display()));
    let mut steps = path.components();
    if steps.next() != Some(Component::RootDir) {
        return Err(wrong("not an absolute path"));
    }
    let mut at: OwnedFd = open("/", flags, Mode::empty())?;
    let mut user = None;
    for step in steps {
        let Component::Normal(name) = step else { return Err(wrong("not a path without ..")) };
        at = match openat(&at, name, flags, Mode::empty()) {
            Ok(next) => next,
            Err(Errno::ENOENT) => return Ok(State { user, found: false }),
            // From here on it is the user's own business, and done with the user's rights.
            Err(_) if user.is_some() => return Ok(State { user, found: true }),
            Err(Errno::ENOTDIR) => {
                return Err(wrong(&format!("{} on the way is a link, or no directory", name.display())));
            }
            Err(errno) => return Err(errno.into()),
        };
        let stat = fstat(&at)?;
        let open_to_others = stat.st_mode & 0o022 != 0 && stat.st_mode & libc::S_ISVTX == 0;
        match (user, stat.st_uid) {
            (None, 0) if open_to_others => {
                return Err(wrong(&format!("others than root may write in {} on the way", name.display())));
            }
            (None, 0) | (Some(_), _) => {}
            (None, uid) => user = Some(uid),
        }
    }
    Ok(State { user, found: true })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    #[test]
    fn the_first_directory_that_is_not_roots_says_whose_it_is() {
        if !nix::unistd::geteuid().is_root() {
            return; // chown
        }
        let dir = tempfile::tempdir().unwrap(); // 0700, in a directory that is sticky
        let at = |relative: &str| dir.path().join(relative);
        let make = |relative: &str, mode: u32, uid: u32| {
            fs::create_dir(at(relative)).unwrap();
            fs::set_permissions(at(relative), Permissions::from_mode(mode)).unwrap();
            chown(at(relative), Some(uid), None).unwrap();
        };
        make("roots", 0o711, 0);
        make("roots/alice", 0o700, 4711);
        make("roots/alice/c1", 0o711, 4711);
        make("roots/alice/theirs", 0o711, 4712);
        symlink("/", at("roots/alice/link")).unwrap();
        let seen = |relative: &str| {
            let state = look(&at(relative)).unwrap();
            (state.user, state.found)
        };
        assert_eq!(seen("roots"), (None, true));
        assert_eq!(seen("roots/bob/c1"), (None, false));
        assert_eq!(seen("roots/alice/c1"), (Some(4711), true));
        assert_eq!(seen("roots/alice/c2"), (Some(4711), false));
        assert_eq!(seen("roots/alice/theirs"), (Some(4711), true), "who put it there");
        assert_eq!(seen("roots/alice/link/etc"), (Some(4711), true), "followed with the user's rights, if at all");

        // A root for everybody: sticky, so each has only what is his own.
        make("all", 0o1777, 0);
        make("all/c1", 0o711, 4711);
        make("all/c2", 0o711, 0);
        assert_eq!((seen("all/c1"), seen("all/c2")), ((Some(4711), true), (None, true)));

        symlink("roots", at("link")).unwrap();
        make("open", 0o777, 0);
        make("group", 0o775, 0);
        fs::write(at("roots/file"), "").unwrap();
        for (odd, why) in [
            ("link/alice", "link on the way is a link"),
            ("roots/file/c1", "no directory"),
            ("open/c1", "others than root may write in open"),
            ("group/c1", "others than root may write in group"),
            ("roots/../roots", "without .."),
        ] {
            let error = look(&at(odd)).unwrap_err().to_string();
            assert!(error.contains(why), "{odd}: {error}");
        }
        assert!(look(Path::new("run/x")).unwrap_err().to_string().contains("absolute"));
    }
}
