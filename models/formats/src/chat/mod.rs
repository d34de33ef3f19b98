//! Chat templates: a conversation as the text that a model was trained to read.
//!
//! A [`ChatTemplate`] renders what transformers' `apply_chat_template` renders, byte for byte: Jinja, blocks trimmed,
//! Python's methods of strings, lists and dictionaries, `break` and `continue`, and the functions that templates on the
//! Hub call (`raise_exception`, `strftime_now`, `tojson`). Spans inside `{% generation %}` come back beside the text.
//!
//! Invariant: rendering reads nothing but its arguments, and the clock where a template asks for `strftime_now`.
//! Absent: escapes of white space beyond ASCII where a template prints a list or a dictionary as Python would,
//! `documents`, continuing a final message, and reading a model's answer back into a message.

mod generation;
mod python;

use crate::error::{FormatError, Result};
use crate::tokenizer::TokenizerAssets;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Rest;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde_json::Value as Json;
use std::ops::Range;
use std::path::Path;

/// The name of the one template in an environment.
const NAME: &str = "chat template";

/// Which template a job means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TemplateChoice<'a> {
    /// A file with one (`data.chat_template`).
    pub file: Option<&'a Path>,
    /// The name of one of the tokenizer's (`data.chat_template_name`); without either, its own.
    pub name: Option<&'a str>,
}

impl<'a> From<Option<&'a Path>> for TemplateChoice<'a> {
    fn from(file: Option<&'a Path>) -> TemplateChoice<'a> {
        TemplateChoice { file, name: None }
    }
}

/// A compiled template with the special tokens of its tokenizer.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    text: String,
    marks_generation: bool,
    special_tokens: Vec<(&'static str, String)>,
}

/// What is rendered beside the messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct RenderOptions<'a> {
    /// JSON schemas of the functions that the model may call: an array.
    pub tools: Option<&'a Json>,
    /// End with what comes before an answer of the assistant.
    pub add_generation_prompt: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Option<&'a serde_json::Map<String, Json>>,
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// What `{% generation %}` encloses, in bytes of the text, ascending.
    pub generation: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Compiles `text` for the special tokens of `tokenizer`.
    ///
    /// # Errors
    /// [`FormatError::Template`] with the line where `text` is no template.
    pub fn new(text: &str, tokenizer: &TokenizerAssets) -> Result<ChatTemplate> {
        let tokens = [
            ("bos_token", tokenizer.bos_token_id),
            ("eos_token", tokenizer.eos_token_ids.first().copied()),
            ("pad_token", tokenizer.pad_token_id),
        ];
        let special_tokens = tokens.into_iter().filter_map(|(name, id)| Some((name, tokenizer.token(id?)?)));
        ChatTemplate::with_special_tokens(text, special_tokens.collect())
    }

    /// Compiles `text`, which may name the tokens of `special_tokens` by their first parts.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`].
    pub fn with_special_tokens(text: &str, special_tokens: Vec<(&'static str, String)>) -> Result<ChatTemplate> {
        let mut environment = environment();
        let source = generation::mark(&text.replace("\r\n", "\n"));
        environment.add_template_owned(NAME, source.text).map_err(|e| template_error(&e))?;
        Ok(ChatTemplate { environment, text: text.into(), marks_generation: source.found, special_tokens })
    }

    /// The template that belongs to `tokenizer`.
    ///
    /// # Errors
    /// Where it has none, and as [`ChatTemplate::new`].
    pub fn of(tokenizer: &TokenizerAssets) -> Result<ChatTemplate> {
        let Some(text) = &tokenizer.chat_template else {
            return Err(FormatError::Template("the tokenizer comes without a chat template".into()));
        };
        ChatTemplate::new(text, tokenizer)
    }

    /// The template that a choice means; none where nothing is chosen and the tokenizer has none.
    ///
    /// # Errors
    /// A file that cannot be read, a name that the tokenizer does not know (with those that it does), and as
    /// [`ChatTemplate::new`].
    pub fn choose(choice: TemplateChoice<'_>, tokenizer: &TokenizerAssets) -> Result<Option<ChatTemplate>> {
        match (choice.file, choice.name, &tokenizer.chat_template) {
            (Some(path), ..) => ChatTemplate::open(path, tokenizer).map(Some),
            (None, Some(name), _) => match tokenizer.named_templates.get(name) {
                Some(text) => ChatTemplate::new(text, tokenizer).map(Some),
                None => Err(FormatError::Template(unknown_name(name, tokenizer))),
            },
            (None, None, Some(_)) => ChatTemplate::of(tokenizer).map(Some),
            (None, None, None) => Ok(None),
        }
    }

    /// The template in a file, or a file's template for a tokenizer that has another or none.
    ///
    /// # Errors
    /// Where the file cannot be read, and as [`ChatTemplate::new`].
    pub fn open(path: &Path, tokenizer: &TokenizerAssets) -> Result<ChatTemplate> {
        let text = std::fs::read_to_string(path).map_err(FormatError::io("read the chat template", path))?;
        ChatTemplate::new(&text, tokenizer)
    }

    /// The template as it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether it has `{% generation %}` blocks, so that [`Rendered::generation`] says what the assistant wrote.
    pub fn marks_generation(&self) -> bool {
        self.marks_generation
    }

    /// Renders a conversation. Each message is an object; `role` and `content` are what most templates read.
    ///
    /// # Errors
    /// [`FormatError::Template`] where the template refuses the conversation or reads what is not there.
    pub fn render(&self, messages: &[Json], options: &RenderOptions) -> Result<Rendered> {
        if self.marks_generation {
            let texts = messages.iter().chain(options.tools).chain(options.variables.iter().flat_map(|v| v.values()));
            generation::check_unmarked(texts).map_err(FormatError::Template)?;
        }
        let mut context: Vec<(&str, Value)> = Vec::new();
        context.extend(self.special_tokens.iter().map(|(name, text)| (*name, Value::from(text.as_str()))));
        context.push(("messages", messages.iter().map(python::value).collect()));
        context.push(("tools", options.tools.map_or_else(|| Value::from(()), python::value)));
        context.push(("documents", Value::from(())));
        context.push(("add_generation_prompt", Value::from(options.add_generation_prompt)));
        let variables = options.variables.into_iter().flatten();
        context.extend(variables.map(|(name, value)| (name.as_str(), python::value(value))));
        let template = self.environment.get_template(NAME).map_err(|e| template_error(&e))?;
        let text = template.render(Value::from_pairs(context)).map_err(|e| template_error(&e))?;
        Ok(if self.marks_generation { generation::unmark(&text) } else { Rendered { text, generation: Vec::new() } })
    }
}

