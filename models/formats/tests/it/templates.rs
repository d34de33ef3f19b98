//! Chat templates against transformers, byte for byte, on fresh random conversations.
//!
//! Templates are those of `tests/templates`, SmolLM2's own, and all that TRL carries in the venv (the published ones of
//! some thirty model families, and its own with `{% generation %}`).

use crate::common::{fresh_seed, python, root, smollm2};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tangelo_formats::chat::{ChatTemplate, RenderOptions};
use tangelo_formats::tokenizer;

/// Spans in characters, as Python counts.
fn characters(text: &str, spans: &[std::ops::Range<usize>]) -> Value {
    let count = |end: usize| text[..end].chars().count();
    spans.iter().map(|span| serde_json::json!([count(span.start), count(span.end)])).collect()
}

fn check(case: &Value, template: &str) -> Result<(), String> {
    let variables = case["variables"].as_object().unwrap();
    let template = ChatTemplate::with_special_tokens(template, Vec::new()).map_err(|e| e.to_string())?;
    let options = RenderOptions {
        tools: Some(&case["tools"]).filter(|tools| tools.is_array()),
        add_generation_prompt: case["add_generation_prompt"] == true,
        variables: Some(variables),
    };
    let found = template.render(case["messages"].as_array().unwrap(), &options);
    match (case["text"].as_str(), found) {
        (Some(expected), Ok(found)) if found.text != expected => {
            let at = found.text.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
            let near = |text: &str| {
                String::from_utf8_lossy(&text.as_bytes()[at.saturating_sub(40).min(text.len())..])
                    .chars()
                    .take(120)
                    .collect::<String>()
            };
            Err(format!("byte {at}: {:?}, expected {:?}", near(&found.text), near(expected)))
        }
        (Some(_), Ok(found)) => {
            // A block that wrote nothing has no span here.
            let expected =
                case["spans"].as_array().unwrap().iter().filter(|s| s[0] != s[1]).cloned().collect::<Value>();
            let found = characters(&found.text, &found.generation);
            if found == expected { Ok(()) } else { Err(format!("generation {found}, expected {expected}")) }
        }
        (Some(_), Err(error)) => Err(format!("fails: {error}")),
        // What Python calls an error may be nothing to complain of here; what a template itself refuses is refused.
        (None, Err(error)) if case["error"]["raised"] == true => {
            let message = case["error"]["message"].as_str().unwrap();
            if error.to_string().contains(message) { Ok(()) } else { Err(format!("{error}, expected {message}")) }
        }
        (None, Ok(_)) if case["error"]["raised"] == true => Err(format!("renders, expected {}", case["error"])),
        (None, _) => Ok(()),
    }
}

#[test]
fn conversations_render_as_transformers_renders_them() {
    let (folder, seed) = (tempfile::tempdir().unwrap(), fresh_seed());
    let matching = |pattern: &str| -> Vec<PathBuf> {
        glob::glob(root().join(pattern).to_str().unwrap()).unwrap().flatten().collect()
    };
    let mut templates = matching("models/formats/tests/templates/*.jinja");
    assert!(templates.len() >= 5);
    templates.extend(matching(".venv/lib/python3*/site-packages/trl/chat_templates/*.jinja"));
    if let Some(model) = smollm2() {
        let own = folder.path().join("smollm2.jinja");
        std::fs::write(&own, tokenizer::load(&model).unwrap().chat_template.unwrap()).unwrap();
        templates.push(own);
    }
    let (program, out) = (root().join("models/formats/tests/templates/render.py"), folder.path().join("cases.json"));
    let run = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')";
    let seed_text = PathBuf::from((seed % 1_000_000_007).to_string());
    let mut arguments = vec![program.as_path(), &seed_text, &out];
    arguments.extend(templates.iter().map(PathBuf::as_path));
    if python(run, &arguments).is_none() {
        return;
    }
    let cases: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&out).unwrap()).unwrap();
    let (mut faults, mut rendered): (BTreeMap<String, Vec<String>>, _) = (BTreeMap::new(), 0);
    for case in &cases {
        let path = case["template"].as_str().unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        rendered += usize::from(case["text"].is_string());
        if let Err(fault) = check(case, &text) {
            faults.entry(path.rsplit('/').next().unwrap().into()).or_default().push(fault);
        }
    }
    println!("{} templates, {} conversations, {rendered} of them rendered", templates.len(), cases.len());
    let lines: Vec<String> = faults.iter().map(|(name, all)| format!("{name} ({}): {}", all.len(), all[0])).collect();
    assert!(faults.is_empty(), "seed {seed}:\n{}", lines.join("\n"));
    assert!(rendered * 2 > cases.len(), "most conversations must be fit for most templates: {rendered}");
}
