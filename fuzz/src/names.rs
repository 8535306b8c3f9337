//! Tokens, container ids and keys of jobs that become file names. Input: a runtime root, a line break, the name; or the name.

use std::path::Path;

use mig_hook::first;

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if first::plain_name(text) {
        is_one_file(&format!("{text}.json"));
    }
    if first::job_key(text) {
        is_one_file(&format!("{text}.json"));
        assert!(!text.starts_with('.'), "hidden: {text:?}");
    }
    let (root, id) = text.rsplit_once('\n').unwrap_or(("", text));
    let name = first::index_name(Some(Path::new(root)), id);
    assert_eq!(name.is_some(), first::plain_name(id));
    let Some(name) = name else { return };
    is_one_file(&name);
    assert_eq!(name.rsplit_once('.').map(|(id, _)| id), Some(id), "the id stays readable");
    if !root.ends_with('/') {
        let other = first::index_name(Some(Path::new(&format!("{root}/"))), id);
        assert_eq!(other.as_ref(), Some(&name), "a slash at the end says nothing");
    }
}

/// Below a directory there is then exactly this one file, in the directory itself.
fn is_one_file(name: &str) {
    let dir = Path::new("/run/mig-hook/leases");
    let path = dir.join(name);
    assert_eq!(path.parent(), Some(dir), "{name:?}");
    assert_eq!(path.file_name().and_then(|name| name.to_str()), Some(name));
    assert!(name.len() <= 255 && !name.contains('\0'), "{name:?}");
}
