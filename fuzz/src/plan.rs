//! The command line of a low-level runtime, as the shim reads it and as runc and crun do. Input: one word a line.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use mig_hook::first::{self, Plan, Verb};

use super::runtimes::{CRUN, Line, Opt, RUNC, Takes};

pub fn check(data: &[u8]) {
    let words: Vec<OsString> = data.split(|b| *b == b'\n').map(|word| OsString::from_vec(word.to_vec())).collect();
    let plan = first::plan(words.clone());
    assert!(words.ends_with(&plan.rest), "the runtime's words are handed on as they are");
    let stripped = words.len() - plan.rest.len();
    assert!(plan.rest.first().is_none_or(|word| !word.to_string_lossy().starts_with("--mig-")), "{:?}", plan.rest);
    let own = words.get(..stripped).unwrap();
    assert!(own.first().is_none_or(|word| word.to_string_lossy().starts_with("--mig-")), "{own:?}");

    let Some(words) = plan.rest.iter().map(|word| word.to_str()).collect::<Option<Vec<&str>>>() else { return };
    // Where the two read a line differently, it is read as runc does.
    let Some(line) = RUNC.read(&words).or_else(|| CRUN.read(&words)) else { return };
    if !ends_open(&line, &words) {
        agrees(&plan, &line, &words);
    }
}

/// Whether the last word is an option whose value is missing: runc takes any other word of the line for it, which nobody means.
fn ends_open(line: &Line, words: &[&str]) -> bool {
    let name = words.last().and_then(|word| word.strip_prefix("--").or(word.strip_prefix('-'))).unwrap_or_default();
    let is_it = |option: &Opt| option.long == name || option.short.is_some_and(|short| name == short.to_string());
    let options = RUNC.options(&line.verb).unwrap_or_default();
    options.iter().any(|option| option.takes == Takes::Value && is_it(option))
}

fn agrees(plan: &Plan, line: &Line, words: &[&str]) {
    let path = |text: &Option<String>| text.as_ref().map(PathBuf::from);
    let verb = match line.verb.as_str() {
        "create" => Verb::Create,
        "run" => Verb::Run,
        "restore" => Verb::Restore,
        "delete" if !line.flag("regex") => Verb::Delete,
        "kill" if !line.flag("regex") => Verb::Kill,
        "exec" => Verb::Exec,
        "state" => Verb::State,
        _ => Verb::Other,
    };
    assert_eq!(plan.verb, verb, "{words:?}");
    assert_eq!(plan.root, path(&line.value("root")), "{words:?}");
    assert_eq!(plan.log, path(&line.value("log")), "{words:?}");
    assert_eq!(plan.log_json, line.value("log-format").as_deref() == Some("json"), "{words:?}");
    if verb == Verb::Other {
        return;
    }
    assert_eq!(plan.id, line.id.as_ref().map(OsString::from), "{words:?}");
    let creates = matches!(verb, Verb::Create | Verb::Run | Verb::Restore);
    if creates {
        assert_eq!(plan.bundle, path(&line.value("bundle")), "{words:?}");
        assert_eq!(plan.pid_file, path(&line.value("pid-file")), "{words:?}");
        assert_eq!(plan.config_file, path(&line.value("config")), "{words:?}");
        let bundle = line.value("bundle").unwrap_or_else(|| ".".into());
        let config = match line.value("config").as_deref() {
            None | Some("config.json") => Path::new(&bundle).join("config.json"),
            Some(other) => PathBuf::from(other),
        };
        assert_eq!(first::config_path(plan), config, "{words:?}");
        let fds = line.value("preserve-fds").unwrap_or_else(|| "0".into());
        assert_eq!(Some(plan.preserve_fds), fds.parse().ok(), "{words:?}");
    }
    if verb == Verb::Exec {
        assert_eq!(plan.process, path(&line.value("process")), "{words:?}");
    }
}
