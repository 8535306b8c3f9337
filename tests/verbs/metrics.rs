//! `migctl metrics`, docs/metrics.md and the Grafana dashboard.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::{Init, World, binaries, blocks, config, document, run, text};
use crate::{asked, code, repository, shown, snapshot, stdout};

/// A metric family as a strict reader of both formats takes it.
#[derive(Debug, Default, PartialEq)]
struct Family {
    kind: String,
    unit: String,
    help: String,
    samples: Vec<(BTreeMap<String, String>, f64)>,
}

/// By the name of their samples: with `_total` for counters.
type Families = BTreeMap<String, Family>;

/// Reads what both OpenMetrics 1.0 (its ABNF, and the rules in words beside it) and Prometheus' text format 0.0.4
/// allow.
fn parse(text: &str) -> Result<Families, String> {
    let mut families = Families::new();
    let mut current: Option<(String, Family, usize)> = None; // name, family, metadata lines so far
    let body = text.strip_suffix("# EOF\n").ok_or("it does not end with # EOF")?;
    let mut finish = |current: Option<(String, Family, usize)>| -> Result<(), String> {
        let Some((name, family, _)) = current else { return Ok(()) };
        let complete = !family.kind.is_empty() && !family.help.is_empty() && !family.samples.is_empty();
        let sampled = if family.kind == "counter" { format!("{name}_total") } else { name.clone() };
        match complete && families.insert(sampled, family).is_none() {
            true => Ok(()),
            false => Err(format!("{name} is not complete, or comes twice")),
        }
    };
    for line in body.split_terminator('\n') {
        let wrong = |what: &str| Err(format!("{what}: {line}"));
        if let Some(metadata) = line.strip_prefix("# ") {
            let mut parts = metadata.splitn(3, ' ');
            let (Some(keyword), Some(name), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
                return wrong("no metadata line");
            };
            if keyword == "TYPE" {
                let reserved = ["_total", "_created", "_count", "_sum", "_bucket", "_gcount", "_gsum"];
                if !is_name(name, true) || reserved.iter().any(|suffix| name.ends_with(suffix)) {
                    return wrong("no name for a family");
                }
                if !["gauge", "counter"].contains(&rest) {
                    return wrong("a type that 0.0.4 does not have");
                }
                finish(current.take())?;
                current = Some((name.to_owned(), Family { kind: rest.to_owned(), ..Family::default() }, 1));
                continue;
            }
            let Some((family, known, lines)) = &mut current else { return wrong("metadata before any type") };
            if family != name || !known.samples.is_empty() {
                return wrong("metadata of another family, or after its samples");
            }
            match (keyword, *lines) {
                ("UNIT", 1) if name.ends_with(&format!("_{rest}")) => known.unit = rest.to_owned(),
                ("HELP", 1 | 2) if !rest.contains(['"', '\\']) => known.help = rest.to_owned(),
                _ => return wrong("not TYPE, UNIT, HELP in that order, or not as both formats write it"),
            }
            *lines = if keyword == "HELP" { 3 } else { 2 };
            continue;
        }
        let Some((family, known, 3)) = &mut current else { return wrong("a sample before its metadata") };
        let (name, labels, value) = sample(line).map_err(|what| format!("{what}: {line}"))?;
        let expected = if known.kind == "counter" { format!("{family}_total") } else { family.clone() };
        if name != expected {
            return wrong("a sample of another family");
        }
        if known.samples.iter().any(|(others, _)| *others == labels) {
            return wrong("the same labels twice");
        }
        if !value.is_finite() || (known.kind == "counter" && value < 0.0) {
            return wrong("no value");
        }
        known.samples.push((labels, value));
    }
    finish(current)?;
    Ok(families)
}

