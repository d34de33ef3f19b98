//! JSON lines to and from a reward process.
//!
//! To it: `{"id": 7, "data_source": ..., "prompt": ..., "completion": ..., "ground_truth": ..., "extra_info": ...}`; a
//! Python function gets `solution_str` instead of the completion, and no prompt. From it: `{"id": 7, "score": 1.0}`,
//! maybe with `"parts": {"name": 0.5}`, or `{"id": 7, "error": "what is wrong"}`, in any order.
//! Invariant: a line that is none of these is noise, and noise never ends a call.

use crate::reward::Sample;
use serde_json::{Map, Value, json};

/// What a process says of a sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Answer {
    /// Maybe no finite number.
    pub score: f64,
    /// Further values, for the record.
    pub parts: Vec<(String, f64)>,
}

/// A line of output, understood.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Reply {
    /// The process can take calls.
    Ready,
    /// The answer to a call.
    Answer { id: u64, result: Result<Answer, String> },
    /// Neither.
    Noise,
}

/// A call without its id: an object of JSON on one line.
pub(crate) fn payload(sample: &Sample, is_verl: bool) -> String {
    let prompt = &sample.prompt;
    let mut call = Map::new();
    call.insert("data_source".into(), prompt.data_source.as_str().into());
    if is_verl {
        call.insert("solution_str".into(), sample.completion.as_str().into());
    } else {
        call.insert("prompt".into(), json!(prompt.input));
        call.insert("completion".into(), sample.completion.as_str().into());
    }
    call.insert("ground_truth".into(), prompt.ground_truth.clone());
    // verl's functions may take a dict for granted.
    let no_info = if is_verl { json!({}) } else { Value::Null };
    let info = Some(&prompt.extra_info).filter(|info| !info.is_null());
    call.insert("extra_info".into(), info.cloned().unwrap_or(no_info));
    Value::Object(call).to_string()
}

/// The line that asks for a call.
pub(super) fn request(id: u64, payload: &str) -> String {
    format!("{{\"id\":{id},{}\n", &payload[1..])
}

/// Understands a line.
pub(super) fn parse(line: &str) -> Reply {
    let Some(Value::Object(object)) = read(line) else { return Reply::Noise };
    if object.get("ready") == Some(&Value::Bool(true)) {
        return Reply::Ready;
    }
    let Some(id) = object.get("id").and_then(id_of) else { return Reply::Noise };
    let result = match (object.get("error"), object.get("score")) {
        (Some(Value::String(error)), _) => Err(error.clone()),
        (Some(error), _) if !error.is_null() => Err(error.to_string()),
        (_, Some(score)) => match float_of(score) {
            Some(score) => Ok(Answer { score, parts: parts_of(object.get("parts")) }),
            None => Err(format!("its `score` is {score}, no number")),
        },
        (_, None) => Err("its answer has neither `score` nor `error`".into()),
    };
    Reply::Answer { id, result }
}

/// JSON, or what Python's json writes for numbers that are not finite.
fn read(line: &str) -> Option<Value> {
    let line = line.trim();
    if !line.starts_with('{') {
        return None;
    }
    serde_json::from_str(line).ok().or_else(|| {
        let plain = [": -Infinity", ": Infinity", ": NaN", ":-Infinity", ":Infinity", ":NaN"];
        let patched = plain.iter().fold(line.to_owned(), |text, name| text.replace(name, ": null"));
        serde_json::from_str(&patched).ok()
    })
}

fn id_of(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// A number, a truth value, the text "NaN" or "Infinity", or null, which is what jq and JavaScript make of NaN.
fn float_of(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::Bool(value) => Some(f64::from(*value)),
        Value::String(text) => text.parse().ok(),
        Value::Null => Some(f64::NAN),
        Value::Array(_) | Value::Object(_) => None,
    }
}

fn parts_of(value: Option<&Value>) -> Vec<(String, f64)> {
    let parts = value.and_then(Value::as_object).into_iter().flatten();
    parts.filter_map(|(name, value)| Some((name.clone(), float_of(value).filter(|v| v.is_finite())?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let score = |id, score: f64| Reply::Answer { id, result: Ok(Answer { score, parts: Vec::new() }) };
        assert_eq!(parse(r#"{"ready": true}"#), Reply::Ready);
        assert_eq!(parse(r#"{"id": 3, "score": 0.5}"#), score(3, 0.5));
        assert_eq!(parse(r#" {"score": true, "id": "3"} "#), score(3, 1.0));
        assert_eq!(parse(r#"{"id": 3, "score": 1, "error": null}"#), score(3, 1.0));
        for noise in ["", "hello", "[1]", r#"{"score": 1}"#, "{", r#"{"id": -1, "score": 1}"#] {
            assert_eq!(parse(noise), Reply::Noise, "{noise}");
        }
        for (line, expected) in [
            (r#"{"id": 1}"#, "its answer has neither `score` nor `error`"),
            (r#"{"id": 1, "score": [1]}"#, "its `score` is [1], no number"),
            (r#"{"id": 1, "error": "no"}"#, "no"),
            (r#"{"id": 1, "error": {"a": 1}}"#, r#"{"a":1}"#),
        ] {
            assert_eq!(parse(line), Reply::Answer { id: 1, result: Err(expected.into()) }, "{line}");
        }
        for line in [
            r#"{"id": 1, "score": NaN}"#,
            r#"{"id":1,"score":NaN}"#,
            r#"{"id": 1, "score": "nan"}"#,
            r#"{"id": 1, "score": null}"#,
        ] {
            let Reply::Answer { result: Ok(answer), .. } = parse(line) else { panic!("{line}") };
            assert!(answer.score.is_nan(), "{line}");
        }
        let Reply::Answer { result: Ok(answer), .. } = parse(r#"{"id": 1, "score": 1, "parts": {"a": 2, "b": "x"}}"#)
        else {
            panic!("parts")
        };
        assert_eq!(answer.parts, [("a".to_owned(), 2.0)]);
        assert_eq!(request(5, r#"{"a":1}"#), "{\"id\":5,\"a\":1}\n");
    }
}
