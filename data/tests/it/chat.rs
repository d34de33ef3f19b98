//! Conversations: three kinds of rows, two kinds of files, one result; what is trained; what is too long; what is wrong.

use crate::support::{Folder, sentence, shards};
use arrow::array::{Array, ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field};
use expect_test::{Expect, expect};
use serde_json::{Value, json};
use std::fs::File;
use std::sync::{Arc, Mutex};
use tangelo_configs::job::{DataFormat, Overlong, Packing};
use tangelo_configs::resolve::{Resources, load_str, resolve};
use tangelo_core::{Batch, Column};
use tangelo_data::encode::Scratch;
use tangelo_data::tokenizer::{TrainOptions, train};
use tangelo_data::{
    ChatEncoder, ChatOptions, DataError, Loader, LoaderOptions, Manifest, PrepareOptions, Progress, Split,
    TextTokenizer, inspect, open_validation, prepare, prepare_job, preview,
};
use tangelo_formats::{Assets, TokenizerAssets};

/// ChatML that says what the assistant writes.
const MARKED: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}\
    {{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// The same without.
fn plain() -> String {
    MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
}

/// A folder whose tokenizer knows `<|im_start|>` and `<|im_end|>`, with a chat template.
fn folder(template: Option<&str>) -> Folder {
    let folder = Folder::new();
    let mut options = TrainOptions::new(vec![folder.text("train.txt")], 400);
    options.special_tokens.extend(["<|im_start|>", "<|im_end|>"].map(str::to_owned));
    let trained = train(&options, &()).unwrap();
    let assets = TokenizerAssets { chat_template: template.map(str::to_owned), ..trained.assets };
    assets.save(&folder.path("tokenizer")).unwrap();
    folder
}

fn conversation(number: u64) -> Vec<(&'static str, String)> {
    let mut messages = vec![("system", "Be brief.".to_owned())];
    messages.truncate(number as usize % 2);
    for turn in 0..1 + number % 3 {
        messages.push(("user", sentence(10 * number + turn)));
        messages.push(("assistant", sentence(10 * number + turn + 5)));
    }
    messages
}

fn messages(number: u64) -> Value {
    conversation(number).into_iter().map(|(role, content)| json!({ "role": role, "content": content })).collect()
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| row.to_string() + "\n").collect()
}

fn options(folder: &Folder, source: &str, to: &str, chat: ChatOptions) -> PrepareOptions {
    PrepareOptions { chat: Some(chat), ..folder.options(source, to) }
}

fn loader(folder: &Folder, prepared: &str, packing: Packing) -> Loader {
    let options =
        LoaderOptions { packing, validation_fraction: 0.0, seq_len: 256, ..folder.loader_options(&[(prepared, None)]) };
    Loader::open(options).unwrap()
}

/// The columns of every row, one epoch.
fn rows(loader: &Loader) -> Vec<Batch> {
    (0..loader.num_samples().div_ceil(6)).map(|i| loader.batch_at(i * 6).unwrap()).collect()
}

fn write_parquet(folder: &Folder, name: &str, conversations: &[Vec<(&'static str, String)>]) {
    let flat: Vec<_> = conversations.concat();
    let text = |values: Vec<&str>| Arc::new(StringArray::from(values)) as ArrayRef;
    // Columns of structs have every field: what a message lacks is null.
    let calls = Arc::new(StringArray::from(vec![None::<&str>; flat.len()])) as ArrayRef;
    let field = |name: &str, nullable| Arc::new(Field::new(name, DataType::Utf8, nullable));
    let items = StructArray::from(vec![
        (field("tool_calls", true), calls),
        (field("content", false), text(flat.iter().map(|m| m.1.as_str()).collect())),
        (field("role", false), text(flat.iter().map(|m| m.0).collect())),
    ]);
    let item = Arc::new(Field::new("item", items.data_type().clone(), false));
    let list =
        ListArray::new(item, OffsetBuffer::from_lengths(conversations.iter().map(Vec::len)), Arc::new(items), None);
    let batch = RecordBatch::try_from_iter([("messages", Arc::new(list) as ArrayRef)]).unwrap();
    let file = File::create(folder.path(name)).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

#[test]
fn every_kind_of_row_and_file_gives_the_same_shards() {
    let folder = folder(Some(MARKED));
    let count = 0..60;
    folder.write("messages.jsonl", lines(count.clone().map(|i| json!({ "id": i, "messages": messages(i) }))));
    let names = |role: &str| {
        match role {
            "user" => "human",
            "assistant" => "gpt",
            other => other,
        }
        .to_owned()
    };
    let sharegpt = |i| -> Value {
        conversation(i).into_iter().map(|(role, text)| json!({ "from": names(role), "value": text })).collect()
    };
    folder.write("sharegpt.jsonl", lines(count.clone().map(|i| json!({ "conversations": sharegpt(i) }))));
    write_parquet(&folder, "messages.parquet", &count.map(conversation).collect::<Vec<_>>());
    let prepared = |source: &str, chat: ChatOptions| {
        let options = PrepareOptions { shard_tokens: 1500, ..options(&folder, source, &format!("p-{source}"), chat) };
        let manifest = prepare(&options, &()).unwrap();
        (manifest.tokens, manifest.chat, rows(&loader(&folder, &format!("p-{source}"), Packing::Concat)))
    };
    let expected = prepared("messages.jsonl", ChatOptions::new(256));
    let trained = expected.1.unwrap().trained_tokens;
    assert!(0 < trained && trained < expected.0, "{expected:?}");
    assert_eq!(prepared("messages.parquet", ChatOptions::new(256)), expected);
    assert_eq!(prepared("sharegpt.jsonl", ChatOptions::new(256)), expected);
    let weights: f32 = expected.2.iter().flat_map(|batch| batch.f32_values(Column::CeWeight).unwrap()).sum();
    // Rows of one epoch and the beginning of the next, which fills the last batch.
    assert!(weights as u64 >= trained * 9 / 10, "{weights} of {trained}");
}

#[test]
fn what_is_trained_is_what_the_assistant_says() {
    let folder = folder(Some(MARKED));
    let tokenizer = TextTokenizer::open(&folder.path("tokenizer")).unwrap();
    folder.write("plain.jinja", plain());
    let marked = ChatEncoder::new(&tokenizer, None, ChatOptions::new(10_000)).unwrap();
    let incremental =
        ChatEncoder::new(&tokenizer, Some(folder.path("plain.jinja").as_path()), ChatOptions::new(10_000)).unwrap();
    for number in 0..40 {
        let row = json!({ "messages": messages(number) }).to_string();
        let found = marked.encode(&row, &mut Scratch::default()).unwrap().unwrap();
        assert_eq!(incremental.encode(&row, &mut Scratch::default()).unwrap().unwrap(), found);
        let ids: Vec<u32> =
            found.tokens.iter().zip(&found.trained).filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
        let said = conversation(number).into_iter().filter(|m| m.0 == "assistant");
        let said: String = said.map(|(_, text)| text + "<|im_end|>\n").collect();
        assert_eq!(tokenizer.decode(&ids).unwrap(), said);
    }
    let everything = ChatOptions { assistant_only_loss: false, ..ChatOptions::new(10_000) };
    let all = ChatEncoder::new(&tokenizer, None, everything).unwrap();
    let row = json!({ "messages": messages(3) }).to_string();
    assert!(all.encode(&row, &mut Scratch::default()).unwrap().unwrap().trained.iter().all(|t| *t));
}

/// Text with marks around what is trained.
fn marked_text(folder: &Folder, chat: ChatOptions, row: &Value) -> String {
    folder.write("one.jsonl", row.to_string());
    let options = PrepareOptions { overwrite: true, ..options(folder, "one.jsonl", "one", chat) };
    prepare(&options, &()).unwrap();
    inspect(&options.folder, 1).unwrap().samples[0].clone()
}

#[test]
fn prompts_and_completions_train_the_completion() {
    let folder = folder(Some(&plain()));
    let check = |chat: ChatOptions, row: Value, expected: &str| assert_eq!(marked_text(&folder, chat, &row), expected);
    let columns = ChatOptions { prompt_column: "q".into(), completion_column: "a".into(), ..ChatOptions::new(256) };
    let texts = json!({ "q": "2 + 2 = ", "a": "4", "id": 1 });
    check(columns.clone(), texts.clone(), "2 + 2 = ⟦4<|endoftext|>⟧");
    check(columns.clone(), json!({ "q": "x: ", "a": "y<|endoftext|>" }), "x: ⟦y<|endoftext|>⟧");
    let as_messages = ChatOptions { as_messages: true, ..columns.clone() };
    let rendered = "<|im_start|>user\n2 + 2 = <|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>\n⟧";
    check(as_messages, texts.clone(), rendered);
    let lists = json!({
        "prompt": [{ "role": "user", "content": "2 + 2 = " }], "completion": [{ "role": "assistant", "content": "4" }],
    });
    check(ChatOptions::new(256), lists, rendered);
    let all = ChatOptions { completion_only_loss: false, ..columns };
    check(all, texts, "⟦2 + 2 = 4<|endoftext|>⟧");
}

#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Progress for Warnings {
    fn warn(&self, message: &str) {
        self.0.lock().unwrap().push(message.into());
    }
}

#[test]
fn long_conversations_are_cut_or_left_out_and_counted() {
    let folder = folder(Some(MARKED));
    let long = |words: usize| "dog ".repeat(words);
    let row = |question: usize, answer: usize| json!({ "messages": [{ "role": "user", "content": long(question) }, { "role": "assistant", "content": long(answer) }] });
    // Fits; its answer is cut; nothing of its answer is left.
    folder.write("a.jsonl", lines([row(2, 2), row(2, 90), row(90, 2), row(3, 3)].into_iter()));
    let prepared = |overlong: Overlong, to: &str| {
        let (chat, warnings) = (ChatOptions { overlong, ..ChatOptions::new(40) }, Warnings::default());
        let manifest = prepare(&options(&folder, "a.jsonl", to, chat), &warnings).unwrap();
        let counts = manifest.chat.unwrap();
        (manifest.documents, counts.truncated, counts.dropped, warnings.0.into_inner().unwrap().join("\n"))
    };
    let (documents, truncated, dropped, warning) = prepared(Overlong::Truncate, "cut");
    assert_eq!((documents, truncated, dropped), (3, 1, 1));
    expect![
        "2 of 4 conversations have more than 40 tokens: 1 are cut, 1 are left out (data.overlong, training.seq_len)"
    ]
    .assert_eq(&warning);
    assert_eq!(prepared(Overlong::Truncate, "cut").3, warning, "a finished folder says it again");
    let (documents, truncated, dropped, _) = prepared(Overlong::Drop, "dropped");
    assert_eq!((documents, truncated, dropped), (2, 0, 2));
    let look = inspect(&folder.path("cut"), 3).unwrap();
    assert!(look.to_string().contains("too long     1 conversations cut, 1 left out"), "{look}");
    folder.write("b.jsonl", lines([row(90, 2)].into_iter()));
    let error = prepare(&options(&folder, "b.jsonl", "none", ChatOptions::new(40)), &()).unwrap_err().to_string();
    assert!(error.contains("no conversation is left: there are none, or all have more than 40 tokens"), "{error}");
}

#[test]
fn shards_do_not_depend_on_threads() {
    let folder = folder(Some(&plain()));
    folder.write("a.jsonl", lines((0..900).map(|i| json!({ "messages": messages(i) }))));
    let prepared = |threads: usize| {
        let chat = ChatOptions { overlong: Overlong::Drop, ..ChatOptions::new(120) };
        let mut options = options(&folder, "a.jsonl", &format!("p{threads}"), chat);
        (options.num_threads, options.shard_tokens) = (threads, 5_000);
        let manifest = prepare(&options, &()).unwrap();
        assert!(manifest.chat.unwrap().dropped > 0);
        (manifest.shards, shards(&options.folder))
    };
    let one = prepared(1);
    assert!(one.0.len() > 2);
    assert_eq!(prepared(5), one);
}

#[test]
fn best_fit_keeps_conversations_whole_and_targets_are_what_is_trained() {
    let folder = folder(Some(MARKED));
    folder.write("a.jsonl", lines((0..80).map(|i| json!({ "messages": messages(i) }))));
    let manifest = prepare(&options(&folder, "a.jsonl", "p", ChatOptions::new(256)), &()).unwrap();
    let (loader, counts) = (loader(&folder, "p", Packing::BestFit), manifest.chat.unwrap());
    let tokenizer = TextTokenizer::open(&folder.path("tokenizer")).unwrap();
    let start = tokenizer.assets().tokenizer.token_to_id("<|im_start|>").unwrap();
    let mut trained = 0;
    for sample in 0..loader.num_samples() {
        let row =
            (0..6).map(|i| loader.batch_at(sample - sample % 6).unwrap().slice(i, 1)).nth(sample as usize % 6).unwrap();
        let column = |column| row.u32_values(column).unwrap();
        let (tokens, targets, positions) = (column(Column::Tokens), column(Column::Targets), column(Column::Positions));
        let (ids, weights) = (column(Column::SeqId), row.f32_values(Column::CeWeight).unwrap());
        let pieces = loader.describe(sample);
        assert!(pieces.iter().all(|piece| piece.tokens.start == 0), "{pieces:?}");
        for at in 0..tokens.len() {
            assert!(
                positions[at] != 0 || tokens[at] == start || at >= pieces.iter().map(|p| p.tokens.end as usize).sum()
            );
            if weights[at] == 0.0 {
                assert_eq!(targets[at], 0);
            } else {
                assert_eq!((weights[at], targets[at], ids[at]), (1.0, tokens[at + 1], ids[at + 1]));
                trained += 1;
            }
        }
    }
    assert_eq!(trained, counts.trained_tokens);
}

#[test]
fn a_folder_made_with_another_template_or_rule_is_refused() {
    let folder = folder(Some(MARKED));
    folder.write("a.jsonl", lines((0..5).map(|i| json!({ "messages": messages(i) }))));
    let made = options(&folder, "a.jsonl", "p", ChatOptions::new(256));
    let before: Manifest = prepare(&made, &()).unwrap();
    folder.write("own.jinja", plain());
    let refused = |options: PrepareOptions| {
        let error = prepare(&options, &()).unwrap_err();
        assert!(matches!(error, DataError::Mismatch { what: "set of options", .. }), "{error}");
    };
    refused(PrepareOptions { chat_template: Some(folder.path("own.jinja")), ..made.clone() });
    refused(PrepareOptions {
        chat: Some(ChatOptions { assistant_only_loss: false, ..ChatOptions::new(256) }),
        ..made.clone()
    });
    refused(PrepareOptions { chat: None, ..made.clone() });
    assert_eq!(prepare(&made, &()).unwrap(), before);
    let again = PrepareOptions { chat_template: Some(folder.path("own.jinja")), overwrite: true, ..made };
    assert_ne!(prepare(&again, &()).unwrap().fingerprint(), before.fingerprint());
    let kept = tangelo_formats::tokenizer::load(&again.folder).unwrap();
    assert_eq!(kept.chat_template, Some(plain()), "the template lies with the tokens");
}

#[test]
fn what_is_wrong_with_a_row_is_named() {
    let folder = folder(Some(&plain()));
    let fail = |chat: ChatOptions, row: &str| {
        folder.write("bad.jsonl", format!("{}\n\n{row}\n", json!({ "messages": messages(1) })));
        let error = prepare(&options(&folder, "bad.jsonl", "bad", chat), &()).unwrap_err().to_string();
        error.replace(&folder.text(""), "")
    };
    let check = |row: &str, expected: Expect| expected.assert_eq(&fail(ChatOptions::new(256), row));
    check(
        "{\"mesages\": []}",
        expect![
            "bad.jsonl: line 3: no `messages`, `conversations`, or `prompt` and `completion`; there is `mesages` (keys there are: mesages). Name the columns in data.sources with messages_column, or prompt_column and completion_column"
        ],
    );
    check(
        "{\"messages\": []}",
        expect!["bad.jsonl: line 3: `messages` is empty: a conversation has at least one message"],
    );
    check(
        "{\"messages\": [{\"rolle\": \"user\", \"content\": \"a\"}]}",
        expect![
            "bad.jsonl: line 3: `messages`, message 1: no `role`; there is `rolle` (keys there are: rolle, content)"
        ],
    );
    check(
        "{\"messages\": [{\"role\": \"asistant\", \"content\": \"a\"}]}",
        expect![
            "bad.jsonl: line 3: `messages`, message 1: unknown role `asistant`; did you mean `assistant`? (known are system, developer, user, assistant, tool)"
        ],
    );
    check(
        "{\"messages\": [{\"from\": \"humans\", \"value\": \"a\"}]}",
        expect![
            "bad.jsonl: line 3: `messages`, message 1: unknown role `humans`; did you mean `human`? (known are system, developer, user, assistant, tool, human, gpt, chatgpt, bing, bard, model, function_call, observation, function_response)"
        ],
    );
    check(
        "{\"messages\": [{\"role\": \"user\", \"content\": 7}]}",
        expect!["bad.jsonl: line 3: `messages`, message 1: `content` is a number; expected text"],
    );
    check(
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
        expect![
            "bad.jsonl: line 3: none of its tokens is trained: there is no message of the assistant, or it is empty"
        ],
    );
    check("{\"messages\": \"hello\"}", expect!["bad.jsonl: line 3: `messages` is text; expected a list of messages"]);
    check(
        "{\"prompt\": \"a\"}",
        expect![
            "bad.jsonl: line 3: no `completion` (keys there are: prompt). Name the columns in data.sources with messages_column, or prompt_column and completion_column"
        ],
    );
    check(
        "{\"prompt\": \"a\", \"completion\": [{\"role\": \"user\", \"content\": \"a\"}]}",
        expect![
            "bad.jsonl: line 3: `prompt` is text and `completion` is a list; expected two texts or two lists of messages"
        ],
    );
    check(
        "[1]",
        expect!["bad.jsonl: line 3: no JSON object; a JSON array is not JSON lines: write one object per line"],
    );
    check("{\"messages\": ", expect!["bad.jsonl: line 3: EOF while parsing a value at line 1 column 12"]);
    let columns =
        ChatOptions { format: DataFormat::PromptCompletion, prompt_column: "question".into(), ..ChatOptions::new(9) };
    expect!["bad.jsonl: line 1: no `question` (keys there are: messages). Name the columns in data.sources with messages_column, or prompt_column and completion_column"].assert_eq(&fail(columns, "{}"));
    folder.write("text.txt", "plain");
    let error = prepare(&options(&folder, "text.txt", "bad", ChatOptions::new(9)), &()).unwrap_err().to_string();
    expect!["text.txt: plain text holds no conversations, which are read from .jsonl, .parquet and .arrow files"]
        .assert_eq(&error.replace(&folder.text(""), ""));
}

#[test]
fn what_is_wrong_with_a_template_is_named() {
    let check = |template: Option<&str>, row: Value, expected: Expect| {
        let folder = folder(template);
        folder.write("a.jsonl", row.to_string());
        let error = prepare(&options(&folder, "a.jsonl", "p", ChatOptions::new(256)), &()).unwrap_err().to_string();
        expected.assert_eq(&error.replace(&folder.text(""), ""));
    };
    let row = || json!({ "messages": messages(2) });
    check(
        None,
        row(),
        expect![
            "a.jsonl: line 1: the tokenizer tokenizer comes without a chat template, and the row holds messages: set data.chat_template to a file with one"
        ],
    );
    check(
        Some("{% for m in messages %}{{ m.content }"),
        row(),
        expect!["tokenizer: the chat template, line 1: syntax error: unexpected `}`, expected end of variable block"],
    );
    check(
        Some("{{ raise_exception('no system, please') }}"),
        row(),
        expect!["a.jsonl: line 1: the chat template refuses the conversation: no system, please"],
    );
    check(
        Some("{{ messages[0].content }} of {{ messages | length }}"),
        row(),
        expect![
            "a.jsonl: line 1: message 2 (assistant): the chat template has no {% generation %} blocks, and renders it in another way when messages follow, so that what the assistant says cannot be told from the rest. Give data.chat_template a template with {% generation %} around it, or set data.assistant_only_loss = false"
        ],
    );
    let last_first = "{% for m in messages[::-1] %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    check(
        Some(last_first),
        row(),
        expect![
            "a.jsonl: line 1: message 2 (assistant): the chat template has no {% generation %} blocks, and renders it in another way when messages follow, so that what the assistant says cannot be told from the rest. Give data.chat_template a template with {% generation %} around it, or set data.assistant_only_loss = false"
        ],
    );
}

const JOB: &str = r#"
[job]
type = "sft"
dump_folder = "FOLDER/run"
[model]
flavor = "debugmodel"
[data]
tokenizer = "FOLDER/tokenizer"
validation_fraction = 0.01
sources = [{ paths = ["FOLDER/a.jsonl"] }]
[training]
seq_len = 256
local_batch_size = 2
[validation]
enable = true
"#;

#[test]
fn a_job_reads_conversations_and_evaluates_on_some() {
    let folder = folder(Some(MARKED));
    folder.write("a.jsonl", lines((0..7).map(|i| json!({ "messages": messages(i) }))));
    folder.write("own.jsonl", lines((0..4).map(|i| json!({ "prompt": "a ", "completion": sentence(i) }))));
    let resolved = |job: &str| {
        let machine = Resources {
            world_size: 1,
            local_world_size: 1,
            num_cores: 2,
            cuda: false,
            current_dir: folder.path(""),
            home: None,
        };
        let job = job.replace("FOLDER", folder.text("").trim_end_matches('/'));
        resolve(load_str(&job, "job.toml", &[]).unwrap(), &machine, &Assets).unwrap().config
    };
    let opened = |job: &str| {
        let config = resolved(job);
        let prepared = prepare_job(&config, &()).unwrap();
        let options = tangelo_data::loader_options(&config, Split::Train, 2, 0, 1).unwrap();
        let training = Loader::open(options).unwrap();
        let held_out = open_validation(&config, &training).unwrap().unwrap();
        let pieces = |l: &Loader| (0..l.num_samples()).flat_map(|s| l.describe(s)).collect::<Vec<_>>();
        (prepared, pieces(&training), pieces(&held_out))
    };
    let (prepared, training, held_out) = opened(JOB);
    assert_eq!(prepared.trained_tokens(), prepared.sources[0].manifest.chat.map(|c| c.trained_tokens));
    assert_eq!((training.len(), held_out.len()), (6, 1), "one of few conversations is held out whole");
    assert_eq!(held_out[0].tokens.start, 0);
    let own = JOB.replace("0.01", "0.005") + "sources = [{ paths = [\"FOLDER/own.jsonl\"] }]\n";
    let (prepared, training, held_out) = opened(&own);
    assert_eq!((training.len(), held_out.len(), prepared.held_out.len()), (7, 4, 1));
    assert!(held_out.iter().all(|piece| piece.source == "own"));
    let first = preview(&resolved(JOB)).unwrap();
    assert_eq!((first.len(), first[0].place.1), (1, 1));
    let shown = first[0].to_string();
    assert!(shown.contains("<|im_start|>assistant\n  ⟦") && shown.contains("<|im_end|>\n  ⟧"), "{shown}");
    assert!(first[0].trained > 0 && first[0].trained < first[0].tokens);
}