/// `name{label="value",…} number`, and nothing behind it: neither timestamp nor exemplar.
fn sample(line: &str) -> Result<(String, BTreeMap<String, String>, f64), &'static str> {
    let end = line.find(['{', ' ']).ok_or("no sample")?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, quoted) = rest.split_once("=\"").ok_or("no label")?;
            let (value, behind) = unquoted(quoted)?;
            if !is_name(label, false) || labels.insert(label.to_owned(), value).is_some() {
                return Err("no name for a label, or the same twice");
            }
            match behind.strip_prefix(',') {
                Some(next) => rest = next,
                None => break rest = behind.strip_prefix('}').ok_or("no end of the labels")?,
            }
        }
    }
    let number = rest.strip_prefix(' ').ok_or("no space before the value")?;
    let is_number = number.bytes().all(|b| b.is_ascii_digit() || b".-+e".contains(&b));
    match number.parse() {
        Ok(value) if is_number && is_name(name, true) => Ok((name.to_owned(), labels, value)),
        _ => Err("no name or no number"),
    }
}

/// The text up to the closing quote, and what is behind it.
fn unquoted(text: &str) -> Result<(String, &str), &'static str> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, c @ ('"' | '\\'))) => value.push(c),
                _ => return Err("an escape that one of the formats does not have"),
            },
            _ => value.push(c),
        }
    }
    Err("no end of a label's value")
}

fn is_name(text: &str, colon: bool) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || (colon && c == ':');
    !text.is_empty() && !text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(fits)
}

fn metrics(world: &World) -> Families {
    let text = stdout(&world.migctl(&["metrics"]));
    parse(&text).unwrap_or_else(|what| panic!("{what}\n{text}"))
}

/// The value of the only sample with these labels.
fn value(families: &Families, name: &str, labels: &[(&str, &str)]) -> f64 {
    let family = families.get(name).unwrap_or_else(|| panic!("there is no {name}"));
    let has = |all: &BTreeMap<String, String>| labels.iter().all(|(k, v)| all.get(*k).is_some_and(|value| value == v));
    let found: Vec<f64> = family.samples.iter().filter(|(all, _)| has(all)).map(|(_, value)| *value).collect();
    assert_eq!(found.len(), 1, "{name} {labels:?}: {family:#?}");
    found[0]
}

/// A machine on which everything that can be told is told. What is given back keeps it so.
fn eventful() -> (World, Vec<Init>) {
    let world = World::new(&["a100-sxm4-80gb", "h100-sxm-80gb", "a100-sxm4-80gb", "h100-sxm-80gb"]);
    world.recording_runtime(0);
    let live = |name: &str, request: &Value| world.living(name, request).1;
    let on = |gpu: &str, profile: &str| config(json!({"mig.profile": profile, "mig.gpu": gpu}), &[]);
    let lease = |container: &str| {
        let mut leases = world.leases().into_iter();
        leases.find(|lease| lease["holder"]["container"] == container).unwrap()
    };
    let token = |container: &str| lease(container)["token"].as_str().unwrap().to_owned();
    let gi = |container: &str| lease(container)["slices"][0]["gi"].to_string();
    let mut alive = vec![];
    // An A100: one with a hostile name of its image, one that is kept, and one that nobody told us of.
    let hostile = json!({"mig.profile": "1g.10gb", "mig.gpu": "0", "io.kubernetes.cri.image-name": "a\"b\\c\n{}#"});
    alive.push(live("web", &config(hostile, &[])));
    let kept = live("kept", &on("0", "2g.20gb"));
    world.edit_lease(&token("kept"), |lease| lease["state"] = json!("static"));
    drop(kept);
    world.sim("make", &["--gpu", "0", "--profile", "3g.40gb"]);
    // A cordoned A100 with a lost slice; an H100 with MIG off.
    alive.push(live("lost", &on("2", "1g.10gb")));
    world.sim("destroy", &["--gpu", "2", "--gi", &gi("lost")]);
    stdout(&world.migctl(&["cordon", "2"]));
    world.sim("mode", &["--gpu", "3", "off"]);
    world.sim("load", &["--gpu", "3", "--memory", "1024", "--ecc", "1"]);
    // An H100: a busy one, one that the driver does not let go, one that ended unseen.
    alive.push(live("busy", &on("1", "2g.20gb")));
    let load = ["--memory", "4096", "--sm", "75", "--dram", "50", "--ecc", "3"];
    world.sim("load", &[&["--gpu", "1", "--gi", &gi("busy")][..], &load].concat());
    let waiting = live("waiting", &on("1", "1g.10gb"));
    world.sim("hold", &["--gpu", "1", "--gi", &gi("waiting")]);
    drop(waiting);
    drop(live("stale", &on("1", "1g.10gb")));
    (world, alive)
}

