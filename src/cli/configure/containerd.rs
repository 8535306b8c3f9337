//! containerd: a runtime handler of the CRI plugin in config.toml.

use toml_edit::{DocumentMut, Item, TableLike, value};

use super::tables::{self, is_shim, shown, string, strings};
use super::{Entry, Host};

/// The CRI plugin, by the version of the file (containerd, docs/cri/config.md).
const PLUGINS: [(i64, &str); 2] = [(2, "io.containerd.grpc.v1.cri"), (3, "io.containerd.cri.v1.runtime")];
/// What of a pod's annotations reaches the container. Globs do not match a slash.
const PATTERNS: [&str; 2] = ["mig.*", "mig.*/*"];
const RUNC: &str = "io.containerd.runc.v2";
/// The handler of pods that name none. Built in, but a file that has any handler takes it away, and CRI does not load
/// without it (1.6, run): such a file must spell it out.
const BUILT_IN: &str = "runc";

pub(super) fn wanted(base: Option<&str>, host: &Host, notes: &mut Vec<String>) -> Result<Entry, String> {
    let doc = tables::parse(&versioned(base))?;
    let path = containerd(&doc)?;
    let default = default_handler(&doc, &path);
    let mut keys = Vec::new();
    for key in ["pod_annotations", "container_annotations"] {
        let mut patterns = strings(default.and_then(|d| d.get(key)));
        patterns.extend(PATTERNS.map(str::to_owned));
        patterns.dedup();
        keys.push((key.to_owned(), shown(&toml_edit::Value::from_iter(patterns))));
    }
    let own = ["runtime_type", "pod_annotations", "container_annotations"];
    keys.extend(values(default, "", &own));
    let options = default.and_then(|d| d.get("options")).and_then(Item::as_table_like);
    keys.extend(values(options, "options.", &["BinaryName"]));
    if let Some(binary) = options.and_then(|o| string(o, "BinaryName")).filter(|b| !b.is_empty() && !is_shim(b)) {
        notes.push(format!(
            "the default handler runs {binary}; to have mig-runtime run it too, name it by [runtime] path in {}",
            crate::first::SETTINGS
        ));
    }
    let disabled = strings(doc.get("disabled_plugins"));
    if let Some(plugin) = disabled.iter().find(|p| *p == "cri" || PLUGINS.iter().any(|(_, name)| p == name)) {
        notes.push(format!("disabled_plugins names {plugin}: handlers are CRI's, so take it out of that list"));
    }
    if !strings(doc.get("imports")).is_empty() {
        notes
            .push("files named by imports are not looked into: if SystemdCgroup is set there, set it here, too".into());
    }
    let handlers = handlers(&doc)?;
    let default = is_spelled_out(handlers) || !handlers.is_some_and(|h| h.iter().any(|(name, _)| name != host.name));
    Ok(Entry { name: host.name.into(), shim: host.shim.into(), keys, default, ..Entry::default() })
}

/// Whether the built-in handler is there as we write it.
fn is_spelled_out(handlers: Option<&dyn TableLike>) -> bool {
    let handler = handlers.and_then(|h| h.get(BUILT_IN)).and_then(Item::as_table_like);
    handler.is_some_and(|h| h.len() == 1 && string(h, "runtime_type") == Some(RUNC))
}

/// The handler whose options a pod has that names none, as far as it is runc's kind.
fn default_handler<'a>(doc: &'a DocumentMut, path: &[&str]) -> Option<&'a dyn TableLike> {
    let containerd = tables::lookup(doc, path)?;
    let named = string(containerd, "default_runtime_name").unwrap_or(BUILT_IN);
    let handler = |name: &str| containerd.get("runtimes")?.as_table_like()?.get(name)?.as_table_like();
    let runcs = |handler: &&dyn TableLike| string(*handler, "runtime_type").is_none_or(|kind| kind == RUNC);
    let shims = |handler: &&dyn TableLike| !binary(*handler).is_some_and(is_shim);
    [named, BUILT_IN].into_iter().filter_map(handler).filter(runcs).find(shims)
}

