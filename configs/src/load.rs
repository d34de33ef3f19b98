//! A job's TOML file read: includes first, then the file, then `--set`; later ones win key by key.
//!
//! Layers are merged by section and key: a later `training.steps` replaces the earlier one, and a later
//! `data.sources` or `model.rope_scaling` replaces the earlier value as a whole. Each layer is checked alone, so that
//! an error names its own file, line and column.

use crate::JobConfig;
use crate::error::{ConfigError, Origin, Place, TextError};
use crate::known::Known;
use crate::nearest::nearest;
use crate::places::Places;
use crate::types::wrong_types;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

/// Reads `path` with everything it includes and lays each of `sets` (`table.key=value`, the value as in TOML or a bare
/// string) over it.
///
/// # Errors
/// [`ConfigError::Read`], [`ConfigError::Cycle`], or [`ConfigError::Text`] with every unknown key at once.
pub fn load(path: &Path, sets: &[String]) -> Result<JobConfig, ConfigError> {
    let mut merged = Layer::default();
    read_into(&mut merged, path, &mut Vec::new())?;
    finish(merged, sets, &Origin::File(path.to_owned()))
}

/// The same for a text that includes nothing; `name` stands for it in errors.
///
/// # Errors
/// As [`load`].
pub fn load_str(text: &str, name: &str, sets: &[String]) -> Result<JobConfig, ConfigError> {
    let origin = Origin::File(PathBuf::from(name));
    let (layer, config) = check_text(text, &origin)?;
    if !config.include.is_empty() {
        return Err(at(&origin, None, "`include` works in files only".into()));
    }
    finish(layer, sets, &origin)
}

/// Values, and where each was given.
#[derive(Default)]
struct Layer {
    values: Table,
    places: Places,
}

fn finish(mut merged: Layer, sets: &[String], origin: &Origin) -> Result<JobConfig, ConfigError> {
    for set in sets {
        apply_set(&mut merged, set)?;
    }
    crate::defaults::lay_under(&mut merged.values);
    let config = JobConfig::deserialize(merged.values).map_err(|e| at(origin, None, e.message().to_owned()))?;
    Ok(JobConfig { places: merged.places, ..config })
}

/// Merges what `path` includes, then `path` itself. `chain` is who included it.
fn read_into(merged: &mut Layer, path: &Path, chain: &mut Vec<PathBuf>) -> Result<(), ConfigError> {
    let failed = |e: std::io::Error| ConfigError::Read { path: path.to_owned(), message: e.to_string() };
    let text = std::fs::read_to_string(path).map_err(failed)?;
    let real = path.canonicalize().map_err(failed)?;
    if let Some(start) = chain.iter().position(|seen| *seen == real) {
        let mut chain = chain[start..].to_vec();
        chain.push(real);
        return Err(ConfigError::Cycle { chain });
    }
    let (layer, config) = check_text(&text, &Origin::File(path.to_owned()))?;
    chain.push(real);
    let folder = path.parent().unwrap_or(Path::new(""));
    for include in &config.include {
        read_into(merged, &folder.join(include), chain)?;
    }
    chain.pop();
    merge(merged, layer);
    Ok(())
}

/// Lays `layer` over `merged`, section by section and key by key.
fn merge(merged: &mut Layer, layer: Layer) {
    merged.places.merge(layer.places);
    let values = &mut merged.values;
    for (section, value) in layer.values {
        match (values.get_mut(&section), value) {
            (Some(Value::Table(below)), Value::Table(above)) => below.extend(above),
            (_, value) => {
                values.insert(section, value);
            }
        }
    }
    values.remove("include");
}