#[test]
fn what_is_told_is_so() {
    let (world, _alive) = eventful();
    let before = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let told = metrics(&world);
    let is = |name: &str, labels: &[(&str, &str)], expected: f64| {
        assert_eq!(value(&told, name, labels), expected, "{name} {labels:?}")
    };
    is("mig_up", &[], 1.0);
    is("mig_gpu_mig_enabled", &[("gpu", "0")], 1.0);
    is("mig_gpu_mig_enabled", &[("gpu", "3")], 0.0);
    is("mig_gpu_cordoned", &[("gpu", "2")], 1.0);
    is("mig_gpu_cordoned", &[("gpu", "0")], 0.0);
    is("mig_gpu_memory_slices", &[("gpu", "0")], 8.0);
    is("mig_gpu_memory_used_bytes", &[("gpu", "3")], 1024.0 * 1024.0 * 1024.0);
    is("mig_gpu_ecc_errors_total", &[("gpu", "3")], 1.0);
    let standing = |gpu: &str, state: &str, slices: f64, memory_slices: f64| {
        is("mig_gpu_slices", &[("gpu", gpu), ("state", state)], slices);
        if state != "lost" {
            is("mig_gpu_memory_slices_occupied", &[("gpu", gpu), ("state", state)], memory_slices);
        }
    };
    standing("0", "held", 1.0, 1.0);
    standing("0", "static", 1.0, 2.0);
    standing("0", "foreign", 1.0, 4.0);
    standing("0", "releasing", 0.0, 0.0);
    standing("1", "held", 2.0, 3.0);
    standing("1", "releasing", 1.0, 1.0);
    standing("2", "lost", 1.0, 0.0);
    is("mig_profile_free", &[("gpu", "1"), ("profile", "1g.10gb")], 3.0);
    is("mig_profile_free", &[("gpu", "0"), ("profile", "3g.40gb")], 0.0);
    is("mig_profile_free", &[("gpu", "2"), ("profile", "1g.10gb")], 0.0);
    is("mig_profile_max", &[("gpu", "2"), ("profile", "1g.10gb")], 7.0);
    let busy: (BTreeMap<String, String>, f64) =
        told["mig_slice_info"].samples.iter().find(|(labels, _)| labels["container"] == "busy").unwrap().clone();
    let (gi, ci) = (busy.0["gi"].as_str(), busy.0["ci"].as_str());
    assert_eq!(
        (busy.0["profile"].as_str(), busy.0["state"].as_str(), busy.0["user"].as_str()),
        ("2g.20gb", "held", "root")
    );
    is("mig_slice_memory_used_bytes", &[("gpu", "1"), ("gi", gi), ("ci", ci)], 4096.0 * 1024.0 * 1024.0);
    is("mig_slice_ecc_errors_total", &[("gpu", "1"), ("gi", gi), ("ci", ci)], 3.0);
    is("mig_slice_sms", &[("gpu", "1"), ("gi", gi), ("ci", ci)], 32.0);
    is("mig_instance_sm_utilization_ratio", &[("gpu", "1"), ("gi", gi)], 0.75);
    is("mig_instance_dram_utilization_ratio", &[("gpu", "1"), ("gi", gi)], 0.5);
    let since = value(&told, "mig_slice_held_since_timestamp_seconds", &[("gpu", "1"), ("gi", gi), ("ci", ci)]);
    assert!((before - 60.0..=before).contains(&since), "{since} {before}");
    is("mig_leases", &[("state", "active")], 3.0);
    is("mig_leases", &[("state", "quarantined")], 1.0);
    is("mig_leases", &[("state", "static")], 1.0);
    is("mig_leases", &[("state", "pending")], 0.0);
    is("mig_leases_stale", &[], 1.0);
    let waits = value(&told, "mig_lease_releasing_since_timestamp_seconds", &[]);
    assert!((before - 60.0..=before).contains(&waits), "{waits} {before}");
    let names: Vec<&String> = told["mig_slice_info"].samples.iter().map(|(labels, _)| &labels["image"]).collect();
    assert!(names.iter().any(|image| *image == "a\"b\\c\n{}#"), "{names:?}");
    // Without a holder there is no name.
    for (labels, _) in &told["mig_slice_info"].samples {
        assert_eq!(
            labels["container"].is_empty(),
            ["static", "foreign"].contains(&labels["state"].as_str()),
            "{labels:?}"
        );
    }
}

