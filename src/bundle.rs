//! An OCI bundle's config.json as a [`serde_json::Value`], and its replacement in one step.
//!
//! Not oci-spec's typed `Spec`: that drops the fields it does not know on a round trip, and the file is not ours.

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, DeserializeSeed, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::first::CONFIG_LIMIT;

/// A config that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// It can't be read.
    #[error("cannot read {path}: {source}; does the bundle exist, and is it the one that --bundle names?")]
    Read {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Larger than [`CONFIG_LIMIT`].
    #[error("{path} is larger than {limit} bytes; no engine writes such a config")]
    TooLarge {
        /// The file.
        path: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// No JSON.
    #[error("{path} is not valid JSON: {source}")]
    Json {
        /// The file.
        path: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A key that the runtime would read in another way than we do.
    #[error(
        "{path}: {duplicate}; runtimes merge such keys and JSON libraries don't, so what would run is not what was \
         checked; let the engine write each key once"
    )]
    Ambiguous {
        /// The file.
        path: String,
        /// Which.
        duplicate: String,
    },
    /// The new text could not be put in place; the old one is untouched.
    #[error("cannot rewrite {path}: {source}; the original is untouched")]
    Replace {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// A parsed config and the first key in it that is there twice.
#[derive(Debug)]
pub struct Config {
    /// The document, keys in their order.
    pub value: Value,
    /// A sentence about a duplicate or case-variant key, where there is one. A request makes it an error.
    pub ambiguous: Option<String>,
}

/// Keys that the runtimes (Go's encoding/json) also match in another case.
const KNOWN: [&str; 28] = [
    "ociVersion",
    "process",
    "root",
    "hostname",
    "domainname",
    "mounts",
    "hooks",
    "annotations",
    "linux",
    "env",
    "args",
    "cwd",
    "user",
    "capabilities",
    "devices",
    "resources",
    "namespaces",
    "cgroupsPath",
    "uidMappings",
    "gidMappings",
    "maskedPaths",
    "readonlyPaths",
    "createRuntime",
    "createContainer",
    "startContainer",
    "prestart",
    "poststart",
    "poststop",
];

/// Reads at most [`CONFIG_LIMIT`] bytes.
pub fn read(path: &Path) -> Result<Vec<u8>, BundleError> {
    let shown = path.display().to_string();
    let failed = |source| BundleError::Read { path: shown.clone(), source };
    read_limited(File::open(path).map_err(failed)?, &shown)
}

/// Reads standard input or an open file to its end, at most [`CONFIG_LIMIT`] bytes.
pub fn read_limited(from: impl Read, shown: &str) -> Result<Vec<u8>, BundleError> {
    let mut bytes = Vec::new();
    let read = from.take(CONFIG_LIMIT + 1).read_to_end(&mut bytes);
    match read {
        Ok(n) if n as u64 > CONFIG_LIMIT => Err(BundleError::TooLarge { path: shown.into(), limit: CONFIG_LIMIT }),
        Ok(_) => Ok(bytes),
        Err(source) => Err(BundleError::Read { path: shown.into(), source }),
    }
}

/// Reads and parses a file in which every key must be unambiguous.
pub fn load(path: &Path) -> Result<Value, BundleError> {
    let shown = path.display().to_string();
    parse(&read(path)?, &shown)?.certain(&shown)
}

/// Parses a config and looks for keys that are there twice.
pub fn parse(bytes: &[u8], shown: &str) -> Result<Config, BundleError> {
    let json = |source| BundleError::Json { path: shown.into(), source };
    let mut ambiguous = None;
    let mut input = serde_json::Deserializer::from_slice(bytes);
    let value = Strict(&mut ambiguous).deserialize(&mut input).map_err(json)?;
    input.end().map_err(json)?;
    Ok(Config { value, ambiguous })
}

impl Config {
    /// The document, if every key in it is unambiguous.
    pub fn certain(self, shown: &str) -> Result<Value, BundleError> {
        match self.ambiguous {
            None => Ok(self.value),
            Some(duplicate) => Err(BundleError::Ambiguous { path: shown.into(), duplicate }),
        }
    }
}

/// Replaces `path` by `value`: a temporary file beside it with the same mode and owner, as far as these may be given, then a
/// rename. On any error, a full disk included, the original stays as it was. No fsync: a bundle does not outlive the boot.
pub fn replace(path: &Path, value: &Value) -> Result<(), BundleError> {
    let temporary = path.with_file_name(format!(".mig-hook.{}.tmp", std::process::id()));
    let result = write_like(path, &temporary, value).and_then(|()| std::fs::rename(&temporary, path));
    result.map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        BundleError::Replace { path: path.display().to_string(), source }
    })
}

fn write_like(original: &Path, temporary: &Path, value: &Value) -> io::Result<()> {
    let meta = original.metadata()?;
    let _ = std::fs::remove_file(temporary); // of an earlier process with our pid
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW).open(temporary)?;
    own_like(&file, &meta)?;
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    file.write_all(&text)
}

