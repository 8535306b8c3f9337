//! podman: our hooks directory and a runtime, in a drop-in of containers.conf.

use std::path::{Path, PathBuf};

use toml_edit::{Array, Item, value};

use super::tables::{self, is_shim};
use super::{Entry, Host};

/// Where podman's hook is installed, below PREFIX.
pub(super) const HOOKS: &str = "share/mig-hook/hooks.d/podman";
/// What `hooks_dir` is where no file names another (containers/common, pkg/config/default.go).
const DEFAULT: &str = "/usr/share/containers/oci/hooks.d";

pub(super) fn wanted(base: Option<&str>, host: &Host) -> Result<Entry, String> {
    let own = base.map(|text| (PathBuf::new(), text.to_owned()));
    let mut hooks = directories(host.earlier.iter().chain(&own))?;
    hooks.retain(|dir| !is_ours(dir));
    hooks.push(host.hooks_dir.to_owned());
    Ok(Entry { name: host.name.into(), shim: host.shim.into(), hooks, ..Entry::default() })
}

/// `hooks_dir` after all these files, in order.
pub(in crate::cli) fn directories<'a>(
    files: impl IntoIterator<Item = &'a (PathBuf, String)>,
) -> Result<Vec<String>, String> {
    let mut hooks = vec![DEFAULT.to_owned()];
    for (path, text) in files {
        hooks = in_effect(hooks, text).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    Ok(hooks)
}

/// `hooks_dir` after one more file. It replaces what was before; podman 5 appends instead where the list says so.
fn in_effect(before: Vec<String>, text: &str) -> Result<Vec<String>, String> {
    let doc = tables::parse(text)?;
    let Some(list) = tables::lookup(&doc, &["engine"]).and_then(|engine| engine.get("hooks_dir")) else {
        return Ok(before);
    };
    let appends = |item: &toml_edit::Value| {
        item.as_inline_table().and_then(|t| t.get("append")).and_then(toml_edit::Value::as_bool) == Some(true)
    };
    let appends = list.as_array().is_some_and(|list| list.iter().any(appends));
    Ok(if appends { before } else { vec![] }.into_iter().chain(tables::strings(Some(list))).collect())
}

/// The runtimes that are ours.
pub(super) fn names(text: &str) -> Result<Vec<String>, String> {
    let doc = tables::parse(text)?;
    let runtimes = tables::lookup(&doc, &["engine", "runtimes"]).into_iter().flat_map(|runtimes| runtimes.iter());
    let ours = runtimes.filter(|(_, paths)| tables::strings(Some(paths)).first().is_some_and(|path| is_shim(path)));
    Ok(ours.map(|(name, _)| name.to_owned()).collect())
}

/// The hooks belong to every runtime of ours; where there is none, to the name that is asked for.
pub(super) fn find(text: &str, name: &str) -> Result<Option<Entry>, String> {
    let doc = tables::parse(text)?;
    let engine = tables::lookup(&doc, &["engine"]);
    let runtime = tables::lookup(&doc, &["engine", "runtimes"]).and_then(|runtimes| runtimes.get(name));
    let shim = tables::strings(runtime).into_iter().next().unwrap_or_default();
    if runtime.is_some() && !is_shim(&shim) {
        return Err(format!("the runtime {name} is another's ({shim:?}); choose a name of your own with --name"));
    }
    let mut hooks = tables::strings(engine.and_then(|engine| engine.get("hooks_dir")));
    if !hooks.iter().any(|dir| is_ours(dir)) || (runtime.is_none() && !names(text)?.is_empty()) {
        hooks.clear();
    }
    let entry = Entry { name: name.into(), shim, hooks, ..Entry::default() };
    Ok((!entry.shim.is_empty() || !entry.hooks.is_empty()).then_some(entry))
}

pub(super) fn apply(text: Option<&str>, entry: &Entry) -> Result<String, String> {
    tables::edit(text.unwrap_or_default(), |doc| {
        let engine = tables::make(doc, &["engine"])?;
        if !entry.hooks.is_empty() {
            set(engine, "hooks_dir", &entry.hooks);
        }
        if !entry.shim.is_empty() {
            set(tables::make(doc, &["engine", "runtimes"])?, &entry.name, std::slice::from_ref(&entry.shim));
        }
        Ok(())
    })
}

fn set(table: &mut toml_edit::Table, key: &str, list: &[String]) {
    table.set_implicit(false);
    let new = value(list.iter().collect::<Array>());
    match table.get_mut(key) {
        Some(old) => *old = new,
        None => drop(table.insert(key, new)),
    }
}

pub(super) fn remove(text: &str, name: &str, original: Option<&str>) -> Result<String, String> {
    let original = original.map(tables::parse).transpose()?.unwrap_or_default();
    let had = tables::lookup(&original, &["engine"]).is_some_and(|engine| engine.contains_key("hooks_dir"));
    tables::edit(text, |doc| {
        tables::take(doc, &["engine", "runtimes"], name);
        if names(text)?.iter().any(|other| other != name) {
            return Ok(());
        }
        let list = tables::make(doc, &["engine"])?.get_mut("hooks_dir").and_then(Item::as_array_mut);
        if let Some(list) = list {
            list.retain(|dir| !dir.as_str().is_some_and(is_ours));
            let rest: Vec<&str> = list.iter().filter_map(|dir| dir.as_str()).collect();
            if !had && (rest.is_empty() || rest == [DEFAULT]) {
                tables::take(doc, &["engine"], "hooks_dir");
            }
        }
        Ok(())
    })
}

/// Whether a file that is read later takes our directory away.
pub(super) fn replaces(text: &str, ours: &str) -> Result<bool, String> {
    let kept = in_effect(vec![ours.to_owned()], text)?;
    Ok(!kept.iter().any(|dir| dir == ours))
}

/// Whether there is a hook for podman to find.
pub(super) fn has_hook(dir: &Path) -> bool {
    dir.read_dir()
        .is_ok_and(|mut files| files.any(|file| file.is_ok_and(|f| f.path().extension().is_some_and(|e| e == "json"))))
}

fn is_ours(dir: &str) -> bool {
    Path::new(dir).ends_with("mig-hook/hooks.d/podman")
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::host;
    use super::*;

    pub(in super::super) const FILES: &[&str] = &[
        "[containers]\nlog_driver = \"k8s-file\" # not the journal\n\n[engine]\nruntime = \"crun\"\n",
        "# Hooks.\n[engine]\nhooks_dir = [\n  \"/etc/containers/oci/hooks.d\", # ours\n  \"/opt/h\",\n]\n[engine.runtimes]\nkata \
         = [\"/opt/kata\"]\n",
    ];
    pub(in super::super) const PIECES: &[&str] = &[
        "[containers]\n# many files\ndefault_ulimits = [\"nofile=1:1\"]\n\n",
        "[engine] # the engine\n  cgroup_manager = 'cgroupfs'\n  hooks_dir = [\"/opt/a\", \"/opt/b\"]\n",
        "[engine.runtimes]\n\"other\" = [ \"/opt/x\",\n  \"/opt/y\" ]\n",
        "[network]\n# nothing here\n",
        "[secrets.opts]\na.b = 1\n\n# the end\n",
    ];
    const OURS: &str = "/usr/share/mig-hook/hooks.d/podman";

    fn hooks(earlier: &[&str], own: Option<&str>) -> Vec<String> {
        let earlier: Vec<(PathBuf, String)> = earlier.iter().map(|t| ("f".into(), (*t).to_owned())).collect();
        wanted(own, &host("mig", &earlier)).unwrap().hooks
    }

    #[test]
    fn what_is_in_effect_is_kept() {
        let set = |dirs: &str| format!("[engine]\nhooks_dir = [{dirs}]\n");
        assert_eq!(hooks(&[], None), [DEFAULT, OURS]);
        assert_eq!(hooks(&["[engine]\n", "[containers]\n"], None), [DEFAULT, OURS]);
        assert_eq!(hooks(&[&set("\"/a\""), &set("\"/b\", \"/c\"")], None), ["/b", "/c", OURS]);
        assert_eq!(hooks(&[&set("\"/a\"")], Some(&set("\"/d\""))), ["/d", OURS]);
        assert_eq!(hooks(&[&set("\"/a\", {append = true}")], None), [DEFAULT, "/a", OURS]);
        assert_eq!(hooks(&[&set("\"/a\", {append = false}")], None), ["/a", OURS]);
        // Of another installation, or of an earlier run.
        assert_eq!(hooks(&[&set("\"/opt/share/mig-hook/hooks.d/podman\", \"/a\"")], None), ["/a", OURS]);
        assert!(wanted(None, &host("mig", &[("/x.conf".into(), "[".into())])).unwrap_err().starts_with("/x.conf: "));
    }

    #[test]
    fn the_drop_in_of_an_ordinary_host() {
        let text = apply(None, &wanted(None, &host("mig", &[])).unwrap()).unwrap();
        assert_eq!(
            text,
            format!(
                "[engine]\nhooks_dir = [\"{DEFAULT}\", \"{OURS}\"]\n\n[engine.runtimes]\nmig = [\"/usr/bin/mig-runtime\"]\n"
            )
        );
    }

    #[test]
    fn a_drop_in_made_by_hand_gets_what_it_lacks() {
        let text = format!("# by hand\n[engine]\nhooks_dir = [\"{DEFAULT}\", \"{OURS}\"]\n");
        let found = find(&text, "mig").unwrap().unwrap();
        assert!(found.shim.is_empty() && found.hooks.len() == 2);
        let after = apply(Some(&text), &wanted(Some(&text), &host("mig", &[])).unwrap()).unwrap();
        assert_eq!(after, text + "\n[engine.runtimes]\nmig = [\"/usr/bin/mig-runtime\"]\n");
    }

    #[test]
    fn a_later_file_that_takes_our_directory_away_is_seen() {
        assert!(replaces("[engine]\nhooks_dir = [\"/a\"]\n", OURS).unwrap());
        assert!(!replaces("[engine]\nhooks_dir = [\"/a\", {append = true}]\n", OURS).unwrap());
        assert!(!replaces(&format!("[engine]\nhooks_dir = [\"{OURS}\"]\n"), OURS).unwrap());
        assert!(!replaces("[network]\n", OURS).unwrap());
    }
}
