//! Supervised fine-tuning against TRL's SFTTrainer on the same rows (tests/python/sft.py): token ids and masks are
//! equal, loss and gradients agree within the limits that [`parity`](crate::parity) has for its models. And whole runs.

use crate::job::{Job, assert_losses_agree, finish, tangelo};
use crate::parity::{check_gradients, golden, load};
use crate::support;
use std::path::Path;
use tangelo_configs::job::Packing;
use tangelo_core::Batch;
use tangelo_data::encode::Scratch;
use tangelo_data::{
    ChatEncoder, ChatOptions, Loader, LoaderOptions, LoaderSource, PrepareOptions, Split, TextTokenizer, prepare,
};
use tangelo_formats::tokenizer;
use tangelo_observe::records::{SampleRecord, read_lines};
use tangelo_observe::{Metric, files};
use tangelo_trainer::alone::Alone;

/// As in sft.py.
const MAX_LENGTH: usize = 96;

/// A row as TRL has it: -100 where nothing is learnt.
#[derive(serde::Deserialize)]
struct Row {
    input_ids: Vec<u32>,
    labels: Vec<i64>,
}

/// What TRL's configuration of a case is here.
fn options(case: &str) -> ChatOptions {
    let defaults = ChatOptions::new(MAX_LENGTH);
    match case {
        "everything" => ChatOptions { assistant_only_loss: false, ..defaults },
        "whole_texts" => ChatOptions { completion_only_loss: false, ..defaults },
        _ => defaults,
    }
}

/// Every row's ids and mask. TRL leaves out rows of which nothing that is learnt fits; so do we.
fn check_rows(folder: &Path, case: &str, faults: &mut Vec<String>) -> PrepareOptions {
    let (tokenizer_path, own) = (folder.join("tokenizer"), folder.join(format!("{case}.jinja")));
    let template = Some(own).filter(|path| path.exists());
    let tokenizer = TextTokenizer::open(&tokenizer_path).unwrap();
    let encoder = ChatEncoder::new(&tokenizer, template.as_deref(), options(case)).unwrap();
    let read = |extension: &str| std::fs::read_to_string(folder.join(format!("{case}.{extension}"))).unwrap();
    let expected: Vec<Row> = serde_json::from_str(&read("json")).unwrap();
    let rows = read("jsonl");
    let found: Vec<_> = rows
        .lines()
        .filter_map(|row| encoder.encode(row, &mut Scratch::default()).expect("a row as TRL reads it"))
        .collect();
    println!(
        "  {} rows of {}, {} cut",
        found.len(),
        rows.lines().count(),
        found.iter().filter(|e| e.truncated).count()
    );
    if found.len() != expected.len() {
        faults.push(format!("{} rows, TRL has {}", found.len(), expected.len()));
    }
    for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let mask: Vec<bool> = expected.labels.iter().map(|&label| label != -100).collect();
        if found.tokens != expected.input_ids {
            faults.push(format!("row {index}: ids {:?}, TRL's {:?}", found.tokens, expected.input_ids));
        }
        if found.trained != mask {
            faults.push(format!("row {index}: mask {:?}, TRL's {mask:?}", found.trained));
        }
    }
    let source = folder.join(format!("{case}.jsonl")).display().to_string();
    let prepared = folder.join(case).join("prepared");
    PrepareOptions {
        chat: Some(options(case)),
        chat_template: template,
        ..PrepareOptions::new(vec![source], tokenizer_path, prepared)
    }
}

/// All rows as one packed batch.
fn batch(options: &PrepareOptions) -> Batch {
    prepare(options, &()).unwrap();
    let loader = |rows: usize| {
        Loader::open(LoaderOptions {
            sources: vec![LoaderSource { name: "rows".into(), folder: options.folder.clone(), weight: None }],
            split: Split::Train,
            validation_fraction: 0.0,
            seq_len: MAX_LENGTH,
            packing: Packing::BestFit,
            document_mask: true,
            seed: 1,
            global_batch_size: rows,
            data_rank: 0,
            data_size: 1,
            verify: true,
        })
        .unwrap()
    };
    let rows = loader(1).num_samples() as usize;
    loader(rows).batch_at(0).unwrap()
}

