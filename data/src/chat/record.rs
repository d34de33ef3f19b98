//! A row of chat data, read and checked: which columns it has, which roles its messages have.

use super::ChatOptions;
use serde_json::{Map, Value, json};
use tangelo_configs::job::DataFormat;
use tangelo_configs::nearest;

pub(super) const ROLE: &str = "role";
const CONTENT: &str = "content";
const MESSAGES: &str = "messages";
const CONVERSATIONS: &str = "conversations";
/// Columns beside the conversation, as in TRL: functions that may be called, and variables of the template.
const TOOLS: &str = "tools";
const VARIABLES: &str = "chat_template_kwargs";

/// Roles that templates know.
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];
/// ShareGPT's names of them.
const SHAREGPT_ROLES: [(&str, &str); 9] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("function_call", "assistant"),
    ("observation", "tool"),
    ("function_response", "tool"),
];

/// Messages and what is rendered with them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Conversation {
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
    pub variables: Option<Map<String, Value>>,
}

/// What a row is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Example {
    Conversation(Conversation),
    /// A prompt of messages, and the prompt and the completion together.
    Completion {
        prompt: Conversation,
        both: Conversation,
    },
    /// A prompt and a completion that no template touches.
    Text {
        prompt: String,
        completion: String,
    },
}

type Result<T> = std::result::Result<T, String>;

/// Reads a row.
pub(super) fn parse(row: &str, options: &ChatOptions) -> Result<Example> {
    let value: Value = serde_json::from_str(row).map_err(|e| format!("not JSON: {e}"))?;
    let Value::Object(mut row) = value else { return Err(format!("expected an object, found {}", kind(&value))) };
    let messages = match (options.format, &options.messages_column) {
        (DataFormat::PromptCompletion, _) => None,
        (_, Some(column)) if options.format != DataFormat::Auto || row.contains_key(column) => Some(column.as_str()),
        (DataFormat::Sharegpt, _) => Some(if row.contains_key(MESSAGES) { MESSAGES } else { CONVERSATIONS }),
        (DataFormat::Messages, _) => Some(MESSAGES),
        (DataFormat::Auto, _) => [MESSAGES, CONVERSATIONS].into_iter().find(|name| row.contains_key(*name)),
    };
    let (tools, variables) = (tools(&mut row)?, variables(&mut row)?);
    let conversation = |messages| Conversation { messages, tools: tools.clone(), variables: variables.clone() };
    let Some(column) = messages else {
        let prompt = take(&mut row, &options.prompt_column, options)?;
        let completion = take(&mut row, &options.completion_column, options)?;
        return prompt_and_completion(prompt, completion, options, &conversation);
    };
    let list = take(&mut row, column, options)?;
    Ok(Example::Conversation(conversation(check_messages(list, column, options.format)?)))
}

/// The value of a column.
fn take(row: &mut Map<String, Value>, column: &str, options: &ChatOptions) -> Result<Value> {
    if let Some(value) = row.get_mut(column) {
        return Ok(value.take());
    }
    let found: Vec<&str> = row.keys().map(String::as_str).collect();
    let (prompt, completion) = (options.prompt_column.as_str(), options.completion_column.as_str());
    let undecided = options.format == DataFormat::Auto && column == prompt && !row.contains_key(completion);
    let (missing, wanted) = if undecided {
        let messages = options.messages_column.as_deref().unwrap_or(MESSAGES);
        let missing = format!("`{messages}`, `{CONVERSATIONS}`, or `{prompt}` and `{completion}`");
        (missing, vec![messages, CONVERSATIONS, prompt, completion])
    } else {
        (format!("`{column}`"), vec![column])
    };
    let near = wanted.iter().find_map(|wanted| nearest(wanted, found.iter().copied()));
    let near = near.map(|near| format!("; there is `{near}`")).unwrap_or_default();
    Err(format!(
        "no {missing}{near} (keys there are: {}). Name the columns in data.sources with messages_column, or \
         prompt_column and completion_column",
        found.join(", ")
    ))
}