fn binary(handler: &dyn TableLike) -> Option<&str> {
    string(handler.get("options")?.as_table_like()?, "BinaryName")
}

/// The plain keys of a table, but for some.
fn values(table: Option<&dyn TableLike>, prefix: &str, but: &[&str]) -> Vec<(String, String)> {
    let plain = |(key, item): (&str, &Item)| {
        let value = item.as_value().filter(|v| !v.is_inline_table() && !but.contains(&key))?;
        Some((format!("{prefix}{key}"), shown(value)))
    };
    table.map_or_else(Vec::new, |table| table.iter().filter_map(plain).collect())
}

/// The handlers that are ours.
pub(super) fn names(text: &str) -> Result<Vec<String>, String> {
    let doc = tables::parse(&versioned(Some(text)))?;
    let handlers = handlers(&doc)?.into_iter().flat_map(|handlers| handlers.iter());
    let ours = handlers.filter(|(_, h)| h.as_table_like().and_then(binary).is_some_and(is_shim));
    Ok(ours.map(|(name, _)| name.to_owned()).collect())
}

fn handlers(doc: &DocumentMut) -> Result<Option<&dyn TableLike>, String> {
    let mut path = containerd(doc)?;
    path.push("runtimes");
    Ok(tables::lookup(doc, &path))
}

pub(super) fn find(text: &str, name: &str) -> Result<Option<Entry>, String> {
    let doc = tables::parse(&versioned(Some(text)))?;
    let runtimes = handlers(&doc)?;
    let Some(handler) = runtimes.and_then(|r| r.get(name)).and_then(Item::as_table_like) else { return Ok(None) };
    let shim = binary(handler).unwrap_or_default();
    if !is_shim(shim) {
        return Err(format!("the handler {name} is another's (BinaryName {shim:?}); choose a name with --name"));
    }
    let mut keys = values(Some(handler), "", &["runtime_type"]);
    keys.extend(values(handler.get("options").and_then(Item::as_table_like), "options.", &["BinaryName"]));
    let default = is_spelled_out(runtimes);
    Ok(Some(Entry { name: name.into(), shim: shim.into(), keys, default, ..Entry::default() }))
}

pub(super) fn apply(text: Option<&str>, entry: &Entry) -> Result<String, String> {
    tables::edit(&versioned(text), |doc| {
        let mut path = containerd(doc)?;
        path.push("runtimes");
        let handlers = tables::make(doc, &path)?;
        let mut handler = tables::last();
        handler.insert("runtime_type", value(RUNC));
        if entry.default && !handlers.contains_key(BUILT_IN) {
            handlers.insert(BUILT_IN, Item::Table(handler.clone()));
        }
        let mut options = tables::last();
        options.insert("BinaryName", value(&entry.shim));
        for (key, text) in &entry.keys {
            match key.strip_prefix("options.") {
                Some(key) => options.insert(key, tables::value(text)?),
                None => handler.insert(key, tables::value(text)?),
            };
        }
        handler.insert("options", Item::Table(options));
        tables::put(handlers, &entry.name, handler);
        Ok(())
    })
}

pub(super) fn remove(text: &str, name: &str, original: Option<&str>) -> Result<String, String> {
    let original = original.map(tables::parse).transpose()?.unwrap_or_default();
    tables::edit(text, |doc| {
        let mut path = containerd(doc)?;
        path.push("runtimes");
        tables::take(doc, &path, name);
        let left = tables::lookup(doc, &path);
        let had = tables::lookup(&original, &path).is_some_and(|h| h.contains_key(BUILT_IN));
        if !had && is_spelled_out(left) && left.is_some_and(|h| h.len() == 1) {
            tables::take(doc, &path, BUILT_IN);
        }
        Ok(())
    })
}

/// A text without any key, or none at all, gets the version that containerd 1.5 to 2 read.
fn versioned(text: Option<&str>) -> String {
    let text = text.unwrap_or_default();
    match tables::parse(text).is_ok_and(|doc| doc.as_table().is_empty()) {
        true if text.is_empty() || text.ends_with('\n') => format!("{text}version = 2\n"),
        true => format!("{text}\nversion = 2\n"),
        false => text.to_owned(),
    }
}

