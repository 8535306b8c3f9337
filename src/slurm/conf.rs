//! Files of Slurm's own format (slurm.conf, gres.conf, cgroup.conf, oci.conf), read as its src/common/parse_config.c reads
//! them, and its lists of hosts and of generic resources. Pure: who reads says how.

use std::path::{Path, PathBuf};

/// How deep files may include files, how many there may be, and their length together in bytes.
const DEPTH: usize = 8;
const FILES: usize = 64;
const LENGTH: usize = 4 << 20;

/// Such a file with all that it includes.
#[derive(Debug, Default)]
pub struct Conf {
    lines: Vec<Line>,
    /// Included files that could not be read, or were too many, too deep or too long.
    pub unread: Vec<PathBuf>,
    files: usize,
    length: usize,
}

/// `NodeName=n1 Gres=migc:7 State=UNKNOWN`: keys in lower case, with their values.
#[derive(Debug)]
pub struct Line(Vec<(String, String)>);

impl Line {
    /// The value of a key, which is given in lower case.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.0.iter().rfind(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn is(&self, key: &str) -> bool {
        self.0.first().is_some_and(|(name, _)| name == key)
    }
}

impl Conf {
    /// The file, and what it includes; `None` where it can't be read.
    pub fn read(file: &Path, text_of: &dyn Fn(&Path) -> Option<String>) -> Option<Conf> {
        let mut conf = Conf::default();
        conf.add(file, text_of, 0).then_some(conf)
    }

    /// Whether the file itself could be read.
    fn add(&mut self, file: &Path, text_of: &dyn Fn(&Path) -> Option<String>, depth: usize) -> bool {
        self.files += 1;
        let text = if depth > DEPTH || self.files > FILES { None } else { text_of(file) };
        let Some(text) = text.filter(|text| self.length + text.len() <= LENGTH) else { return false };
        self.length += text.len();
        for line in logical_lines(&text) {
            match included(&line) {
                Some(name) => {
                    let cluster = self.value("clustername").unwrap_or_default().to_lowercase();
                    let included = file.with_file_name(name.replace("%c", &cluster));
                    if !self.add(&included, text_of, depth + 1) {
                        self.unread.push(included);
                    }
                }
                None => self.lines.extend(Some(pairs(&line)).filter(|line| !line.0.is_empty())),
            }
        }
        true
    }

    /// All lines that begin with a key, which is given in lower case.
    pub fn lines<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a Line> {
        self.lines.iter().filter(move |line| line.is(key))
    }

    /// What a key is set to; of several, Slurm takes the last.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.lines.iter().rfind(|line| line.is(key)).and_then(|line| line.value(key))
    }

    /// Whether any line sets a key to a value that is as wanted.
    pub fn any(&self, key: &str, wanted: impl Fn(&str) -> bool) -> bool {
        self.lines.iter().filter_map(|line| line.value(key)).any(wanted)
    }

    /// The words of a list that a key is set to, in lower case and without what stands before a slash (`task/cgroup`).
    pub fn words(&self, key: &str) -> Vec<String> {
        let words = self.value(key).unwrap_or_default().split(',').map(str::trim).filter(|word| !word.is_empty());
        words.map(|word| word.rsplit('/').next().unwrap_or(word).to_ascii_lowercase()).collect()
    }
}

/// Lines without comments, those that end in `\` joined with the next, `\#` and `\\` as what they stand for.
fn logical_lines(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut joined = String::new();
    for line in text.lines() {
        let line = without_comment(line);
        let trimmed = line.trim_end();
        let backslashes = trimmed.len() - trimmed.trim_end_matches('\\').len();
        if backslashes % 2 == 1 {
            joined += &trimmed[..trimmed.len() - 1];
            continue;
        }
        joined += line;
        lines.push(unescaped(&std::mem::take(&mut joined)));
    }
    lines.push(unescaped(&joined));
    lines
}

