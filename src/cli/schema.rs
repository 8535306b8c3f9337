//! docs/schema/VERB.json, made from the document types, so that neither says what the other doesn't.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;
use serde_json::{Value, json};

use super::*;

/// Every verb with a `--json` document of its own, and the type of that document.
fn documents() -> BTreeMap<&'static str, Value> {
    BTreeMap::from([
        ("adopt", schema::<adopt::Answer>("adopt")),
        ("cordon", schema::<cordon::Answer>("cordon")),
        ("create", schema::<create::Answer>("create")),
        ("destroy", schema::<destroy::Answer>("destroy")),
        ("drain", schema::<drain::Answer>("drain")),
        ("mode", schema::<mode::Answer>("mode")),
        ("reserve", schema::<reserve::Answer>("reserve")),
        ("uncordon", schema::<cordon::Answer>("uncordon")),
        ("apply", schema::<apply::Answer>("apply")),
        ("assert", schema::<assert::Answer>("assert")),
        ("configure", schema::<configure::Report>("configure")),
        ("doctor", schema::<doctor::Report>("doctor")),
        ("gc", schema::<gc::Report>("gc")),
        ("job", schema::<job::Answer>("job")),
        ("history", schema::<history::History>("history")),
        ("leases", schema::<leases::Leases>("leases")),
        ("list", schema::<list::Listing>("list")),
        ("plan", schema::<plan::Answer>("plan")),
        ("profiles", schema::<profiles::Profiles>("profiles")),
        ("queue", schema::<queue::Queue>("queue")),
        ("slurm", schema::<crate::slurm::counts::Node>("slurm")),
        ("map", schema::<map::Map>("map")),
        ("release", schema::<release::Answer>("release")),
        ("top", schema::<top::Frame>("top")),
    ])
}

fn schema<T: JsonSchema + Serialize + 'static>(verb: &str) -> Value {
    let mut generator = SchemaSettings::draft2020_12().for_serialize().into_generator();
    let title = format!("migctl {verb} --json");
    let description = T::json_schema(&mut generator).get("description").cloned();
    let mut schema = json!({"$schema": null, "title": null, "description": null});
    let body = generator.root_schema_for::<Document<'static, T>>().to_value();
    schema.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    schema["title"] = json!(title);
    schema["description"] = json!(description);
    tidy(&mut schema, true);
    schema
}

/// Allows no other properties than those named; drops what only Rust knows (`"format": "uint32"`, links in comments).
/// `whole`: no schema around this one adds properties to the same object.
fn tidy(schema: &mut Value, whole: bool) {
    const ALTERNATIVES: [&str; 3] = ["oneOf", "anyOf", "allOf"];
    let Some(schema) = schema.as_object_mut() else { return };
    let has_own = schema.contains_key("properties");
    if has_own && whole && !schema.contains_key("additionalProperties") {
        let composed = ALTERNATIVES.iter().any(|key| schema.contains_key(*key));
        let close = if composed { "unevaluatedProperties" } else { "additionalProperties" };
        schema.insert(close.into(), json!(false));
    }
    schema.shift_remove("format");
    if let Some(Value::String(text)) = schema.get_mut("description") {
        *text = text.replace("[`", "`").replace("`]", "`");
    }
    for key in ALTERNATIVES {
        let alternatives = schema.get_mut(key).and_then(Value::as_array_mut);
        alternatives.into_iter().flatten().for_each(|s| tidy(s, whole && !has_own));
    }
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let described = ["description", "$ref", "const"].iter().any(|key| property.get(key).is_some());
        assert!(described, "the field {name} needs a doc comment: it becomes the description");
    }
    for key in ["properties", "$defs"] {
        let members = schema.get_mut(key).and_then(Value::as_object_mut);
        members.into_iter().flat_map(|m| m.values_mut()).for_each(|s| tidy(s, true));
    }
    for key in ["items", "additionalProperties"] {
        schema.get_mut(key).into_iter().for_each(|s| tidy(s, true));
    }
}

#[test]
fn the_published_schemas_are_those_of_the_document_types() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/schema");
    let documents = documents();
    for (verb, schema) in &documents {
        let file = dir.join(format!("{verb}.json"));
        let text = format!("{schema:#}\n");
        if std::env::var_os("UPDATE_SCHEMAS").is_some() {
            std::fs::write(&file, &text).unwrap();
        }
        let published = std::fs::read_to_string(&file).unwrap_or_default();
        assert_eq!(
            published, text,
            "docs/schema/{verb}.json is not what the type of the document says. Is the change one that docs/schema/README.md \
             allows? Then: UPDATE_SCHEMAS=1 cargo test --lib cli::schema"
        );
    }
    let files = dir.read_dir().unwrap().map(|entry| entry.unwrap().path());
    for file in files.filter(|file| file.extension().is_some_and(|e| e == "json")) {
        let verb = file.file_stem().unwrap().to_str().unwrap();
        assert!(documents.contains_key(verb), "{} belongs to no verb", file.display());
    }
}
