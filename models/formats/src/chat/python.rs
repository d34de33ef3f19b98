//! What Jinja templates expect of Python: JSON as `json.dumps` writes it, methods of strings, Python's white space.

use minijinja::value::{Enumerator, Kwargs, Object, ObjectRepr, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde_json::Value as Json;
use std::fmt::{self, Write};
use std::sync::{Arc, LazyLock};

/// JSON as a template's value.
pub(super) fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (None, Some(n)) => Value::from(n),
            (None, None) => float(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::from_object(Container(items.iter().map(value).collect())),
        Json::Object(map) => {
            Value::from_object(Container(Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), value(item))))))
        }
    }
}

/// A list or a dictionary that prints as Python's `repr`: the engine leaves characters as they are that nobody can see.
#[derive(Debug)]
struct Container(Value);

impl Object for Container {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        if self.0.kind() == ValueKind::Map { ObjectRepr::Map } else { ObjectRepr::Seq }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get_item(key).ok().filter(|item| !item.is_undefined())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        match self.0.kind() {
            ValueKind::Map => Enumerator::Values(self.0.try_iter().map(Iterator::collect).unwrap_or_default()),
            _ => Enumerator::Seq(self.0.len().unwrap_or(0)),
        }
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (is_map, mut between) = (self.0.kind() == ValueKind::Map, "");
        f.write_str(if is_map { "{" } else { "[" })?;
        for item in self.0.try_iter().into_iter().flatten() {
            f.write_str(std::mem::replace(&mut between, ", "))?;
            write_repr(&item, f)?;
            if is_map {
                f.write_str(": ")?;
                write_repr(&self.0.get_item(&item).unwrap_or_default(), f)?;
            }
        }
        f.write_str(if is_map { "}" } else { "]" })
    }
}

/// Python's `repr` of a part of a container.
fn write_repr(value: &Value, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match (value.kind(), value.as_str()) {
        (_, Some(text)) => write_text_repr(text, f),
        (ValueKind::None, _) => f.write_str("None"),
        (ValueKind::Bool, _) => f.write_str(if value.is_true() { "True" } else { "False" }),
        _ => write!(f, "{value}"),
    }
}

fn write_text_repr(text: &str, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    // What `str.isprintable` denies: Unicode's "other" and "separator", but for the space.
    static UNSEEN: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"[\p{C}\p{Z}--\x20]").unwrap_or_else(|e| unreachable!("a pattern of our own: {e}"))
    });
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    f.write_char(quote)?;
    for c in text.chars() {
        match (c, c as u32) {
            ('\n', _) => f.write_str("\\n")?,
            ('\r', _) => f.write_str("\\r")?,
            ('\t', _) => f.write_str("\\t")?,
            ('\\', _) => f.write_str("\\\\")?,
            _ if c == quote => write!(f, "\\{c}")?,
            (' '..='~', _) => f.write_char(c)?,
            (_, code) if UNSEEN.is_match(c.encode_utf8(&mut [0; 4])) => match code {
                0..0x100 => write!(f, "\\x{code:02x}")?,
                0x100..0x1_0000 => write!(f, "\\u{code:04x}")?,
                _ => write!(f, "\\U{code:08x}")?,
            },
            _ => f.write_char(c)?,
        }
    }
    f.write_char(quote)
}

/// A number that Python prints in another way than the template engine, such as with an exponent. It can be printed, not
/// computed with.
#[derive(Debug)]
struct Printed(f64);

impl Object for Printed {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&float_text(self.0))
    }
}

fn float(value: f64) -> Value {
    let plain = Value::from(value);
    if float_text(value) == plain.to_string() { plain } else { Value::from_object(Printed(value)) }
}

/// Jinja's test `iterable`: the engine would have it of `none` too.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && (value.as_str().is_some() || value.try_iter().is_ok())
}

/// White space as `str.isspace` has it: Unicode's, and the four separators of ASCII.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Jinja's `trim`, which makes text of whatever it is given.
pub(super) fn trim(value: &Value, characters: Option<&str>) -> String {
    let text = value.to_string();
    match characters {
        Some(set) => text.trim_matches(|c| set.contains(c)).into(),
        None => text.trim_matches(is_space).into(),
    }
}

/// Methods of Python's values: our own for white space and for what the library lacks, else the library's.
pub(super) fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return unknown_method_callback(state, value, name, arguments) };
    match (name, arguments) {
        ("strip", []) => Ok(text.trim_matches(is_space).into()),
        ("lstrip", []) => Ok(text.trim_start_matches(is_space).into()),
        ("rstrip", []) => Ok(text.trim_end_matches(is_space).into()),
        ("removeprefix", _) => from_args::<(&str,)>(arguments).map(|(p,)| text.strip_prefix(p).unwrap_or(text).into()),
        ("removesuffix", _) => from_args::<(&str,)>(arguments).map(|(s,)| text.strip_suffix(s).unwrap_or(text).into()),
        ("partition", _) => from_args::<(&str,)>(arguments).map(|(at,)| match text.split_once(at) {
            Some((before, after)) => [before, at, after].into_iter().collect(),
            None => [text, "", ""].into_iter().collect(),
        }),
        ("rpartition", _) => from_args::<(&str,)>(arguments).map(|(at,)| match text.rsplit_once(at) {
            Some((before, after)) => [before, at, after].into_iter().collect(),
            None => ["", "", text].into_iter().collect(),
        }),
        ("rsplit", [separator, count]) if separator.as_str().is_some() => {
            let (separator, count) =
                from_args::<(&str, usize)>(&[separator.clone(), count.clone()]).map(|(s, n)| (s.to_owned(), n))?;
            let mut parts: Vec<&str> = text.rsplitn(count + 1, separator.as_str()).collect();
            parts.reverse();
            Ok(parts.into_iter().collect())
        }
        _ => unknown_method_callback(state, value, name, arguments),
    }
}

