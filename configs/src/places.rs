//! Where each key of a job was given, so that an error about its value can name the place.
//!
//! Errors about values name keys in backticks, `section.key`. The first of them that a `--set` gave is at fault, as it
//! came last, or else the first that stands in a file; where a message names defaults only, no place is named.

use crate::error::{ConfigError, Origin, Place};
use std::collections::BTreeMap;
use toml::de::{DeTable, DeValue};

/// Keys as dotted paths, items of arrays by their index, to where they were given.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Places(BTreeMap<String, Place>);

impl Places {
    /// The places of all keys of a text; `position` turns a byte offset into line and column.
    pub(crate) fn of(table: &DeTable<'_>, origin: &Origin, position: impl Fn(usize) -> (usize, usize)) -> Places {
        let mut places = Places::default();
        places.collect(table, "", &|offset| Place { origin: origin.clone(), position: Some(position(offset)) });
        places
    }

    fn collect(&mut self, table: &DeTable<'_>, prefix: &str, place: &dyn Fn(usize) -> Place) {
        for (key, value) in table {
            let path = format!("{prefix}{}", key.get_ref());
            self.0.insert(path.clone(), place(key.span().start));
            match value.get_ref() {
                DeValue::Table(inner) => self.collect(inner, &format!("{path}."), place),
                DeValue::Array(items) => {
                    for (index, item) in items.iter().enumerate() {
                        if let DeValue::Table(inner) = item.get_ref() {
                            self.collect(inner, &format!("{path}.{index}."), place);
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// Lays a later layer over this one: it replaces values of sections whole.
    pub(crate) fn merge(&mut self, layer: Places) {
        for path in layer.0.keys().filter(|path| path.matches('.').count() == 1) {
            self.forget(path);
        }
        self.0.extend(layer.0);
    }

    /// Notes a `--set` of `path`.
    pub(crate) fn set(&mut self, path: &str, origin: Origin) {
        self.forget(path);
        self.0.insert(path.to_owned(), Place { origin, position: None });
    }

    fn forget(&mut self, path: &str) {
        self.0
            .retain(|known, _| known.strip_prefix(path).is_none_or(|rest| !rest.is_empty() && !rest.starts_with('.')));
    }

    /// The error with a place in front of each message about values.
    pub(crate) fn locate(&self, error: ConfigError) -> ConfigError {
        match error {
            ConfigError::Values(messages) => {
                ConfigError::Values(messages.into_iter().map(|message| self.locate_message(message)).collect())
            }
            other => other,
        }
    }

    fn locate_message(&self, message: String) -> String {
        let given: Vec<&Place> = message.split('`').skip(1).step_by(2).filter_map(|key| self.find(key)).collect();
        let is_set = |place: &&&Place| matches!(place.origin, Origin::Set(_));
        match given.iter().find(is_set).or(given.first()) {
            Some(place) => format!("{place}: {message}"),
            None => message,
        }
    }

    /// Where `section.key`, or the value that it is in, was given.
    fn find(&self, key: &str) -> Option<&Place> {
        let mut paths = std::iter::successors(Some(key), |path| Some(path.rsplit_once('.')?.0));
        paths.find_map(|path| self.0.get(path).filter(|_| path.contains('.')))
    }
}