/// Parses one layer and checks its keys and types.
fn check_text(text: &str, origin: &Origin) -> Result<(Layer, JobConfig), ConfigError> {
    let place = |offset: usize| Some(line_and_column(text, offset));
    let spanned = DeTable::parse(text)
        .map_err(|e| at(origin, e.span().and_then(|s| place(s.start)), e.message().trim().to_owned()))?;
    let known = Known::new();
    let mut unknown = Vec::new();
    find_unknown(spanned.get_ref(), &known, &mut Vec::new(), &mut |offset, message| {
        unknown.push(TextError { place: Place { origin: origin.clone(), position: place(offset) }, message });
    });
    if !unknown.is_empty() {
        unknown.sort_by_key(|e| e.place.position);
        return Err(ConfigError::Text(unknown));
    }
    let values = toml::from_str::<Table>(text).map_err(|e| at(origin, None, e.message().to_owned()))?;
    let config = toml::from_str::<JobConfig>(text).map_err(|e| {
        let span = e.span().unwrap_or(0..0);
        let error = |offset: usize, key: &str, message: &str| TextError {
            place: Place { origin: origin.clone(), position: place(offset) },
            message: explain(key, message),
        };
        let first = error(span.start, &key_at(spanned.get_ref(), span.start).join("."), e.message());
        let pieces = wrong_types(&values, spanned.get_ref());
        let mut pieces: Vec<TextError> = pieces.iter().map(|p| error(p.offset, &p.key, &p.message)).collect();
        pieces.sort_by_key(|e| e.place.position);
        // Which of the tables around it lacks its `type` the whole does not know.
        match e.message().starts_with(NO_TYPE) && !pieces.is_empty() {
            true => ConfigError::Text(pieces),
            false => ConfigError::Text(with_others(first, pieces)),
        }
    })?;
    let places = Places::of(spanned.get_ref(), origin, |offset| line_and_column(text, offset));
    Ok((Layer { values, places }, config))
}

/// All errors; those of the parts come in the order of the text. The whole knows best where its first one is: it stands for the last part that
/// begins no later; where the parts by themselves are right, it says all there is to say.
fn with_others(first: TextError, mut all: Vec<TextError>) -> Vec<TextError> {
    let section = |e: &TextError| e.message.split(['`', '.']).nth(1).map(str::to_owned);
    let is_there =
        |other: &TextError| other.place.position <= first.place.position && section(other) == section(&first);
    match (all.iter().rposition(is_there), all.iter().any(|other| section(other) == section(&first))) {
        (Some(index), _) => all[index] = first,
        (None, false) => all.push(first),
        (None, true) => {}
    }
    all
}

/// Reports every key that no section has, deepest tables included.
fn find_unknown(table: &DeTable<'_>, known: &Known, path: &mut Vec<String>, report: &mut dyn FnMut(usize, String)) {
    for (key, value) in table {
        path.push(key.get_ref().to_string());
        match known.child(&path[..]) {
            false => report(key.span().start, known.explain_unknown(path)),
            true => find_unknown_in(value.get_ref(), known, path, report),
        }
        path.pop();
    }
}

fn find_unknown_in(value: &DeValue<'_>, known: &Known, path: &mut Vec<String>, report: &mut dyn FnMut(usize, String)) {
    match value {
        DeValue::Table(inner) => find_unknown(inner, known, path, report),
        DeValue::Array(items) => items.iter().for_each(|item| find_unknown_in(item.get_ref(), known, path, report)),
        _ => {}
    }
}

/// The keys that lead to what stands at byte `offset`.
fn key_at(table: &DeTable<'_>, offset: usize) -> Vec<String> {
    for (key, value) in table {
        // A table's own span is its header's; what is inside it counts as well.
        let inner = key_in(value.get_ref(), offset);
        if !inner.is_empty() || value.span().contains(&offset) || key.span().contains(&offset) {
            return std::iter::once(key.get_ref().to_string()).chain(inner).collect();
        }
    }
    Vec::new()
}