/// How a value is written.
struct Style {
    ensure_ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False`.
pub(super) fn to_json(value: &Value, arguments: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let arguments = arguments.into_values();
    let (positional, named): (&[Value], Kwargs) = from_args(&arguments)?;
    let argument = |place: usize, name: &str| -> Result<Value, Error> {
        let named: Option<Value> = named.get(name)?;
        Ok(positional.get(place).cloned().or(named).unwrap_or_else(|| Value::from(())))
    };
    let (ascii, indent, separators, sort) =
        (argument(0, "ensure_ascii")?, argument(1, "indent")?, argument(2, "separators")?, argument(3, "sort_keys")?);
    named.assert_all_used()?;
    let indent = match indent.kind() {
        ValueKind::None => None,
        ValueKind::String => indent.as_str().map(str::to_owned),
        _ => Some(" ".repeat(indent.as_usize().unwrap_or(0))),
    };
    let items = if indent.is_some() { "," } else { ", " };
    let (item_separator, key_separator) = match separators.kind() {
        ValueKind::None => (items.to_owned(), ": ".to_owned()),
        _ => (separators.get_item_by_index(0)?.to_string(), separators.get_item_by_index(1)?.to_string()),
    };
    let style =
        Style { ensure_ascii: ascii.is_true(), indent, item_separator, key_separator, sort_keys: sort.is_true() };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Style {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&number(value)),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.write_items(['[', ']'], items.len(), depth, out, |index, out| {
                    self.write(&items[index], depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_key(Value::to_string);
                }
                self.write_items(['{', '}'], keys.len(), depth, out, |index, out| {
                    self.write_key(&keys[index], out);
                    out.push_str(&self.key_separator);
                    self.write(&value.get_item(&keys[index])?, depth + 1, out)
                })?;
            }
            _ if value.downcast_object_ref::<Printed>().is_some() => out.push_str(&value.to_string()),
            other => {
                let message = format!("tojson: a value of kind {other} has no form in JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        [open, close]: [char; 2],
        count: usize,
        depth: usize,
        out: &mut String,
        mut write: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.as_ref().filter(|_| count > 0) {
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
        };
        out.push(open);
        for index in 0..count {
            if index > 0 {
                out.push_str(&self.item_separator);
            }
            line(depth + 1, out);
            write(index, out)?;
        }
        line(depth, out);
        out.push(close);
        Ok(())
    }

    /// A key that is no text becomes one, as in Python.
    fn write_key(&self, key: &Value, out: &mut String) {
        match key.kind() {
            ValueKind::String => self.write_text(key.as_str().unwrap_or_default(), out),
            ValueKind::Bool => out.push_str(if key.is_true() { "\"true\"" } else { "\"false\"" }),
            ValueKind::None => out.push_str("\"null\""),
            ValueKind::Number => _ = write!(out, "\"{}\"", number(key)),
            _ => self.write_text(&key.to_string(), out),
        }
    }

    fn write_text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if (c as u32) < 0x20 || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// A number as Python prints it: whole ones as they are, others in the fewest digits that give them back.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float_text(float),
        _ => value.to_string(),
    }
}

fn float_text(float: f64) -> String {
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    // Rust changes to exponents where Python does, but writes 1e16 for 1e+16 and 1e-7 for 1e-07.
    let text = format!("{float:?}");
    let Some((digits, exponent)) = text.split_once('e') else { return evenly(float, &text) };
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
    format!("{}e{sign}{exponent:0>2}", evenly(float, digits))
}

/// Of two shortest texts that are equally near Python takes the one with the even last digit, Rust the larger.
fn evenly(float: f64, digits: &str) -> String {
    let shortest = format!("{float:e}");
    let count = shortest.split('e').next().map_or(0, |mantissa| mantissa.chars().filter(char::is_ascii_digit).count());
    // Rounds to even where it is between two.
    let rounded = format!("{float:.*e}", count.saturating_sub(1));
    if rounded == shortest || rounded.parse() != Ok(float) {
        return digits.to_owned();
    }
    let last = rounded.split('e').next().and_then(|mantissa| mantissa.chars().last());
    digits[..digits.len() - 1].chars().chain(last).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_print_as_python_prints_them() {
        let json = serde_json::json!({"a": ["it's", "\"'", "x\u{a0}\u{2003}\u{e000}\u{10ffff}é", "\u{7f}\\\t"], "b": [true, null, 1.5, {}]});
        let expected =
            r#"{'a': ["it's", '"\'', 'x\xa0\u2003\ue000\U0010ffffé', '\x7f\\\t'], 'b': [True, None, 1.5, {}]}"#;
        assert_eq!(value(&json).to_string(), expected);
    }

    #[test]
    fn floats_are_pythons() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e16, "1e+16"),
            (123456789012345.0, "123456789012345.0"),
            (1.5e-7, "1.5e-07"),
            (1e-4, "0.0001"),
            (-2.5e300, "-2.5e+300"),
            (5e-324, "5e-324"),
            // In the middle between two texts of 17 digits.
            (1_584_544_111_390_069.0 + 0.25, "1584544111390069.2"),
            (1_584_544_111_390_069.0 + 0.75, "1584544111390069.8"),
            (-4_503_599_627_370_495.5, "-4503599627370495.5"),
        ];
        for (float, expected) in cases {
            assert_eq!(float_text(float), expected);
        }
    }
}