#[test]
fn docs_and_dashboard_have_every_metric_and_no_other() {
    let (world, _alive) = eventful();
    let told = metrics(&world);
    let page = std::fs::read_to_string(repository("docs/metrics.md")).unwrap();
    let mut documented = BTreeMap::new();
    for row in page.lines().filter(|line| line.starts_with("| `mig_")) {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        if cells.len() == 5 {
            let labels: BTreeSet<String> = cells[3].split(", ").filter(|l| !l.is_empty()).map(str::to_owned).collect();
            let name = cells[0].trim_matches('`').to_owned();
            documented.insert(name, (cells[1].to_owned(), cells[2].to_owned(), labels));
        }
    }
    let shape = |family: &Family| {
        let labels: BTreeSet<String> = family.samples.iter().flat_map(|(labels, _)| labels.keys().cloned()).collect();
        (family.kind.clone(), family.unit.clone(), labels)
    };
    let shapes: BTreeMap<String, _> = told.iter().map(|(name, family)| (name.clone(), shape(family))).collect();
    assert_eq!(documented, shapes, "docs/metrics.md differs from what is printed");

    let queries = blocks(&page, "promql");
    assert!(!queries.is_empty(), "the page has no query");
    for query in queries {
        assert_eq!(check(&query, &shapes).1, Vec::<String>::new(), "{query}");
    }

    let dashboard = document(&repository("packaging/grafana/mig-hook.json"));
    let mut used = BTreeSet::new();
    for expression in expressions(&dashboard) {
        let (metrics, wrong) = check(&expression, &shapes);
        assert!(wrong.is_empty() && !metrics.is_empty(), "{expression}: {wrong:?}");
        used.extend(metrics);
    }
    let unused: Vec<&String> = shapes.keys().filter(|name| !used.contains(*name)).collect();
    assert!(unused.is_empty(), "no panel shows {unused:?}");
    let mut legends = Vec::new();
    strings(&dashboard, "legendFormat", &mut legends);
    let labels: BTreeSet<String> = shapes.values().flat_map(|(_, _, labels)| labels.clone()).collect();
    for label in
        legends.iter().flat_map(|legend| legend.split("{{").skip(1)).map(|rest| rest.split("}}").next().unwrap())
    {
        assert!(label == "instance" || labels.contains(label), "a legend shows {label}");
    }
}

/// Every query: of panels, and of the variables.
fn expressions(dashboard: &Value) -> Vec<String> {
    let mut found = Vec::new();
    strings(dashboard, "expr", &mut found);
    let of_panels = found.len();
    for variable in dashboard["templating"]["list"].as_array().unwrap().iter().filter(|v| v["type"] == "query") {
        let query = variable["query"]["query"].as_str().unwrap();
        assert_eq!(variable["definition"], query);
        let inside = query.strip_prefix("label_values(").and_then(|rest| rest.strip_suffix(')')).unwrap();
        let (series, label) = inside.rsplit_once(", ").unwrap();
        found.push(format!("sum by ({label}) ({series})"));
    }
    assert!(of_panels > 15 && found.len() > of_panels, "{found:#?}");
    found
}