#[test]
fn rows_loss_and_gradients_equal_trls() {
    let (Some(python), Some(model)) = (support::python(), support::smollm2()) else { return };
    let (folder, seed) = (tempfile::tempdir().unwrap(), support::fresh_seed());
    tokenizer::load(&model).unwrap().save(&folder.path().join("tokenizer")).unwrap();
    support::run_script(&python, "sft.py", &["make", folder.path().to_str().unwrap(), &seed.to_string()]);
    let cases: Vec<String> =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("cases.json")).unwrap()).unwrap();
    assert_eq!(cases.len(), 6);
    let mut faults = Vec::new();
    for case in cases {
        println!("{case}");
        let mut found = Vec::new();
        let options = check_rows(folder.path(), &case, &mut found);
        let alone = Alone::new(load(&folder.path().join(&case).join("model"), true)).unwrap();
        let golden = golden(&folder.path().join(&case).join("golden.safetensors"));
        check_gradients(&alone, &batch(&options), &golden, &mut found);
        faults.extend(found.into_iter().map(|fault| format!("{case}: {fault}")));
    }
    assert!(faults.is_empty(), "seed {seed}:\n{}", faults.join("\n"));
}

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}\
    {% if add_generation_prompt %}assistant: {% endif %}";

/// Questions whose answers are the same sentence, so that little is to be learnt, and that quickly.
fn conversations(seed: u64, count: u64) -> String {
    let turn = |role, content: String| serde_json::json!({ "role": role, "content": content });
    let row = |i: u64| {
        let asked = turn("user", format!("{}?", (seed + i * 7919) % 1000));
        serde_json::json!({ "messages": [asked, turn("assistant", "not today".into())] }).to_string() + "\n"
    };
    (0..count).map(row).collect()
}

#[test]
fn a_run_learns_the_answers_in_every_layout_alike() {
    let (seed, answer) = (support::fresh_seed(), "not today<|endoftext|>");
    let job = Job::new(seed);
    std::fs::write(job.path("chats.jsonl"), conversations(seed, 60)).unwrap();
    std::fs::write(job.path("held_out.jsonl"), conversations(seed + 1, 7)).unwrap();
    std::fs::write(job.path("chat.jinja"), TEMPLATE).unwrap();
    let source = |name: &str| format!("[{{ paths = [{:?}] }}]", job.path(name).display().to_string());
    let sets = [
        "job.type=sft".to_owned(),
        format!("data.sources={}", source("chats.jsonl")),
        format!("data.chat_template={}", job.path("chat.jinja").display()),
        "data.validation_fraction=0".into(),
        "optimizer.lr=0.01".into(),
        "validation.enable=true".into(),
        format!("validation.sources={}", source("held_out.jsonl")),
        "validation.freq=20".into(),
        "validation.steps=-1".into(),
        "validation.prompts=[\"5?\"]".into(),
        "validation.sample_tokens=6".into(),
    ];
    let arguments: Vec<&str> = sets.iter().flat_map(|set| ["--set", set.as_str()]).collect();
    let alone = job.run("alone", 1, &arguments);
    let losses = alone.losses();
    assert!(losses[19].1 < 0.5 * losses[0].1, "{losses:?}");
    let trained = alone.records().iter().filter_map(|r| r.get(Metric::EvalLoss)).next_back().expect("an evaluation");
    assert!(trained < 0.6 * losses[0].1, "held-out loss {trained}");
    assert_losses_agree(&job.run("two", 2, &arguments).losses(), &losses, "two ranks");
    // The template was kept with the run: what it writes is what the answer follows.
    let run = alone.folder.display().to_string();
    let asked = ["generate", &run, "--chat", "--prompt", "5?", "--json", "--max-new-tokens", "2"];
    let (code, text) = finish(&mut tangelo(&asked));
    let said: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {code:?} {text}"));
    let tokenizer = tokenizer::load(&alone.folder).unwrap().tokenizer;
    let expected = tokenizer.encode("user: 5?<|endoftext|>assistant: ", false).unwrap();
    assert_eq!(said["prompt_ids"], serde_json::json!(expected.get_ids()));
    // What it answered after the last step is what it answers now, drawn by the same numbers.
    let samples: Vec<SampleRecord> =
        read_lines(&alone.folder.join(files::SAMPLES), |line| serde_json::from_str(line).ok()).unwrap();
    assert_eq!((samples.len(), samples[0].step, samples[0].prompt.as_str()), (1, 20, "5?"));
    let drawn = ["--temperature", "0.8", "--top-p", "0.95", "--seed", "20", "--max-new-tokens", "6"];
    let (code, text) =
        finish(&mut tangelo(&[&["generate", &run, "--chat", "--prompt", "5?", "--json"], &drawn[..]].concat()));
    let said: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {code:?} {text}"));
    assert_eq!(said["text"], samples[0].text.as_str(), "{text}");
    let (_, look) = finish(&mut tangelo(&["data", "inspect", job.path("prepared/chats").to_str().unwrap()]));
    assert!(look.contains(&format!("assistant: \u{27e6}{answer}\u{27e7}")), "{look}");
    assert!(look.contains(&format!("trained      {} tokens", 60 * 10)), "{look}");
}
