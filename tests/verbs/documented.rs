//! Nothing is forgotten: every verb has its tests, its schema and its part of the manual page, and every option is named
//! there.

use std::process::Command;

use serde_json::json;

use crate::common::{binaries, installed, run, skip, text};
use crate::{faults, repository, stdout};

/// Verbs without a document of ours.
const NO_SCHEMA: [(&str, &str); 5] = [
    ("cdi", "prints a CDI spec, whose form is CDI's"),
    ("completions", "prints a shell's script"),
    ("metrics", "prints OpenMetrics text"),
    ("run", "becomes another program, or prints a shell's commands"),
    ("export", "prints a config of mig-parted, whose form is mig-parted's"),
];

/// A command as the shipped binary lists it.
pub struct Listed {
    /// `["queue", "cancel"]`; empty for migctl itself.
    pub words: Vec<String>,
    /// Long options, with their dashes.
    options: Vec<String>,
}

/// migctl, its verbs, and what is below these.
pub fn commands() -> Vec<Listed> {
    let mut found: Vec<Listed> = vec![];
    let mut open: Vec<Vec<String>> = vec![vec![]];
    while let Some(words) = open.pop() {
        let help = stdout(&run(Command::new(binaries().join("migctl")).args(&words).arg("--help")));
        let first_word = |line: &str| line.split_whitespace().next().unwrap_or_default().to_owned();
        let below = section(&help, "Commands:").into_iter().map(first_word).filter(|verb| verb != "help");
        open.extend(below.map(|verb| [&words[..], &[verb]].concat()).collect::<Vec<_>>());
        let long = |line: &str| line.split([' ', ',', '=', '[']).find(|word| word.starts_with("--")).map(str::to_owned);
        let options = section(&help, "Options:").into_iter().filter_map(long).collect();
        found.push(Listed { words, options });
    }
    assert!(found.len() > 6 && found.iter().any(|c| c.options.len() > 6), "the reader of help is broken");
    found
}

pub fn verbs() -> Vec<String> {
    commands().into_iter().filter(|c| c.words.len() == 1).flat_map(|c| c.words).collect()
}

/// The lines that begin an entry in one part of clap's help: what they say of it is indented deeper.
fn section<'a>(help: &'a str, title: &str) -> Vec<&'a str> {
    let part = help.lines().skip_while(|line| *line != title).skip(1);
    let part = part.take_while(|line| line.is_empty() || line.starts_with(' '));
    part.filter(|line| (1..=6).contains(&(line.len() - line.trim_start().len()))).collect()
}

fn without_markup(page: &str) -> String {
    let page = std::fs::read_to_string(repository(page)).unwrap();
    ["\\fB", "\\fI", "\\fR"].iter().fold(page, |page, font| page.replace(font, "")).replace("\\-", "-")
}

/// docs/man/migctl.1 without its markup: OPTIONS, and what is said of each verb.
fn manual() -> impl Fn(&str) -> String {
    let plain = without_markup("docs/man/migctl.1");
    move |name| {
        let mut depth = 0;
        let mut tagged = false;
        let mut inside = false;
        let mut part = String::new();
        for line in plain.lines() {
            let words = line.strip_prefix(".B ").unwrap_or(line);
            match line {
                ".RS" => depth += 1,
                ".RE" => depth -= 1,
                _ if line.starts_with(".SH ") => inside = line == format!(".SH {name}"),
                _ if tagged && depth == 0 && name != "OPTIONS" => inside = words.split(' ').next() == Some(name),
                _ => {}
            }
            tagged = line == ".TP";
            if inside {
                part += words;
                part.push('\n');
            }
        }
        part
    }
}

/// Whether a text has a word, and not only as a part of another: `--gpu` is not in `--gpus`.
fn names(text: &str, word: &str) -> bool {
    text.split(|c: char| !c.is_alphanumeric() && c != '-').any(|w| w == word)
}

#[test]
fn every_verb_has_a_schema_and_tests() {
    for verb in verbs() {
        let tests = repository("tests/verbs").join(format!("{verb}.rs"));
        assert!(tests.is_file(), "migctl {verb} has no tests: {}", tests.display());
        let harness = std::fs::read_to_string(repository("tests/verbs.rs")).unwrap();
        assert!(harness.contains(&format!("mod {verb};\n")), "tests/verbs.rs leaves tests/verbs/{verb}.rs out");
        let schema = repository("docs/schema").join(format!("{verb}.json"));
        match NO_SCHEMA.iter().find(|(without, _)| *without == verb) {
            Some((_, why)) => assert!(!schema.exists(), "{verb} {why}, but there is {}", schema.display()),
            None => assert!(schema.is_file(), "migctl {verb} has no schema: a line in src/cli/schema.rs makes it"),
        }
    }
}

#[test]
fn a_schema_finds_what_is_missing_wrong_or_unknown() {
    let answer = json!({"version": 1, "token": "a", "outcome": "busy", "reason": "b"});
    assert_eq!(faults("release", &answer), Vec::<String>::new());
    for (field, value) in [("version", json!(2)), ("token", json!(1)), ("outcome", json!("x")), ("new", json!(true))] {
        let mut wrong = answer.clone();
        wrong[field] = value;
        assert!(!faults("release", &wrong).is_empty(), "{wrong}");
    }
    for field in ["version", "token", "outcome", "reason"] {
        let mut short = answer.clone();
        short.as_object_mut().unwrap().remove(field);
        assert!(!faults("release", &short).is_empty(), "{short}");
    }
}

#[test]
fn the_manual_page_names_every_verb_and_option() {
    let manual = manual();
    let commands = commands();
    let global = commands.iter().find(|c| c.words.is_empty()).unwrap();
    for option in &global.options {
        assert!(names(&manual("OPTIONS"), option), "{option} is not in OPTIONS of docs/man/migctl.1");
    }
    for command in commands.iter().filter(|c| !c.words.is_empty()) {
        let part = manual(&command.words[0]);
        let said = command.words.join(" ");
        for word in command.words.iter().chain(command.options.iter().filter(|o| !global.options.contains(o))) {
            assert!(
                names(&part, word),
                "{word} of migctl {said} is not where docs/man/migctl.1 describes {said}: {part}"
            );
        }
    }
}

#[test]
fn the_simulators_page_names_every_command() {
    let page = without_markup("sim/nvml-sim.1");
    let commands = page.split(".SH ").find(|part| part.starts_with("COMMANDS")).unwrap();
    let help = stdout(&run(Command::new(binaries().join("nvml-sim")).arg("--help")));
    let listed = section(&help, "Commands:").into_iter().map(|line| line.split_whitespace().next().unwrap());
    let listed: Vec<&str> = listed.filter(|command| *command != "help").collect();
    assert!(listed.len() > 10, "the reader of help is broken: {help}");
    for command in listed {
        assert!(names(commands, command), "{command} is not in COMMANDS of sim/nvml-sim.1");
    }
}

#[test]
fn the_manual_pages_are_well_formed() {
    if !installed("groff") {
        return skip("the_manual_pages_are_well_formed", "no groff");
    }
    let pages = repository("docs/man").read_dir().unwrap().map(|page| page.unwrap().path());
    for page in pages.chain([repository("sim/nvml-sim.1")]) {
        let output = run(Command::new("groff").args(["-ww", "-man", "-z"]).arg(&page));
        assert!(output.status.success() && output.stderr.is_empty(), "{}: {}", page.display(), text(&output));
    }
}
