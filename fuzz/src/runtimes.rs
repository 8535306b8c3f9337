//! How runc and crun read their command lines: their option tables, and the rules of the libraries that they read them with
//! (urfave/cli 1.22 over Go's flag; glibc's argp in order). The tables are those of runc 1.1.5 and crun 1.8.1, and
//! tests/corpus.rs holds them against what the installed ones print and do.

/// One option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opt {
    pub long: &'static str,
    pub short: Option<char>,
    pub takes: Takes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    Nothing,
    Value,
    /// crun's `--tty[=TTY]`.
    Maybe,
}

/// A runtime.
#[derive(Debug)]
pub struct Runtime {
    pub globals: &'static [Opt],
    pub verbs: &'static [(&'static str, &'static [Opt])],
    reads: fn(&Runtime, &[&str]) -> Option<Line>,
}

/// A command line as it was read.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Line {
    pub verb: String,
    pub given: Vec<(&'static str, Option<String>)>,
    pub id: Option<String>,
}

impl Line {
    /// The last value of an option.
    pub fn value(&self, long: &str) -> Option<String> {
        self.given.iter().rev().find(|(name, _)| *name == long)?.1.clone()
    }

    pub fn flag(&self, long: &str) -> bool {
        self.given.iter().any(|(name, _)| *name == long)
    }
}

impl Runtime {
    /// `None` where it refuses the line, does something else (help, version), or where no more is known of the verb.
    pub fn read(&self, words: &[&str]) -> Option<Line> {
        (self.reads)(self, words)
    }

    /// The options of a verb.
    pub fn options(&self, verb: &str) -> Option<&'static [Opt]> {
        self.verbs.iter().find(|(name, _)| *name == verb).map(|(_, options)| *options)
    }
}

const fn flag(long: &'static str) -> Opt {
    Opt { long, short: None, takes: Takes::Nothing }
}
const fn flag_or(long: &'static str, short: char) -> Opt {
    Opt { long, short: Some(short), takes: Takes::Nothing }
}
const fn value(long: &'static str) -> Opt {
    Opt { long, short: None, takes: Takes::Value }
}
const fn value_or(long: &'static str, short: char) -> Opt {
    Opt { long, short: Some(short), takes: Takes::Value }
}

pub const RUNC: Runtime = Runtime {
    globals: &[
        flag("debug"),
        value("log"),
        value("log-format"),
        value("root"),
        value("criu"),
        flag("systemd-cgroup"),
        value("rootless"),
        flag_or("help", 'h'),
        flag_or("version", 'v'),
    ],
    verbs: &[
        (
            "create",
            &[
                value_or("bundle", 'b'),
                value("console-socket"),
                value("pid-file"),
                flag("no-pivot"),
                flag("no-new-keyring"),
                value("preserve-fds"),
            ],
        ),
        (
            "run",
            &[
                value_or("bundle", 'b'),
                value("console-socket"),
                flag_or("detach", 'd'),
                flag("keep"),
                value("pid-file"),
                flag("no-subreaper"),
                flag("no-pivot"),
                flag("no-new-keyring"),
                value("preserve-fds"),
            ],
        ),
        (
            "restore",
            &[
                value("console-socket"),
                value("image-path"),
                value("work-path"),
                flag("tcp-established"),
                flag("ext-unix-sk"),
                flag("shell-job"),
                flag("file-locks"),
                value("manage-cgroups-mode"),
                value_or("bundle", 'b'),
                flag_or("detach", 'd'),
                value("pid-file"),
                flag("no-subreaper"),
                flag("no-pivot"),
                value("empty-ns"),
                flag("auto-dedup"),
                flag("lazy-pages"),
                value("lsm-profile"),
                value("lsm-mount-context"),
            ],
        ),
        (
            "exec",
            &[
                value("console-socket"),
                value("cwd"),
                value_or("env", 'e'),
                flag_or("tty", 't'),
                value_or("user", 'u'),
                value_or("additional-gids", 'g'),
                value_or("process", 'p'),
                flag_or("detach", 'd'),
                value("pid-file"),
                value("process-label"),
                value("apparmor"),
                flag("no-new-privs"),
                value_or("cap", 'c'),
                value("preserve-fds"),
                value("cgroup"),
                flag("ignore-paused"),
            ],
        ),
        ("delete", &[flag_or("force", 'f')]),
        ("kill", &[flag_or("all", 'a')]),
        ("state", &[]),
    ],
    reads: runc,
};

