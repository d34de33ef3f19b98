//! Every key a job's TOML file may have, from the schema, and the nearest one to a key it may not have.

use crate::nearest::nearest;
use serde_json::Value;
use std::collections::BTreeSet;

/// The known keys, as dotted paths; items of arrays have their array's path.
pub(crate) struct Known {
    paths: BTreeSet<String>,
}

impl Known {
    pub(crate) fn new() -> Known {
        let schema = crate::schema();
        let mut paths = BTreeSet::new();
        collect(&schema, &schema, "", &mut paths);
        Known { paths }
    }

    /// Whether a key of this path exists.
    pub(crate) fn child(&self, path: &[String]) -> bool {
        self.paths.contains(&path.join("."))
    }

    /// What to say of a key that does not exist. One here that differs by a letter is likeliest meant, then one of the same
    /// name elsewhere, then one of a similar name here.
    pub(crate) fn explain_unknown(&self, path: &[String]) -> String {
        let full = path.join(".");
        let Some((name, section)) = path.split_last() else { return "an empty key".into() };
        let section = section.join(".");
        let last = |p: &str| p.rsplit('.').next().unwrap_or_default().to_owned();
        let siblings: Vec<&str> = self.paths.iter().filter(|p| parent(p) == section).map(String::as_str).collect();
        let elsewhere = self.paths.iter().find(|p| last(p) == *name).cloned();
        let here = || {
            let names: Vec<String> = siblings.iter().map(|p| last(p)).collect();
            let found = nearest(name, names.iter().map(String::as_str))?;
            Some(if section.is_empty() { found.to_owned() } else { format!("{section}.{found}") })
        };
        let near = || {
            let leaves: BTreeSet<String> = self.paths.iter().map(|p| last(p)).collect();
            let found = nearest(name, leaves.iter().map(String::as_str))?;
            self.paths.iter().find(|p| last(p) == found).cloned()
        };
        if self.paths.contains(&section) && siblings.is_empty() {
            return format!("unknown key `{full}`: `{section}` is a value, it has no keys");
        }
        let kind = if path.len() == 1 { "unknown section or key" } else { "unknown key" };
        let off_by_one = siblings.iter().find(|p| strsim::osa_distance(&last(p), name) == 1).map(|p| (*p).to_owned());
        match off_by_one.or(elsewhere).or_else(here).or_else(near) {
            Some(meant) => format!("{kind} `{full}`; did you mean `{meant}`?"),
            None if section.is_empty() => format!("{kind} `{full}`; sections are {}", siblings.join(", ")),
            None => format!("{kind} `{full}`; [{section}] has {}", {
                siblings.iter().map(|p| last(p)).collect::<Vec<_>>().join(", ")
            }),
        }
    }
}

fn parent(path: &str) -> &str {
    path.rsplit_once('.').map_or("", |(section, _)| section)
}

/// Adds the keys under `node`, whatever way the schema puts them: a reference, alternatives, an array's items.
fn collect(root: &Value, node: &Value, path: &str, paths: &mut BTreeSet<String>) {
    if let Some(name) = node.get("$ref").and_then(Value::as_str).and_then(|r| r.strip_prefix("#/$defs/")) {
        collect(root, &root["$defs"][name], path, paths);
    }
    for alternatives in ["anyOf", "oneOf", "allOf"] {
        for alternative in node.get(alternatives).and_then(Value::as_array).into_iter().flatten() {
            collect(root, alternative, path, paths);
        }
    }
    if let Some(items) = node.get("items") {
        collect(root, items, path, paths);
    }
    for (key, child) in node.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let inner = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        collect(root, child, &inner, paths);
        paths.insert(inner);
    }
}
