//! The grammar of requests. Input: a container's name or nothing, then lines `KEY=VALUE`.

use mig_hook::first::{self, Asked, SANDBOX_KEYS};
use mig_hook::request::{Request, RequestError, from_annotations, from_env};
use serde_json::{Map, Value, json};

pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (name, rest) = text.split_once('\n').unwrap_or((text, ""));
    let pairs: Map<String, Value> = rest
        .split('\n')
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.to_owned(), value.into()))
        .collect();
    let annotations: Vec<(&str, &str)> =
        pairs.iter().map(|(key, value)| (key.as_str(), value.as_str().unwrap())).collect();

    let asked = read(&annotations, (!name.is_empty()).then_some(name));
    let reversed: Vec<_> = annotations.iter().rev().copied().collect();
    let turned = read(&reversed, (!name.is_empty()).then_some(name));
    assert_eq!(asked.is_ok(), turned.is_ok(), "the order of keys decides nothing");
    if let (Ok(one), Ok(other)) = (&asked, &turned) {
        assert_eq!(one, other, "the order of keys decides nothing");
    }
    agrees_with_the_first_stage(&annotations, &pairs, &asked);
    variables_mean_the_same(&annotations);
}

fn read(annotations: &[(&str, &str)], name: Option<&str>) -> Result<Option<Request>, RequestError> {
    let asked = from_annotations(annotations.iter().copied(), name);
    match &asked {
        Ok(Some(request)) => is_sound(request),
        Ok(None) => {}
        Err(error) => is_printable(&error.to_string()),
    }
    asked
}

fn is_sound(request: &Request) {
    assert!(!request.alternatives.is_empty());
    assert!(request.alternatives.iter().all(|wants| (1..=64).contains(&wants.len())), "{request:?}");
    assert!(request.wait_s.is_none_or(|wait| (1..=7 * 24 * 3600).contains(&wait)), "{request:?}");
    let kept: Request = serde_json::from_value(serde_json::to_value(request).unwrap()).unwrap();
    assert_eq!(kept, *request, "as it is kept in the queue");
    let shown = request.to_string();
    let again: Vec<(&str, &str)> = shown.split(' ').filter_map(|part| part.split_once('=')).collect();
    if again.iter().all(|(_, value)| value.len() <= 256) {
        assert_eq!(from_annotations(again.into_iter(), None), Ok(Some(kept)), "{shown} means the same");
    }
}

/// A refusal goes to terminals and logs: nothing of a stranger's text that they would obey, and not much of it.
fn is_printable(error: &str) {
    assert!(error.chars().all(|c| c.is_ascii_graphic() || c == ' ' || c == '…'), "{error:?}");
    assert!(error.len() < 600, "{error}");
}

/// What has a meaning, or is refused, is not handed on to the runtime as if nothing were asked.
fn agrees_with_the_first_stage(
    annotations: &[(&str, &str)],
    pairs: &Map<String, Value>,
    asked: &Result<Option<Request>, RequestError>,
) {
    let sandbox = annotations.iter().any(|(key, value)| SANDBOX_KEYS.contains(key) && *value == "sandbox");
    let glance = first::asked(json!({"annotations": pairs}).to_string().as_bytes(), false);
    if !sandbox && !matches!(asked, Ok(None)) {
        assert_eq!(glance, Asked::Something, "{annotations:?}");
    }
}

/// The same words in the environment mean the same.
fn variables_mean_the_same(annotations: &[(&str, &str)]) {
    let of_keys = |(key, _): &&(&str, &str)| !key.contains('/') && key.starts_with("mig.") && *key != "mig.lease";
    let unnamed: Vec<(&str, &str)> = annotations.iter().filter(of_keys).copied().collect();
    let variables: Vec<String> =
        unnamed.iter().map(|(key, value)| format!("{}={value}", key.replace('.', "_").to_ascii_uppercase())).collect();
    let known = |var: &&String| first::REQUEST_VARIABLES.contains(&var.split('=').next().unwrap());
    let asked = from_env(variables.iter().map(String::as_str));
    if variables.iter().filter(known).count() == unnamed.len() && unnamed.iter().all(|(key, _)| is_lower(key)) {
        let annotated = from_annotations(unnamed.iter().copied(), None);
        assert_eq!(asked.as_ref().ok(), annotated.as_ref().ok(), "{unnamed:?}");
    }
    if !matches!(asked, Ok(None)) {
        let config = json!({"process": {"env": variables}}).to_string();
        assert_eq!(first::asked(config.as_bytes(), true), Asked::Something, "{variables:?}");
    }
}

fn is_lower(key: &str) -> bool {
    !key.bytes().any(|b| b.is_ascii_uppercase() || b == b'_')
}
