//! The placement as shipped, on recorded streams of requests: the small form of `make bench-placement`, for every run of the
//! tests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../benches/placement/mod.rs"]
#[allow(dead_code)] // what only the benchmark prints
mod replays;

use mig_hook::placement::Policy;
use replays::trace::{self, Trace};
use replays::{Chooser, POLICIES, RECORDED, check, replay};

fn recorded(name: &str) -> Trace {
    let (_, packed) = RECORDED.iter().find(|(recorded, _)| *recorded == name).unwrap();
    trace::unpacked(packed).unwrap()
}

/// By the default policy on nodes of 4 and 8 GPUs, one of them with requests of several slices.
#[test]
fn recorded_requests_go_where_another_program_put_them() {
    for name in ["p2-small-4gpu-heavy", "p5-multi-8gpu", "p6-media-drift-8gpu"] {
        check(name, "scc", &replay(&recorded(name), Chooser::Product(Policy::Scc)).unwrap()).unwrap();
    }
}

#[test]
fn all_policies_do_what_they_are_known_for_on_one_gpu() {
    let name = "p4-inference-1gpu";
    let trace = recorded(name);
    for (policy, chooser) in POLICIES {
        check(name, policy, &replay(&trace, chooser).unwrap()).unwrap();
    }
    // With one slice a request there is one first fit.
    check(name, "ff_low", &replay(&trace, Chooser::Product(Policy::FirstFit)).unwrap()).unwrap();
}

#[test]
fn mixed_boards_are_replayed_too() {
    let request = |id: u32, name: &str| format!(r#"{{"id":{id},"t_ms":{id},"life_ms":9,"profiles":["{name}"]}}"#);
    let names = ["1g.10gb", "1g.6gb", "4g.24gb", "1g.24gb", "7g.40gb", "3g.40gb"];
    let requests: Vec<String> = (0..).zip(names).map(|(id, name)| request(id, name)).collect();
    let head = r#"{"meta":{"node":["A30","A100-40","H100-80","rtx-pro-6000-blackwell-se"],"warm":0}}"#;
    let trace = trace::unpacked(format!("{head}\n{}\n", requests.join("\n")).as_bytes()).unwrap();
    // 1g.10gb goes to the A100, where it is worth less, and then 7g.40gb does not fit; nor does 4g.24gb beside 1g.6gb.
    let outcome = replay(&trace, Chooser::Product(Policy::Scc)).unwrap();
    assert_eq!((outcome.offered, outcome.refused, outcome.frag), (6, 2, None));
    assert!(replay(&trace, Chooser::Repack).is_err());
}

#[test]
fn a_bad_trace_is_refused_with_the_reason() {
    let head = r#"{"meta":{"node":["A30"],"warm":0.5}}"#;
    let with = |line: &str| format!("{head}\n{line}\n");
    let good = r#"{"id":1,"t_ms":5,"life_ms":1,"profiles":["1g.6gb"]}"#;
    for (text, why) in [
        (String::new(), "it is empty"),
        (head.to_owned(), "it has no requests"),
        (good.to_owned(), "line 1: expected {\"meta\""),
        (head.replace("A30", "A31"), "meta.node names A31; known are A100-40"),
        (head.replace("\"A30\"", ""), "meta.node names no GPU"),
        (with(good).replace("0.5", "1.5"), "meta.warm is 1.5"),
        (with("{"), "line 2"),
        (with(&good.replace("1g.6gb", "1g.10gb")), "line 2: no GPU of the node offers 1g.10gb"),
        (with(&good.replace("\"1g.6gb\"", "")), "line 2: the request names no profile"),
        (with(&good.replace("\"t_ms\":5", "\"t_ms\":-5")), "line 2: invalid value"),
        (with(&good.replace("\"life_ms\":1", "\"life_ms\":18446744073709551615")), "out of range"),
        (with(&format!("{good}\n{}", good.replace(":5", ":4"))), "line 3: t_ms 4 comes after 5"),
    ] {
        let error = format!("{:#}", trace::unpacked(text.as_bytes()).unwrap_err());
        assert!(error.contains(why), "{text}\n{error}");
    }
    assert!(format!("{:#}", trace::unpacked(&RECORDED[0].1[..1000]).unwrap_err()).contains("cannot be unpacked"));
    assert!(format!("{:#}", trace::unpacked(&[0xff, 0xfe]).unwrap_err()).contains("no text"));
    assert_eq!(trace::unpacked(with(good).as_bytes()).unwrap().requests.len(), 1);
}
