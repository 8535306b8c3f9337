//! TOML with its comments, order and line ends.

use toml_edit::{DocumentMut, Item, Table, TableLike, Value};

/// Reads a text, has it changed, and writes it with the line ends and the kind of last line that it had.
pub(super) fn edit(text: &str, change: impl FnOnce(&mut DocumentMut) -> Result<(), String>) -> Result<String, String> {
    let mut doc = parse(text)?;
    change(&mut doc)?;
    let mut new = doc.to_string();
    if !text.is_empty() && !text.ends_with('\n') && new.ends_with('\n') {
        new.pop();
    }
    Ok(if dos(text) { new.replace('\n', "\r\n") } else { new })
}

/// toml_edit reads CRLF and writes LF: such a text is edited without the CR.
pub(super) fn parse(text: &str) -> Result<DocumentMut, String> {
    let text = if dos(text) { text.replace("\r\n", "\n") } else { text.to_owned() };
    text.parse().map_err(|error: toml_edit::TomlError| {
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        format!("not valid TOML: line {line}: {}", error.message())
    })
}

fn dos(text: &str) -> bool {
    let ends = text.matches('\n').count();
    ends > 0 && ends == text.matches("\r\n").count()
}

/// The table at a path, in whatever form it is written.
pub(super) fn lookup<'a>(doc: &'a DocumentMut, path: &[&str]) -> Option<&'a dyn TableLike> {
    let mut table: &dyn TableLike = doc.as_table();
    for key in path {
        table = table.get(key)?.as_table_like()?;
    }
    Some(table)
}

/// The table at a path, made where it is missing. An inline table can't be added to in this form.
pub(super) fn make<'a>(doc: &'a mut DocumentMut, path: &[&str]) -> Result<&'a mut Table, String> {
    let mut table = doc.as_table_mut();
    for (depth, key) in path.iter().enumerate() {
        let missing = || {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        };
        let shown = || path[..=depth].join(".");
        table = table
            .entry(key)
            .or_insert_with(missing)
            .as_table_mut()
            .ok_or_else(|| format!("{} is no [table] of its own; write it as one, then run this again", shown()))?;
    }
    Ok(table)
}

/// Puts a table into another, in the place of the one of that name, with the comment above it.
pub(super) fn put(parent: &mut Table, name: &str, mut table: Table) {
    if let Some(old) = parent.get(name).and_then(Item::as_table) {
        *table.decor_mut() = old.decor().clone();
        table.set_position(old.position());
        for (_, inner) in table.iter_mut() {
            inner.as_table_mut().into_iter().for_each(|inner| inner.set_position(old.position()));
        }
    }
    parent.insert(name, Item::Table(table));
}

/// A table that is written at the end of the file.
pub(super) fn last() -> Table {
    let mut table = Table::new();
    table.set_position(Some(isize::MAX));
    table
}

/// Takes a key out of the table at a path, if both are there. A comment above it goes to the end of the file.
pub(super) fn take(doc: &mut DocumentMut, path: &[&str], key: &str) {
    let mut table: &mut dyn TableLike = doc.as_table_mut();
    for step in path {
        match table.get_mut(step).and_then(Item::as_table_like_mut) {
            Some(inner) => table = inner,
            None => return,
        }
    }
    let above = match table.remove(key) {
        Some(Item::Table(taken)) => taken.decor().prefix().and_then(|p| p.as_str()).unwrap_or_default().to_owned(),
        _ => return,
    };
    if above.contains('#') {
        let trailing = doc.trailing().as_str().unwrap_or_default().to_owned();
        doc.set_trailing(above + &trailing);
    }
}

/// A value as one would write it, without what stands around it.
pub(super) fn shown(value: &Value) -> String {
    value.clone().decorated("", "").to_string()
}

/// A value from what [`shown`] made of it.
pub(super) fn value(shown: &str) -> Result<Item, String> {
    let value: Value = shown.parse().map_err(|_| format!("{shown} is no TOML value"))?;
    Ok(Item::Value(value))
}

pub(super) fn strings(value: Option<&Item>) -> Vec<String> {
    let array = value.and_then(Item::as_array);
    array.map_or_else(Vec::new, |a| a.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
}

pub(super) fn string<'a>(table: &'a dyn TableLike, key: &str) -> Option<&'a str> {
    table.get(key)?.as_str()
}

/// Whether a path names mig-runtime.
pub(super) fn is_shim(path: &str) -> bool {
    std::path::Path::new(path).file_name().is_some_and(|name| name == "mig-runtime")
}