fn prompt_and_completion(
    prompt: Value,
    completion: Value,
    options: &ChatOptions,
    conversation: &impl Fn(Vec<Value>) -> Conversation,
) -> Result<Example> {
    let names = (&options.prompt_column, &options.completion_column);
    let message = |role: &str, content: &Value| json!({ ROLE: role, CONTENT: content });
    let (prompt, completion) = match (&prompt, &completion) {
        (Value::String(prompt), Value::String(completion)) if !options.as_messages => {
            return Ok(Example::Text { prompt: prompt.clone(), completion: completion.clone() });
        }
        (Value::String(_), Value::String(_)) => {
            (vec![message("user", &prompt)], vec![message("assistant", &completion)])
        }
        (Value::Array(_), Value::Array(_)) => {
            (check_messages(prompt, names.0, DataFormat::Auto)?, check_messages(completion, names.1, DataFormat::Auto)?)
        }
        _ => {
            let (prompt, completion) = (kind(&prompt), kind(&completion));
            return Err(format!(
                "`{}` is {prompt} and `{}` is {completion}; expected two texts or two lists of messages",
                names.0, names.1
            ));
        }
    };
    let both = [prompt.clone(), completion].concat();
    Ok(Example::Completion { prompt: conversation(prompt), both: conversation(both) })
}

/// The messages of a list, with their roles in the words of templates.
fn check_messages(list: Value, column: &str, format: DataFormat) -> Result<Vec<Value>> {
    let Value::Array(list) = list else {
        return Err(format!("`{column}` is {}; expected a list of messages", kind(&list)));
    };
    if list.is_empty() {
        return Err(format!("`{column}` is empty: a conversation has at least one message"));
    }
    let number = |index: usize, e: String| format!("`{column}`, message {}: {e}", index + 1);
    let all = list.into_iter().enumerate();
    all.map(|(index, message)| check_message(message, format).map_err(|e| number(index, e))).collect()
}

fn check_message(message: Value, format: DataFormat) -> Result<Value> {
    let Value::Object(mut message) = message else {
        return Err(format!("expected an object, found {}", kind(&message)));
    };
    let is_sharegpt = match format {
        DataFormat::Sharegpt => true,
        DataFormat::Messages => false,
        _ => !message.contains_key(ROLE) && message.contains_key("from"),
    };
    let (role_key, content_key) = if is_sharegpt { ("from", "value") } else { (ROLE, CONTENT) };
    let found: Vec<String> = message.keys().cloned().collect();
    let missing = |key: &str| {
        let near = nearest(key, found.iter().map(String::as_str)).map(|n| format!("; there is `{n}`"));
        format!("no `{key}`{} (keys there are: {})", near.unwrap_or_default(), found.join(", "))
    };
    let role = message.remove(role_key).ok_or_else(|| missing(role_key))?;
    let role = known_role(&role, is_sharegpt)?;
    let has_calls = message.contains_key("tool_calls");
    if !message.contains_key(content_key) && !has_calls {
        return Err(missing(content_key));
    }
    let content = message.remove(content_key);
    match &content {
        Some(Value::String(_) | Value::Array(_)) | None => {}
        Some(Value::Null) if has_calls => {}
        Some(other) => return Err(format!("`{content_key}` is {}; expected text", kind(other))),
    }
    let mut checked = Map::from_iter([(ROLE.to_owned(), Value::from(role))]);
    checked.extend(content.map(|content| (CONTENT.to_owned(), content)));
    checked.extend(message);
    Ok(Value::Object(checked))
}

fn known_role(role: &Value, is_sharegpt: bool) -> Result<&'static str> {
    let Some(name) = role.as_str() else { return Err(format!("the role is {}; expected text", kind(role))) };
    let same = ROLES.into_iter().map(|role| (role, role));
    let known: Vec<(&str, &'static str)> = same.chain(SHAREGPT_ROLES.into_iter().filter(|_| is_sharegpt)).collect();
    if let Some((_, role)) = known.iter().find(|(known, _)| *known == name) {
        return Ok(role);
    }
    let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
    let near = nearest(name, names.iter().copied()).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
    Err(format!("unknown role `{name}`{near} (known are {})", names.join(", ")))
}

/// A list of functions, or its JSON as text: columnar files cannot hold schemas of different shapes.
fn tools(row: &mut Map<String, Value>) -> Result<Option<Value>> {
    let value = match row.remove(TOOLS) {
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => serde_json::from_str(&text).map_err(|e| format!("`{TOOLS}` is not JSON: {e}"))?,
        Some(Value::Null) | None => return Ok(None),
        Some(value) => value,
    };
    match value {
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(_) => Ok(Some(value)),
        other => Err(format!("`{TOOLS}` is {}; expected a list of functions", kind(&other))),
    }
}

fn variables(row: &mut Map<String, Value>) -> Result<Option<Map<String, Value>>> {
    match row.remove(VARIABLES) {
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(Value::Null) | None => Ok(None),
        Some(other) => Err(format!("`{VARIABLES}` is {}; expected an object", kind(&other))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
