//! What the tests of rewards share.

use super::Sample;
use crate::prompts::{Prompt, PromptInput};
use serde_json::{Value, json};
use std::sync::Arc;

/// A sample of one question.
pub(super) fn sample(completion: &str, ground_truth: Value) -> Sample {
    let prompt = Prompt {
        index: 7,
        input: PromptInput::Text("What is it?".into()),
        ground_truth,
        data_source: "tests".into(),
        extra_info: json!({"split": "train"}),
    };
    Sample { prompt: Arc::new(prompt), completion: completion.into(), completion_tokens: 5 }
}

/// Samples whose completions are given.
pub(super) fn samples(completions: &[&str]) -> Vec<Sample> {
    completions.iter().map(|completion| sample(completion, json!("1"))).collect()
}