fn without_comment(line: &str) -> &str {
    let mut escaped = false;
    for (at, c) in line.char_indices() {
        match c {
            '#' if !escaped => return &line[..at],
            '\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    line
}

fn unescaped(line: &str) -> String {
    let mut chars = line.chars();
    std::iter::from_fn(|| match chars.next() {
        Some('\\') => chars.next(),
        other => other,
    })
    .collect()
}

/// The file that an `Include` line names.
fn included(line: &str) -> Option<&str> {
    let (word, rest) = line.split_once(char::is_whitespace)?;
    if word.eq_ignore_ascii_case("include") { rest.split_whitespace().next() } else { None }
}

fn pairs(line: &str) -> Line {
    let mut found = Vec::new();
    let mut rest = line;
    while let Some((key, value, after)) = pair(rest) {
        found.push((key.to_ascii_lowercase(), value.to_owned()));
        rest = after;
    }
    Line(found)
}

/// The key, value and rest of `keyvalue_pattern`: `Key = "value with blanks"`, `Key+=value`.
fn pair(text: &str) -> Option<(&str, &str, &str)> {
    let text = text.trim_start();
    let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '.')?;
    let (key, rest) = text.split_at(end);
    let rest = rest.trim_start();
    let rest = rest.strip_prefix(['-', '*', '+', '/']).unwrap_or(rest).strip_prefix('=')?.trim_start();
    let quoted = rest.strip_prefix('"').and_then(|rest| rest.split_once('"'));
    let quoted = quoted.filter(|(_, after)| after.is_empty() || after.starts_with(char::is_whitespace));
    let (value, after) = quoted.unwrap_or_else(|| rest.split_at(rest.find(char::is_whitespace).unwrap_or(rest.len())));
    (!key.is_empty() && !rest.is_empty()).then_some((key, value, after))
}

/// Whether a list of hosts, or of files (`gpu[01-16,20],login`), has a name. Nothing is expanded.
pub fn has(list: &str, name: &str) -> bool {
    let mut open = false;
    let mut items = list.split(|c| {
        open = (open || c == '[') && c != ']';
        c == ',' && !open
    });
    items.any(|item| is_one_of(item.trim(), name))
}

fn is_one_of(item: &str, name: &str) -> bool {
    let Some((before, rest)) = item.split_once('[') else { return item == name };
    let Some(((numbers, after), name)) = rest.split_once(']').zip(name.strip_prefix(before)) else { return false };
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    (1..=digits).any(|n| is_numbered(numbers, &name[..n]) && is_one_of(after, &name[n..]))
}

/// Whether `01-16,20` has these digits. The first of a range says how many there are at least.
fn is_numbered(numbers: &str, digits: &str) -> bool {
    let Ok(number) = digits.parse::<u64>() else { return false };
    numbers.split(',').any(|range| {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let width = digits.len() == low.len() || (digits.len() > low.len() && !digits.starts_with('0'));
        let bounds = low.parse::<u64>().ok().zip(high.parse::<u64>().ok());
        width && bounds.is_some_and(|(low, high)| (low..=high).contains(&number))
    })
}

/// One of `gpu:a100_3g.20gb:2,migc:7`: name, type and count.
#[derive(Debug, PartialEq, Eq)]
pub struct Gres {
    /// In lower case.
    pub name: String,
    /// Its type.
    pub kind: Option<String>,
    /// How many.
    pub count: u64,
}

/// The resources of `Gres=`.
pub fn gres(list: &str) -> Vec<Gres> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty()).map(one_gres).collect()
}

fn one_gres(item: &str) -> Gres {
    let item = item.split('(').next().unwrap_or(item); // sockets, as `gpu:2(S:0)`
    let mut words: Vec<&str> = item.split(':').filter(|word| *word != "no_consume").collect();
    let count = words.last().filter(|_| words.len() > 1).and_then(|word| counted(word));
    if count.is_some() {
        words.pop();
    }
    let name = words.first().copied().unwrap_or_default().to_ascii_lowercase();
    Gres { name, kind: words.get(1).map(|kind| (*kind).to_owned()), count: count.unwrap_or(1) }
}