fn strings(value: &Value, key: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (name, inner) in object {
                match inner {
                    Value::String(text) if name == key => found.push(text.clone()),
                    inner => strings(inner, key, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|inner| strings(inner, key, found)),
        _ => {}
    }
}

/// The metrics of an expression, and what is not there: metrics, labels in their selectors, and labels that are grouped or
/// joined by.
fn check(
    expression: &str,
    shapes: &BTreeMap<String, (String, String, BTreeSet<String>)>,
) -> (Vec<String>, Vec<String>) {
    let (mut metrics, mut wrong) = (Vec::new(), Vec::new());
    let of_prometheus = |label: &str| ["instance", "job"].contains(&label);
    let starts = expression.match_indices("mig_").map(|(at, _)| at);
    for at in starts.filter(|at| !expression[..*at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_')) {
        let rest = &expression[at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, behind) = rest.split_at(end);
        let Some((_, _, labels)) = shapes.get(name) else {
            wrong.push(format!("there is no {name}"));
            continue;
        };
        metrics.push(name.to_owned());
        let selectors = behind.strip_prefix('{').and_then(|inside| inside.split('}').next()).unwrap_or_default();
        for selector in selectors.split(',').filter(|s| !s.is_empty()) {
            let label = selector.split(['=', '!']).next().unwrap();
            if !of_prometheus(label) && !labels.contains(label) {
                wrong.push(format!("{name} has no label {label}"));
            }
        }
    }
    let all: BTreeSet<&String> =
        metrics.iter().filter_map(|name| shapes.get(name)).flat_map(|(_, _, labels)| labels).collect();
    for word in ["by (", "on (", "group_left (", "group_right (", "ignoring (", "without ("] {
        for inside in expression.split(word).skip(1) {
            let list = inside.split(')').next().unwrap();
            let labels = list.split(", ").filter(|label| !label.is_empty());
            wrong.extend(
                labels
                    .filter(|l| !of_prometheus(l) && !all.contains(&(*l).to_owned()))
                    .map(|l| format!("no label {l}")),
            );
        }
    }
    (metrics, wrong)
}

#[test]
fn the_checks_find_what_is_wrong() {
    let whole = "# TYPE a_bytes gauge\n# UNIT a_bytes bytes\n# HELP a_bytes Words.\na_bytes{l=\"x\\n\"} 1\n# TYPE b counter\n# HELP b Words.\nb_total 2\n# EOF\n";
    let families = parse(whole).unwrap();
    assert_eq!(families["a_bytes"].samples[0].0["l"], "x\n");
    assert_eq!(families.keys().collect::<Vec<_>>(), ["a_bytes", "b_total"]);
    for (part, wrong) in [
        ("# EOF\n", ""),
        ("# EOF\n", "# EOF"),
        ("gauge", "info"),
        ("# UNIT a_bytes bytes\n", "# UNIT a_bytes seconds\n"),
        ("# HELP b Words.\n", ""),
        ("# HELP b Words.\n", "# HELP b \\\"Words\\\".\n"),
        ("b_total 2", "b 2"),
        ("b_total 2", "b_total 2 1520879607"),
        ("b_total 2", "b_total -2"),
        ("b_total 2", "b_total NaN"),
        ("b_total 2", "b_total 2\nb_total 2"),
        ("x\\n", "x\\t"),
        ("{l=\"x\\n\"}", "{l=\"x\",l=\"y\"}"),
        ("{l=\"x\\n\"}", "{l=\"x\"y\"}"),
        ("{l=\"x\\n\"}", "{0=\"x\"}"),
        ("# TYPE b counter", "# TYPE a_bytes counter"),
        ("a_bytes{", "# a comment\na_bytes{"),
        ("a_bytes{", "\na_bytes{"),
    ] {
        assert!(whole.contains(part) && parse(&whole.replacen(part, wrong, 1)).is_err(), "{part} as {wrong}");
    }
    let labels = BTreeSet::from(["gpu".to_owned()]);
    let shapes = BTreeMap::from([("mig_a".to_owned(), ("gauge".into(), String::new(), labels))]);
    assert_eq!(check("sum by (gpu, instance) (mig_a{gpu=~\"$gpu\"})", &shapes).1, Vec::<String>::new());
    for wrong in ["mig_b", "mig_a{gi=\"1\"}", "sum by (gi) (mig_a)", "mig_a * on (gi) mig_a"] {
        assert_eq!(check(wrong, &shapes).1.len(), 1, "{wrong}");
    }
}

#[test]
fn the_dashboard_is_one_that_grafana_draws() {
    let dashboard = document(&repository("packaging/grafana/mig-hook.json"));
    assert!(dashboard["schemaVersion"].as_u64().unwrap() >= 39 && dashboard["uid"] == "mig-hook");
    assert_eq!(dashboard["templating"]["list"][0]["type"], "datasource");
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len());
    let mut taken = BTreeSet::new();
    for panel in panels {
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            assert!(x < 24 && (at("y")..at("y") + at("h")).all(|y| taken.insert((x, y))), "{}", panel["title"]);
        }
    }
}