pub const CRUN: Runtime = Runtime {
    globals: &[
        value("cgroup-manager"),
        flag("debug"),
        value("log"),
        value("log-format"),
        value("root"),
        value("rootless"),
        flag("systemd-cgroup"),
        flag_or("help", '?'),
        flag("usage"),
        flag_or("version", 'v'),
    ],
    verbs: &[
        (
            "create",
            &[
                value_or("bundle", 'b'),
                value("console-socket"),
                value_or("config", 'f'),
                flag("no-new-keyring"),
                flag("no-pivot"),
                flag("no-subreaper"),
                value("pid-file"),
                value("preserve-fds"),
            ],
        ),
        (
            "run",
            &[
                value_or("bundle", 'b'),
                value("console-socket"),
                flag_or("detach", 'd'),
                value_or("config", 'f'),
                flag("no-new-keyring"),
                flag("no-pivot"),
                flag("no-subreaper"),
                value("pid-file"),
                value("preserve-fds"),
            ],
        ),
        (
            "exec",
            &[
                value("apparmor"),
                value("cgroup"),
                value("console-socket"),
                value("cwd"),
                value_or("cap", 'c'),
                flag_or("detach", 'd'),
                value_or("env", 'e'),
                flag("no-new-privs"),
                value("pid-file"),
                value("preserve-fds"),
                value("process-label"),
                value_or("process", 'p'),
                Opt { long: "tty", short: Some('t'), takes: Takes::Maybe },
                value_or("user", 'u'),
            ],
        ),
        ("delete", &[flag_or("force", 'f'), flag_or("regex", 'r')]),
        ("kill", &[flag_or("all", 'a'), flag_or("regex", 'r')]),
        ("state", &[]),
    ],
    reads: crun,
};

/// How many words a verb takes besides its options.
fn takes(verb: &str, words: usize) -> bool {
    match verb {
        "exec" => words >= 1,
        "kill" => (1..=2).contains(&words),
        _ => words == 1,
    }
}

fn runc(runtime: &Runtime, words: &[&str]) -> Option<Line> {
    let mut line = Line::default();
    let after = go_flags(runtime.globals, words, &mut line.given)?;
    let (verb, rest) = after.split_first()?;
    line.verb = (*verb).to_owned();
    let options = runtime.options(verb)?;
    let mut given = Vec::new();
    // Only exec, whose command may have options of its own, takes them in their order.
    let ordered = if *verb == "exec" { rest.to_vec() } else { options_first(options, rest) };
    let operands = go_flags(options, &ordered, &mut given)?;
    line.given.extend(given);
    line.id = operands.first().map(|id| (*id).to_owned());
    let format = line.value("log-format");
    (takes(verb, operands.len()) && format.is_none_or(|format| ["text", "json", ""].contains(&format.as_str())))
        .then_some(line)
}

/// Go's flag package: up to the first word that is no option; `-x` and `--x` are the same.
fn go_flags<'a>(
    options: &[Opt],
    words: &[&'a str],
    given: &mut Vec<(&'static str, Option<String>)>,
) -> Option<Vec<&'a str>> {
    let mut spelled: Vec<(&'static str, &str)> = Vec::new();
    let mut at = 0;
    while let Some(word) = words.get(at) {
        let Some(body) = word.strip_prefix('-').filter(|body| !body.is_empty()) else { break };
        at += 1;
        if body == "-" {
            break;
        }
        let body = body.strip_prefix('-').unwrap_or(body);
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (body, None),
        };
        if name.starts_with('-') || name.is_empty() {
            return None;
        }
        let is_it = |option: &&Opt| option.long == name || option.short.is_some_and(|c| name == c.to_string());
        let option = options.iter().find(is_it)?;
        let value = match (option.takes, value) {
            (Takes::Nothing, None) => None,
            // Off again, or on; what off means here depends on the option.
            (Takes::Nothing, Some(value)) => {
                ["1", "t", "T", "true", "TRUE", "True"].contains(&value).then_some(None)?
            }
            (_, Some(value)) => Some(value.to_owned()),
            (_, None) => {
                at += 1;
                Some((*words.get(at - 1)?).to_owned())
            }
        };
        if option.long == "help" || option.long == "version" {
            return None;
        }
        // A number as anybody writes it: Go also knows other notations.
        let plain = |text: &String| text.parse::<u32>().is_ok() && text.bytes().all(|b| b.is_ascii_digit());
        let decimal = |text: &String| plain(text) && (text == "0" || !text.starts_with('0'));
        if option.long == "preserve-fds" && !value.as_ref().is_some_and(decimal) {
            return None;
        }
        // One option under both of its names is refused.
        if spelled.iter().any(|(long, other)| *long == option.long && *other != name) {
            return None;
        }
        spelled.push((option.long, name));
        given.push((option.long, value));
    }
    Some(words.get(at..)?.to_vec())
}