/// A number, perhaps with a suffix that stands for a power of 1024.
pub fn counted(word: &str) -> Option<u64> {
    let power = |c: char| "KMGTP".find(c.to_ascii_uppercase()).map(|at| at as u32 + 1);
    let suffix = word.chars().next_back().and_then(power);
    let number: u64 = word[..word.len() - usize::from(suffix.is_some())].parse().ok()?;
    number.checked_mul(1024u64.checked_pow(suffix.unwrap_or(0))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn conf(files: &[(&str, &str)]) -> Conf {
        let files: BTreeMap<PathBuf, String> =
            files.iter().map(|(name, text)| (Path::new("/etc/slurm").join(name), (*text).to_owned())).collect();
        Conf::read(Path::new("/etc/slurm/slurm.conf"), &|path| files.get(path).cloned()).unwrap()
    }

    #[test]
    fn keys_values_comments_and_continued_lines() {
        let conf = conf(&[(
            "slurm.conf",
            "# Prolog=/no\nCLUSTERNAME = Mini # a word\nProlog=/a\\#b\nTaskPlugin=task/affinity,Task/CGroup\\\n ,x\n\
             RunTimeRun=\"mig-runtime run %n\"\nNodeName=n1 \\ # split\n  Gres=migc:7,migm:8 \\\\ State=UNKNOWN\nprolog=/last\n\
             =x\nKey\nnodename = n2 gres += gpu:1\n",
        )]);
        assert_eq!(conf.value("clustername"), Some("Mini"));
        assert_eq!(conf.value("prolog"), Some("/last"), "the last counts");
        assert_eq!(conf.lines("prolog").next().unwrap().value("prolog"), Some("/a#b"));
        assert_eq!(conf.words("taskplugin"), ["affinity", "cgroup"]);
        assert_eq!(conf.value("runtimerun"), Some("mig-runtime run %n"));
        let nodes: Vec<_> = conf.lines("nodename").map(|line| (line.value("nodename"), line.value("gres"))).collect();
        assert_eq!(nodes, [(Some("n1"), Some("migc:7,migm:8")), (Some("n2"), Some("gpu:1"))]);
        assert_eq!((conf.value("gres"), conf.value("key"), conf.words("nothing").len()), (None, None, 0));
    }

    #[test]
    fn files_include_files_beside_them_but_not_for_ever() {
        let conf = conf(&[
            ("slurm.conf", "ClusterName=Mini\nInclude nodes/%c.conf\ninclude slurm.conf\nINCLUDE /gone\nIncludes=1\n"),
            ("nodes/mini.conf", "NodeName=n1\ninclude more.conf\n"),
            ("nodes/more.conf", "NodeName=n2\n"),
        ]);
        assert!(conf.lines("nodename").count() > 2 && conf.lines("nodename").count() < 100);
        assert!(conf.unread.contains(&"/gone".into()) && conf.unread.contains(&"/etc/slurm/slurm.conf".into()));
        assert_eq!(conf.value("includes"), Some("1"));
        let long = "#".repeat(LENGTH + 1);
        assert!(Conf::read(Path::new("/x"), &|_| Some(long.clone())).is_none());
        assert!(Conf::read(Path::new("/x"), &|_| None).is_none());
    }

    #[test]
    fn lists_of_hosts_are_looked_into() {
        for (list, name, is) in [
            ("n1", "n1", true),
            ("n1", "n10", false),
            ("n[1-3,7]", "n3", true),
            ("n[1-3,7]", "n7", true),
            ("n[1-3,7]", "n4", false),
            ("n[01-16]", "n7", false),
            ("n[01-16]", "n07", true),
            ("n[1-16]", "n07", false),
            ("n[8-12]", "n10", true),
            ("login,gpu[1-2]", "gpu2", true),
            ("r[1-2]n[0-9]-ib", "r2n5-ib", true),
            ("r[1-2]n[0-9]-ib", "r3n5-ib", false),
            ("/dev/nvidia[0-3]", "/dev/nvidia2", true),
            ("n[1-", "n1", false),
            ("n[a-b,]", "n1", false),
            ("n[0-99999999999999999999]", "n1", false),
            ("", "n1", false),
        ] {
            assert_eq!(has(list, name), is, "{list} {name}");
        }
    }

    #[test]
    fn resources_have_a_type_and_a_count_or_not() {
        let of = |name: &str, kind: Option<&str>, count| Gres { name: name.into(), kind: kind.map(Into::into), count };
        assert_eq!(
            gres("gpu:a100_3g.20gb:2(S:0), Migc:7,shard,lustre:no_consume:4K,migc:h100:14,gpu:h100"),
            [
                of("gpu", Some("a100_3g.20gb"), 2),
                of("migc", None, 7),
                of("shard", None, 1),
                of("lustre", None, 4096),
                of("migc", Some("h100"), 14),
                of("gpu", Some("h100"), 1),
            ]
        );
        assert_eq!((counted("99999999999P"), counted("2é"), counted("")), (None, None, None));
    }

    proptest::proptest! {
        #[test]
        fn hostile_text_is_read_to_its_end(text in "([\\[\\]\\\\#\"=, a-c0-9\n]|Include x|NodeName=|é){0,200}") {
            let conf = Conf::read(Path::new("/a/x"), &|_| Some(text.clone())).unwrap_or_default();
            for line in conf.lines("nodename") {
                let value = line.value("nodename").unwrap_or_default();
                let _ = (has(value, "a1b22"), gres(value));
            }
        }
    }
}