#[test]
fn an_empty_machine() {
    let world = World::with(&["a30-24gb"], &["--seed", "metrics"]);
    snapshot(&world, "metrics", &shown(&world, &["metrics"]));
    assert!(!world.path("state").exists(), "looking makes nothing");
}

#[test]
fn a_user_is_told_nothing_rather_than_half_of_it() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let open = run(Command::new("chmod").args(["-R", "a+rX"]).arg(world.path("m").parent().unwrap()));
    assert!(open.status.success(), "{}", text(&open));
    let program = world.path("migctl");
    std::fs::copy(binaries().join("migctl"), &program).unwrap();
    let output = run(Command::new(&program).arg("--config").arg(world.config()).arg("metrics").uid(65534).gid(65534));
    assert!(code(&output) == 77 && output.stdout.is_empty() && text(&output).contains("as root"), "{}", text(&output));
}

#[test]
fn the_file_is_replaced_whole() {
    let world = World::new(&["a100-sxm4-80gb"]);
    let file = world.path("textfile/mig.prom");
    let output = ["metrics", "--output", file.to_str().unwrap()];
    assert_eq!(code(&world.migctl(&output)), 74, "a mistyped directory is not made");
    std::fs::create_dir(file.parent().unwrap()).unwrap();
    assert_eq!(stdout(&world.migctl(&output)), "");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(stdout(&world.migctl(&output)), "");
    parse(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o644, "node_exporter is not root");
    assert_eq!(file.parent().unwrap().read_dir().unwrap().count(), 1, "nothing else is left");
    let output = world.migctl(&["metrics", "--output", world.path("config.toml/mig.prom").to_str().unwrap()]);
    assert_eq!(code(&output), 74, "{}", text(&output));
}

#[test]
fn what_fails_is_told_in_the_text_and_by_the_exit_code() {
    let world = World::new(&["a100-sxm4-80gb"]);
    world.recording_runtime(0);
    let (_bundle, _init) = world.living("web", &asked("1g.10gb"));
    let library = world.path("m/usr/lib/libnvidia-ml.so.1");
    std::fs::rename(&library, world.path("away")).unwrap();
    let file = world.path("mig.prom");
    let output = world.migctl(&["metrics", "--output", file.to_str().unwrap()]);
    assert!(code(&output) == 69 && text(&output).contains("libnvidia-ml.so.1"), "{}", text(&output));
    let told = parse(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!((value(&told, "mig_up", &[]), value(&told, "mig_leases", &[("state", "active")])), (0.0, 1.0));
    assert!(!told.contains_key("mig_gpu_info"));
    std::fs::rename(world.path("away"), &library).unwrap();
    // Leases that another version wrote: then it can't be told who has what.
    let token = world.lease()["token"].as_str().unwrap().to_owned();
    world.edit_lease(&token, |lease| lease["version"] = json!(7));
    let output = world.migctl(&["metrics", "--output", file.to_str().unwrap()]);
    assert!(code(&output) == 74 && text(&output).contains("version 7"), "{}", text(&output));
    let told = parse(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert_eq!(told.keys().collect::<Vec<_>>(), ["mig_build_info", "mig_up"]);
    let output = world.migctl(&["metrics", "--json"]);
    assert!(code(&output) == 64 && text(&output).contains("no JSON document"), "{}", text(&output));
}
