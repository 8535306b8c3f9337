//! What the library shows where the machine's files are not: in a container, which is given the library and nothing else.
//!
//! The driver's library asks the kernel, which answers by the device nodes that a client can open. Here the machine's files
//! stand for the kernel, and a container has none of them. So a machine with a driver tree repeats itself behind the code of
//! its library, in a file that containers have in common with the host: what is cut or destroyed is seen there at once.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::makedev;
use serde::{Deserialize, Serialize};

use crate::state::{Config, Gpu, State, ci_cap_minor, gi_cap_minor};

/// Behind the text and where it begins: the last bytes of the file.
const MARK: &[u8; 16] = b"\nnvml-sim window";
const FOOTER: u64 = 8 + MARK.len() as u64;
/// Minor of /dev/nvidiactl.
const CTL_MINOR: u32 = 255;

/// A machine as it was at some moment.
#[derive(Debug, Serialize, Deserialize)]
pub struct View {
    /// Its fixed part.
    pub config: Config,
    /// Its instances.
    pub state: State,
}

/// Writes a view behind the first `at` bytes of a library.
pub fn draw(library: &Path, at: u64, config: &Config, state: &State) -> io::Result<()> {
    #[derive(Serialize)]
    struct Borrowed<'a> {
        config: &'a Config,
        state: &'a State,
    }
    let mut text = serde_json::to_vec(&Borrowed { config, state })?;
    text.extend(at.to_le_bytes());
    text.extend(MARK);
    let file = OpenOptions::new().read(true).write(true).open(library)?;
    let held = lock(file, FlockArg::LockExclusive)?;
    // Shorter first: who is killed in between leaves no view, rather than half of two.
    held.set_len(at)?;
    held.write_all_at(&text, at)
}

/// The view behind a library, if it has one.
pub fn look(library: &Path) -> io::Result<Option<View>> {
    let held = lock(File::open(library)?, FlockArg::LockShared)?;
    let size = held.metadata()?.len();
    let Some(end) = size.checked_sub(FOOTER) else { return Ok(None) };
    let mut footer = [0; FOOTER as usize];
    held.read_exact_at(&mut footer, end)?;
    let (at, mark) = footer.split_at(8);
    let at = at.try_into().map_or(0, u64::from_le_bytes);
    if mark != MARK || at > end {
        return Ok(None);
    }
    let mut text = vec![0; (end - at) as usize];
    held.read_exact_at(&mut text, at)?;
    Ok(Some(serde_json::from_slice(&text)?))
}

fn lock(file: File, how: FlockArg) -> io::Result<Flock<File>> {
    let mut file = file;
    loop {
        match Flock::lock(file, how) {
            Ok(held) => return Ok(held),
            Err((back, nix::errno::Errno::EINTR)) => file = back,
            Err((_, errno)) => return Err(errno.into()),
        }
    }
}

/// Whether this process can open that device at that path. No driver answers here.
pub fn opens(path: &Path, major: u32, minor: u32) -> bool {
    let node =
        |meta: fs::Metadata| meta.file_type().is_char_device() && meta.rdev() == makedev(major.into(), minor.into());
    let opens = || match File::open(path) {
        Ok(_) => true,
        Err(error) => matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV)),
    };
    path.symlink_metadata().is_ok_and(node) && opens()
}

/// What a client sees of a machine by the nodes in its /dev: the GPUs by their place in the machine; `None` where it can't
/// open the driver at all.
pub fn visible_gpus(dev: &Path, config: &Config) -> Option<Vec<usize>> {
    let nvidia = config.majors.nvidia;
    opens(&dev.join("nvidiactl"), nvidia, CTL_MINOR).then(|| {
        let seen = |minor: u32| opens(&dev.join(format!("nvidia{minor}")), nvidia, minor);
        (0..config.gpus.len()).filter(|index| seen(config.gpus[*index].minor)).collect()
    })
}

/// The instances of these GPUs that a client can open. Who else is at work there it is not told.
pub fn visible_state(dev: &Path, config: &Config, state: &State, gpus: &[usize]) -> State {
    let seen = |minor: u32| opens(&dev.join(format!("nvidia-caps/nvidia-cap{minor}")), config.majors.caps, minor);
    let of_gpu = |index: &usize| -> Option<Gpu> {
        let minor = config.gpus.get(*index)?.minor;
        let mut gpu = state.gpus.get(*index)?.clone();
        gpu.gis.retain(|gi| seen(gi_cap_minor(minor, gi.id)));
        for gi in &mut gpu.gis {
            let id = gi.id;
            gi.cis.retain(|ci| seen(ci_cap_minor(minor, id, ci.id)));
        }
        Some(gpu)
    };
    State { births: state.births, gpus: gpus.iter().filter_map(of_gpu).collect(), holds: Vec::new() }
}