/// Gives a file the owner and mode of the original. Without root it can't be given away, and to a group only by its member:
/// Slurm 22.05 leaves a config.json of root's in a user's directory. Then it stays ours, and another group than the
/// original's may nothing.
fn own_like(file: &File, original: &Metadata) -> io::Result<()> {
    let give = |uid, gid| match fchown(file, uid, Some(gid)) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(false),
        given => given.map(|()| true),
    };
    let mask = match give(Some(original.uid()), original.gid())? {
        true => 0o7777,
        false if give(None, original.gid())? => 0o777,
        false => 0o707,
    };
    file.set_permissions(Permissions::from_mode(original.mode() & mask))
}

/// The bundle directory, absolute.
pub fn directory(bundle: Option<&Path>) -> io::Result<PathBuf> {
    std::path::absolute(bundle.unwrap_or(Path::new(".")))
}

/// Builds a `Value` and notes the first object with a key twice, or with a known key in another case.
struct Strict<'a>(&'a mut Option<String>);

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;
    fn deserialize<D: serde::Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        d.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(Value::Number(v.into()))
    }
    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }
    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(Value::String(v.to_owned()))
    }
    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(Value::String(v))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_some<D: serde::Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
        Deserialize::deserialize(d)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = seq.next_element_seed(Strict(&mut *self.0))? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let value = map.next_value_seed(Strict(&mut *self.0))?;
            let known = KNOWN.iter().find(|k| k.eq_ignore_ascii_case(&key) && **k != key);
            if self.0.is_none() {
                let shown = || key.chars().take(60).collect::<String>();
                *self.0 = match known {
                    Some(known) => Some(format!("the key {:?} is a case variant of \"{known}\"", shown())),
                    None if object.contains_key(&key) => Some(format!("the key {:?} is there twice", shown())),
                    None => None,
                };
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// Whether the root file system of a config can be written, so that its runtime can make places for mounts there. One that
/// the container alone may not write can.
pub fn has_writable_root(config: &Value, bundle: Option<&Path>) -> bool {
    let Some(root) = config.pointer("/root/path").and_then(Value::as_str) else { return true };
    let stat = nix::sys::statvfs::statvfs(&bundle.unwrap_or(Path::new("")).join(root));
    stat.map_or(true, |stat| !stat.flags().contains(nix::sys::statvfs::FsFlags::ST_RDONLY))
}

/// Whether /dev in a config's root file system is a symbolic link. runc 1.1 and crun 1.8 follow one out of the container,
/// and crun makes the nodes where it points.
pub fn dev_is_link(config: &Value, bundle: Option<&Path>) -> bool {
    let Some(root) = config.pointer("/root/path").and_then(Value::as_str) else { return false };
    let dev = bundle.unwrap_or(Path::new("")).join(root).join("dev");
    dev.symlink_metadata().is_ok_and(|meta| meta.file_type().is_symlink())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ambiguous(text: &str) -> Option<String> {
        parse(text.as_bytes(), "config.json").unwrap().ambiguous
    }

    #[test]
    fn duplicates_and_case_variants_are_seen_anywhere() {
        assert_eq!(ambiguous(r#"{"a":1,"b":{"c":[{"d":1}]}}"#), None);
        assert!(ambiguous(r#"{"linux":{},"linux":{}}"#).unwrap().contains("\"linux\" is there twice"));
        assert!(ambiguous(r#"{"linux":{"Devices":[]}}"#).unwrap().contains("case variant of \"devices\""));
        assert!(ambiguous(r#"{"x":[{"k":1,"k":2}]}"#).is_some());
        // Annotations and environment are free text; only the names that runtimes know are matched.
        assert_eq!(ambiguous(r#"{"annotations":{"a":"1","A":"2"}}"#), None);
    }

    #[test]
    fn numbers_are_written_as_they_were_read() {
        let written = |text: &str| parse(text.as_bytes(), "config.json").unwrap().value.to_string();
        for number in ["0.1", "5e-324", "1.7976931348623157e+308", "18446744073709551615", "-1"] {
            assert_eq!(written(number), number);
        }
        let longer_than_a_double = written("184467442073709551615");
        assert_eq!(written(&longer_than_a_double), longer_than_a_double);
    }

    #[test]
    fn trailing_text_and_halves_are_no_json() {
        for bad in ["", "{", "{} {}", "nul"] {
            assert!(matches!(parse(bad.as_bytes(), "config.json"), Err(BundleError::Json { .. })), "{bad}");
        }
    }

    #[test]
    fn replace_keeps_mode_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, "{}").unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        replace(&path, &serde_json::json!({"a": 1})).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o640);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_config_is_named() {
        let error = read(Path::new("/nonexistent/config.json")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/config.json") && error.contains("--bundle"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes, "config.json");
        }

        #[test]
        fn what_serde_writes_comes_back_equal(keys in proptest::collection::btree_map("[a-z]{1,6}", any::<i64>(), 0..8)) {
            let value = serde_json::to_value(&keys).unwrap();
            let parsed = parse(value.to_string().as_bytes(), "x").unwrap();
            prop_assert_eq!(parsed.value, value);
        }
    }
}
