//! Values of wrong types, all of them.
//!
//! Reading a whole layer ends at the first value that does not fit. So where it fails, its parts are read by themselves,
//! table by table down to the keys at fault, each with the `type` that says which keys stand beside it.

use crate::JobConfig;
use crate::load::NO_TYPE;
use serde::Deserialize;
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// A value that cannot be read.
pub(crate) struct WrongType {
    /// Where it begins, in bytes.
    pub offset: usize,
    /// Its key.
    pub key: String,
    /// Why, in serde's words.
    pub message: String,
}

/// What tells which keys a table may have.
const TAGS: [&str; 2] = ["type", "rope_type"];

/// Every value of the layer that cannot be read by itself.
pub(crate) fn wrong_types(values: &Table, spanned: &DeTable<'_>) -> Vec<WrongType> {
    let mut found = Vec::new();
    for (section, value) in values {
        let Some(span) = spanned.get(section.as_str()) else { continue };
        let piece = Piece { key: section.clone(), value, spans: span.get_ref(), offset: span.span().start };
        let alone = |value: Value| Table::from_iter([(section.clone(), value)]);
        piece.look(&alone, true, &mut found);
    }
    found
}

/// A part of a layer.
struct Piece<'a> {
    key: String,
    value: &'a Value,
    spans: &'a DeValue<'a>,
    offset: usize,
}

impl Piece<'_> {
    /// Reports what of it cannot be read. `whole` makes a layer of the piece alone; `is_complete`: what must stand beside
    /// it does.
    fn look(&self, whole: &dyn Fn(Value) -> Table, is_complete: bool, found: &mut Vec<WrongType>) {
        let Err(error) = JobConfig::deserialize(whole(self.value.clone())) else { return };
        let before = found.len();
        if let Some(kinds) = self.kinds_to_choose(error.message(), whole) {
            let message = format!("`type` is missing; {kinds}");
            found.push(WrongType { offset: self.offset, key: self.key.clone(), message });
            return;
        }
        match (self.value, self.spans) {
            (Value::Table(keys), DeValue::Table(spans)) => self.look_at_keys(keys, spans, whole, is_complete, found),
            (Value::Array(items), DeValue::Array(spans)) if items.iter().all(Value::is_table) => {
                for (value, span) in items.iter().zip(spans) {
                    let (key, offset) = (self.key.clone(), span.span().start);
                    let piece = Piece { key, value, spans: span.get_ref(), offset };
                    piece.look(&|item| whole(Value::Array(vec![item])), is_complete, found);
                }
            }
            _ => {}
        }
        // Of a key alone it says nothing that others are missing.
        let says_nothing = !is_complete && error.message().starts_with("missing field");
        if found.len() == before && !says_nothing {
            let (offset, key) = (self.offset, self.key.clone());
            found.push(WrongType { offset, key, message: error.message().to_owned() });
        }
    }

    /// Where this table itself does not say of which kind it is: what it could say.
    fn kinds_to_choose(&self, message: &str, whole: &dyn Fn(Value) -> Table) -> Option<String> {
        let Value::Table(keys) = self.value else { return None };
        if message.trim_end() != NO_TYPE || keys.contains_key("type") {
            return None;
        }
        let mut nameless = keys.clone();
        nameless.insert("type".into(), Value::String(String::new()));
        let error = JobConfig::deserialize(whole(Value::Table(nameless))).err()?;
        error.message().strip_prefix("unknown variant ``, ").map(|kinds| kinds.trim_end().to_owned())
    }

    fn look_at_keys(
        &self,
        keys: &Table,
        spans: &DeTable<'_>,
        whole: &dyn Fn(Value) -> Table,
        is_complete: bool,
        found: &mut Vec<WrongType>,
    ) {
        let before = found.len();
        let is_tag = |key: &String| TAGS.contains(&key.as_str());
        let tag = keys.iter().find(|(key, _)| is_tag(key));
        for (name, value) in tag.into_iter().chain(keys.iter().filter(|(key, _)| !is_tag(key))) {
            let Some(span) = spans.get(name.as_str()) else { continue };
            let alone = |value: Value| {
                let mut table = Table::from_iter([(name.clone(), value)]);
                tag.into_iter().for_each(|(key, tag)| _ = table.entry(key).or_insert_with(|| tag.clone()));
                whole(Value::Table(table))
            };
            let key = format!("{}.{name}", self.key);
            let piece = Piece { key, value, spans: span.get_ref(), offset: span.span().start };
            piece.look(&alone, is_complete && tag.is_none(), found);
            if found.len() > before && is_tag(name) {
                // Nothing can be said of the keys beside it.
                return;
            }
        }
    }
}