fn unknown_name(name: &str, tokenizer: &TokenizerAssets) -> String {
    let names: Vec<&str> = tokenizer.named_templates.keys().map(String::as_str).collect();
    let has = match (names.as_slice(), &tokenizer.chat_template) {
        ([], Some(_)) => "it has one, without a name: remove `data.chat_template_name`".to_owned(),
        ([], None) => "it has none: set `data.chat_template` to a file with one".to_owned(),
        (names, _) => format!("it has {}", names.join(", ")),
    };
    format!("`data.chat_template_name` = \"{name}\": the tokenizer has no chat template of that name; {has}")
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.unwrap_or_else(|e| unreachable!("the default delimiters: {e}")));
    environment.set_unknown_method_callback(python::method);
    environment.add_filter("tojson", python::to_json);
    environment.add_filter("trim", python::trim);
    environment.add_test("iterable", python::is_iterable);
    environment.add_filter(generation::FILTER, generation::enclose);
    environment.add_function("raise_exception", |message: Value| -> std::result::Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    environment.add_function("strftime_now", |format: &str, _rest: Rest<Value>| {
        let now = jiff::fmt::strtime::format(format, &jiff::Zoned::now());
        now.map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
    });
    environment
}

/// Goes before what a template says by `raise_exception`, so that it is told from errors of rendering.
const RAISED: &str = "raised: ";

fn template_error(error: &Error) -> FormatError {
    let detail = error.detail().unwrap_or_default();
    FormatError::Template(match (detail.strip_prefix(RAISED), error.line()) {
        (Some(message), _) => format!("the chat template refuses the conversation: {message}"),
        (None, Some(line)) => format!("the chat template, line {line}: {}: {detail}", error.kind()),
        (None, None) => format!("the chat template: {}: {detail}", error.kind()),
    })
}
