//! `tangelo data`: train a tokenizer, prepare token shards, look at them.

use super::{print, terminal};
use crate::cli::data::{ChatArgs, DataCommand, InspectArgs, PrepareArgs, TokenizerArgs};
use crate::error::LaunchError;
use crate::progress::DataProgress;
use crate::run::short_count;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tangelo_configs::job::Overlong;
use tangelo_data::manifest::is_prepared;
use tangelo_data::tokenizer::{TrainOptions, train};
use tangelo_data::{ChatOptions, DataError, Inspection, Manifest, PrepareOptions, prepare};

/// `tangelo data ...`
pub fn data(command: &DataCommand) -> Result<(), LaunchError> {
    match command {
        DataCommand::Tokenizer(arguments) => tokenizer(arguments),
        DataCommand::Prepare(arguments) => prepare_folder(arguments),
        DataCommand::Inspect(arguments) => inspect(arguments),
    }
}

fn tokenizer(arguments: &TokenizerArgs) -> Result<(), LaunchError> {
    let terminal = terminal(arguments.quiet);
    let mut options = TrainOptions::new(arguments.paths.clone(), arguments.vocab_size);
    options.text_column.clone_from(&arguments.text_column);
    options.sample_bytes = arguments.sample_bytes;
    let begun = Instant::now();
    let trained = train(&options, &DataProgress::new(&terminal, &|| false));
    terminal.clear();
    let trained = trained?;
    let path = if arguments.output.extension().is_some_and(|e| e == "json") {
        std::fs::write(&arguments.output, trained.assets.to_json())
            .map_err(LaunchError::io("write", &arguments.output))?;
        arguments.output.clone()
    } else {
        trained.save(&arguments.output)?
    };
    terminal.say(&format!(
        "{}: {} tokens, learnt from {} in {} documents in {:.1} s",
        path.display(),
        trained.assets.vocab_size(),
        bytes(trained.text_bytes),
        trained.documents,
        begun.elapsed().as_secs_f64()
    ));
    Ok(())
}

fn prepare_folder(arguments: &PrepareArgs) -> Result<(), LaunchError> {
    let terminal = terminal(arguments.quiet);
    let mut options = PrepareOptions::new(arguments.paths.clone(), &arguments.tokenizer, &arguments.output);
    options.text_column.clone_from(&arguments.text_column);
    options.shard_tokens = arguments.shard_tokens.get();
    options.num_threads = arguments.threads;
    options.overwrite = arguments.overwrite;
    options.chat = chat_options(&arguments.chat);
    options.chat_template.clone_from(&arguments.chat.chat_template);
    options.chat_template_name.clone_from(&arguments.chat.chat_template_name);
    let begun = Instant::now();
    let manifest = prepare(&options, &DataProgress::new(&terminal, &|| false));
    terminal.clear();
    let manifest = manifest?;
    let seconds = begun.elapsed().as_secs_f64();
    terminal.say(&format!("{}: {} in {seconds:.1} s", arguments.output.display(), counts(&manifest)));
    Ok(())
}

/// How rows become conversations, where they are some.
fn chat_options(arguments: &ChatArgs) -> Option<ChatOptions> {
    let seq_len = arguments.seq_len.filter(|_| arguments.chat)?;
    let defaults = ChatOptions::new(seq_len.get());
    Some(ChatOptions {
        format: arguments.format,
        messages_column: arguments.messages_column.clone(),
        prompt_column: arguments.prompt_column.clone().unwrap_or(defaults.prompt_column),
        completion_column: arguments.completion_column.clone().unwrap_or(defaults.completion_column),
        as_messages: arguments.as_messages,
        assistant_only_loss: !arguments.learn_everything,
        completion_only_loss: !arguments.learn_everything,
        overlong: if arguments.drop_overlong { Overlong::Drop } else { Overlong::Truncate },
        max_tokens: defaults.max_tokens,
    })
}

fn inspect(arguments: &InspectArgs) -> Result<(), LaunchError> {
    let folders = prepared_folders(&arguments.folder)?;
    let looks = folders.iter().map(|folder| tangelo_data::inspect(folder, arguments.samples));
    let looks: Vec<Inspection> = looks.collect::<Result<_, DataError>>()?;
    if !arguments.json {
        return print(&looks.iter().map(Inspection::to_string).collect::<Vec<_>>().join("\n"));
    }
    let lines: Result<Vec<String>, _> = looks.iter().map(serde_json::to_string).collect();
    print(&(lines.map_err(|e| LaunchError::Internal(e.to_string()))?.join("\n") + "\n"))
}

/// The folder itself, or the prepared folders right inside it.
fn prepared_folders(folder: &Path) -> Result<Vec<PathBuf>, LaunchError> {
    if is_prepared(folder) {
        return Ok(vec![folder.to_owned()]);
    }
    let entries = std::fs::read_dir(folder).map_err(LaunchError::io("list", folder))?.flatten();
    let mut inside: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(|path| is_prepared(path)).collect();
    inside.sort();
    // The manifest's own reader says best what is missing.
    Ok(if inside.is_empty() { vec![folder.to_owned()] } else { inside })
}

fn counts(manifest: &Manifest) -> String {
    let tokens = short_count(manifest.tokens as f64);
    let (shards, text) = (manifest.shards.len(), bytes(manifest.text_bytes));
    format!("{tokens} tokens in {} documents, from {text} of text, in {shards} shard(s)", manifest.documents)
}

fn bytes(count: u64) -> String {
    match count as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n => format!("{:.0} kB", (n / 1e3).ceil()),
    }
}
