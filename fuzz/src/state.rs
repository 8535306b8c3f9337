//! What a runtime sends to a hook, and the annotations in it.

use mig_hook::bundle;
use mig_hook::first::{self, Asked, SANDBOX_KEYS};
use mig_hook::hook::State;
use mig_hook::request::from_annotations;
use serde_json::Value;

pub fn check(data: &[u8]) {
    if let Ok(state) = State::parse(data, "the State") {
        let name = first::index_name(None, &state.id);
        assert!(name.is_some_and(|name| !name.contains('/')), "{:?} becomes a file name", state.id);
        assert!(state.pid != Some(0), "0 is no process");
        assert!(state.bundle.is_none_or(|bundle| bundle.is_absolute() && bundle.parent().is_some()));
    }
    let Ok(config) = bundle::parse(data, "the State") else { return };
    let again = bundle::parse(config.value.to_string().as_bytes(), "again").unwrap().value;
    assert_eq!(again, config.value, "what was read is what is written");
    if config.ambiguous.is_none() {
        assert_eq!(serde_json::from_slice::<Value>(data).unwrap(), config.value, "as any other reader has it");
        agrees_with_the_first_stage(data, &config.value);
    }
}

/// The first stage looks at the same bytes, with a reader that knows less.
fn agrees_with_the_first_stage(data: &[u8], config: &Value) {
    let annotations = config.get("annotations").and_then(Value::as_object).into_iter().flatten();
    let strings: Vec<(&str, &str)> =
        annotations.filter_map(|(key, value)| Some((key.as_str(), value.as_str()?))).collect();
    let sandbox = strings.iter().any(|(key, value)| SANDBOX_KEYS.contains(key) && *value == "sandbox");
    let nothing = matches!(from_annotations(strings.iter().copied(), None), Ok(None));
    match first::asked(data, false) {
        Asked::Nothing => assert!(nothing || sandbox, "what is asked is seen: {strings:?}"),
        Asked::Something => assert!(!sandbox, "a sandbox asks for nothing"),
        Asked::Unclear => {}
    }
}