fn key_in(value: &DeValue<'_>, offset: usize) -> Vec<String> {
    match value {
        DeValue::Table(inner) => key_at(inner, offset),
        DeValue::Array(items) => {
            items.iter().map(|item| key_in(item.get_ref(), offset)).find(|keys| !keys.is_empty()).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

fn apply_set(merged: &mut Layer, set: &str) -> Result<(), ConfigError> {
    let origin = Origin::Set(set.to_owned());
    let fail = |message: String| at(&origin, None, message);
    let (key, text) =
        set.split_once('=').ok_or_else(|| fail("expected table.key=value, such as --set training.steps=100".into()))?;
    let path: Vec<String> = key.trim().split('.').map(str::to_owned).collect();
    let names: Vec<String> = path.iter().filter(|part| part.parse::<usize>().is_err()).cloned().collect();
    let known = Known::new();
    if path[0] == "include" {
        return Err(fail("`include` works in files only".into()));
    }
    if let Some(end) = (1..=names.len()).find(|&end| !known.child(&names[..end])) {
        return Err(fail(known.explain_unknown(&names[..end])));
    }
    if names.len() == 1 {
        return Err(fail(format!("`{key}` is a section; name a key in it: table.key=value")));
    }
    let parsed = toml::from_str::<Table>(&format!("value = {}", text.trim())).ok().and_then(|mut t| t.remove("value"));
    let bare = Value::String(text.to_owned());
    let first = with_value(&merged.values, &path, parsed.clone().unwrap_or_else(|| bare.clone())).map_err(fail)?;
    merged.values = match JobConfig::deserialize(first.clone()) {
        Ok(_) => first,
        Err(error) => {
            // `--set job.description=7` means the text "7".
            let second = with_value(&merged.values, &path, bare).map_err(fail)?;
            JobConfig::deserialize(second.clone()).map_err(|_| fail(explain(&names.join("."), error.message())))?;
            second
        }
    };
    merged.places.set(&path.join("."), origin);
    Ok(())
}

/// `table` with `value` at `path`; numbers in the path index arrays.
fn with_value(table: &Table, path: &[String], value: Value) -> Result<Table, String> {
    let mut result = Value::Table(table.clone());
    let mut place = &mut result;
    for part in path {
        place = match place {
            Value::Array(items) => {
                let length = items.len();
                let item = part.parse::<usize>().ok().and_then(|index| items.get_mut(index));
                item.ok_or_else(|| format!("`{part}` is no index into an array of {length}"))?
            }
            Value::Table(inner) => inner.entry(part.clone()).or_insert_with(|| Value::Table(Table::new())),
            other => return Err(format!("`{part}`: there is a {} here, not a table", other.type_str())),
        };
    }
    *place = value;
    match result {
        Value::Table(table) => Ok(table),
        _ => Err("no key is named".into()),
    }
}

/// How serde says that a table which is one of several kinds does not say which.
pub(crate) const NO_TYPE: &str = "missing field `type`";

/// A type error in the user's words.
fn explain(key: &str, message: &str) -> String {
    const WORDS: [(&str, &str); 7] = [
        (NO_TYPE, "the `type` of its section is not set; set that before"),
        ("expected usize", "expected a whole number of at least 0"),
        ("expected u64", "expected a whole number of at least 0"),
        ("expected i64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected path string", "expected a path in quotes"),
    ];
    let message = message.trim();
    let plain = WORDS.iter().fold(message.to_owned(), |text, (from, to)| text.replace(from, to));
    let hint = variant_hint(message).unwrap_or_default();
    if key.is_empty() { format!("{plain}{hint}") } else { format!("`{key}`: {plain}{hint}") }
}

/// "Did you mean" for serde's "unknown variant `a`, expected one of `b`, `c`".
fn variant_hint(message: &str) -> Option<String> {
    let quoted: Vec<&str> = message.strip_prefix("unknown variant")?.split('`').skip(1).step_by(2).collect();
    let near = nearest(quoted.first()?, quoted.iter().skip(1).copied())?;
    Some(format!("; did you mean `{near}`?"))
}

fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

fn at(origin: &Origin, position: Option<(usize, usize)>, message: String) -> ConfigError {
    ConfigError::Text(vec![TextError { place: Place { origin: origin.clone(), position }, message }])
}
