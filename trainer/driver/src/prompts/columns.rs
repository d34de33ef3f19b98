//! From a row of columns to a prompt: verl's columns, or the plain form with a prompt and an answer.

use super::{Message, Prompt, PromptInput};
use crate::reward::number;
use serde_json::{Map, Value};
use tangelo_configs::{Prompts, nearest};

/// verl's column with the ground truth under `ground_truth`.
pub(super) const REWARD_MODEL: &str = "reward_model";
pub(super) const DATA_SOURCE: &str = "data_source";
pub(super) const EXTRA_INFO: &str = "extra_info";
const PROMPT_KEYS: [&str; 2] = ["prompt", "question"];
const ANSWER_KEYS: [&str; 3] = [REWARD_MODEL, "ground_truth", "answer"];

/// Which columns a file's prompts and ground truths are in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Columns {
    pub prompt: String,
    /// Nothing where the data know no answers.
    pub answer: Option<String>,
}

impl Columns {
    /// Chooses among the columns that are there.
    ///
    /// # Errors
    /// In words, which column is missing and which one may be meant.
    pub fn choose(config: &Prompts, names: &[&str]) -> Result<Columns, String> {
        let has = |name: &&str| names.contains(name);
        let missing = |key: &str, wanted: &str| {
            let near = nearest(wanted, names.iter().copied()).map(|n| format!("; did you mean `{n}`?"));
            let hint = near.unwrap_or_else(|| format!("; set `prompts.{key}` to one of them"));
            format!("no column `{wanted}`; columns there are: {}{hint}", names.join(", "))
        };
        let prompt = match config.prompt_key.as_deref() {
            Some(key) if !has(&key) => return Err(missing("prompt_key", key)),
            Some(key) => key,
            None => PROMPT_KEYS.into_iter().find(has).ok_or_else(|| missing("prompt_key", PROMPT_KEYS[0]))?,
        };
        let answer = match config.answer_key.as_deref() {
            // `reward_model.ground_truth` names a column of a struct.
            Some(key) if !has(&key.split('.').next().unwrap_or(key)) => return Err(missing("answer_key", key)),
            Some(key) => Some(key),
            None => ANSWER_KEYS.into_iter().find(has),
        };
        Ok(Columns { prompt: prompt.to_owned(), answer: answer.map(str::to_owned) })
    }

    /// The names of all columns that are read.
    pub fn read(&self) -> Vec<&str> {
        let answer = self.answer.as_deref().map(|key| key.split('.').next().unwrap_or(key));
        [Some(self.prompt.as_str()), answer, Some(DATA_SOURCE), Some(EXTRA_INFO)].into_iter().flatten().collect()
    }
}

/// Makes a prompt of a row.
///
/// # Errors
/// In words, what is wrong with the row.
pub(super) fn prompt_of(
    row: &Map<String, Value>,
    columns: &Columns,
    config: &Prompts,
    need_ground_truth: bool,
    file_source: &str,
) -> Result<Prompt, String> {
    let input = row.get(&columns.prompt).ok_or_else(|| format!("no `{}`", columns.prompt))?;
    let ground_truth = ground_truth(row, columns, config)?;
    if need_ground_truth && ground_truth.is_null() {
        let place = columns.answer.as_deref().unwrap_or("answer");
        return Err(format!(
            "no ground truth: `{place}` is missing or null, and the reward compares with it; set `prompts.answer_key`, \
             or remove the row"
        ));
    }
    let data_source = match row.get(DATA_SOURCE).and_then(Value::as_str) {
        Some(name) => name,
        None => config.data_source.as_deref().unwrap_or(file_source),
    };
    Ok(Prompt {
        index: 0,
        input: dressed(parse_input(input, &columns.prompt)?, config),
        ground_truth,
        data_source: data_source.to_owned(),
        extra_info: row.get(EXTRA_INFO).cloned().unwrap_or(Value::Null),
    })
}

fn parse_input(value: &Value, key: &str) -> Result<PromptInput, String> {
    match value {
        Value::String(text) if text.trim().is_empty() => Err(format!("`{key}` is empty")),
        Value::String(text) => Ok(PromptInput::Text(text.clone())),
        Value::Array(items) if items.is_empty() => Err(format!("`{key}` is an empty list of messages")),
        Value::Array(items) => {
            items.iter().map(|item| message(item, key)).collect::<Result<_, _>>().map(PromptInput::Messages)
        }
        other => Err(format!("`{key}` is {}; expected a text or a list of {{role, content}}", brief(other))),
    }
}

fn message(value: &Value, key: &str) -> Result<Message, String> {
    let text = |name: &str| {
        let found = value.get(name);
        found.and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
            let found = found.map_or_else(|| "missing".to_owned(), |v| format!("{}, not a text", brief(v)));
            format!("a message in `{key}` has a `{name}` that is {found}")
        })
    };
    Ok(Message { role: text("role")?, content: text("content")? })
}

/// Puts the system message before a prompt and the suffix behind it.
pub(super) fn dressed(input: PromptInput, config: &Prompts) -> PromptInput {
    let suffix = config.prompt_suffix.as_deref().unwrap_or_default();
    let mut messages = match input {
        PromptInput::Text(text) if !config.chat => return PromptInput::Text(text + suffix),
        PromptInput::Text(content) => vec![Message { role: "user".into(), content }],
        PromptInput::Messages(messages) => messages,
    };
    if let Some(last) = messages.iter_mut().rev().find(|m| m.role == "user") {
        last.content.push_str(suffix);
    }
    if let Some(content) = config.system_prompt.clone().filter(|_| messages.first().is_none_or(|m| m.role != "system"))
    {
        messages.insert(0, Message { role: "system".into(), content });
    }
    PromptInput::Messages(messages)
}

fn ground_truth(row: &Map<String, Value>, columns: &Columns, config: &Prompts) -> Result<Value, String> {
    let Some(key) = columns.answer.as_deref() else { return Ok(Value::Null) };
    let mut path = key.split('.');
    let mut value = path.next().and_then(|name| row.get(name)).unwrap_or(&Value::Null);
    for name in path {
        value = value.get(name).unwrap_or(&Value::Null);
    }
    if key == REWARD_MODEL {
        value = value.get("ground_truth").unwrap_or(&Value::Null);
    }
    match (value, config.answer_after.as_deref()) {
        (Value::String(text), Some(mark)) => {
            let (_, after) = text
                .rsplit_once(mark)
                .ok_or_else(|| format!("`{key}` lacks {mark:?} (`prompts.answer_after`): it is {}", brief(value)))?;
            Ok(Value::String(plain_number(after.trim())))
        }
        _ => Ok(value.clone()),
    }
}

/// 1,234 without its comma, as verl writes ground truths; anything else as it stands.
fn plain_number(text: &str) -> String {
    if text.contains(',') && number::parse(text).is_some() { text.replace(',', "") } else { text.to_owned() }
}

/// A value as JSON, cut short.
pub(crate) fn brief(value: &Value) -> String {
    const LONGEST: usize = 80;
    let text = value.to_string();
    if text.chars().count() <= LONGEST {
        text
    } else {
        format!("{}...", text.chars().take(LONGEST).collect::<String>())
    }
}