/// The path of the table that holds the handlers and the default's name.
fn containerd(doc: &DocumentMut) -> Result<Vec<&'static str>, String> {
    let version = doc.get("version").map_or(Some(1), Item::as_integer);
    match PLUGINS.iter().find(|(of, _)| Some(*of) == version) {
        Some((_, plugin)) => Ok(vec!["plugins", plugin, "containerd"]),
        None if version == Some(1) => {
            Err("it has version 1 (no version = 2 or 3), which can't name a handler's annotations. \
             `containerd config migrate`, where your containerd has it, prints it in a newer version: put that in its \
             place. Else write version = 2 and the full names of plugins (cri is io.containerd.grpc.v1.cri). Then run \
             this again"
                .into())
        }
        None => Err("its version is none that migctl knows: 2 and 3".into()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::host;
    use super::*;

    /// Debian's; a piece of what kubeadm's users make of `containerd config default`; the form of containerd 2
    /// (docs/cri/config.md); one with dotted keys.
    pub(in super::super) const FILES: &[&str] = &[
        "version = 2\n\n[plugins]\n  [plugins.\"io.containerd.grpc.v1.cri\"]\n    [plugins.\"io.containerd.grpc.v1.cri\".cni]\n      \
         bin_dir = \"/usr/lib/cni\"\n      conf_dir = \"/etc/cni/net.d\"\n  [plugins.\"io.containerd.internal.v1.opt\"]\n    path = \
         \"/var/lib/containerd/opt\"\n",
        KUBEADM,
        V3,
        "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nruntimes.runc.runtime_type = \
         \"io.containerd.runc.v2\"\nruntimes.runc.options.SystemdCgroup = true\n# end\n",
        "# Docker's package ships it so, all in comments\n#root = \"/var/lib/containerd\"\n#[grpc]\n",
    ];
    const KUBEADM: &str = r#"disabled_plugins = []
imports = []
oom_score = 0
version = 2

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins]

  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "registry.k8s.io/pause:3.6"

    [plugins."io.containerd.grpc.v1.cri".containerd]
      default_runtime_name = "runc"
      snapshotter = "overlayfs"

      [plugins."io.containerd.grpc.v1.cri".containerd.default_runtime.options]

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes]

        [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
          base_runtime_spec = ""
          pod_annotations = ["io.example.*"]
          privileged_without_host_devices = true
          runtime_type = "io.containerd.runc.v2"

          [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
            BinaryName = ""
            # the kubelet's driver
            SystemdCgroup = true

    [plugins."io.containerd.grpc.v1.cri".x509_key_pair_streaming]
      tls_cert_file = ""
"#;
    const V3: &str = r#"version = 3
root = '/var/lib/containerd'

[plugins]
  [plugins.'io.containerd.cri.v1.images']
    snapshotter = 'overlayfs'

  [plugins.'io.containerd.cri.v1.runtime']
    enable_cdi = true

    [plugins.'io.containerd.cri.v1.runtime'.containerd]
      default_runtime_name = 'runc'

      [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes]
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
          runtime_type = 'io.containerd.runc.v2'
          sandboxer = 'podsandbox'
          io_type = ''

          [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
            BinaryName = ''
            SystemdCgroup = true
"#;
    pub(in super::super) const PIECES: &[&str] = &[
        "disabled_plugins = [ ] # none\n",
        "[debug]\n  level = \"info\"\n\n# of CRI\n",
        "[plugins.\"io.containerd.grpc.v1.cri\"]\n  sandbox_image = 'p'\n",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  default_runtime_name = \"nvidia\"\n",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.nvidia]\n  runtime_type = \
         \"io.containerd.runc.v2\"\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.nvidia.options]\n  BinaryName = \
         \"/usr/bin/nvidia-container-runtime\"\n  SystemdCgroup = true # yes\n",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  runtime_type = \"io.containerd.runc.v2\"\n",
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\n# other kind\nruntime_type = \"io.containerd.kata.v2\"\n",
        "[plugins.\"io.containerd.grpc.v1.cri\".registry]\n\n# the end",
    ];

    fn after(text: Option<&str>) -> (String, Vec<String>) {
        let mut notes = vec![];
        let entry = wanted(text, &host("mig", &[]), &mut notes).unwrap();
        (apply(text, &entry).unwrap(), notes)
    }

    fn handlers(text: &str, plugin: &str) -> toml::Table {
        let doc: toml::Table = text.parse().unwrap();
        doc["plugins"][plugin]["containerd"]["runtimes"].as_table().unwrap().clone()
    }

    #[test]
    fn the_options_of_the_default_handler_carry_over() {
        for (text, plugin) in [(KUBEADM, PLUGINS[0].1), (V3, PLUGINS[1].1)] {
            let (new, notes) = after(Some(text));
            let handlers = handlers(&new, plugin);
            let mig = &handlers["mig"];
            assert_eq!(mig["options"]["SystemdCgroup"].as_bool(), Some(true));
            assert_eq!(mig["options"]["BinaryName"].as_str(), Some("/usr/bin/mig-runtime"));
            assert_eq!(mig["runtime_type"].as_str(), Some(RUNC));
            assert!(mig["pod_annotations"].as_array().unwrap().iter().any(|p| p.as_str() == Some("mig.*/*")));
            assert_eq!(handlers["runc"]["options"]["BinaryName"].as_str(), Some(""));
            assert!(notes.is_empty(), "{notes:?}");
        }
        let mig = &handlers(&after(Some(KUBEADM)).0, PLUGINS[0].1)["mig"];
        assert_eq!(mig["privileged_without_host_devices"].as_bool(), Some(true));
        assert_eq!(mig["pod_annotations"].as_array().unwrap()[0].as_str(), Some("io.example.*"));
        assert_eq!(handlers(&after(Some(V3)).0, PLUGINS[1].1)["mig"]["sandboxer"].as_str(), Some("podsandbox"));
    }

    #[test]
    fn a_file_without_handlers_keeps_the_built_in_one() {
        let (new, _) = after(None);
        assert!(new.starts_with("version = 2\n"), "{new}");
        assert_eq!(handlers(&new, PLUGINS[0].1)["runc"]["runtime_type"].as_str(), Some(RUNC));
        assert_eq!(remove(&new, "mig", None).unwrap(), "version = 2\n");
        // Where another handler came since, the built-in one must stay with it.
        let kata = new + "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.kata]\nruntime_type = \"k\"\n";
        let left = handlers(&remove(&kata, "mig", None).unwrap(), PLUGINS[0].1);
        assert_eq!(left.keys().collect::<Vec<_>>(), ["kata", "runc"]);
    }

    #[test]
    fn what_an_admin_must_know_is_noted() {
        let (_, notes) = after(Some("version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"));
        assert!(notes[0].contains("disabled_plugins"), "{notes:?}");
        let nvidia = PIECES[4];
        let (_, notes) = after(Some(&format!("version = 2\nimports = [\"/etc/c/*.toml\"]\n{}{nvidia}", PIECES[3])));
        assert!(notes.iter().any(|n| n.contains("nvidia-container-runtime")), "{notes:?}");
        assert!(notes.iter().any(|n| n.contains("imports")), "{notes:?}");
    }

    #[test]
    fn a_comment_above_our_table_outlives_it() {
        let text = after(Some(KUBEADM)).0.replace(
            "\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mig]",
            "\n# said by the admin\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.mig]",
        );
        assert!(text.contains("# said"));
        let (again, _) = after(Some(&text));
        assert_eq!(again, text, "the comment stays above it");
        assert!(remove(&text, "mig", Some(KUBEADM)).unwrap().contains("# said by the admin"));
    }

    #[test]
    fn version_1_is_refused_with_the_way_out() {
        for text in ["disabled_plugins = [\"cri\"]\n", "version = 1\n"] {
            let error = find(text, "mig").unwrap_err();
            assert!(error.contains("version 1") && error.contains("containerd config migrate"), "{error}");
        }
    }
}
