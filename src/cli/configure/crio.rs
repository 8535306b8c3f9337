//! CRI-O: a runtime handler in a drop-in of crio.conf.

use std::path::Path;

use toml_edit::{Item, TableLike, value};

use super::tables::{self, is_shim, shown, string};
use super::{Entry, Host};

const RUNTIMES: [&str; 3] = ["crio", "runtime", "runtimes"];
/// The default where no file names one: crun, in older versions runc (pkg/config, ValidateDefaultRuntime).
const DEFAULTS: [&str; 2] = ["crun", "runc"];
/// What is not taken over from the default handler: what a handler runs, and where it keeps its state.
const OWN: [&str; 6] = [
    "runtime_path",
    "runtime_type",
    "runtime_root",
    "runtime_config_path",
    "platform_runtime_paths",
    "inherit_default_runtime",
];

/// monitor_path and the like are the default handler's: CRI-O looks for a conmon in its PATH otherwise, and does not start
/// when it finds none.
pub(super) fn wanted(host: &Host, low_level: &Path) -> Result<Entry, String> {
    let mut docs = Vec::new();
    for (path, text) in host.earlier {
        docs.push(tables::parse(text).map_err(|error| format!("{}: {error}", path.display()))?);
    }
    let runtime = |doc| tables::lookup(doc, &RUNTIMES[..2]);
    let named = docs.iter().rev().find_map(|doc| string(runtime(doc)?, "default_runtime"));
    let handler =
        |name: &str| docs.iter().rev().find_map(|doc| tables::lookup(doc, &RUNTIMES)?.get(name)?.as_table_like());
    let default = named.into_iter().chain(DEFAULTS).find_map(handler);
    let root = low_level.file_name().unwrap_or_default().to_string_lossy();
    let mut keys = vec![("runtime_root".to_owned(), shown(&format!("/run/{root}").into()))];
    keys.extend(values(default, &OWN));
    Ok(Entry { name: host.name.into(), shim: host.shim.into(), keys, ..Entry::default() })
}

fn values(table: Option<&dyn TableLike>, but: &[&str]) -> Vec<(String, String)> {
    let plain = |(key, item): (&str, &Item)| {
        let value = item.as_value().filter(|_| !but.contains(&key))?;
        Some((key.to_owned(), shown(value)))
    };
    table.map_or_else(Vec::new, |table| table.iter().filter_map(plain).collect())
}

/// The handlers that are ours.
pub(super) fn names(text: &str) -> Result<Vec<String>, String> {
    let doc = tables::parse(text)?;
    let handlers = tables::lookup(&doc, &RUNTIMES).into_iter().flat_map(|handlers| handlers.iter());
    let path = |item: &Item| string(item.as_table_like()?, "runtime_path").map(is_shim);
    Ok(handlers.filter(|(_, handler)| path(handler) == Some(true)).map(|(name, _)| name.to_owned()).collect())
}

pub(super) fn find(text: &str, name: &str) -> Result<Option<Entry>, String> {
    let doc = tables::parse(text)?;
    let handler = tables::lookup(&doc, &RUNTIMES).and_then(|r| r.get(name)).and_then(Item::as_table_like);
    let Some(handler) = handler else { return Ok(None) };
    let shim = string(handler, "runtime_path").unwrap_or_default();
    if !is_shim(shim) {
        return Err(format!("the handler {name} is another's (runtime_path {shim:?}); choose a name with --name"));
    }
    let keys = values(Some(handler), &OWN[..2]);
    Ok(Some(Entry { name: name.into(), shim: shim.into(), keys, ..Entry::default() }))
}

pub(super) fn apply(text: Option<&str>, entry: &Entry) -> Result<String, String> {
    tables::edit(text.unwrap_or_default(), |doc| {
        let mut handler = tables::last();
        handler.insert("runtime_path", value(&entry.shim));
        handler.insert("runtime_type", value("oci"));
        for (key, text) in &entry.keys {
            handler.insert(key, tables::value(text)?);
        }
        tables::put(tables::make(doc, &RUNTIMES)?, &entry.name, handler);
        Ok(())
    })
}

pub(super) fn remove(text: &str, name: &str) -> Result<String, String> {
    tables::edit(text, |doc| {
        tables::take(doc, &RUNTIMES, name);
        Ok(())
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::host;
    use super::*;

    pub(in super::super) const FILES: &[&str] = PIECES;
    pub(in super::super) const PIECES: &[&str] = &[
        "[crio.image]\n# where\nsignature_policy = \"/etc/crio/policy.json\"\n",
        "[crio.runtime]\ndefault_runtime = \"crun\" # fast\n\n",
        "[crio.runtime.runtimes.crun]\nruntime_path = \"/usr/libexec/crio/crun\"\nruntime_root = \"/run/crun\"\nmonitor_path = \
         \"/usr/libexec/crio/conmon\"\nallowed_annotations = [\n    \"io.containers.trace-syscall\",\n]\n",
        "[crio.runtime.runtimes.runc]\nruntime_path = \"/usr/libexec/crio/runc\"\nruntime_root = \"/run/runc\"\nmonitor_path = \
         \"/opt/conmon\"\n",
    ];

    fn text(earlier: &[&str], low_level: &str) -> String {
        let earlier: Vec<_> = earlier.iter().map(|text| ("f".into(), (*text).to_owned())).collect();
        apply(None, &wanted(&host("mig", &earlier), Path::new(low_level)).unwrap()).unwrap()
    }

    #[test]
    fn the_monitor_is_the_default_handlers() {
        let new: toml::Table = text(&[&PIECES.concat()], "/usr/bin/runc").parse().unwrap();
        let mig = &new["crio"]["runtime"]["runtimes"]["mig"];
        assert_eq!(mig["monitor_path"].as_str(), Some("/usr/libexec/crio/conmon"));
        assert_eq!(mig["runtime_path"].as_str(), Some("/usr/bin/mig-runtime"));
        assert_eq!(mig["runtime_root"].as_str(), Some("/run/runc"));
        assert_eq!(mig["runtime_type"].as_str(), Some("oci"));
        // A later file wins, in what is the default and in what it says.
        let later =
            "[crio.runtime]\ndefault_runtime = \"runc\"\n[crio.runtime.runtimes.runc]\nmonitor_path = \"/late\"\n";
        let new = text(&[&PIECES.concat(), later], "/usr/bin/crun");
        assert!(new.contains("monitor_path = \"/late\"") && new.contains("runtime_root = \"/run/crun\""), "{new}");
    }

    #[test]
    fn nothing_more_than_needed() {
        assert_eq!(
            text(&[], "/usr/bin/crun"),
            "[crio.runtime.runtimes.mig]\nruntime_path = \"/usr/bin/mig-runtime\"\nruntime_type = \"oci\"\nruntime_root = \
             \"/run/crun\"\n"
        );
        let broken = [("/etc/crio/crio.conf".into(), "[".to_owned())];
        assert!(wanted(&host("mig", &broken), Path::new("/r")).unwrap_err().starts_with("/etc/crio/crio.conf: "));
    }
}