/// urfave/cli brings the options of a verb before its other words. What follows one is taken along as its value, unless it is
/// an option itself: also where the option has none.
fn options_first<'a>(options: &[Opt], words: &[&'a str]) -> Vec<&'a str> {
    let is_option = |word: &str| {
        let name = word.strip_prefix("--").or(word.strip_prefix('-')).unwrap_or_default();
        let name = name.split('=').next().unwrap_or_default();
        let known = |option: &Opt| option.long == name || option.short.is_some_and(|c| name == c.to_string());
        options.iter().any(known) || name == "help" || name == "h"
    };
    let (mut first, mut last) = (Vec::new(), Vec::new());
    let mut value_next = false;
    for (n, word) in words.iter().enumerate() {
        if *word == "--" {
            last.extend(&words[n..]);
            break;
        } else if value_next && !is_option(word) {
            value_next = false;
            first.push(*word);
        } else if is_option(word) {
            first.push(*word);
            value_next = !word.contains('=');
        } else {
            last.push(*word);
        }
    }
    first.extend(last);
    first
}

fn crun(runtime: &Runtime, words: &[&str]) -> Option<Line> {
    let mut line = Line::default();
    let after = argp(runtime.globals, words, &mut line.given)?;
    // crun 1.8 takes the value of --rootless for that of --root.
    let place = |long| line.given.iter().rposition(|(name, _)| *name == long);
    if place("rootless") > place("root") {
        return None;
    }
    let (verb, rest) = after.split_first()?;
    line.verb = (*verb).to_owned();
    let mut given = Vec::new();
    let operands = argp(runtime.options(verb)?, rest, &mut given)?;
    line.given.extend(given);
    line.id = operands.first().map(|id| (*id).to_owned());
    let manager = line.value("cgroup-manager");
    let known = manager.is_none_or(|manager| ["systemd", "cgroupfs", "disabled"].contains(&manager.as_str()));
    (known && takes(verb, operands.len())).then_some(line)
}

/// glibc's argp, in order: up to the first word that is no option. Long names may be cut short, letters written together.
fn argp<'a>(
    options: &[Opt],
    words: &[&'a str],
    given: &mut Vec<(&'static str, Option<String>)>,
) -> Option<Vec<&'a str>> {
    /// argp's own.
    const OWN: [Opt; 5] =
        [flag_or("help", '?'), flag("usage"), flag_or("version", 'V'), value("program-name"), value("HANG")];
    let mut at = 0;
    let mut take = |option: &Opt, value: Option<String>| -> Option<()> {
        if OWN.iter().any(|own| own.long == option.long) {
            return None;
        }
        let decimal = |text: &String| text.parse::<u32>().is_ok_and(|n| n.to_string() == *text);
        if option.long == "preserve-fds" && !value.as_ref().is_some_and(decimal) {
            return None;
        }
        given.push((option.long, value));
        Some(())
    };
    while let Some(word) = words.get(at) {
        let Some(body) = word.strip_prefix('-').filter(|body| !body.is_empty()) else { break };
        at += 1;
        if body == "-" {
            break;
        }
        if let Some(body) = body.strip_prefix('-') {
            let (name, value) = match body.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (body, None),
            };
            let all = || options.iter().chain(&OWN);
            let exact = all().find(|option| option.long == name);
            let mut near = all().filter(|option| option.long.starts_with(name));
            let option = match (exact, near.next(), near.next()) {
                (Some(option), ..) | (None, Some(option), None) => option,
                // `--ro`: crun 1.8 has one meaning for --root and --rootless.
                _ => return None,
            };
            let value = match (option.takes, value) {
                (Takes::Nothing, Some(_)) => return None,
                (Takes::Value, None) => {
                    at += 1;
                    Some((*words.get(at - 1)?).to_owned())
                }
                (_, value) => value,
            };
            take(option, value)?;
            continue;
        }
        let mut letters = body.chars();
        while let Some(letter) = letters.next() {
            let option = options.iter().chain(&OWN).find(|option| option.short == Some(letter))?;
            match option.takes {
                Takes::Nothing => take(option, None)?,
                Takes::Maybe | Takes::Value => {
                    let rest = letters.as_str();
                    let value = match (rest.is_empty(), option.takes) {
                        (false, _) => Some(rest.to_owned()),
                        (true, Takes::Maybe) => None,
                        (true, _) => {
                            at += 1;
                            Some((*words.get(at - 1)?).to_owned())
                        }
                    };
                    take(option, value)?;
                    break;
                }
            }
        }
    }
    Some(words.get(at..)?.to_vec())
}
