//! A reward model in a run: its values are those of transformers' sequence classification for the same prompt and answer,
//! in the policy's tokens or in its own.

use crate::job::{Job, finish};
use crate::rlhf::{command, job, run};
use crate::support;

/// A chat template for the policy, which is not the reward model's.
const TEMPLATE: &str = "{% for m in messages %}{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant> {% endif %}";

fn sets(job: &Job, case: &str) -> Vec<String> {
    let folder = job.path("models").join(case);
    vec![
        "reward.parts=[{ type = \"model\" }]".into(),
        format!("roles.reward.hf_assets_path={:?}", folder.display().to_string()),
        "training.steps=2".into(),
    ]
}

#[test]
fn rewards_are_what_transformers_says_of_prompt_and_answer() {
    let Some(python) = support::python() else { return };
    let (job, seed) = (job(), support::fresh_seed());
    let models = job.path("models").display().to_string();
    support::run_script(&python, "reward_model.py", &["make", &models, &seed.to_string()]);
    std::fs::write(job.path("chat.jinja"), TEMPLATE).unwrap();
    let chat = format!("data.chat_template={:?}", job.path("chat.jinja").display().to_string());
    // On the ranks of the policy, and on a rank of its own.
    let apart = "placement.pools=[{ name = \"a\", ranks = 1 }, { name = \"b\", ranks = 1 }]";
    let cases: [(&str, &[&str]); 2] =
        [("same", &[]), ("other", &["prompts.chat=true", &chat, apart, "placement.roles={ reward = \"b\" }"])];
    for (case, more) in cases {
        let sets = sets(&job, case);
        let sets: Vec<&str> = sets.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let steps = run(&job, case, 2, &sets);
        assert!(steps[&2]["reward/model/mean"].is_finite());
        let folder = job.path(case).display().to_string();
        support::run_script(&python, "reward_model.py", &["check", &models, &folder, case]);
    }
    // What users get wrong.
    let refused = |name: &str, sets: &[&str], words: &[&str]| {
        let (code, text) = finish(&mut command(&job, name, 2, sets));
        assert_eq!(code, Some(2), "{text}");
        words.iter().for_each(|word| assert!(text.contains(word), "no {word:?} in\n{text}"));
    };
    let part = "reward.parts=[{ type = \"model\" }]";
    refused("no-model", &[part], &["roles.reward.hf_assets_path", "sequence classifier"]);
    // Conversations, and a reward model of other tokens without a template to write them with.
    let other = job.path("models/other");
    for file in ["chat_template.jinja", "tokenizer_config.json"] {
        _ = std::fs::remove_file(other.join(file));
    }
    let with = sets(&job, "other");
    let with: Vec<&str> = with.iter().map(String::as_str).chain(["prompts.chat=true", &chat]).collect();
    let words = ["chat template", &other.display().to_string(), "/tokenizer.json, so", "prompts.chat"];
    refused("no-template", &with, &words);
    // A model of language has no value to give.
    let none = job.path("policy-as-reward");
    run(&job, "language", 1, &["training.steps=1", "checkpoint.last_save_in_hf=true"]);
    std::fs::rename(job.path("language/export"), &none).unwrap();
    let path = format!("roles.reward.hf_assets_path={:?}", none.display().to_string());
    refused("no-head", &[part, &path], &["role reward", "score.weight"]);
}
